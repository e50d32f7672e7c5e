package main

// The store's bbolt file: checking its format, opening it and creating it.

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"

	"go.etcd.io/bbolt"
)

const (
	// formatKey is the key in bucketMeta of programName, a slash and the format version.
	// A file of a later version than formatVersion is refused.
	formatKey = "format"
	// programKey is the key in bucketMeta of the version of the program that gave the file its
	// format, and so of one that can read it. The error for a later format version names it.
	programKey = "program"
	// formatVersion is the format version that this program writes. It reads version 1 too.
	formatVersion = 2
)

// currentFormat is the value of formatKey that this program writes.
var currentFormat = fmt.Appendf(nil, "%s/%d", programName, formatVersion)

// checkFile checks m, the current meta page of the file, and that the file is in the format of
// this program. The error completes a sentence that begins with the name of the file.
func checkFile(f *os.File, m meta) error {
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if err := m.check(info.Size()); err != nil {
		return err
	}
	inline, err := rootBucket(f, m, bucketMeta)
	if err != nil {
		return err
	}
	// A bucket this small is inline: its value is a header and then a leaf page.
	var format, program []byte
	if len(inline) > bucketHeaderSize {
		format = leafValue(inline[bucketHeaderSize:], []byte(formatKey), 0)
		program = leafValue(inline[bucketHeaderSize:], []byte(programKey), 0)
	}
	n, ok := parseFormat(format)
	switch {
	case !ok:
		return errors.New("is a bbolt database, but not one of this program, or its root page is broken; name another file, or restore a backup")
	case n > formatVersion:
		reader := "the program that wrote it"
		if program != nil {
			reader = fmt.Sprintf("%s %s or a later one", programName, quoted(string(program)))
		}
		return fmt.Errorf("has format version %d, and this program (%s) reads version %d and earlier; use %s", n, readBuild().Version, formatVersion, reader)
	}
	return nil
}

// parseFormat returns the format version from the value of formatKey. It returns false if the
// value is not one of this program.
func parseFormat(value []byte) (version int, ok bool) {
	name, text, _ := strings.Cut(string(value), "/")
	version, err := strconv.Atoi(text)
	return version, err == nil && version > 0 && name == programName
}

// checkRoot checks that the file has each of buckets, which the store uses without looking. Its
// error is as checkFile's.
func checkRoot(f *os.File, m meta) error {
	for _, name := range buckets {
		if bytes.Equal(name, bucketQuotas) {
			continue // upgrade creates it
		}
		value, err := rootBucket(f, m, name)
		if err != nil {
			return err
		}
		if value == nil {
			return fmt.Errorf("is broken: it has no bucket %s; restore a backup", name)
		}
	}
	return nil
}

// open opens the file with openFile, which runs check, and then with bbolt.
func (s *Store) open(check func(*os.File, meta) error) error {
	f, m, err := openFile(s.path, check, s.log)
	if err != nil {
		return err
	}
	s.file, s.reserved = f, reservable()
	if s.opened, err = f.Stat(); err == nil {
		err = s.openDB(m)
	}
	if err != nil {
		f.Close()
		return err
	}
	return nil
}

// openDB opens the file, whose current meta page is m, with bbolt. If it fails, db is nil and
// the file may be unlocked. Unless the store is new, the caller holds reopenLock.
func (s *Store) openDB(m meta) (err error) {
	lent, err := duplicate(s.file)
	if err != nil {
		return err
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil { // bbolt panics on a broken freelist page
			lent.Close()
			err = fmt.Errorf("database %s: %w: %v; restore a backup", s.path, ErrDamaged, p)
		}
	}()
	db, err := bbolt.Open(s.path, 0o600, &bbolt.Options{
		Timeout:         lockTimeout,
		InitialMmapSize: int(s.reserved),
		OpenFile:        func(string, int, os.FileMode) (*os.File, error) { return lent, nil },
	})
	if errors.Is(err, syscall.ENOMEM) && s.reserved > 0 {
		s.reserved /= 16 // another store of this process may have taken what reservable found
		return s.openDB(m)
	}
	if err != nil {
		return ofDatabase(s.path, ofBolt(s.path, err))
	}
	s.db, s.lent = db, lent
	list := make([]byte, pageHeaderSize+8)
	if _, err := s.file.ReadAt(list, int64(m.freelist)*m.pageSize); err == nil {
		s.freeAtOpen, _, _ = freeCount(list)
	}
	return nil
}

// closeDB closes db, to open it again. bbolt would unlock the file, and another process could
// take it. So bbolt finds its handle closed already, and unmaps the file only; the lock stays
// with the handle of the store. The caller holds reopenLock.
func (s *Store) closeDB() {
	if s.db == nil {
		return
	}
	s.lent.Close()
	_ = s.db.Close() // fails to unlock the file
	s.db = nil
}

// reservations are the sizes of the address space, in bytes, that reservable tries. No file
// outgrows the first. A process may have less address space where its limit is set (ulimit -v)
// or where the kernel or the emulator of one has fewer bits for it.
var reservations = []int64{16 << 40, 1 << 40, 64 << 30, 4 << 30, 1 << 30}

// reservable returns the address space, in bytes, that bbolt shall map for the file at least.
// When the file outgrows it, bbolt must map it again, for which it waits until all open read
// transactions end, and then all others wait for bbolt. reservable leaves as much address space
// for everything else. Address space takes no memory.
func reservable() int64 {
	for _, size := range reservations {
		if size > math.MaxInt/2 {
			continue
		}
		b, err := syscall.Mmap(-1, 0, int(2*size), syscall.PROT_NONE, syscall.MAP_PRIVATE|syscall.MAP_ANON|syscall.MAP_NORESERVE)
		if err != nil {
			continue
		}
		_ = syscall.Munmap(b) // fails for no mapping of Mmap
		return size
	}
	return 0
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
		return putFormat(tx)
	})
	if err == nil {
		err = f.link() // before bbolt unlocks the file, which could then be taken for a leftover
	}
	if errors.Is(err, fs.ErrExist) {
		err = nil
	}
	return errors.Join(err, db.Close())
}

// putFormat stores the format version and the version of this program.
func putFormat(tx *bbolt.Tx) error {
	b := tx.Bucket(bucketMeta)
	return errors.Join(
		b.Put([]byte(formatKey), currentFormat),
		b.Put([]byte(programKey), []byte(readBuild().Version)))
}
