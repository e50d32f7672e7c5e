package main

// The compact command.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
)

// compactCmd is the compact command with its arguments.
type compactCmd struct{ database }

// Run replaces the database with a copy that has no free pages. No server may have the
// database open.
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
	// Compacting a file with a broken page could lose contracts, and the result would look
	// sound.
	if err := verify(c.DB); err != nil {
		return err
	}
	a.logLevel.Set(slog.LevelWarn) // without what the store says when it opens
	store, err := Open(c.DB, a.now, a.log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	bar := a.startProgress("rewriting", 0, "")
	bar.add(0) // draws the bar
	before, after, err := store.Compact(func(path string) error {
		bar.done()
		return verify(path)
	})
	bar.done()
	if err != nil {
		return advise(err, "name another file with --db")
	}
	return a.printf("compacted %s from %d to %d bytes\n", c.DB, before, after)
}
