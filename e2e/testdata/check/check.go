package main

// Many checks by one process, which replay_test.go builds into the program: a process for
// each would take longer than all that the check does.

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

// manyChecksEnv is the variable with which the program reads the paths of databases, a line
// each, and prints for each what "check" prints and its error, as a line of JSON.
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
