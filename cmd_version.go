package main

// The command version.

import (
	"fmt"
)

type versionCmd struct{}

// Run prints which program this is.
func (versionCmd) Run(a *app) error {
	_, err := fmt.Fprintln(a.stdout, readBuild())
	return err
}
