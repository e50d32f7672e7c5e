package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/bbolt"
)

// When a file grows, bbolt maps it again. The mapping waits for every read transaction to end,
// and new ones wait for the mapping. So the end of a read transaction must not wait for the
// start of another.
func TestReadersGoOnWhileTheFileIsMappedAnew(t *testing.T) {
	slow(t)
	path := filepath.Join(t.TempDir(), "test.db")
	s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	// The map is small, so that the file often outgrows it.
	s.endReaders()
	if err := s.db.Close(); err != nil {
		t.Fatal(err)
	}
	if s.db, err = bbolt.Open(path, 0o600, nil); err != nil {
		t.Fatal(err)
	}
	s.keepReaders()
	k := Key{Owner{demoOrg, demoUser}, demoContract}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			var buf []byte
			for ctx.Err() == nil {
				if buf, _, err := s.Get(buf[:0], k, always); err != nil && !errors.Is(err, ErrNotFound) {
					t.Errorf("Get: %v, %.100s", err, buf)
					return
				}
			}
		})
	}
	doc := []byte(strings.Repeat("x", 100<<10))
	for i := range 200 { // 20 MB: from 32 KiB it doubles ten times
		if _, err := s.Put(key(i), doc, always); err != nil {
			t.Errorf("Put: %v", err)
			break
		}
	}
	cancel()
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	checkFileSound(t, path)
}

// hold starts a commit that lasts until release is called. Release waits for its write.
func hold(t testing.TB, s *Store) (release func()) {
	t.Helper()
	held, let, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := s.Put(key(0xffff), []byte("held"), func(Version, bool) error {
			close(held)
			<-let
			return nil
		})
		done <- err
	}()
	<-held
	return func() {
		close(let)
		if err := <-done; err != nil {
			t.Errorf("the write that held the committer: %v", err)
		}
	}
}

func TestWritesThatWaitShareACommit(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	before := transaction(t, s)
	release := hold(t, s)
	const writers = 100
	errs := make([]error, writers)
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			check := always
			if i%2 == 1 {
				check = absent // of one contract, which all of these want to make
			}
			_, errs[i] = s.Put(key(i*((i+1)%2)+(i%2)), fmt.Appendf(nil, "%d", i), check)
		})
	}
	waitFor(t, "all writes wait", func() bool { return s.Waiting() == writers })
	release()
	wg.Wait()
	if n := transaction(t, s) - before; n != 2 {
		t.Errorf("%d transactions, want one for the write that was held and one for all that waited", n)
	}
	made := -1
	for i, err := range errs {
		switch {
		case i%2 == 0 && err != nil:
			t.Errorf("write %d: %v", i, err)
		case i%2 == 1 && err == nil && made >= 0:
			t.Errorf("writes %d and %d both made the contract", made, i)
		case i%2 == 1 && err == nil:
			made = i
		case i%2 == 1 && !errors.Is(err, errThere):
			t.Errorf("write %d: %v", i, err)
		}
	}
	if made < 0 {
		t.Fatal("no write made the contract")
	}
	wantDocument(t, s, key(1), fmt.Sprint(made))
	for i := 2; i < writers; i += 2 {
		wantDocument(t, s, key(i), fmt.Sprint(i))
	}
}

func TestRefusedWritesCommitNothing(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	before := transaction(t, s)
	no := errors.New("no")
	if _, err := s.Put(key(1), []byte("a"), func(Version, bool) error { return no }); !errors.Is(err, no) {
		t.Errorf("got %v", err)
	}
	if after := transaction(t, s); after != before {
		t.Errorf("transaction %d, then %d", before, after)
	}
}

func TestManyWritersAreAllThereAfterARestart(t *testing.T) {
	path := newPath(t)
	const writers, each = 64, 20
	t.Run("write", func(t *testing.T) {
		s, _ := openStore(t, path)
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for i := range each {
					if _, err := s.Put(key(w*each+i), fmt.Appendf(nil, "%d of %d", i, w), absent); err != nil {
						t.Errorf("write %d of %d: %v", i, w, err)
					}
				}
			})
		}
		wg.Wait()
	})
	s, _ := openStore(t, path)
	for w := range writers {
		for i := range each {
			wantDocument(t, s, key(w*each+i), fmt.Sprintf("%d of %d", i, w))
		}
	}
}

// A commit that hangs holds up nobody for longer than the limits, which pass at once in the
// time of the test.
func TestCommitThatHangsHoldsUpNobody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _ := openStore(t, newPath(t))
		if _, err := s.Put(key(1), []byte("before"), always); err != nil {
			t.Fatal(err)
		}
		let, held := make(chan struct{}), make(chan error)
		began := time.Now()
		go func() {
			_, err := s.Put(key(2), []byte("held"), func(Version, bool) error { <-let; return nil })
			if d := time.Since(began); d != queueTimeout+commitTimeout {
				err = fmt.Errorf("after %s: %w", d, err)
			}
			held <- err
		}()
		synctest.Wait()
		for range 3 {
			asked := time.Now()
			if err := s.Ready(); !errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrBusy) || time.Since(asked) > readyTimeout {
				t.Errorf("Ready after %s: %v", time.Since(asked), err)
			}
			if n := s.Waiting(); n != 0 {
				t.Errorf("Ready left %d writes in the queue", n)
			}
			time.Sleep(readyInterval)
		}
		asked := time.Now()
		if err := s.Ready(); !errors.Is(err, ErrUnavailable) || time.Since(asked) != 0 {
			t.Errorf("Ready of a commit that is known to hang, after %s: %v", time.Since(asked), err)
		}
		asked = time.Now()
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				_, err := s.Put(key(0x8000+i), []byte("waits"), always)
				if d := time.Since(asked); !errors.Is(err, ErrBusy) || d != queueTimeout {
					t.Errorf("a write that waited: after %s: %v", d, err)
				}
			})
		}
		wg.Wait()
		wantDocument(t, s, key(1), "before")
		if err := <-held; !errors.Is(err, ErrUnknown) {
			t.Errorf("the write whose commit hangs: %v", err)
		}
		close(let)
		if _, err := s.Put(key(3), []byte("after"), always); err != nil {
			t.Errorf("a write when the commit has ended: %v", err)
		}
		wantDocument(t, s, key(2), "held")
		if _, _, err := s.Get(nil, key(0x8000), always); !errors.Is(err, ErrNotFound) {
			t.Errorf("refused, and there: %v", err)
		}
		if err := s.Ready(); err != nil {
			t.Errorf("Ready when the commit has ended: %v", err)
		}
	})
}

func TestCloseDoesNotWaitForACommitThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log := &lockedBuffer{}
		s, err := Open(newPath(t), time.Now, slog.New(slog.NewTextHandler(log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		let := make(chan struct{})
		defer close(let)
		ended := make(chan error, 2)
		for _, do := range []func() error{
			func() error {
				_, err := s.Put(key(1), []byte("held"), func(Version, bool) error { <-let; return nil })
				return err
			},
			func() error { _, err := s.StartImport(); return err }, // which waits in the queue without a limit
		} {
			go func() { ended <- do() }()
			synctest.Wait()
		}
		s.MarkUsed("a client, whose last use Close stores")
		began := time.Now()
		if err := s.Close(); err != nil || time.Since(began) > 10*time.Second {
			t.Errorf("Close after %s: %v", time.Since(began), err)
		}
		for range 2 {
			if err := <-ended; !errors.Is(err, ErrClosed) {
				t.Errorf("a write that had not ended: %v", err)
			}
		}
		if !strings.Contains(log.String(), "the disk does not answer, so the last commit was not waited for") {
			t.Errorf("the log does not say so\n%s", log)
		}
	})
}

// What a commit takes stays in memory while the disk hangs, also after its writes were broken off.
func TestCommitTakesBoundedBytes(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	for _, tt := range []struct {
		writes, size int
		want         uint64 // commits
	}{
		{1025, 1, 2},
		{1024, 1, 1},
		{3, commitBytes / 2, 3}, // the stored value has a checksum, too
		{2, commitBytes + 1, 2},
		{17, 4<<20 - 1000, 2},
	} {
		before := transaction(t, s)
		release := hold(t, s)
		doc := bytes.Repeat([]byte("x"), tt.size)
		var wg sync.WaitGroup
		for i := range tt.writes {
			wg.Go(func() {
				if _, err := s.Put(key(i), doc, always); err != nil {
					t.Errorf("%d writes of %d bytes: %v", tt.writes, tt.size, err)
				}
			})
		}
		waitFor(t, "all writes wait", func() bool { return s.Waiting() == tt.writes })
		release()
		wg.Wait()
		if n := transaction(t, s) - before - 1; n != tt.want {
			t.Errorf("%d writes of %d bytes took %d commits, want %d", tt.writes, tt.size, n, tt.want)
		}
	}
}

func TestReadyCommitsOnceForManyWhoAsk(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	before := transaction(t, s)
	started := time.Now()
	for range 100 {
		if err := s.Ready(); err != nil {
			t.Error(err)
		}
	}
	n := transaction(t, s) - before
	if most := 1 + uint64(time.Since(started)/readyInterval); n < 1 || n > most {
		t.Errorf("%d transactions, want 1 to %d", n, most)
	}
}

func TestWritesOfACommitSeeEachOtherInOrder(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	one, two := []byte(`{"n":1}`), []byte(`{"n":2}`)
	is := func(want []byte) Precondition {
		return func(current Version, exists bool) error {
			if !exists || current != versionOf(want) {
				return fmt.Errorf("found version %x, exists %v, want that of %s", current, exists, want)
			}
			return nil
		}
	}
	put := func(doc []byte, check Precondition) func() error {
		return func() error { _, err := s.Put(key(1), doc, check); return err }
	}
	remove := func(check Precondition) func() error {
		return func() error { return s.Delete(key(1), check) }
	}
	steps := []struct {
		name string
		do   func() error
		want error
	}{
		{"make", put(one, absent), nil},
		{"make what is there", put(two, absent), errThere},
		{"replace what was made, not what was refused", put(two, is(one)), nil},
		{"delete what replaced it", remove(is(two)), nil},
		{"make it again, now that it is gone", put(one, absent), nil},
		{"replace that", put(two, is(one)), nil},
	}
	before := transaction(t, s)
	release := hold(t, s)
	errs := make([]error, len(steps))
	var wg sync.WaitGroup
	for i, step := range steps {
		wg.Go(func() { errs[i] = step.do() })
		waitFor(t, step.name+" waits", func() bool { return s.Waiting() == i+1 }) // so the next comes after it
	}
	release()
	wg.Wait()
	for i, step := range steps {
		if !errors.Is(errs[i], step.want) {
			t.Errorf("%s: %v, want %v", step.name, errs[i], step.want)
		}
	}
	if n := transaction(t, s) - before; n != 2 {
		t.Errorf("%d transactions, want one for the write that was held and one for all that waited", n)
	}
	wantDocument(t, s, key(1), string(two))
}
