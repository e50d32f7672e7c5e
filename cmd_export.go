package main

// The export command.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
)

// exportCmd is the export command with its arguments.
type exportCmd struct {
	Org  string `env:"-" placeholder:"UUID" help:"Export only the contracts of this organization."`
	User string `env:"-" placeholder:"UUID" help:"Export only the contracts of this user."`
	File string `arg:"" default:"-" help:"Write to this file, replacing it if it exists; - means standard output (default: ${default})."`
	database
}

// Run writes one line for each contract, ordered by organization, user and id. A contract
// that is written during the export may or may not be included, but never in part.
func (c *exportCmd) Run(ctx context.Context, a *app) (err error) {
	query := url.Values{}
	for name, id := range map[string]string{"org": c.Org, "user": c.User} {
		if id == "" {
			continue
		}
		if _, err := parseID(id); err != nil {
			return fmt.Errorf("--%s %w", name, err)
		}
		query.Set(name+"_id", id)
	}
	control, err := a.connect(c.DB, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, control.close()) }()
	return a.output(c.File, func(to io.Writer) error {
		return a.receive(ctx, control, "/contracts?"+query.Encode(), to)
	}, nil)
}
