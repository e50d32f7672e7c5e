package main

// The command check.

import (
	"context"
	"errors"
	"fmt"
)

type checkCmd struct{ database }

// Run prints each fault of the database: of its pages, by bbolt's own check, and of
// its documents. While a server has the database open it looks at a copy.
func (c *checkCmd) Run(ctx context.Context, a *app) (err error) {
	path := c.DB
	control, err := dialControl(c.DB)
	switch {
	case err == nil:
		f, err := createAtomic(withoutLinks(c.DB)) // which never gets there
		if err != nil {
			return err
		}
		defer f.discard()
		if err := a.receive(ctx, control, "/backup", f); err != nil {
			return err
		}
		path = f.Name()
	case !errors.Is(err, errNoServer):
		return err
	case !exists(path):
		return noDatabase(path)
	}
	var faults int
	contents, err := a.checkDatabase(ctx, path, c.DB, func(fault string) {
		faults++
		fmt.Fprintln(a.stdout, fault)
	})
	if err != nil {
		return err
	}
	if faults > 0 {
		return fmt.Errorf("%s has %s; a PUT or DELETE mends a contract, for all else restore a backup", c.DB, counted(faults, "fault"))
	}
	fmt.Fprintf(a.stdout, "%s is sound: %s, %s, %s\n", c.DB,
		counted(contents.Contracts, "contract"), counted(contents.Clients, "client"), counted(int(contents.Bytes), "byte"))
	return nil
}
