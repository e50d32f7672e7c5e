package main

// The client commands: add, list, rotate, remove.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"text/tabwriter"
	"time"
)

type clientCmd struct {
	Add    clientAddCmd    `cmd:"" help:"Make a client for an organization and print its id and secret, once."`
	List   clientListCmd   `cmd:"" help:"List the clients."`
	Rotate clientRotateCmd `cmd:"" help:"Give a client a new secret and print it, once. Its tokens stay good."`
	Remove clientRemoveCmd `cmd:"" help:"Remove a client. Its tokens are refused from then on."`
}

type clientAddCmd struct {
	Org   string `required:"" placeholder:"UUID" help:"The organization that the client acts for."`
	Scope string `default:"read write" placeholder:"SCOPES" help:"What the client may do (default: \"${default}\")."`
	database
}

// Run makes a client and prints its secret, of which only a hash is kept.
func (c *clientAddCmd) Run(ctx context.Context, a *app) error {
	org, err := parseID(c.Org)
	if err != nil {
		return fmt.Errorf("--org %w", err)
	}
	wanted := addClientRequest{Org: org}
	if err := wanted.Scopes.UnmarshalText([]byte(c.Scope)); err != nil {
		return fmt.Errorf("--scope: %w", err)
	}
	var made credentials
	r := controlRequest{action: "add client", method: http.MethodPost, path: "/clients", in: wanted, out: &made, mayCreate: true}
	if err := c.ask(ctx, a, r); err != nil {
		return err
	}
	fmt.Fprintf(a.stdout, "client_id:     %s\nclient_secret: %s\n\nThe secret is not shown again.\n", made.ID, made.Secret)
	return nil
}

type clientListCmd struct{ database }

// Run prints the clients as a table, in the order of their making.
func (c *clientListCmd) Run(ctx context.Context, a *app) error {
	var clients []listedClient
	if err := c.ask(ctx, a, controlRequest{action: "list clients", method: http.MethodGet, path: "/clients", out: &clients}); err != nil {
		return err
	}
	w := tabwriter.NewWriter(a.stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "CLIENT\tORGANIZATION\tSCOPES\tCREATED\tLAST USED")
	for _, c := range clients {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", c.ID, c.Org, c.Scopes, shownTime(c.Created), shownTime(c.LastUsed))
	}
	return w.Flush()
}

func shownTime(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format(time.RFC3339)
}

type clientRotateCmd struct {
	ID    string        `arg:"" help:"The client's id."`
	Grace time.Duration `default:"24h" placeholder:"DURATION" help:"How long the old secret stays good (default: ${default}); 0s is not at all."`
	database
}

// Validate is called by kong.
func (c *clientRotateCmd) Validate() error {
	if c.Grace < 0 || c.Grace > maxLifetime || c.Grace%time.Second != 0 {
		return errors.New("--grace must be whole seconds, from 0s to 8760h")
	}
	return checkClientID(c.ID)
}

func checkClientID(id string) error {
	if id == "" {
		return errors.New("the client's id is empty; client list shows those that there are")
	}
	return nil
}

// Run gives a client a new secret and prints it.
func (c *clientRotateCmd) Run(ctx context.Context, a *app) error {
	var made credentials
	r := controlRequest{action: "rotate client", method: http.MethodPost, path: clientPath(c.ID) + "/secret", in: rotateRequest{int64(c.Grace / time.Second)}, out: &made}
	if err := c.ask(ctx, a, r); err != nil {
		return err
	}
	fmt.Fprintf(a.stdout, "client_id:     %s\nclient_secret: %s\n\nThe secret is not shown again. ", made.ID, made.Secret)
	if c.Grace == 0 {
		fmt.Fprintln(a.stdout, "The old one is refused from now on.")
	} else {
		fmt.Fprintf(a.stdout, "The old one is good until %s.\n", shownTime(a.now().Add(c.Grace)))
	}
	return nil
}

type clientRemoveCmd struct {
	ID string `arg:"" help:"The client's id."`
	database
}

// Validate is called by kong.
func (c *clientRemoveCmd) Validate() error { return checkClientID(c.ID) }

// Run removes a client.
func (c *clientRemoveCmd) Run(ctx context.Context, a *app) error {
	return c.ask(ctx, a, controlRequest{action: "remove client", method: http.MethodDelete, path: clientPath(c.ID)})
}

func clientPath(id string) string { return "/clients/" + url.PathEscape(id) }
