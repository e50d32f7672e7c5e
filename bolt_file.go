package main

// The database file below bbolt: its lock and its two meta pages, which are read and checked
// before bbolt maps the file, since bbolt trusts their contents. The layout is that of
// bbolt's package internal/common: integers are in the machine's byte order, and page ids
// count pages from the start of the file.

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"log/slog"
	"os"
	"syscall"
	"time"
)

// lockTimeout is how long an open waits for the lock of another process, which may be about
// to end.
const lockTimeout = 900 * time.Millisecond

// ErrInUse is returned when another process holds the lock of the database file.
var ErrInUse = errors.New("another process has it open; stop that one (a running server?) or name another file with --db")

// meta is one of bbolt's two meta pages. Commits write them in turn. The current
// transaction is that of the valid meta page with the higher txid.
type meta struct {
	page     []byte // the whole page
	valid    bool   // magic number, version and checksum are right: bbolt uses the page
	pageSize int64  // in bytes
	root     uint64 // page id of the root bucket
	freelist uint64 // page id of the freelist
	pages    uint64 // number of pages in the file (bbolt's pgid, the high water mark)
	txid     uint64 // transaction id
}

// The constants of bbolt's file format. Sizes are in bytes. A new file gets the page size of the
// system, and no system that Go runs on has pages outside of minPageSize to maxPageSize.
const (
	metaMagic      = 0xED0CDAED
	metaVersion    = 2
	metaSize       = 64
	metaPageFlag   = 0x04
	pageHeaderSize = 16
	minPageSize    = 1 << 10
	maxPageSize    = 64 << 10
)

// The number of pages of a file. The fewest are two meta pages, the list of free pages and the
// root page. maxPages, 16 TiB of 4 KiB pages, bounds the memory that the page checker takes: a
// bit for each page.
const (
	minPages = 4
	maxPages = 1 << 32
)

// lastTransaction is the highest transaction id that a file can have when it passes a check. As
// meta.check accepts twice as many, a file that has passed can be written to for ever.
const lastTransaction = 1 << 62

// openFile opens and locks an existing database file and calls syncMetas. It returns the
// locked file and the current meta page.
func openFile(path string, check func(*os.File, meta) error, log *slog.Logger) (*os.File, meta, error) {
	f, err := openLocked(path, os.O_RDWR)
	if err != nil {
		return nil, meta{}, ofDatabase(path, err)
	}
	m, err := syncMetas(f, check, log)
	if err != nil {
		f.Close()
		return nil, meta{}, ofDatabase(path, err)
	}
	return f, m, nil
}

// syncMetas verifies that a locked database file has a valid meta page, and calls check with the
// current one. Then it writes both meta pages again, unchanged, and syncs the file. Otherwise, a
// meta page might be in the page cache only: after a sync that failed or that the end of the
// process cut short, the kernel may take the cached page for clean and never write it. syncMetas
// returns the current meta page.
func syncMetas(f *os.File, check func(*os.File, meta) error, log *slog.Logger) (m meta, err error) {
	metas, err := readMetas(f)
	if err != nil {
		return m, err
	}
	m = currentMeta(metas)
	if !metas[0].valid || !metas[1].valid {
		log.Warn("one of the two meta pages of the database is broken, so the other one is used; make a backup", "file", f.Name())
	}
	if err := check(f, m); err != nil {
		return m, err
	}
	for i := range metas {
		if _, err := f.WriteAt(metas[i].page, int64(i)*m.pageSize); err != nil {
			return m, fmt.Errorf("write meta page: %w", err)
		}
	}
	if err := f.Sync(); err != nil {
		return m, fmt.Errorf("sync: %w", err)
	}
	return m, nil
}

// ofDatabase adds the path of the database to an error, and what to do about it.
func ofDatabase(path string, err error) error {
	return fmt.Errorf("database %s: %w", path, advise(err, "name another file with --db"))
}

// openLocked opens and locks an existing regular file. With the flag os.O_RDWR the lock is
// exclusive; with os.O_RDONLY it is shared, so that other processes can read but not write.
// bbolt later takes the same lock again, on the same open file. If another process keeps
// its lock for lockTimeout, openLocked returns ErrInUse.
func openLocked(path string, flag int) (*os.File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s %w", path, errNotFile)
	}
	how := syscall.LOCK_EX
	if flag == os.O_RDONLY {
		how = syscall.LOCK_SH
	}
	for {
		f, err := os.OpenFile(path, flag, 0)
		if err != nil {
			return nil, err
		}
		if err := lock(f, how); err != nil {
			f.Close()
			return nil, err
		}
		// The process that held the lock before may have replaced the file, as compact does.
		opened, err1 := f.Stat()
		placed, err2 := os.Stat(path)
		if err := errors.Join(err1, err2); err != nil {
			f.Close()
			return nil, err
		}
		if os.SameFile(opened, placed) {
			return f, nil
		}
		f.Close()
	}
}

