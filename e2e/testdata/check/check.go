package main

// replay_test.go builds this file into the program, so that one process can check many
// databases: starting a process for each would take longer than the check itself.

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"
)

// manyChecksEnv is an environment variable. If it is set, the program reads paths of databases
// from stdin, one per line, and prints for each a line with a JSON array of the faults that the
// command "check" would print, and its error.
const manyChecksEnv = "MANY_CHECKS"

func init() {
	if os.Getenv(manyChecksEnv) == "" {
		return
	}
	paths, results := bufio.NewScanner(os.Stdin), json.NewEncoder(os.Stdout)
	for paths.Scan() {
		faults := []string{}
		a := &app{stdout: io.Discard, log: slog.New(slog.DiscardHandler), logLevel: new(slog.LevelVar), now: time.Now}
		_, err := a.checkDatabase(context.Background(), paths.Text(), paths.Text(), func(fault string) { faults = append(faults, fault) })
		if err != nil {
			faults = append(faults, err.Error())
		}
		if err := results.Encode(faults); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(0)
}
