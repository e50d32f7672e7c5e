package main

// Atomic files: a file is written beside its destination, synced, and renamed into
// place, so that a crash leaves either all of it or nothing.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// atomicFile is a file on its way to its place.
type atomicFile struct {
	*os.File    // beside the place, mode 0600
	destination string
}

// createAtomic begins a file that is to be at path, where a link would be replaced and
// not followed: who can put one there may be anybody. The caller discards it in any
// case.
func createAtomic(path string) (*atomicFile, error) {
	dir := filepath.Dir(path)
	if _, err := os.Stat(dir); err != nil { // said better than by what CreateTemp would try
		return nil, err
	}
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return nil, err
	}
	return &atomicFile{tmp, path}, nil
}

// createAtomicDB is createAtomic for a database, whose links are followed. What root
// makes belongs to whom the file there belongs to, or else the directory: the service
// that is to open it may be another user.
func createAtomicDB(path string) (*atomicFile, error) {
	path = withoutLinks(path)
	like, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		like, err = os.Stat(filepath.Dir(path))
	}
	if err != nil {
		return nil, err
	}
	f, err := createAtomic(path)
	if err != nil {
		return nil, err
	}
	if owner, ok := like.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 {
		// Root of a container may lack the capability, and then be all that there is.
		if err := f.Chown(int(owner.Uid), int(owner.Gid)); err != nil && !errors.Is(err, fs.ErrPermission) {
			f.discard()
			return nil, err
		}
	}
	return f, nil
}

// withoutLinks is where a file really is, if it is there.
func withoutLinks(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		return real
	}
	return path
}

// replace puts the file in its place, and what is there out of it.
func (f *atomicFile) replace() error { return f.put(os.Rename) }

// link puts the file in its place unless something is there: then it returns
// fs.ErrExist.
func (f *atomicFile) link() error { return f.put(os.Link) }

func (f *atomicFile) put(move func(from, to string) error) error {
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	if err := move(f.Name(), f.destination); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(f.destination))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// discard closes the file and removes what is not in its place.
func (f *atomicFile) discard() {
	f.Close()
	os.Remove(f.Name())
}
