package main

// The check command.

import (
	"context"
	"errors"
	"fmt"
)

// checkCmd is the check command with its arguments.
type checkCmd struct{ database }

// Run prints each fault of the database: those of its pages, and those of the stored values if
// the pages have none. While a server has the database open, Run checks a copy. It returns an
// error if there is a fault.
func (c *checkCmd) Run(ctx context.Context, a *app) (err error) {
	path := c.DB
	control, err := dialControl(c.DB)
	switch {
	case err == nil:
		// The copy is a temporary file beside the database; it never replaces it.
		f, err := createAtomic(withoutLinks(c.DB))
		if err != nil {
			return advise(err, "check the database while no server runs")
		}
		defer f.discard()
		if err := a.receive(ctx, control, "/backup", f); err != nil {
			return advise(err, "check the database while no server runs")
		}
		f.share()
		path = f.Name()
	case !errors.Is(err, errNoServer):
		return err
	case !exists(path):
		return noDatabase(path)
	}
	var faults int
	contents, err := a.checkDatabase(ctx, path, c.DB, func(fault string) {
		faults++
		_ = a.printf("%s\n", fault)
	})
	if errors.Is(err, ErrInUse) {
		if _, err := dialHolder(c.DB); err != nil {
			return err
		}
		return c.Run(ctx, a) // with the server, which has just started
	}
	if err != nil {
		return err
	}
	if faults > 0 {
		return fmt.Errorf("%s has %s; repair a contract with PUT or DELETE; for any other fault, restore a backup", c.DB, counted(faults, "fault"))
	}
	return a.printf("%s is sound: %s, %s, %s\n", c.DB,
		counted(contents.Contracts, "contract"), counted(contents.Clients, "client"), counted(int(contents.Bytes), "byte"))
}
