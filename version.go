package main

// Which program this is, as the Go toolchain wrote it into the binary.

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

type versionCmd struct{}

// Run prints which program this is.
func (versionCmd) Run(a *app) error {
	_, err := fmt.Fprintln(a.stdout, readBuild())
	return err
}
