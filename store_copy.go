package main

// Copies of the whole database: the snapshot for a backup, and compaction.

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"

	"go.etcd.io/bbolt"
)

// Snapshot returns a copy of the database, as of one transaction, and the size of the copy in
// bytes. The meta pages, the length and the format of the copy have been checked, and bbolt
// can open it. It is a file without a name, so that closing it frees its space.
//
// The copy is made on local disk, in the directory of the database, and only then sent to the
// client, so that the read transaction is short however slow the client is. While a read
// transaction is open, bbolt cannot map a file that grows, and all writers wait
// (https://github.com/etcd-io/bbolt/issues/850).
//
// If the copy must give way to a commit or to a reopening, Snapshot returns errGaveWay.
// If ctx ends meanwhile, it returns the error of ctx.
func (s *Store) Snapshot(ctx context.Context) (_ *os.File, size int64, err error) {
	const other = "copy the file while no server runs"
	f, err := createBeside(withoutLinks(s.path))
	if err != nil {
		return nil, 0, fmt.Errorf("copy the database to a file in its directory: %w", advise(err, other))
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
		err = w.err // bbolt does not always wrap it
	}
	if err != nil {
		return nil, 0, fmt.Errorf("copy the database to a file in its directory: %w", advise(err, other))
	}
	metas, err := readMetas(f)
	if err != nil {
		return nil, 0, fmt.Errorf("check the copy of the database: %w", err)
	}
	if err := checkFile(f, currentMeta(metas)); err != nil {
		return nil, 0, fmt.Errorf("check the copy of the database: %w", err)
	}
	again, err := duplicate(f)
	if err != nil {
		return nil, 0, err
	}
	db, err := openReadOnly(again)
	if err != nil {
		return nil, 0, fmt.Errorf("check the copy of the database: %w", err)
	}
	if err := db.Close(); err != nil {
		return nil, 0, err
	}
	_, err = f.Seek(0, io.SeekStart)
	return f, size, err
}

// snapshotWriter writes a snapshot to a file. It fails once ctx ends or the snapshot must give
// way.
type snapshotWriter struct {
	ctx context.Context
	s   *Store
	f   *os.File
	err error // of the last Write
}

// Write implements io.Writer.
func (w *snapshotWriter) Write(b []byte) (n int, err error) {
	if err = cmp.Or(w.ctx.Err(), w.s.giveWay()); err == nil {
		n, err = w.f.Write(b)
	}
	w.err = err
	return n, err
}

// compactTxBytes is how much one transaction of a compaction writes, in bytes. The last value
// may exceed it.
const compactTxBytes = 16 << 20

// Compact writes a copy of the database without free pages, calls verify with the path of the
// copy and, if verify returns nil, replaces the database with the copy. It returns the sizes
// of the database before and after, in bytes. The store must be closed after that and not
// used otherwise, since it still has the old file open.
func (s *Store) Compact(verify func(path string) error) (before, after int64, err error) {
	f, err := createAtomicDB(s.path)
	if err != nil {
		return 0, 0, err
	}
	defer f.discard()
	if err := s.compactTo(f); err != nil {
		return 0, 0, fmt.Errorf("write the compacted copy: %w", err)
	}
	f.share()
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

// compactTo writes the compacted copy to f, and leaves it unlocked, as bbolt does. A panic on a
// broken page of the database marks the store as damaged and is returned as an error.
func (s *Store) compactTo(f *atomicFile) (err error) {
	to, err := bbolt.Open(f.Name(), 0o600, &bbolt.Options{
		Timeout:  lockTimeout,
		OpenFile: func(string, int, os.FileMode) (*os.File, error) { return duplicate(f.File) },
	})
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
