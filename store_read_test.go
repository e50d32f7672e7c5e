package main

// Reads beside a commit that fails, hangs or makes the file grow.

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"
)

// breakHandle makes the next commit fail: bbolt's handle of the file is closed.
func breakHandle(t testing.TB, s *Store) {
	t.Helper()
	s.reopenLock.RLock()
	defer s.reopenLock.RUnlock()
	if err := s.lent.Close(); err != nil {
		t.Fatal(err)
	}
}

// A process that waits for the lock would otherwise get it, and write to the file.
func TestFileStaysLockedWhileItIsReopened(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	other := open(t, s.path)
	wantLocked := func(when string) {
		t.Helper()
		if err := syscall.Flock(int(other.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); !errors.Is(err, syscall.EWOULDBLOCK) {
			t.Errorf("the lock %s: %v", when, err)
			_ = syscall.Flock(int(other.Fd()), syscall.LOCK_UN)
		}
	}
	metas, err := readMetas(s.file)
	if err != nil {
		t.Fatal(err)
	}
	wantLocked("while the file is open")
	s.reopenLock.Lock()
	s.endReaders()
	s.closeDB()
	wantLocked("while bbolt has closed it")
	if err := s.openDB(currentMeta(metas)); err != nil {
		t.Fatal(err)
	}
	s.keepReaders()
	s.reopenLock.Unlock()
	wantLocked("when bbolt has opened it again")
	if _, err := s.Put(key(1), []byte("after"), always); err != nil {
		t.Error(err)
	}
}

// If a reopening left the mapping of the file before, the address space would end soon.
func TestFailedCommitsOneAfterAnotherAreUndone(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	for i := range 50 {
		if _, err := s.Put(key(1), fmt.Appendf(nil, "%d", i), always); err != nil {
			t.Fatal(err)
		}
		breakHandle(t, s)
		if _, err := s.Put(key(1), []byte("not written"), always); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("a commit without a file: %v", err)
		}
		wantDocument(t, s, key(1), strconv.Itoa(i))
	}
}

// A long read ends when the file must be reopened, so that reads and writes go on.
func TestLongReadsGiveWayToAReopening(t *testing.T) {
	for name, long := range map[string]func(*Store) error{
		"a backup": func(s *Store) error {
			// As slow as it can be: the commit fails while the copy is at its first piece.
			_, _, err := s.Snapshot(slowly{t.Context(), func() { waitFor(t, "the reopening is wanted", s.reopenWanted.Load) }})
			return err
		},
		"the look after the start": func(s *Store) error {
			return s.view(func(*reader) error {
				waitFor(t, "the reopening is wanted", s.reopenWanted.Load)
				return s.giveWay()
			})
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := openStore(t, newPath(t))
			if _, err := s.Put(key(1), []byte("before"), always); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			began := openReads(s)
			go func() { ended <- long(s) }()
			waitFor(t, "it has begun", func() bool { return openReads(s) > began })
			breakHandle(t, s)
			if _, err := s.Put(key(1), []byte("not written"), always); !errors.Is(err, ErrUnavailable) {
				t.Fatalf("a commit without a file: %v", err)
			}
			wantDocument(t, s, key(1), "before")
			if _, err := s.Put(key(1), []byte("after"), always); err != nil {
				t.Fatal(err)
			}
			if err := <-ended; !errors.Is(err, errGaveWay) {
				t.Errorf("it ended with %v", err)
			}
		})
	}
}

// openReads returns the number of read transactions in use.
func openReads(s *Store) int64 {
	stats, _ := s.Stats()
	return stats.OpenReads
}

// slowly is a context that calls wait each time when it is asked whether it has ended.
type slowly struct {
	context.Context
	wait func()
}

func (s slowly) Err() error {
	s.wait()
	return s.Context.Err()
}

// The look after the start is made again after it gave way, and finds what is broken.
func TestLookThatGaveWayIsMadeAgain(t *testing.T) {
	path := newPath(t)
	withSomeContracts(t, path)
	s := openUnsound(t, path)
	var root int64
	if err := s.view(func(r *reader) error { root = int64(r.Bucket(bucketContracts).Root()); return nil }); err != nil {
		t.Fatal(err)
	}
	page := make([]byte, pageSize)
	if _, err := s.file.ReadAt(page, root*int64(pageSize)); err != nil {
		t.Fatal(err)
	}
	if binary.NativeEndian.Uint16(page[8:]) != branchPageFlag {
		t.Fatal("the root of the contracts is no branch page")
	}
	binary.NativeEndian.PutUint64(page[pageHeaderSize+8:], uint64(root)) // the first child
	if _, err := s.file.WriteAt(page, root*int64(pageSize)); err != nil {
		t.Fatal(err)
	}
	s.reopenWanted.Store(true)
	var first firstFault
	if err := s.lookAtBranches(&first); !errors.Is(err, errGaveWay) || first.err() != nil {
		t.Fatalf("the look did not give way: %v, %v", err, first.err())
	}
	looked := make(chan struct{})
	go func() { defer close(looked); s.checkBranches() }()
	select {
	case <-looked:
		t.Fatal("the look is over")
	case <-time.After(reopenInterval / 2):
	}
	s.reopenWanted.Store(false)
	<-looked
	if !s.isDead() {
		t.Error("the broken page was not found")
	}
}

