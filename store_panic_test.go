package main

// Panics in a read or a write. One on a broken page stops all writes, since they could break more
// pages; any other is a mistake in this program and fails its own request alone.

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"

	"go.etcd.io/bbolt"
)

// openLogged opens a store until the test ends, and returns its log.
func openLogged(t testing.TB, path string, now func() time.Time) (*Store, *lockedBuffer) {
	t.Helper()
	log := &lockedBuffer{}
	s, err := Open(path, now, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s, log
}

// mistakes are the panics of a function that is wrong, by name.
var mistakes = map[string]func(*bbolt.Tx){
	"an index beyond a value": func(tx *bbolt.Tx) {
		value := tx.Bucket(bucketMeta).Get([]byte(formatKey))
		_ = value[len(value)]
	},
	"too few bytes for a number": func(tx *bbolt.Tx) { binary.BigEndian.Uint64(tx.Bucket(bucketMeta).Get([]byte(formatKey))[:7]) },
	"a nil map":                  func(*bbolt.Tx) { maps.Copy(map[int]int(nil), map[int]int{0: 0}) },
	"a nil pointer":              func(*bbolt.Tx) { var w *write; w.err = nil },
	"a text":                     func(*bbolt.Tx) { panic("text") },
	"an error":                   func(*bbolt.Tx) { panic(errThere) },
	"a function that bbolt calls": func(tx *bbolt.Tx) {
		_ = tx.Bucket(bucketMeta).ForEach(func(k, _ []byte) error { panic(string(k)) })
	},
	"a function that Go's library calls": func(*bbolt.Tx) { _ = strings.Map(func(rune) rune { panic("in Map") }, "x") },
}

func TestWriteThatPanicsFailsAlone(t *testing.T) {
	for name, mistake := range mistakes {
		t.Run(name, func(t *testing.T) {
			path := newPath(t)
			s, log := openLogged(t, path, time.Now)
			release := hold(t, s)
			put := func(n int) func() error {
				return func() error { _, err := s.Put(key(n), []byte("{}"), always); return err }
			}
			writes := []func() error{
				put(1),
				func() error {
					return s.update(0, func(tx *bbolt.Tx) error {
						if err := putSecond(tx); err != nil {
							return err
						}
						mistake(tx)
						return nil
					})
				},
				put(3),
				func() error {
					_, err := s.Put(key(4), []byte("{}"), func(Version, bool) error { return errThere })
					return err
				},
			}
			errs := make([]error, len(writes))
			var wg sync.WaitGroup
			for i, do := range writes { // in one batch, and in this order
				wg.Go(func() { errs[i] = do() })
				waitFor(t, "the write waits", func() bool { return s.Waiting() == i+1 })
			}
			before := transaction(t, s)
			release()
			wg.Wait()
			if errs[0] != nil || errs[2] != nil || !errors.Is(errs[3], errThere) {
				t.Errorf("the other writes: %v", errs)
			}
			if !errors.Is(errs[1], errPanic) || errors.Is(errs[1], ErrDamaged) || errors.Is(errs[1], ErrUnavailable) {
				t.Errorf("the write that panicked: %v", errs[1])
			}
			if p := problemOf(errs[1]); p.Status != 500 {
				t.Errorf("its response is %+v", p)
			}
			if n := transaction(t, s) - before; n != 2 {
				t.Errorf("%d transactions, want one for the write that was held and one for the others", n)
			}
			wantDocument(t, s, key(1), "{}")
			wantDocument(t, s, key(3), "{}")
			if _, _, err := s.Get(nil, key(2), always); !errors.Is(err, ErrNotFound) {
				t.Errorf("what was put before the panic: %v, want %v", err, ErrNotFound)
			}
			if err := s.Ready(); err != nil {
				t.Errorf("afterwards: %v", err)
			}
			said := log.String()
			if strings.Count(said, "\n") != 1 || !strings.Contains(said, "a mistake in this program") || !strings.Contains(said, "store_panic_test.go") {
				t.Errorf("the log is %q, want one line with the stack", said)
			}
		})
	}
}

// putSecond puts a contract, as Put does.
func putSecond(tx *bbolt.Tx) error {
	return put(tx, bucketContracts, key(2).bytes(), []byte("{}"))
}

func TestReadThatPanicsFailsAlone(t *testing.T) {
	for name, mistake := range mistakes {
		t.Run(name, func(t *testing.T) {
			s, log := openLogged(t, newPath(t), time.Now)
			if _, err := s.Put(key(1), []byte("{}"), always); err != nil {
				t.Fatal(err)
			}
			err := s.view(func(r *reader) error { mistake(r.Tx); return nil })
			if !errors.Is(err, errPanic) || errors.Is(err, ErrDamaged) {
				t.Errorf("got %v", err)
			}
			wantDocument(t, s, key(1), "{}")
			if _, err := s.Put(key(2), []byte("{}"), always); err != nil {
				t.Errorf("a write afterwards: %v", err)
			}
			if said := log.String(); strings.Count(said, "\n") != 1 || !strings.Contains(said, "a mistake in this program") {
				t.Errorf("the log is %q, want one line", said)
			}
		})
	}
}

// The removal of expired values is part of each commit. If it panics, writes go on without it.
func TestWritesGoOnWithoutAPurgeThatPanics(t *testing.T) {
	var wrong bool
	s, log := openLogged(t, newPath(t), func() time.Time {
		if wrong {
			panic("the clock")
		}
		return time.Now()
	})
	wrong = true
	for i := range 3 {
		if _, err := s.Put(key(i), []byte("{}"), always); err != nil { // which asks for the time in the purge only
			t.Errorf("write %d: %v", i, err)
		}
	}
	wrong = false
	if said := log.String(); strings.Count(said, "\n") != 1 || !strings.Contains(said, "the clock") {
		t.Errorf("the log is %q, want one line", said)
	}
}

// A page that is broken is told from a mistake, wherever the panic is.
func TestPanicOnABrokenPageStopsWrites(t *testing.T) {
	for _, tt := range []struct {
		name   string
		broken []byte // the contracts' root page
	}{
		{"bbolt panics on a page of no kind", make([]byte, pageHeaderSize)},
		{"memory beyond the end of the file", nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := newPath(t)
			withSomeContracts(t, path)
			s, log := openLogged(t, path, time.Now)
			var root int
			if err := s.view(func(r *reader) error { root = int(r.Bucket(bucketContracts).Root()); return nil }); err != nil {
				t.Fatal(err)
			}
			if tt.broken == nil {
				if err := s.file.Truncate(int64(root * pageSize)); err != nil {
					t.Fatal(err)
				}
			} else {
				servicetest.BreakFile(t, path, root*pageSize, tt.broken)
			}
			if _, err := s.Put(key(1), []byte("{}"), always); !errors.Is(err, ErrDamaged) {
				t.Errorf("got %v", err)
			}
			if _, err := s.Put(key(2), []byte("{}"), always); !errors.Is(err, ErrDamaged) || !errors.Is(err, ErrUnavailable) {
				t.Errorf("then %v", err)
			}
			if said := log.String(); strings.Count(said, "\n") != 1 || !strings.Contains(said, "run check or restore a backup") {
				t.Errorf("the log is %q, want one line", said)
			}
		})
	}
}
