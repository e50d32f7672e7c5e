package main

// The version of this program, as the Go toolchain recorded it in the binary.

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// build is what debug.ReadBuildInfo knows of this binary.
type build struct {
	Version string // of the module; "(devel)" where it was not built from a commit
	Commit  string // "" where that is not known
	Go      string
}

func readBuild() build {
	b := build{Version: "(devel)", Go: runtime.Version()}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return b
	}
	if info.Main.Version != "" {
		b.Version = info.Main.Version
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			b.Commit = s.Value
		}
	}
	return b
}

func (b build) String() string {
	commit := b.Commit
	if commit == "" {
		commit = "unknown"
	}
	return fmt.Sprintf("%s %s, commit %s, %s", programName, b.Version, commit, b.Go)
}

// programName is the binary's, and what the database file and the logs call it.
const programName = "energy-contracts"
