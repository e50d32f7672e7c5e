package main

// The restore command.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
)

// restoreCmd is the restore command with its arguments.
type restoreCmd struct {
	File  string `arg:"" help:"Restore this backup; - means standard input."`
	Force bool   `env:"-" help:"Replace the database if it exists."`
	database
}

// Run verifies a backup and puts it in the place of the database. No server may have the
// database open.
func (c *restoreCmd) Run(ctx context.Context, a *app) error {
	if _, err := dialControl(c.DB); err == nil {
		return fmt.Errorf("a server has %s open; stop it first", c.DB)
	}
	release, err := lockTarget(c.DB)
	if err != nil {
		return advise(err, "name another file with --db")
	}
	defer release()
	replace := exists(c.DB)
	if replace && !c.Force {
		return fmt.Errorf("%s already exists; use --force to replace it", c.DB)
	}
	backup, size, err := a.input(c.File)
	if err != nil {
		return err
	}
	defer backup.Close()
	f, err := createAtomicDB(c.DB)
	if err != nil {
		return ofDatabase(c.DB, err)
	}
	defer f.discard()
	if err := c.copy(ctx, a, f.File, backup, size); err != nil {
		return err
	}
	f.share()
	if err := a.verifyDatabase(ctx, f.Name(), c.File); err != nil {
		return fmt.Errorf("nothing was restored: %w", err)
	}
	if replace {
		return f.replace()
	}
	if err := f.link(); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s was created during the restore; use --force to replace it", c.DB)
	} else if err != nil {
		return err
	}
	return nil
}

// metasBytes is the size in bytes of the start of a backup that has both meta pages. The page
// size is that of the system where the database was created, of which 64 KiB is the largest.
const metasBytes = 64<<10 + minPageSize

// copy copies a backup to a file. size is the size of the backup in bytes, or -1 if it is unknown.
// copy returns an error for an input that is not a backup before it copies the rest of it, and
// copies only the bytes that the meta pages require. So neither a wrong input nor one without end
// fills the disk.
func (c *restoreCmd) copy(ctx context.Context, a *app, to, backup *os.File, size int64) error {
	failed := func(err error) error {
		return fmt.Errorf("copy %s: %w", c.File, advise(err, "name another file with --db"))
	}
	refused := func(err error) error { return fmt.Errorf("nothing was restored: %w", ofDatabase(c.File, err)) }
	from := untilDone(ctx, backup)
	defer from.Close()
	bar := a.startProgress("copying", size, "")
	defer bar.done()
	n, err := io.CopyN(io.MultiWriter(to, bar), from, metasBytes)
	if err != nil && !errors.Is(err, io.EOF) {
		return failed(err)
	}
	m, err := metaOfBackup(to)
	if err == nil && size >= 0 {
		err = checkFile(backup, m) // its pages can be read in any order
	}
	if err != nil {
		return refused(err)
	}
	if _, err := io.CopyN(io.MultiWriter(to, bar), from, m.bytes()-n); err != nil && !errors.Is(err, io.EOF) {
		return failed(err)
	}
	if size >= 0 {
		return nil
	}
	// A file of bbolt may be longer than it must be, and whoever writes it to a pipe should not fail.
	if _, err := io.Copy(io.Discard, from); err != nil {
		return failed(err)
	}
	return nil
}

// metaOfBackup returns the current meta page of a backup, of which a file has at least
// metasBytes. Its numbers are possible, whatever the size of the backup.
func metaOfBackup(f *os.File) (meta, error) {
	start := make([]byte, len(gzipMagic))
	if _, err := f.ReadAt(start, 0); err == nil && string(start) == gzipMagic {
		return meta{}, errors.New("is compressed with gzip; decompress it and restore it again")
	}
	metas, err := readMetas(f)
	if err != nil {
		return meta{}, err
	}
	m := currentMeta(metas)
	return m, m.check(math.MaxInt64)
}
