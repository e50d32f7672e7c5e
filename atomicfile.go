package main

// Atomic files: a file is written under a temporary name in the directory of its destination,
// synced, and then moved to the destination, so that after a crash the destination has either
// the whole new file or the old one. What a killed process leaves under a temporary name is
// removed by a later one.

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// atomicFile is a temporary file that replace or link moves to its destination.
type atomicFile struct {
	*os.File    // in the directory of the destination
	destination string
}

// createAtomic creates the temporary file for the destination path, with mode 0600. It removes
// what killed processes left for the same destination. A symbolic link at path is replaced and
// not followed, since in a shared directory anybody may have put it there. The caller must call
// discard, also after replace or link.
func createAtomic(path string) (*atomicFile, error) {
	if path == "" {
		return nil, errors.New("the name of the file is empty; name a file")
	}
	removeLeftovers(path, func(string, int64) {})
	tmp, err := createBeside(path)
	if err != nil {
		return nil, err
	}
	return &atomicFile{tmp, path}, nil
}

// temporaryPrefix returns what the names of the temporary files for the destination path begin
// with. A number follows. No other program makes such names, so that removeLeftovers may remove
// the files.
func temporaryPrefix(path string) string { return "." + filepath.Base(path) + "." + programName + "-" }

// createBeside creates a temporary file in the directory of path. While it is open it is locked,
// which keeps removeLeftovers away from it. The lock is exclusive: on file systems where locks
// are mandatory, as on SMB, a shared one would forbid to write.
func createBeside(path string) (*os.File, error) {
	dir := filepath.Dir(path)
	for {
		tmp, err := os.CreateTemp(dir, temporaryPrefix(path)+"*")
		if err != nil {
			var named *fs.PathError
			if errors.As(err, &named) { // it names the temporary file
				err = named.Err
			}
			return nil, fmt.Errorf("create a file in %s: %w", dir, err)
		}
		// Without locks, nothing is ever removed. With them, removeLeftovers may have come first.
		locked := syscall.Flock(int(tmp.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if !errors.Is(locked, syscall.EWOULDBLOCK) && (locked != nil || isAt(tmp, tmp.Name())) {
			return tmp, nil
		}
		tmp.Close()
	}
}

// share lets other handles read the file, which is still kept from removeLeftovers. The caller
// calls it when the file is written and before it is verified.
func (f *atomicFile) share() { _ = syscall.Flock(int(f.Fd()), syscall.LOCK_SH|syscall.LOCK_NB) }

// removeLeftovers removes the temporary files for the destination path that no process has
// open, and calls removed with the path and the size in bytes of each. A process that was killed
// leaves its file, which may be as large as the database. A file stays if it cannot be locked or
// removed.
func removeLeftovers(path string, removed func(path string, size int64)) {
	dir, prefix := filepath.Dir(path), temporaryPrefix(path)
	entries, _ := os.ReadDir(dir) // who cannot read it has no leftovers removed
	for _, e := range entries {
		number, ok := strings.CutPrefix(e.Name(), prefix)
		if _, err := strconv.ParseUint(number, 10, 64); !ok || err != nil || !e.Type().IsRegular() {
			continue
		}
		name := filepath.Join(dir, e.Name())
		if size, err := removeUnused(name); err == nil {
			removed(name, size)
		}
	}
}

// removeUnused removes a regular file that no process has locked, and returns its size in bytes.
// It follows no link.
func removeUnused(path string) (size int64, err error) {
	f, err := os.OpenFile(path, os.O_RDWR|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0) // NFS locks for writing only what is open for it
	if err != nil {
		return 0, err
	}
	defer f.Close()
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return 0, err
	}
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !info.Mode().IsRegular() || !isAt(f, path) { // it was moved to its destination
		return 0, errNotFile
	}
	return info.Size(), syscall.Unlink(path) // os.Remove would remove a directory too
}

// isAt reports whether path is the name of the open file f.
func isAt(f *os.File, path string) bool {
	opened, err1 := f.Stat()
	placed, err2 := os.Lstat(path)
	return err1 == nil && err2 == nil && os.SameFile(opened, placed)
}

// createAtomicDB is createAtomic for a database, except that symbolic links are followed and that
// the file is made like the one that it replaces. If there is none and root creates the file, it
// gets the owner and the group of the directory, since the service that will open it may run as
// another user.
func createAtomicDB(path string) (*atomicFile, error) {
	path = withoutLinks(path)
	f, err := createAtomic(path)
	if err != nil {
		return nil, err
	}
	old, err := os.Stat(path)
	switch {
	case err == nil:
		err = f.makeLike(old)
	case errors.Is(err, fs.ErrNotExist):
		var dir fs.FileInfo
		if dir, err = os.Stat(filepath.Dir(path)); err == nil && os.Geteuid() == 0 {
			_, err = f.giveTo(dir)
		}
	}
	if err != nil {
		f.discard()
		return nil, err
	}
	return f, nil
}

// makeLike gives the file the owner, the group and the permissions of old, as far as this process
// may. Permissions of the group are not given to another group.
func (f *atomicFile) makeLike(old fs.FileInfo) error {
	mode := old.Mode().Perm() // without setuid, setgid and sticky
	kept, err := f.giveTo(old)
	if err != nil {
		return err
	}
	if !kept {
		mode &^= 0o070
	}
	if err := f.Chmod(mode); !errors.Is(err, fs.ErrPermission) {
		return err
	}
	return nil // as for the owner
}

// giveTo gives the file the owner and the group of like, as far as this process may: root may
// give it to anybody, and anybody to a group of their own. In a container, root may lack the
// capability, and is then often the only user. giveTo reports whether the file has the group.
func (f *atomicFile) giveTo(like fs.FileInfo) (group bool, err error) {
	want, ok := like.Sys().(*syscall.Stat_t)
	if !ok {
		return false, nil
	}
	err = f.Chown(int(want.Uid), int(want.Gid))
	if errors.Is(err, fs.ErrPermission) {
		err = f.Chown(-1, int(want.Gid))
	}
	if err != nil && !errors.Is(err, fs.ErrPermission) {
		return false, err
	}
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	is, ok := info.Sys().(*syscall.Stat_t)
	return ok && is.Gid == want.Gid, nil
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
	_ = syscall.Flock(int(f.Fd()), syscall.LOCK_UN) // at its destination, nothing takes it for a leftover
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
