package main

// A file that is there whole or not at all: written beside its place, synced, and
// put there in one step.

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
	*os.File        // beside the place, mode 0600
	place    string // without symbolic links
}

// createAtomic begins a file that is to be at path. The caller discards it in any
// case. Under root it belongs to whom the file there belongs to, or else the
// directory: what an administrator makes is for the service to open.
func createAtomic(path string) (_ *atomicFile, err error) {
	if real, err := filepath.EvalSymlinks(path); err == nil {
		path = real
	}
	dir := filepath.Dir(path)
	like, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if like, err = os.Stat(dir); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	case !like.Mode().IsRegular():
		return nil, fmt.Errorf("%s is there and not a file; name another", path)
	}
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		return nil, err
	}
	f := &atomicFile{tmp, path}
	if owner, ok := like.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 {
		if err := tmp.Chown(int(owner.Uid), int(owner.Gid)); err != nil {
			f.discard()
			return nil, err
		}
	}
	return f, nil
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
	if err := move(f.Name(), f.place); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(f.place))
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
