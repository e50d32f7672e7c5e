package main

// The command compact.

import (
	"context"
	"errors"
	"fmt"
)

type compactCmd struct{ database }

// Run rewrites the database without its free pages. No server may have it open.
func (c *compactCmd) Run(ctx context.Context, a *app) (err error) {
	if !exists(c.DB) {
		return noDatabase(c.DB)
	}
	verify := func(path string) error {
		if err := a.verifyDatabase(ctx, path, c.DB); err != nil {
			return fmt.Errorf("%w; nothing was changed", err)
		}
		return nil
	}
	// A broken page could lose contracts on the way, and look sound after.
	if err := verify(c.DB); err != nil {
		return err
	}
	store, err := Open(c.DB, a.now, a.log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	bar := a.progress("rewriting", 0, "")
	bar.add(0)
	before, after, err := store.Compact(func(path string) error {
		bar.done()
		return verify(path)
	})
	bar.done()
	if err != nil {
		return err
	}
	fmt.Fprintf(a.stdout, "%s had %d bytes and has %d\n", c.DB, before, after)
	return nil
}
