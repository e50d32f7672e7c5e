package main

// Opening the store's bbolt file: creating it, checking its format, mapping it.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"go.etcd.io/bbolt"
)

// formatKey in bucketMeta says what the file is and in which form: programName, a
// slash, formatVersion. A program refuses a version that it does not know, and says
// what is under programKey: the version of the program that gave the file its form,
// and so one that reads it.
const (
	formatKey     = "format"
	programKey    = "program"
	formatVersion = 1
)

// checkFile compares the file with the meta page that stands: its length, and
// that it is a file in our format.
func checkFile(f *os.File, m meta) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if want := int64(m.pages) * m.pageSize; info.Size() < want {
		return fmt.Errorf("is cut off: it has %d bytes, its meta page says %d; restore a backup", info.Size(), want)
	}
	leaf, err := rootLeaf(f, m, bucketMeta)
	if err != nil {
		return err
	}
	// A bucket this small stands inline in its parent, as a page of its own.
	var format, program []byte
	if inline := leafValue(leaf, bucketMeta); len(inline) > bucketHeaderSize {
		format = leafValue(inline[bucketHeaderSize:], []byte(formatKey))
		program = leafValue(inline[bucketHeaderSize:], []byte(programKey))
	}
	name, version, _ := strings.Cut(string(format), "/")
	n, err := strconv.Atoi(version)
	switch {
	case name != programName || err != nil:
		return errors.New("is a bbolt database, but not one of this program (or its root is broken); name another file with --db, or restore a backup")
	case n != formatVersion:
		reader := "the program that wrote it"
		if program != nil {
			reader = fmt.Sprintf("%s %s or a later one", programName, quoted(string(program)))
		}
		return fmt.Errorf("has format version %d, and this program (%s) reads version %d; use %s", n, readBuild().Version, formatVersion, reader)
	}
	return nil
}

// initialMmapSize lets the file grow to 1 GiB before bbolt must map it anew,
// for which it waits for every open read transaction. It is address space,
// not memory.
const initialMmapSize = 1 << 30

// open opens the file, which openFile checks and, with resync, syncs first. It
// returns the id of the transaction that stands. When it fails, db is nil.
func (s *Store) open(check func(*os.File, meta) error, resync bool) (txid uint64, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil { // the freelist's page
			s.file.Close()
			err = fmt.Errorf("database %s: %w: %v; restore a backup", s.path, ErrDamaged, p)
		}
	}()
	s.db = nil
	db, err := bbolt.Open(s.path, 0o600, &bbolt.Options{
		Timeout:         lockTimeout,
		InitialMmapSize: initialMmapSize,
		OpenFile: func(path string, _ int, _ os.FileMode) (_ *os.File, err error) {
			var m meta
			if s.file, m, err = openFile(path, check, resync, s.log); err != nil {
				return nil, err
			}
			txid = m.txid
			list := make([]byte, pageHeaderSize+8)
			if _, err := s.file.ReadAt(list, int64(m.freelist)*m.pageSize); err == nil {
				s.freeAtOpen, _, _ = freeCount(list)
			}
			return s.file, nil
		},
	})
	if err != nil {
		return 0, err
	}
	s.db = db
	return txid, nil
}

// openReadOnly opens a file for reading that checkFile has passed. Closing it closes
// f, and so does its error.
func openReadOnly(f *os.File) (_ *bbolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", ErrDamaged, p)
		}
		if err != nil {
			f.Close()
		}
	}()
	return bbolt.Open(f.Name(), 0, &bbolt.Options{
		ReadOnly: true,
		Timeout:  lockTimeout,
		OpenFile: func(string, int, os.FileMode) (*os.File, error) { return f, nil },
	})
}

// create makes the file, so that a start that is cut short leaves none, and two
// starts make one.
func create(path string) error {
	f, err := createAtomicDB(path)
	if err != nil {
		return err
	}
	defer f.discard()
	db, err := bbolt.Open(f.Name(), 0o600, &bbolt.Options{Timeout: lockTimeout})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range buckets {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		format := fmt.Sprintf("%s/%d", programName, formatVersion)
		b := tx.Bucket(bucketMeta)
		return errors.Join(b.Put([]byte(formatKey), []byte(format)), b.Put([]byte(programKey), []byte(readBuild().Version)))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	if err := f.link(); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
