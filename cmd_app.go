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
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// app is the environment in which a command runs.
type app struct {
	stdout io.Writer
	// terminal reports whether stderr is a terminal, so that progress bars are shown.
	terminal bool
	log      *slog.Logger
	// logLevel sets the level of log.
	logLevel *slog.LevelVar
	now      func() time.Time
	// detach makes the process outlive the terminal that it was started from and the reader of its
	// log.
	detach func()
	// listening is called with the address once the server accepts connections.
	listening func(net.Addr)
}

// printf prints a text to standard output, as printable has it.
func (a *app) printf(format string, args ...any) error {
	_, err := io.WriteString(a.stdout, printable(fmt.Sprintf(format, args...)))
	return err
}

// printable returns a text with an escape such as \x1b in place of each character that is not
// printable. Line feeds stay. Texts from a file, a request or a server may contain control
// characters, which must not reach the terminal.
func printable(text string) string {
	var b strings.Builder
	for len(text) > 0 {
		r, size := utf8.DecodeRuneInString(text)
		piece := text[:size]
		if r != '\n' && !unicode.IsPrint(r) || r == utf8.RuneError && size == 1 {
			piece = strconv.Quote(piece)
			piece = piece[1 : len(piece)-1]
		}
		b.WriteString(piece)
		text = text[size:]
	}
	return b.String()
}

// standardStream names standard output or standard input in place of a file.
const standardStream = "-"

// output calls fill to write the named file, or standard output. A file appears under
// its name only when it is complete and synced and verify has found no fault in it; it
// replaces the file that was there. verify may be nil; standard output is not verified.
func (a *app) output(name string, fill func(io.Writer) error, verify func(path string) error) (err error) {
	if name == standardStream {
		if f, ok := a.stdout.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			a.terminal = false // a bar would mix with the output
		}
		return fill(a.stdout)
	}
	defer func() { err = advise(err, "name another file") }()
	release, err := lockTarget(name)
	if errors.Is(err, errLacking) { // then the file is no database that a process has open
		release, err = func() {}, nil
	}
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
		f.share()
		if err := verify(f.Name()); err != nil {
			return fmt.Errorf("%w; nothing was written to %s", err, name)
		}
	}
	return f.replace()
}

// lockTarget locks a file that is about to be replaced. It returns an error if the file
// is a database that a process has open. No process can open it until release is called.
// A file that does not exist needs no lock.
func lockTarget(path string) (release func(), err error) {
	if !exists(path) {
		return func() {}, nil
	}
	f, err := openLocked(path, os.O_RDONLY)
	if errors.Is(err, ErrInUse) {
		return nil, fmt.Errorf("%s is a database in use, so it was not replaced; name another file, or stop the process that uses it", path)
	}
	if err != nil {
		return nil, err
	}
	return func() { f.Close() }, nil
}

// input opens the named file, or standard input, for reading. It returns the size in
// bytes, or -1 if the size is unknown.
func (a *app) input(name string) (f *os.File, size int64, err error) {
	if name == standardStream {
		return os.Stdin, -1, nil
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("%w; name a file that this account may read, or - for standard input", err)
		}
	}()
	if f, err = os.Open(name); err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = fmt.Errorf("%s %w", name, errNotFile)
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	if !info.Mode().IsRegular() {
		return f, -1, nil
	}
	return f, info.Size(), nil
}

// untilDone returns a reader of r that fails with ctx's error once ctx is done, even while a read
// of r waits, as one of a pipe may do without end. The caller closes it.
func untilDone(ctx context.Context, r io.Reader) io.ReadCloser {
	out, in := io.Pipe()
	context.AfterFunc(ctx, func() { in.CloseWithError(ctx.Err()) })
	go func() {
		_, err := io.Copy(in, r)
		in.CloseWithError(err)
	}()
	return out
}

// progress is a progress bar on stderr. It shows nothing if stderr is not a terminal,
// and ignores errors: a bar that cannot be drawn must not stop the command.
type progress struct{ bar *progressbar.ProgressBar }

// startProgress starts a progress bar from 0 to total, counted in unit, or in bytes if
// unit is "". A total below 1 means that the total is unknown.
func (a *app) startProgress(description string, total int64, unit string) progress {
	if total < 1 {
		total = -1
	}
	return progress{progressbar.NewOptions64(total,
		progressbar.OptionSetDescription(description),
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

// add advances the bar by n.
func (p progress) add(n int64) { _ = p.bar.Add64(n) }

// Write advances the bar by len(b), so that the bar can be a writer of io.MultiWriter.
func (p progress) Write(b []byte) (int, error) {
	p.add(int64(len(b)))
	return len(b), nil
}

// done removes the bar.
func (p progress) done() { _ = p.bar.Finish() }

// interrupt removes the bar until the next add, so that a line can be printed.
func (p progress) interrupt() { _ = p.bar.Clear() }

// checkDatabase calls report for each fault of the database at path, which no process may
// have open for writing. Its errors refer to the database by name.
func (a *app) checkDatabase(ctx context.Context, path, name string, report func(fault string)) (c Contents, err error) {
	defer func() {
		if err != nil {
			err = ofDatabase(name, err)
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
	bar := a.startProgress("checking", 2*info.Size(), "") // the Checker reads all bytes twice
	defer bar.done()
	checker := Checker{
		Report:   func(fault string) { bar.interrupt(); report(fault) },
		Progress: bar.add,
	}
	checker.Contract = func(k Key, doc []byte) {
		for _, fault := range v.stored(k, doc) {
			checker.Report(fmt.Sprintf("contract %s: %s", k.bytes(), fault))
		}
	}
	return checker.Check(ctx, path)
}

// verifyDatabase returns an error if checkDatabase finds a fault. The error has the
// number of faults and the first one; it refers to the database by name.
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
		return fmt.Errorf("database %s has %s, which the check command lists; the first is: %s", name, counted(faults, "fault"), first)
	}
	return nil
}

// counted returns n and a noun, in the plural unless n is 1. The plural must end in s.
func counted(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprintf("%d %s", n, noun)
}
