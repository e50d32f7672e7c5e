package main

// The command restore.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
)

type restoreCmd struct {
	File  string `arg:"" help:"The backup; - is standard input."`
	Force bool   `env:"-" help:"Replace a database that is there."`
	database
}

// Run puts a backup in the place of the database, which no server may have open.
func (c *restoreCmd) Run(ctx context.Context, a *app) error {
	if _, err := dialControl(c.DB); err == nil {
		return fmt.Errorf("a server has %s open; stop it first", c.DB)
	}
	there := exists(c.DB)
	if there && !c.Force {
		return fmt.Errorf("%s is there already; --force replaces it", c.DB)
	}
	release, err := lockTarget(c.DB)
	if err != nil {
		return err
	}
	defer release()
	backup, size, err := a.input(c.File)
	if err != nil {
		return err
	}
	defer backup.Close()
	f, err := createAtomicDB(c.DB)
	if err != nil {
		return err
	}
	defer f.discard()
	bar := a.progress("copying", size, "")
	_, err = io.Copy(io.MultiWriter(f, bar), reading(ctx, backup))
	bar.done()
	if err != nil {
		return fmt.Errorf("copy %s: %w", c.File, err)
	}
	if err := a.verifyDatabase(ctx, f.Name(), c.File); err != nil {
		return fmt.Errorf("nothing was restored: %w", err)
	}
	if there {
		return f.replace()
	}
	if err := f.link(); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s is there by now; --force replaces it", c.DB)
	} else if err != nil {
		return err
	}
	return nil
}