// openUnsound opens a store whose file is not checked at the end of the test.
func openUnsound(t testing.TB, path string) *Store {
	t.Helper()
	s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// A write that makes the file larger than 1 GiB, which was the size of the mapping once, does not
// wait for a backup.
func TestFileOutgrowsNoMapping(t *testing.T) {
	if strconv.IntSize < 64 {
		t.Skip("the address space is too small")
	}
	path := newPath(t)
	withSomeContracts(t, path)
	enlarge(t, path, 1<<30-8<<20)
	s := openUnsound(t, path)
	if s.reserved < 1<<40 { // less than a process with one store reserves: other tests cannot close damaged ones
		t.Errorf("only %d bytes are reserved", s.reserved)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended, let := make(chan error, 1), make(chan struct{})
	began := openReads(s)
	go func() {
		_, _, err := s.Snapshot(slowly{ctx, func() { <-let }})
		ended <- err
	}()
	waitFor(t, "the backup has begun", func() bool { return openReads(s) > began })
	doc := bytes.Repeat([]byte("x"), 16<<20)
	if _, err := s.Put(key(1), doc, always); err != nil {
		t.Errorf("a write that makes the file grow while a backup copies: %v", err)
	}
	wantDocument(t, s, key(2), someDocument(2))
	if info, err := os.Stat(path); err != nil || info.Size() < 1<<30 {
		t.Errorf("the file has not grown: %v, %v", info, err)
	}
	cancel()
	close(let)
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("the backup: %v", err)
	}
}

// Stores that are opened at the same time may find the same address space free.
func TestFileIsMappedInLessAddressSpaceThanWasFree(t *testing.T) {
	if strconv.IntSize < 64 {
		t.Skip("the address space is too small")
	}
	s, _ := openStore(t, newPath(t))
	metas, err := readMetas(s.file)
	if err != nil {
		t.Fatal(err)
	}
	s.reopenLock.Lock()
	s.endReaders()
	s.closeDB()
	s.reserved = 1 << 47 // all of it
	err = s.openDB(currentMeta(metas))
	s.keepReaders()
	s.reopenLock.Unlock()
	if err != nil || s.reserved < 1 || s.reserved >= 1<<47 {
		t.Errorf("reserved are %d bytes, %v", s.reserved, err)
	}
	if _, err := s.Put(key(1), []byte("after"), always); err != nil {
		t.Error(err)
	}
	wantDocument(t, s, key(1), "after")
}

// enlarge makes a database file as large as if all its pages up to size were in use. They take no
// space, but nothing refers to them.
func enlarge(t testing.TB, path string, size int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	metas, err := readMetas(f)
	if err != nil {
		t.Fatal(err)
	}
	for i, m := range metas {
		b := m.page[pageHeaderSize : pageHeaderSize+metaSize]
		binary.NativeEndian.PutUint64(b[40:], uint64(size/m.pageSize))
		sum := fnv.New64a()
		sum.Write(b[:56])
		binary.NativeEndian.PutUint64(b[56:], sum.Sum64())
		if _, err := f.WriteAt(m.page, int64(i)*m.pageSize); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
}

// Where not enough address space can be reserved, a backup gives way to a commit for which the
// file must be mapped again.
func TestBackupGivesWayToALargerMapping(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	metas, err := readMetas(s.file)
	if err != nil {
		t.Fatal(err)
	}
	s.endReaders()
	s.closeDB()
	s.reserved = 0
	if err := s.openDB(currentMeta(metas)); err != nil {
		t.Fatal(err)
	}
	s.keepReaders()
	ended := make(chan error, 1)
	began := openReads(s)
	go func() {
		_, _, err := s.Snapshot(slowly{t.Context(), func() {
			waitFor(t, "a commit takes long", func() bool { return s.busyFor() > slowCommit })
		}})
		ended <- err
	}()
	waitFor(t, "the backup has begun", func() bool { return openReads(s) > began })
	if _, err := s.Put(key(1), bytes.Repeat([]byte("x"), 1<<20), always); err != nil {
		t.Errorf("a write that makes the file grow: %v", err)
	}
	if err := <-ended; !errors.Is(err, errGaveWay) {
		t.Errorf("the backup: %v", err)
	}
	f, _, err := s.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

// The address space may be limited. A database is served as long as its file fits.
func TestAddressSpaceThatIsLimited(t *testing.T) {
	slow(t)
	needTool(t, "prlimit")
	db := newPath(t)
	withSomeContracts(t, db)
	for _, limit := range []int64{200 << 40, 20 << 40, 100 << 30, 5 << 30} {
		t.Run(fmt.Sprintf("%d GiB", limit>>30), func(t *testing.T) {
			wrapper := []string{"prlimit", fmt.Sprintf("--as=%d", limit)}
			if got := run(t, wrapper, "client", "list", "--db", db); got.status != 0 {
				t.Errorf("%+v", got)
			}
		})
	}
	enlarge(t, db, 100<<30)
	got := run(t, []string{"prlimit", fmt.Sprintf("--as=%d", int64(5<<30))}, "client", "list", "--db", db)
	if want := "energy-contracts: database " + db + ": map the file into memory: cannot allocate memory; raise the limit of the address space (ulimit -v)\n"; got.status != 1 || got.stderr != want {
		t.Errorf("a file that does not fit: %+v, want %q", got, want)
	}
}
