package main

// The version command.

import (
	"fmt"
)

// versionCmd is the version command.
type versionCmd struct{}

// Run prints the version, the commit and the Go version of this program.
func (versionCmd) Run(a *app) error {
	_, err := fmt.Fprintln(a.stdout, readBuild())
	return err
}
