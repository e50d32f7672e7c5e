package main

// Copies of the whole database: the snapshot that a backup sends, and compaction.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"

	"go.etcd.io/bbolt"
)

// compactTxBytes is what one transaction of a compaction writes, in bytes.
const compactTxBytes = 16 << 20

// Snapshot returns a copy of the database as one transaction left it, and its size in
// bytes: a file beside it that has no name any more. It is on local disk so that the
// transaction is over soon, however slowly the copy is read: an open one keeps a file
// that grows from being mapped anew, and so all writers waiting
// (https://github.com/etcd-io/bbolt/issues/850). It ends with ErrUnavailable when the
// disk fails meanwhile.
func (s *Store) Snapshot(ctx context.Context) (_ *os.File, size int64, err error) {
	f, err := os.CreateTemp(filepath.Dir(s.path), "."+filepath.Base(s.path)+".*")
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, 0, err
	}
	w := &snapshotWriter{ctx: ctx, s: s, f: f}
	err = s.view(func(r *reader) error {
		size, err = r.WriteTo(w)
		return err
	})
	if err != nil && w.err != nil {
		err = w.err // which bbolt does not always wrap
	}
	if err != nil {
		return nil, 0, fmt.Errorf("copy the database beside itself: %w", err)
	}
	metas, err := readMetas(f)
	if err != nil {
		return nil, 0, fmt.Errorf("the copy of the database: %w", err)
	}
	if err := checkFile(f, currentMeta(metas)); err != nil {
		return nil, 0, fmt.Errorf("the copy of the database: %w", err)
	}
	again, err := duplicate(f)
	if err != nil {
		return nil, 0, err
	}
	db, err := openReadOnly(again)
	if err != nil {
		return nil, 0, fmt.Errorf("the copy of the database: %w", err)
	}
	if err := db.Close(); err != nil {
		return nil, 0, err
	}
	_, err = f.Seek(0, io.SeekStart)
	return f, size, err
}

// snapshotWriter writes as long as somebody wants it, and nobody waits for its
// transaction to end.
type snapshotWriter struct {
	ctx context.Context
	s   *Store
	f   *os.File
	err error // of the Write that failed
}

func (w *snapshotWriter) Write(b []byte) (n int, err error) {
	switch {
	case w.ctx.Err() != nil:
		err = w.ctx.Err()
	case w.s.reopenWanted.Load():
		err = ErrUnavailable
	default:
		n, err = w.f.Write(b)
	}
	w.err = err
	return n, err
}

// Compact puts a copy without free pages in the place of the database, if verify finds
// nothing wrong with it, and returns the sizes of both in bytes. Nothing else is to be
// done with the store from then on than to close it.
func (s *Store) Compact(verify func(path string) error) (before, after int64, err error) {
	f, err := createAtomicDB(s.path)
	if err != nil {
		return 0, 0, err
	}
	defer f.discard()
	if err := s.compactTo(f.Name()); err != nil {
		return 0, 0, fmt.Errorf("write the database anew: %w", err)
	}
	if err := verify(f.Name()); err != nil {
		return 0, 0, err
	}
	old, err1 := s.file.Stat()
	compacted, err2 := f.Stat()
	if err := errors.Join(err1, err2); err != nil {
		return 0, 0, err
	}
	return old.Size(), compacted.Size(), f.replace()
}

func (s *Store) compactTo(path string) (err error) {
	to, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockTimeout})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = s.markDamaged(p)
		}
	}()
	return bbolt.Compact(to, s.db, compactTxBytes)
}
