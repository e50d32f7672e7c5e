package main

// The commands check and compact, and the look at a whole database that they share
// with backup and restore.

import (
	"context"
	"errors"
	"fmt"
	"os"
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
	contents, err := a.examine(ctx, path, c.DB, func(fault string) {
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

// counted says how many there are of what has an ordinary plural.
func counted(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}

// examine tells found each fault of a database that no server has open. Its error calls
// it by name.
func (a *app) examine(ctx context.Context, path, name string, found func(fault string)) (c Contents, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("database %s: %w", name, err)
		}
	}()
	v, err := newValidator()
	if err != nil {
		return Contents{}, err
	}
	info, err := os.Stat(path)
	if err != nil {
		return Contents{}, err
	}
	bar := a.progress("checking", 2*info.Size(), "")
	defer bar.done()
	e := Examination{
		Found: func(fault string) { bar.interrupt(); found(fault) },
		Seen:  bar.add,
	}
	e.Contract = func(k Key, doc []byte) {
		for _, fault := range v.stored(k, doc) {
			e.Found(fmt.Sprintf("contract %s: %s", k.bytes(), fault))
		}
	}
	return e.Examine(ctx, path)
}

// verify is nil for a database without a fault. Its error calls it by name.
func (a *app) verify(ctx context.Context, path, name string) error {
	var faults int
	var first string
	_, err := a.examine(ctx, path, name, func(fault string) {
		if faults++; faults == 1 {
			first = fault
		}
	})
	if err != nil {
		return err
	}
	if faults > 0 {
		return fmt.Errorf("database %s has %s, which check lists, the first: %s", name, counted(faults, "fault"), first)
	}
	return nil
}

// stored returns what is wrong with a document that is stored under a key: nothing, if
// an import of its line would store it just so.
func (v *Validator) stored(k Key, doc []byte) []string {
	if len(doc) == 0 {
		return []string{"is empty"}
	}
	is, c, err := v.Line(appendLine(nil, k, doc))
	if err != nil {
		var faults []string
		for _, f := range faultsOf(err) {
			faults = append(faults, f.String())
		}
		return faults
	}
	if is != k {
		return []string{fmt.Sprintf("says that it is contract %s", is.bytes())}
	}
	if again, err := c.encode(k.Contract); err != nil || string(again) != string(doc) {
		return []string{"is not in the form in which contracts are stored"}
	}
	return nil
}

type compactCmd struct{ database }

// Run rewrites the database without its free pages. No server may have it open.
func (c *compactCmd) Run(ctx context.Context, a *app) (err error) {
	if !exists(c.DB) {
		return noDatabase(c.DB)
	}
	verify := func(path string) error {
		if err := a.verify(ctx, path, c.DB); err != nil {
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
