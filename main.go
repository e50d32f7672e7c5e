// Energy-contracts serves the energy contracts of a partner API from one program and one database
// file. An energy contract states what a user of an organization pays for electricity.
//
// The files form layers. Each layer calls only those below it:
//
//   - main.go and the commands (cmd_*.go) read the command line and connect the other layers.
//   - The control socket (control*.go) is how a command uses the database of a running server.
//   - The handlers (handler.go, docs.go, oauth.go) serve the endpoints of the API. They share the
//     router and the exchange of request and response (router.go, exchange.go, problem.go), the
//     authorization (auth.go, issuer.go, throttle.go), and the request fields (conditions.go,
//     idempotency.go, cors.go).
//   - The validation (validate.go, parse.go) turns a request body into a contract.
//   - The store (store*.go) keeps contracts, clients and tokens. It knows nothing of HTTP.
//   - bolt_*.go reads and checks the pages of bbolt's file, where bbolt itself does not.
//   - The model and the faults (model.go, fault.go) are the types that all layers share.
//
// CONTRIBUTING.md lists all files in this order, and a test checks that the list is complete.
package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/google/uuid"
	"golang.org/x/term"
)

// main runs the command line and exits with status 1 if that fails.
func main() {
	uuid.EnableRandPool() // saves a system call for each id; ids are not secret, so a pool is safe
	if os.Getenv("GOGC") == "" {
		// The heap of a server is about 4 MB. With the default of 100 it would be collected 75
		// times a second under load.
		debug.SetGCPercent(200)
	}
	syscall.Umask(0o077) // only the user that runs the program may use the files it creates
	// Each of these ends the process in order. SIGABRT still prints the stacks, for a developer; Go
	// ignores the rest of the signals that people and programs send.
	ends := []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup has it
		ends = append(ends, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), ends...)
	context.AfterFunc(ctx, stop) // so that a second signal ends the process at once
	// A command whose output nobody reads must still remove its temporary files, so that the write
	// returns an error instead.
	signal.Ignore(syscall.SIGPIPE)
	level := new(slog.LevelVar)
	stderr := &logWriter{w: os.Stderr}
	a := &app{
		stdout:    os.Stdout,
		terminal:  term.IsTerminal(int(os.Stderr.Fd())),
		logLevel:  level,
		now:       time.Now,
		listening: func(net.Addr) {},
	}
	options := &slog.HandlerOptions{Level: level}
	if a.terminal {
		a.log = slog.New(slog.NewTextHandler(stderr, options))
	} else {
		a.log = slog.New(slog.NewJSONHandler(stderr, options))
	}
	a.detach = func() {
		signal.Ignore(syscall.SIGHUP)
		stderr.detach(func(lost int) {
			a.log.Warn("log lines were lost, since standard error could not be written", "lines", lost)
		})
	}
	err := a.run(ctx, os.Args[1:])
	if err != nil && !readerLeft(err) {
		fmt.Fprintf(stderr, programName+": %s\n", printable(err.Error()))
	}
	stderr.close()
	if err != nil {
		os.Exit(1)
	}
}

// readerLeft reports whether a command failed because nobody reads its output any more, as after
// "export | head". A reader that leaves has what it wants, and needs no message.
func readerLeft(err error) bool {
	var failed *fs.PathError
	return errors.As(err, &failed) && failed.Path == os.Stdout.Name() && errors.Is(failed.Err, syscall.EPIPE)
}

// cli is the command line. Each flag can also be set by an environment variable, except the flags
// that only make sense for a single run of a command.
type cli struct {
	Serve   serveCmd   `cmd:"" help:"Serve the API until SIGINT, SIGTERM or SIGQUIT."`
	Client  clientCmd  `cmd:"" help:"Manage the clients that may get tokens. Works with and without a running server."`
	Backup  backupCmd  `cmd:"" help:"Copy the database to a file. Works with and without a running server."`
	Restore restoreCmd `cmd:"" help:"Replace the database with a backup. Stop the server first."`
	Check   checkCmd   `cmd:"" help:"Check the database for damage. Works with and without a running server."`
	Compact compactCmd `cmd:"" help:"Rewrite the database without its free pages, so that the file is smaller. Stop the server first."`
	Export  exportCmd  `cmd:"" help:"Write contracts as JSON Lines. Works with and without a running server."`
	Import  importCmd  `cmd:"" help:"Store the contracts of an export, all or none. Works with and without a running server."`
	Version versionCmd `cmd:"" help:"Print the version, the commit and the Go version of this program."`

	VersionFlag kong.VersionFlag `name:"version" env:"-" help:"Print what the command version prints."`
}

// run parses the command line and runs its command.
func (a *app) run(ctx context.Context, args []string) error {
	parser, err := kong.New(&cli{},
		kong.Name(programName),
		kong.Description("Serve a partner API's energy contracts from one binary and one file."),
		kong.DefaultEnvars("ENERGY_CONTRACTS"),
		kong.Vars{"version": readBuild().String()},
		kong.BindTo(ctx, (*context.Context)(nil)),
		kong.Bind(a))
	if err != nil {
		return fmt.Errorf("command line: %w", err)
	}
	command, err := parser.Parse(args)
	if err != nil {
		return fmt.Errorf("%w; --help explains the commands and flags", err)
	}
	return command.Run()
}
