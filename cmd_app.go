package main

// What the commands share: their environment, files in and out, progress bars, and the
// verification of a database.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// app is what a command gets from its surroundings.
type app struct {
	stdout io.Writer
	// terminal: a person sees what is written to stderr.
	terminal bool
	log      *slog.Logger
	// logLevel is log's.
	logLevel *slog.LevelVar
	now      func() time.Time
	// listening is told the address once connections are taken.
	listening func(net.Addr)
}

// progress begins a bar of so many of a unit; of bytes if unit is "". A total below 1
// is unknown.
func (a *app) progress(what string, total int64, unit string) progress {
	if total < 1 {
		total = -1
	}
	return progress{progressbar.NewOptions64(total,
		progressbar.OptionSetDescription(what),
		progressbar.OptionSetWriter(os.Stderr),
		progressbar.OptionSetVisibility(a.terminal),
		progressbar.OptionShowBytes(unit == ""),
		progressbar.OptionShowCount(),
		progressbar.OptionShowIts(),
		progressbar.OptionSetItsString(unit),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionSetWidth(20),
		progressbar.OptionClearOnFinish(),
	)}
}

// progress is a bar on stderr, and nothing where that is no terminal.
type progress struct{ bar *progressbar.ProgressBar }

// add goes on by n. A bar that cannot be shown is no reason to stop.
func (p progress) add(n int64) { _ = p.bar.Add64(n) }

// Write counts what is written, for io.MultiWriter and the like.
func (p progress) Write(b []byte) (int, error) {
	p.add(int64(len(b)))
	return len(b), nil
}

// done takes the bar away.
func (p progress) done() { _ = p.bar.Finish() }

// interrupt takes the bar away until it goes on, so that a line can be printed.
func (p progress) interrupt() { _ = p.bar.Clear() }

// standardFile is standard input or output in the place of a file's name.
const standardFile = "-"

// output has fill write a file, which is in its place once it is whole and verify,
// which may be nil, finds it right.
func (a *app) output(name string, fill func(io.Writer) error, verify func(path string) error) error {
	if name == standardFile {
		if f, ok := a.stdout.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			a.terminal = false // a bar would be in between
		}
		return fill(a.stdout)
	}
	release, err := lockTarget(name)
	if err != nil {
		return err
	}
	defer release()
	f, err := createAtomic(name)
	if err != nil {
		return err
	}
	defer f.discard()
	if err := fill(f); err != nil {
		return err
	}
	if verify != nil {
		if err := verify(f.Name()); err != nil {
			return fmt.Errorf("%w; nothing was written to %s", err, name)
		}
	}
	return f.replace()
}

// holdPlace makes sure that what is about to be replaced is no database that a
// process has open, nor gets opened until release.
func lockTarget(path string) (release func(), err error) {
	if !exists(path) {
		return func() {}, nil
	}
	f, err := openLocked(path, os.O_RDONLY)
	if errors.Is(err, ErrInUse) {
		return nil, fmt.Errorf("%s is a database that a process has open, so it is not replaced; stop that process or name another file", path)
	}
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

// input opens a file to read, and tells its size in bytes; -1 is unknown.
func (a *app) input(name string) (f *os.File, size int64, err error) {
	if name == standardFile {
		return os.Stdin, -1, nil
	}
	if f, err = os.Open(name); err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return f, -1, err
	}
	return f, info.Size(), nil
}

// reading is a reader until the context ends.
func reading(ctx context.Context, r io.Reader) io.Reader {
	return readerFunc(func(b []byte) (int, error) {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		return r.Read(b)
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(b []byte) (int, error) { return f(b) }

// examine tells found each fault of a database that no server has open. Its error calls
// it by name.
func (a *app) checkDatabase(ctx context.Context, path, name string, found func(fault string)) (c Contents, err error) {
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
	e := Checker{
		Report:   func(fault string) { bar.interrupt(); found(fault) },
		Progress: bar.add,
	}
	e.Contract = func(k Key, doc []byte) {
		for _, fault := range v.stored(k, doc) {
			e.Report(fmt.Sprintf("contract %s: %s", k.bytes(), fault))
		}
	}
	return e.Check(ctx, path)
}

// verify is nil for a database without a fault. Its error calls it by name.
func (a *app) verifyDatabase(ctx context.Context, path, name string) error {
	var faults int
	var first string
	_, err := a.checkDatabase(ctx, path, name, func(fault string) {
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

// counted says how many there are of what has an ordinary plural.
func counted(n int, what string) string {
	if n != 1 {
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}