// duplicate returns a second handle of an open file, for bbolt, which closes the handle that
// it is given. The two share one lock.
func duplicate(f *os.File) (*os.File, error) {
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

// lock locks a file with flock: how is LOCK_EX or LOCK_SH. It returns ErrInUse if the lock is
// not free within lockTimeout.
func lock(f *os.File, how int) error {
	for deadline := time.Now().Add(lockTimeout); ; time.Sleep(20 * time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, syscall.ENOLCK), errors.Is(err, errors.ErrUnsupported):
			return lacking(f.Name(), "file locks", err)
		case !errors.Is(err, syscall.EWOULDBLOCK):
			return fmt.Errorf("lock: %w", err)
		case time.Now().After(deadline):
			return ErrInUse
		}
	}
}

// readMetas reads both meta pages. It returns an error if neither is valid, or if they disagree
// on the page size: bbolt takes that of the first one that it finds for both. Otherwise it
// checks only what it needs itself; see meta.check.
func readMetas(f *os.File) (metas [2]meta, err error) {
	info, err := f.Stat()
	if err != nil {
		return metas, err
	}
	if info.Size() == 0 {
		return metas, errors.New("is empty, so it is not a database; remove it, or name another file")
	}
	found, at := readMeta(f, 0, minPageSize), int64(0)
	// The second meta page follows the first, which has the page size. If the first is
	// broken, the second is looked for at every possible page size, as bbolt does.
	for next := int64(minPageSize); !found.valid && next <= maxPageSize; next *= 2 {
		found, at = readMeta(f, next, minPageSize), next
	}
	size := found.pageSize
	switch {
	case !found.valid:
		return metas, errors.New("is not a database, or both its meta pages are broken; restore a backup, or name another file")
	case size < minPageSize || size > maxPageSize || size&(size-1) != 0 || at != 0 && at != size:
		return metas, fmt.Errorf("is broken: its meta page at byte %d has the page size %d; restore a backup", at, size)
	}
	for i := range metas {
		metas[i] = readMeta(f, int64(i)*size, size)
		if metas[i].valid && metas[i].pageSize != size {
			return metas, fmt.Errorf("is broken: its meta pages have the page sizes %d and %d; restore a backup", size, metas[i].pageSize)
		}
	}
	return metas, nil
}

// currentMeta returns the valid meta page with the higher txid. At least one must be valid.
func currentMeta(metas [2]meta) meta {
	if !metas[0].valid || metas[1].valid && metas[1].txid > metas[0].txid {
		return metas[1]
	}
	return metas[0]
}

// readMeta reads size bytes at an offset as a meta page. One that cannot be read is not
// valid.
func readMeta(f *os.File, offset, size int64) meta {
	m := meta{page: make([]byte, size)}
	if n, _ := f.ReadAt(m.page, offset); n < pageHeaderSize+metaSize {
		return m
	}
	b := m.page[pageHeaderSize : pageHeaderSize+metaSize]
	u32 := func(at int) uint32 { return binary.NativeEndian.Uint32(b[at:]) }
	u64 := func(at int) uint64 { return binary.NativeEndian.Uint64(b[at:]) }
	m.pageSize, m.root, m.freelist, m.pages, m.txid = int64(u32(8)), u64(16), u64(32), u64(40), u64(48)
	sum := fnv.New64a()
	sum.Write(b[:56])
	m.valid = u32(0) == metaMagic && u32(4) == metaVersion && u64(56) == sum.Sum64()
	return m
}

// check checks the numbers of a valid meta page of a file of size bytes, since a checksum
// proves nothing about who wrote them. Without an error, the pages are in the file and no
// product of a page id and pageSize overflows. The error completes a sentence that begins with
// the name of the file.
func (m meta) check(size int64) error {
	broken := func(what string, n uint64) error {
		return fmt.Errorf("is broken: its meta page has the %s %d; restore a backup", what, n)
	}
	isPage := func(id uint64) bool { return id >= 2 && id < m.pages }
	switch want := m.bytes(); {
	case m.pages < minPages || m.pages > maxPages:
		return broken("number of pages", m.pages)
	case size < want:
		return fmt.Errorf("is truncated: it has %d bytes, but its meta page requires %d; restore a backup", size, want)
	case !isPage(m.root):
		return broken("root page", m.root)
	case !isPage(m.freelist):
		return broken("page of free pages", m.freelist)
	// A backup has the transaction before this one too. At the last number the next one would
	// begin at 0, and bbolt would take its commit for an old one.
	case m.txid < 1 || m.txid > 2*lastTransaction:
		return broken("transaction", m.txid)
	}
	return nil
}

// hasHeader reports whether the header of the page is that of a meta page with this id.
func (m meta) hasHeader(id uint64) bool {
	return binary.NativeEndian.Uint64(m.page) == id && binary.NativeEndian.Uint16(m.page[8:]) == metaPageFlag
}

// bytes returns the size of all pages in bytes. It overflows unless check has accepted m.
func (m meta) bytes() int64 { return int64(m.pages) * m.pageSize }

// exists reports whether there is anything at path. It also returns true if that cannot be
// determined, so that opening the path returns the reason.
func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
