package main

// The command backup.

import (
	"context"
	"errors"
	"io"
)

type backupCmd struct {
	File string `arg:"" help:"Write the copy to this file, in place of what is there; - is standard output."`
	database
}

// Run copies the database as it is at one instant.
func (c *backupCmd) Run(ctx context.Context, a *app) (err error) {
	control, err := a.control(c.DB, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, control.close()) }()
	return a.output(c.File,
		func(to io.Writer) error { return a.receive(ctx, control, "/backup", to) },
		func(path string) error { return a.verifyDatabase(ctx, path, c.File) })
}
