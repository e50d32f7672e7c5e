// Energy-contracts serves a partner API's energy contracts from one binary: what
// a user of an organization pays for electricity.
//
// Calls run one way: main.go and the files of the commands (clients.go, backup.go,
// check.go, export.go, import.go) read the command line and wire, with control.go
// between a command and a running server; handler.go, oauth.go and docs.go have the
// endpoints, with cors.go before them, on top of exchange.go (one request and its
// answer), auth.go, issuer.go, guessing.go, condition.go, idempotency.go and
// problem.go; parse.go and validate.go turn bodies into the contracts of model.go;
// store.go keeps them, with tokens.go, commit.go, staging.go, maintenance.go, dbfile.go
// and pages.go, and knows nothing of HTTP.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/alecthomas/kong"
	"github.com/google/uuid"
	"golang.org/x/term"
)

func main() {
	uuid.EnableRandPool() // ids are no secrets, and each would be a system call
	syscall.Umask(0o077)  // what the program makes is its user's alone
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
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

// cli is the command line. A flag is an environment variable too, but for those that
// are for one run of a command.
type cli struct {
	Serve   serveCmd   `cmd:"" help:"Serve the API until a signal ends it."`
	Client  clientCmd  `cmd:"" help:"Manage the clients that may get tokens, beside a running server or without one."`
	Backup  backupCmd  `cmd:"" help:"Copy the database to a file, beside a running server or without one."`
	Restore restoreCmd `cmd:"" help:"Put a backup in the place of the database. No server may run."`
	Check   checkCmd   `cmd:"" help:"Look for faults in the database, beside a running server or without one."`
	Compact compactCmd `cmd:"" help:"Rewrite the database without its free pages. No server may run."`
	Export  exportCmd  `cmd:"" help:"Write contracts as JSON Lines, beside a running server or without one."`
	Import  importCmd  `cmd:"" help:"Store the contracts of an export, all or none, beside a running server or without one."`
	Version versionCmd `cmd:"" help:"Print the version, the commit and the Go version of this program."`
}

// run does what the command line says.
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
