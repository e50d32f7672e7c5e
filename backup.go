package main

// The commands backup and restore, and what they ask of the process that has the
// database (control.go).

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"

	"golang.org/x/term"
)

// standardFile is standard input or output in the place of a file's name.
const standardFile = "-"

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
		func(path string) error { return a.verify(ctx, path, c.File) })
}

// receive writes what the process with the database answers.
func (a *app) receive(ctx context.Context, control *controlClient, path string, to io.Writer) error {
	content, size, err := control.send(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer content.Close()
	bar := a.progress("copying", size, "")
	defer bar.done()
	_, err = io.Copy(io.MultiWriter(to, bar), content)
	return answerLeft(err)
}

// output has fill write a file, which is in its place once it is whole and verify,
// which may be nil, finds it right.
func (a *app) output(name string, fill func(io.Writer) error, verify func(path string) error) error {
	if name == standardFile {
		if f, ok := a.stdout.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
			a.terminal = false // a bar would be in between
		}
		return fill(a.stdout)
	}
	release, err := holdPlace(name)
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
func holdPlace(path string) (release func(), err error) {
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
	release, err := holdPlace(c.DB)
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
	if err := a.verify(ctx, f.Name(), c.File); err != nil {
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

// backupControl is the other end.
type backupControl struct{ store *Store }

func (c backupControl) get(x *exchange) (answer, error) {
	f, size, err := c.store.Snapshot(x.r.Context())
	if err != nil {
		return answer{}, tellOperator(err)
	}
	x.done = func() { f.Close() }
	buf := make([]byte, pageBytes)
	return answer{status: http.StatusOK, contentType: "application/octet-stream", size: size, more: func([]byte) ([]byte, error) {
		n, err := f.Read(buf)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return buf[:n], err
	}}, nil
}
