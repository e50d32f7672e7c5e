package main

// The command export.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
)

type exportCmd struct {
	Org  string `env:"-" placeholder:"UUID" help:"The contracts of this organization only."`
	User string `env:"-" placeholder:"UUID" help:"The contracts of this user only."`
	File string `arg:"" default:"-" help:"Write to this file, in place of what is there; - is standard output (default: ${default})."`
	database
}

// Run writes a line for each contract, in the order of organization, user and id. A
// contract that is written meanwhile may be in it or not, but never half of one.
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
	control, err := a.control(c.DB, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, control.close()) }()
	return a.output(c.File, func(to io.Writer) error {
		return a.receive(ctx, control, "/contracts?"+query.Encode(), to)
	}, nil)
}
