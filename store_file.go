package main

// The store's bbolt file: checking its format, opening it and creating it.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"go.etcd.io/bbolt"
)

const (
	// formatKey is the key in bucketMeta of programName, a slash and the format version.
	// A file of another version than formatVersion is refused.
	formatKey = "format"
	// programKey is the key in bucketMeta of the version of the program that created the
	// file, and so of one that can read it. The error for another format version names it.
	programKey = "program"
	// formatVersion is the format version that this program reads and writes.
	formatVersion = 1
)

// checkFile checks that the file is as long as m, its current meta page, requires, and
// that it is in the format of this program. The error completes a sentence that begins
// with the name of the file.
func checkFile(f *os.File, m meta) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if want := int64(m.pages) * m.pageSize; info.Size() < want {
		return fmt.Errorf("is truncated: it has %d bytes, but its meta page requires %d; restore a backup", info.Size(), want)
	}
	leaf, err := rootLeaf(f, m, bucketMeta)
	if err != nil {
		return err
	}
	// A bucket this small is inline: the value of its element in the root is a header and
	// then a leaf page.
	var format, program []byte
	if inline := leafValue(leaf, bucketMeta); len(inline) > bucketHeaderSize {
		format = leafValue(inline[bucketHeaderSize:], []byte(formatKey))
		program = leafValue(inline[bucketHeaderSize:], []byte(programKey))
	}
	name, version, _ := strings.Cut(string(format), "/")
	n, err := strconv.Atoi(version)
	switch {
	case name != programName || err != nil:
		return errors.New("is a bbolt database, but not one of this program, or its root page is broken; name another file, or restore a backup")
	case n != formatVersion:
		reader := "the program that wrote it"
		if program != nil {
			reader = fmt.Sprintf("%s %s or a later one", programName, quoted(string(program)))
		}
		return fmt.Errorf("has format version %d, and this program (%s) reads version %d; use %s", n, readBuild().Version, formatVersion, reader)
	}
	return nil
}

// initialMmapSize is the size in bytes to which the file can grow before bbolt must map it
// again, for which it waits until all open read transactions end. It takes address space,
// not memory.
const initialMmapSize = 1 << 30

// open opens the file with openFile, which runs check and, with resync, rewrites and syncs
// the meta pages before bbolt maps the file. It returns the id of the last committed
// transaction. If it fails, db is nil. Unless the store is new, the caller holds committing
// and reopenLock.
func (s *Store) open(check func(*os.File, meta) error, resync bool) (txid uint64, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil { // bbolt panics on a broken freelist page
			s.file.Close()
			err = fmt.Errorf("database %s: %w: %v; restore a backup", s.path, ErrDamaged, p)
		}
	}()
	s.db = nil
	opened := false
	db, err := bbolt.Open(s.path, 0o600, &bbolt.Options{
		Timeout:         lockTimeout,
		InitialMmapSize: initialMmapSize,
		OpenFile: func(path string, _ int, _ os.FileMode) (_ *os.File, err error) {
			var m meta
			if s.file, m, err = openFile(path, check, resync, s.log); err != nil {
				return nil, err
			}
			opened = true
			txid = m.txid
			list := make([]byte, pageHeaderSize+8)
			if _, err := s.file.ReadAt(list, int64(m.freelist)*m.pageSize); err == nil {
				s.freeAtOpen, _, _ = freeCount(list)
			}
			return s.file, nil
		},
	})
	if opened && err != nil {
		err = ofDatabase(s.path, ofBolt(s.path, err))
	}
	if err != nil {
		return 0, err
	}
	s.db = db
	return txid, nil
}

// ofBolt explains the error of bbolt.Open for a file that cannot be mapped.
func ofBolt(path string, err error) error {
	switch {
	case errors.Is(err, syscall.ENODEV):
		return lacking(path, "memory maps", err)
	case errors.Is(err, syscall.ENOMEM):
		return fmt.Errorf("map the file into memory: %w; raise the limit of the address space (ulimit -v)", err)
	}
	return err
}

// openReadOnly opens f, which checkFile has accepted, as a read-only database. It takes
// over f: closing the database closes f, and if openReadOnly fails, f is closed too.
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
	db, err := bbolt.Open(f.Name(), 0, &bbolt.Options{
		ReadOnly: true,
		Timeout:  lockTimeout,
		OpenFile: func(string, int, os.FileMode) (*os.File, error) { return f, nil },
	})
	if err != nil {
		return nil, ofBolt(f.Name(), err)
	}
	return db, nil
}

// create creates an empty database at path. It does so under a temporary name first, so
// that an interrupted start leaves no incomplete file. If another process creates the
// file at the same time, the one that comes second leaves the first one's file alone.
func create(path string) error {
	f, err := createAtomicDB(path)
	if err != nil {
		return err
	}
	defer f.discard()
	if err := lock(f.File, syscall.LOCK_EX); err != nil {
		return err
	}
	db, err := bbolt.Open(f.Name(), 0o600, &bbolt.Options{
		Timeout:  lockTimeout,
		OpenFile: func(string, int, os.FileMode) (*os.File, error) { return duplicate(f.File) },
	})
	if err != nil {
		return ofBolt(f.Name(), err)
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
	if err == nil {
		err = f.link() // before bbolt unlocks the file, which could then be taken for a leftover
	}
	if errors.Is(err, fs.ErrExist) {
		err = nil
	}
	return errors.Join(err, db.Close())
}
