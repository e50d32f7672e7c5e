// Energy-contracts serves the energy contracts of a partner API from one binary and one
// file: the prices that a user of an organization pays for electricity.
//
// The program is one package of layers. A file uses only files of its own layer below it,
// and of the layers below:
//
//   - main.go and cmd_*.go: the command line and its commands
//   - control_*.go: the control socket, between a command and a running server
//   - handler.go, docs.go, auth.go, oauth.go, issuer.go and the files below them: HTTP
//   - validate.go and parse.go: from the bytes of a request to a valid contract
//   - store_*.go and store.go: contracts, clients and tokens in a bbolt file; they know
//     nothing of HTTP
//   - bolt_*.go: the bytes of that file, as far as bbolt must not see them unchecked
//   - model.go and fault.go: the types that all layers share
//
// CONTRIBUTING.md lists the files in their order, and a test holds it.
package main

import (
	"context"
	"fmt"
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
	uuid.EnableRandPool() // ids are not secret, and each would cost a system call
	if os.Getenv("GOGC") == "" {
		// A server's heap is about 4 MB, which the default percent of 100 would collect 75
		// times a second under load.
		debug.SetGCPercent(200)
	}
	syscall.Umask(0o077) // files that the program creates are for its own account only
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // so that a second signal ends the process at once
	level := new(slog.LevelVar)
	a := &app{
		stdout:    os.Stdout,
		terminal:  term.IsTerminal(int(os.Stderr.Fd())),
		logLevel:  level,
		now:       time.Now,
		listening: func(net.Addr) {},
	}
	options := &slog.HandlerOptions{Level: level}
	if a.terminal {
		a.log = slog.New(slog.NewTextHandler(os.Stderr, options))
	} else {
		a.log = slog.New(slog.NewJSONHandler(os.Stderr, options))
	}
	if err := a.run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintf(os.Stderr, programName+": %v\n", err)
		os.Exit(1)
	}
}

// cli is the command line. A flag can also be set by an environment variable, except a flag
// that is meant for a single run of a command.
type cli struct {
	Serve   serveCmd   `cmd:"" help:"Serve the API until a signal stops it."`
	Client  clientCmd  `cmd:"" help:"Manage the clients that may get tokens, with or without a running server."`
	Backup  backupCmd  `cmd:"" help:"Copy the database to a file and check the copy, with or without a running server."`
	Restore restoreCmd `cmd:"" help:"Replace the database with a backup. Stop the server first."`
	Check   checkCmd   `cmd:"" help:"Check the database for faults, with or without a running server."`
	Compact compactCmd `cmd:"" help:"Shrink the database file by its free pages. Stop the server first."`
	Export  exportCmd  `cmd:"" help:"Write contracts as JSON Lines, with or without a running server."`
	Import  importCmd  `cmd:"" help:"Import contracts that export wrote, all or none, with or without a running server."`
	Version versionCmd `cmd:"" help:"Print the version, the commit and the Go version of this program."`
}

// run parses args and runs the command.
func (a *app) run(ctx context.Context, args []string) error {
	parser, err := kong.New(&cli{},
		kong.Name(programName),
		kong.Description("Serve a partner API's energy contracts from one binary and one file."),
		kong.DefaultEnvars("ENERGY_CONTRACTS"),
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
