package main

// The database file below bbolt: locking, and the two meta pages, which are read and
// checked before bbolt may map the file. The layout is that of bbolt's internal/common:
// integers are in the machine's byte order, and page ids count pages from the start of
// the file.

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

// lockTimeout is how long a file that another process holds is asked for: that
// process may be about to end.
const lockTimeout = 900 * time.Millisecond

// ErrInUse is returned by Open when another process has the database open.
var ErrInUse = errors.New("another process has it open; stop that one (a running server?) or name another file with --db")

// meta is one of bbolt's two meta pages. The valid one with the higher txid says
// which transaction stands.
type meta struct {
	page     []byte // the whole page, as it is in the file
	valid    bool
	pageSize int64
	root     uint64 // page id of the root bucket
	freelist uint64 // page id of the list of free pages
	pages    uint64 // how many pages the file holds (bbolt's pgid, the high water mark)
	txid     uint64
}

const (
	metaMagic      = 0xED0CDAED
	metaVersion    = 2
	metaSize       = 64
	pageHeaderSize = 16
	minPageSize    = 1 << 10
	maxPageSize    = 16 << 20
)

// openFile opens and locks an existing database file and checks what can be
// checked without reading all of it, and then what look does, if it is not nil. With
// resync it then writes both meta pages again as they are, and syncs: a meta page whose
// sync failed, or was cut short by the end of its process, is only in the page cache,
// where the kernel may hold it for clean. It returns the file, locked, and the meta page
// that stands.
func openFile(path string, check func(*os.File, meta) error, resync bool, log *slog.Logger) (_ *os.File, m meta, err error) {
	f, err := openLocked(path, os.O_RDWR)
	if err != nil {
		return nil, m, ofDatabase(path, err)
	}
	defer func() { // else the file would stay locked, for mend too
		if err != nil {
			f.Close()
			err = ofDatabase(path, err)
		}
	}()
	metas, err := readMetas(f)
	if err != nil {
		return nil, m, err
	}
	m = currentMeta(metas)
	if !metas[0].valid || !metas[1].valid {
		log.Warn("one of the database's two meta pages is broken, the other one is used; back the file up", "file", path)
	}
	if err := check(f, m); err != nil {
		return nil, m, err
	}
	if resync {
		for i := range metas {
			if _, err := f.WriteAt(metas[i].page, int64(i)*m.pageSize); err != nil {
				return nil, m, fmt.Errorf("write meta page: %w", err)
			}
		}
		if err := f.Sync(); err != nil {
			return nil, m, fmt.Errorf("sync: %w", err)
		}
	}
	return f, m, nil
}

// errNotFile: there is something else, such as a directory.
var errNotFile = errors.New("is not a file")

// ofDatabase says which database an error is of, and what to do where the error does not.
func ofDatabase(path string, err error) error {
	remedy := ""
	switch {
	case errors.Is(err, fs.ErrPermission):
		remedy = "; use the account that owns it, or name another file with --db"
	case errors.Is(err, errNotFile):
		remedy = "; name a file with --db"
	}
	return fmt.Errorf("database %s: %w%s", path, err, remedy)
}

// openLocked opens an existing file for os.O_RDWR and locks it against all others,
// or for os.O_RDONLY and locks it against those who would write. It is the lock that
// bbolt will take once more, on the same open file.
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
		// Who had the lock until now may have put another file in its place.
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

// duplicate returns another handle of an open file: bbolt closes the one that it gets.
func duplicate(f *os.File) (*os.File, error) {
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		return nil, fmt.Errorf("duplicate %s: %w", f.Name(), err)
	}
	return os.NewFile(uintptr(fd), f.Name()), nil
}

func lock(f *os.File, how int) error {
	for deadline := time.Now().Add(lockTimeout); ; time.Sleep(20 * time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), how|syscall.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, syscall.EWOULDBLOCK):
			return fmt.Errorf("lock: %w", err)
		case time.Now().After(deadline):
			return ErrInUse
		}
	}
}

// readMetas reads both meta pages, of which at least one is valid.
func readMetas(f *os.File) (metas [2]meta, err error) {
	info, err := f.Stat()
	if err != nil {
		return metas, err
	}
	if info.Size() == 0 {
		return metas, errors.New("is empty, so it is no database; remove it, or name another file with --db")
	}
	var pageSize int64
	if first := readMeta(f, 0, minPageSize); first.valid {
		pageSize = first.pageSize
	}
	// The first tells where the second is. When it is broken, look for the second
	// where bbolt looks too.
	for at := int64(minPageSize); pageSize == 0 && at <= maxPageSize; at *= 2 {
		if second := readMeta(f, at, minPageSize); second.valid && second.pageSize == at {
			pageSize = at
		}
	}
	if pageSize == 0 {
		return metas, errors.New("is not a database, or both its meta pages are broken; restore a backup, or name another file with --db")
	}
	for i := range metas {
		metas[i] = readMeta(f, int64(i)*pageSize, pageSize)
	}
	return metas, nil
}

// standing returns the meta page that counts.
func currentMeta(metas [2]meta) meta {
	if !metas[0].valid || metas[1].valid && metas[1].txid > metas[0].txid {
		return metas[1]
	}
	return metas[0]
}

// readMeta reads size bytes at an offset as a meta page.
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
	m.valid = u32(0) == metaMagic && u32(4) == metaVersion && u64(56) == sum.Sum64() &&
		m.pageSize >= minPageSize && m.pageSize <= maxPageSize
	return m
}

// exists tells whether there is anything at path. A path that cannot be looked
// at counts, so that opening it says why.
func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
