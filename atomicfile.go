package main

// Atomic files: a file is written under a temporary name in the directory of its destination,
// synced, and then moved to the destination, so that after a crash the destination has either
// the whole new file or the old one.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// atomicFile is a temporary file that replace or link moves to its destination.
type atomicFile struct {
	*os.File    // in the directory of the destination, mode 0600
	destination string
}

// createAtomic creates the temporary file for the destination path. A symbolic link at path
// is replaced and not followed, since in a shared directory anybody may have put it there.
// The caller must call discard, also after replace or link.
func createAtomic(path string) (*atomicFile, error) {
	if path == "" {
		return nil, errors.New("the name of the file is empty; name a file")
	}
	tmp, err := createBeside(path)
	if err != nil {
		return nil, err
	}
	return &atomicFile{tmp, path}, nil
}

// createBeside creates a temporary file in the directory of path.
func createBeside(path string) (*os.File, error) {
	dir := filepath.Dir(path)
	tmp, err := os.CreateTemp(dir, "."+filepath.Base(path)+".*")
	if err != nil {
		var named *fs.PathError
		if errors.As(err, &named) { // it names the temporary file
			err = named.Err
		}
		return nil, fmt.Errorf("create a file in %s: %w", dir, err)
	}
	return tmp, nil
}

// createAtomicDB is createAtomic for a database, except that symbolic links are followed. If
// root creates the file, it gets the owner and the group of the file that it replaces, or
// those of the directory if there is none, since the service that will open it may run as
// another user.
func createAtomicDB(path string) (*atomicFile, error) {
	path = withoutLinks(path)
	f, err := createAtomic(path)
	if err != nil {
		return nil, err
	}
	like, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		like, err = os.Stat(filepath.Dir(path))
	}
	if err != nil {
		f.discard()
		return nil, err
	}
	if owner, ok := like.Sys().(*syscall.Stat_t); ok && os.Geteuid() == 0 {
		// In a container, root may lack the capability to change the owner, and is then often
		// the only user, so that the file stays root's.
		if err := f.Chown(int(owner.Uid), int(owner.Gid)); err != nil && !errors.Is(err, fs.ErrPermission) {
			f.discard()
			return nil, err
		}
	}
	return f, nil
}

// withoutLinks returns path with all symbolic links resolved. A link to a file that does not
// exist leads to the path where that file would be: unlike the output of a command, a database
// is a file of the operator's, who chose the link. Any other path that leads nowhere is returned
// unchanged.
func withoutLinks(path string) string {
	real, err := filepath.EvalSymlinks(path)
	if err == nil {
		return real
	}
	target, notLink := os.Readlink(path)
	if notLink != nil || !errors.Is(err, fs.ErrNotExist) { // any other error may be links in a circle
		return path
	}
	if !filepath.IsAbs(target) {
		dir, _ := filepath.Split(path)
		target = dir + target // filepath.Join would take .. for the directory of a link
	}
	return withoutLinks(target)
}

// advise adds to an error of the file system what to do about it. otherwise is the way out that
// is always open, such as "name another file".
func advise(err error, otherwise string) error {
	remedy := ""
	switch {
	case errors.Is(err, fs.ErrPermission):
		remedy = "use the account that owns it, or "
	case errors.Is(err, fs.ErrNotExist):
		remedy = "make the directory, or "
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		remedy = "free some space, or "
	case errors.Is(err, errNotFile), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ELOOP),
		errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, syscall.EROFS):
	default:
		return err
	}
	return fmt.Errorf("%w; %s%s", err, remedy, otherwise)
}

// errNotFile is returned when a path leads to something other than a regular file, such as
// a directory.
var errNotFile = errors.New("is not a file")

// replace syncs the file and moves it to its destination, replacing any file there. Where the
// file system cannot sync directories, the old file may come back after a crash.
func (f *atomicFile) replace() error {
	err := f.put(os.Rename)
	if errors.Is(err, errNoDirSync) {
		return nil
	}
	return err
}

// link syncs the file and puts it at its destination. It returns fs.ErrExist if something is
// there already.
func (f *atomicFile) link() error {
	err := f.put(os.Link)
	var failed *os.LinkError
	switch {
	case errors.Is(err, errNoDirSync):
		// A crash could take the name of the new file, and with it all that is written to it.
		return errors.Join(lacking(f.destination, "sync of directories", err), os.Remove(f.destination))
	case errors.As(err, &failed) && (errors.Is(err, syscall.EPERM) || errors.Is(err, errors.ErrUnsupported)):
		return lacking(f.destination, "hard links", failed.Err)
	}
	return err
}

// errNoDirSync is returned by put when the file is at its destination, but its file system cannot
// sync the directory.
var errNoDirSync = errors.New("a directory cannot be synced")

// put syncs the file, moves it with move and syncs the directory, so that the new name
// survives a crash too.
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
	err = dir.Sync()
	if errors.Is(err, syscall.EINVAL) || errors.Is(err, errors.ErrUnsupported) {
		err = errNoDirSync
	}
	if closed := dir.Close(); err == nil {
		err = closed
	}
	return err
}

// errLacking is returned when the file system of a file lacks something that a database needs.
// Some network file systems do.
var errLacking = errors.New("use a directory on a local file system")

// lacking returns errLacking for what the file system of a file lacks. It does not wrap err,
// which may be one that means something else for another call, such as EPERM.
func lacking(file, what string, err error) error {
	return fmt.Errorf("the file system of %s has no %s (%s); %w", filepath.Dir(file), what, err.Error(), errLacking)
}

// discard closes the file and removes its temporary name. A file that was moved to its
// destination stays there.
func (f *atomicFile) discard() {
	f.Close()
	os.Remove(f.Name())
}
