package main

// The restore command.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
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
	bar := a.startProgress("copying", size, "")
	_, err = io.Copy(io.MultiWriter(f, bar), contextReader{ctx, backup})
	bar.done()
	if err != nil {
		return fmt.Errorf("copy %s: %w", c.File, advise(err, "name another file with --db"))
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
