package main

// The backup command.

import (
	"context"
	"errors"
	"io"
)

// backupCmd is the backup command with its arguments.
type backupCmd struct {
	File string `arg:"" help:"Write the copy to this file, replacing it if it exists; - means standard output."`
	database
}

// Run copies the database as one transaction left it, and verifies the copy unless it
// goes to standard output.
func (c *backupCmd) Run(ctx context.Context, a *app) (err error) {
	control, err := a.connect(c.DB, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, control.close()) }()
	return a.output(c.File,
		func(to io.Writer) error { return a.receive(ctx, control, "/backup", to) },
		func(path string) error { return a.verifyDatabase(ctx, path, c.DB) })
}
