package main

// The version of this program, which the Go toolchain records in the binary.

import (
	"fmt"
	"runtime"
	"runtime/debug"
)

// programName is the name of the binary, also used in the database file and in logs.
const programName = "energy-contracts"

// build describes how this binary was built.
type build struct {
	Version string // of the module; "(devel)" if it was not built from a commit
	Commit  string // the revision that it was built from; "" if not known
	Go      string // version of Go
}

// readBuild returns the build that debug.ReadBuildInfo describes.
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

// String returns one line with the program's name and its build, for the version command.
func (b build) String() string {
	commit := b.Commit
	if commit == "" {
		commit = "unknown"
	}
	return fmt.Sprintf("%s %s, commit %s, %s", programName, b.Version, commit, b.Go)
}
