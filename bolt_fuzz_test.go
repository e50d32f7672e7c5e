package main

// The fuzz target of whole files: those that somebody made, or that a disk broke.

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// fuzzPageSize is the size of the pages of fuzzFile, in bytes. It is the smallest, so that a small
// file has trees of several levels.
const fuzzPageSize = minPageSize

// fuzzFile returns a small sound database that has whatever a file can have: branch pages, pages
// that overflow, inline buckets, free pages, tokens and records that expire.
func fuzzFile(t testing.TB) []byte {
	t.Helper()
	path := newPath(t)
	s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		c := Client{ID: fmt.Sprintf("client-%d", i), Org: demoOrg, Scopes: Scopes{true, true}, Created: time.Now()}
		token := Token{Client: c.ID, ClientCreated: c.Created, Org: demoOrg, Scopes: Scopes{true, true}, Expires: time.Now().Add(time.Hour)}
		once := &Idempotency{Client: c.ID, Key: fmt.Sprint("once ", i), Body: hashOf("body")}
		_, err := s.Create(key(1000+i), []byte(someDocument(1000+i)), once)
		if err := errors.Join(err, s.AddClient(c), s.AddToken(hashOf(fmt.Sprint(i)), token)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	small := newPath(t)
	from, err1 := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true})
	to, err2 := bbolt.Open(small, 0o600, &bbolt.Options{PageSize: fuzzPageSize})
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(bbolt.Compact(to, from, 0), from.Close(), to.Close()); err != nil {
		t.Fatal(err)
	}
	if s, err = Open(small, time.Now, slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	for i := range 40 {
		doc := someDocument(i)
		if i%20 == 0 {
			doc = strings.Replace(doc, `"supplier":"`, `"supplier":"`+strings.Repeat("long ", 300), 1)
		}
		if _, err := s.Put(key(i), []byte(doc), always); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 10 {
		if err := s.Delete(key(i), always); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	metas, err := readMetas(open(t, small))
	if err != nil {
		t.Fatal(err)
	}
	return []byte(readFile(t, small))[:currentMeta(metas).bytes()]
}

// fileEdits are the changes to a file that the bytes of a fuzzer stand for, one after another.
type fileEdits struct {
	file  []byte
	bytes []byte // the rest
	hole  int64  // the number of bytes of a hole at the end
}

// next returns the next n bytes as a number; missing ones are 0.
func (e *fileEdits) next(n int) (v uint64) {
	for range n {
		v <<= 8
		if len(e.bytes) > 0 {
			v |= uint64(e.bytes[0])
			e.bytes = e.bytes[1:]
		}
	}
	return v
}

// page returns the offset of some page.
func (e *fileEdits) page() int { return int(e.next(1)) * fuzzPageSize % max(len(e.file), 1) }

// number returns a number that may harm.
func (e *fileEdits) number() uint64 {
	pages := uint64(len(e.file) / fuzzPageSize)
	switch e.next(1) % 10 {
	case 0:
		return e.next(8)
	case 1:
		return 1 << (e.next(1) % 64)
	case 2:
		return 1<<(e.next(1)%64) - 1
	case 3:
		return pages - e.next(1)%4
	case 4:
		return math.MaxUint64
	case 5:
		return math.MaxUint64 / fuzzPageSize
	case 6:
		return e.next(2)
	default:
		return e.next(1)
	}
}

// write writes size bytes of a number at an offset, if the file has it.
func (e *fileEdits) write(at, size int, n uint64) {
	if at >= 0 && at+size <= len(e.file) {
		copy(e.file[at:at+size], binary.LittleEndian.AppendUint64(nil, n))
	}
}

// edit makes all changes, and then the checksums of the meta pages right, since no change to a meta
// page would matter else.
func (e *fileEdits) edit() {
	resealed := true
	for len(e.bytes) > 0 {
		switch e.next(1) % 12 {
		case 0, 1: // the header of a page
			field := [][2]int{{0, 8}, {8, 2}, {10, 2}, {12, 4}}[e.next(1)%4]
			e.write(e.page()+field[0], field[1], e.number())
		case 2, 3: // an element of a page
			at := e.page() + pageHeaderSize + int(e.next(1)%64)*elementSize
			field := [][2]int{{0, 4}, {4, 4}, {8, 4}, {12, 4}, {8, 8}}[e.next(1)%5]
			e.write(at+field[0], field[1], e.number())
		case 4, 5: // a meta page, or both
			field := [][2]int{{metaPageSize, 4}, {metaRoot, 8}, {metaRoot + 8, 8}, {metaFreelist, 8}, {metaPages, 8}, {metaTxid, 8}}[e.next(1)%6]
			which, n := e.next(1)%3, e.number()
			if which != 0 {
				e.write(pageHeaderSize+field[0], field[1], n)
			}
			if which != 1 {
				e.write(fuzzPageSize+pageHeaderSize+field[0], field[1], n)
			}
		case 6: // bytes anywhere
			at := int(e.next(3)) % max(len(e.file), 1)
			for range e.next(1) % 16 {
				e.write(at, 1, e.next(1))
				at++
			}
		case 7: // a page in the place of another, perhaps with the id of that
			from, to := e.page(), e.page()
			if max(from, to)+fuzzPageSize <= len(e.file) {
				copy(e.file[to:to+fuzzPageSize], bytes.Clone(e.file[from:from+fuzzPageSize]))
				if e.next(1)%2 == 0 {
					e.write(to, 8, uint64(to/fuzzPageSize))
				}
			}
		case 8: // no end
			e.file = e.file[:int(e.next(2))%(len(e.file)+1)]
		case 9: // pages after the end, or a hole, which both meta pages count or do not
			if n := e.next(1); n < 128 {
				e.file = append(e.file, make([]byte, n%16*fuzzPageSize)...)
			} else {
				e.hole = int64(e.next(3)) * fuzzPageSize
			}
			if pages := (uint64(len(e.file)) + uint64(e.hole)) / fuzzPageSize; e.next(1)%4 > 0 {
				e.write(pageHeaderSize+metaPages, 8, pages)
				e.write(fuzzPageSize+pageHeaderSize+metaPages, 8, pages)
			}
		case 10: // the list of free pages
			at := e.page()
			n := e.next(1) % 32
			e.write(at+8, 2, freelistPageFlag)
			e.write(at+10, 2, n)
			for i := range n {
				e.write(at+pageHeaderSize+int(i)*8, 8, e.number())
			}
		case 11: // wrong checksums
			resealed = !resealed
		}
	}
	if resealed && len(e.file) >= 2*fuzzPageSize {
		reseal(e.file, 0)
		reseal(e.file, fuzzPageSize)
	}
}

// FuzzChecker checks that the checker ends in order for any file, soon and with little memory, and
// that a file without faults works: bbolt finds no fault either, and the store reads it, writes to
// it and removes the values that have expired.
func FuzzChecker(f *testing.F) {
	file := fuzzFile(f)
	f.Add([]byte{})
	for page := range byte(len(file) / fuzzPageSize) {
		field := page % 4
		f.Add([][]byte{
			{0, field, page, 4},                // a field of its header: all bits
			{0, field, page, 9, 1},             // 1
			{0, field, page, 3, 1},             // the last page
			{2, page, page % 2, field, 1, 31},  // an element: 2³¹
			{2, page, page % 2, field, 9, 0},   // 0
			{7, page, page + 1, 0, 7, page, 3}, // copies
		}[page%6])
	}
	for field := range byte(6) {
		for which := range byte(3) {
			f.Add([]byte{4, field, which, 0, 0, 0x20, 0, 0, 0, 0, 0, 0}) // 2⁵³
			f.Add([]byte{4, field, which, 4})
			f.Add([]byte{4, field, which, 9, 0})
			f.Add([]byte{4, field, which, 1, 11}) // another page size
		}
	}
	f.Fuzz(func(t *testing.T, edits []byte) {
		if len(edits) > 1<<10 {
			t.Skip("more edits than a fault needs")
		}
		e := fileEdits{file: bytes.Clone(file), bytes: edits}
		e.edit()
		path := writeFile(t, e.file)
		if e.hole > 0 {
			if err := os.Truncate(path, int64(len(e.file))+e.hole); err != nil {
				t.Fatal(err)
			}
		}
		var faults []string
		var err error
		began := time.Now()
		took := allocated(func() { faults, err = faultsOfFile(t.Context(), path) })
		if most := uint64(16<<20 + (len(e.file)+int(e.hole))/fuzzPageSize/8); took > most || time.Since(began) > time.Minute {
			t.Errorf("the check took %v and %d bytes of memory, want %d at most", time.Since(began), took, most)
		}
		if err != nil || len(faults) > 0 {
			return
		}
		if metas, err := readMetas(open(t, path)); err != nil || currentMeta(metas).txid > lastTransaction-1000 {
			t.Skip("the transactions after this one are a fault")
		}
		wantWorking(t, path)
	})
}

// faultsOfFile returns the faults that the checker finds in the file at path.
func faultsOfFile(ctx context.Context, path string) (faults []string, err error) {
	c := Checker{Report: func(fault string) { faults = append(faults, fault) }, Contract: func(Key, []byte) {}, Progress: func(int64) {}}
	_, err = c.Check(ctx, path)
	return faults, err
}

// wantWorking uses a file in which the checker found no fault as the service does, and checks it
// again.
func wantWorking(t testing.TB, path string) {
	t.Helper()
	checkFileSound(t, path)
	log := &lockedBuffer{}
	c := &clock{}
	s, err := Open(path, c.now, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatalf("it has no fault, and is not opened: %v", err)
	}
	want := func(what string, err error, allowed ...error) {
		t.Helper()
		for _, a := range allowed {
			if errors.Is(err, a) {
				return
			}
		}
		if err != nil {
			t.Errorf("it has no fault, and yet: %s: %v", what, err)
		}
	}
	_, _, err = s.Scan(Selection{}, Key{}, func(Key, []byte) {})
	want("scan", err)
	clients, err := s.Clients()
	want("clients", err)
	for _, c := range clients {
		_, err := s.Client(c.ID)
		want("client", err)
		_, err = s.RotateClient(c.ID, hashOf("secret"), time.Now(), nil)
		want("rotate", err)
	}
	_, err = s.Token(hashOf("0"))
	want("token", err, ErrNotFound, ErrExpired)
	for i := range 60 { // each page of the contracts
		_, _, err := s.Get(nil, key(i), always)
		want("get", err, ErrNotFound)
		_, err = s.Put(key(i), []byte(someDocument(i)), always)
		want("put", err)
	}
	for i := range 3 {
		once := &Idempotency{Client: fmt.Sprintf("client-%d", i), Key: fmt.Sprint("once ", i), Body: hashOf("body")}
		_, err := s.Create(key(2000+i), []byte(someDocument(2000+i)), once)
		want("create", err, ErrKeyReused)
	}
	c.move(100 * 24 * time.Hour) // all has expired
	for i := range 60 {
		want("delete", s.Delete(key(i), always))
	}
	want("add a token", s.AddToken(hashOf("new"), Token{Client: "client-0", Org: demoOrg, Scopes: Scopes{true, true}, Expires: c.now().Add(time.Hour)}))
	snapshot, _, err := s.Snapshot(t.Context())
	want("snapshot", err)
	if err == nil {
		want("snapshot", snapshot.Close())
	}
	compacted, err := createAtomicDB(filepath.Join(t.TempDir(), "compact.db"))
	if err != nil {
		t.Fatal(err)
	}
	want("compact", s.compactTo(compacted))
	compacted.discard()
	want("ready", s.Ready())
	want("close", s.Close())
	if strings.Contains(log.String(), "level=ERROR") {
		t.Errorf("it has no fault, and the log says\n%s", log)
	}
	if faults, err := faultsOfFile(t.Context(), path); err != nil || len(faults) > 0 {
		t.Errorf("after it was used: %q, %v", faults, err)
	}
}
