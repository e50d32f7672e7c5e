package main

// The client commands: add, list, rotate and remove.

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"
)

// clientCmd has the client commands.
type clientCmd struct {
	Add    clientAddCmd    `cmd:"" help:"Create a client for an organization and print its id and secret. The secret is shown only once."`
	List   clientListCmd   `cmd:"" help:"List all clients with their organization, scopes and last use."`
	Rotate clientRotateCmd `cmd:"" help:"Give a client a new secret and print it. The client's tokens remain valid, except those of a demo client."`
	Remove clientRemoveCmd `cmd:"" help:"Remove a client and revoke its tokens at once."`
}

// clientAddCmd is the client add command with its arguments.
type clientAddCmd struct {
	Org   string `required:"" placeholder:"UUID" help:"Create the client for this organization."`
	Scope string `default:"read write" placeholder:"SCOPES" help:"Grant the client these scopes: read, write or both (default: \"${default}\")."`
	database
}

// Run creates a client and prints its id and secret. The database stores only a hash of
// the secret.
func (c *clientAddCmd) Run(ctx context.Context, a *app) error {
	org, err := parseID(c.Org)
	if err != nil {
		return fmt.Errorf("--org %w", err)
	}
	var scopes Scopes
	if err := scopes.UnmarshalText([]byte(c.Scope)); err != nil {
		return fmt.Errorf("--scope: %w", err)
	}
	client := addClientRequest{Org: string(org), Scope: scopes.String()}
	var added credentials
	r := controlRequest{action: "add client", method: http.MethodPost, path: "/clients", in: client, out: &added, mayCreate: true}
	if err := c.call(ctx, a, r); err != nil {
		return err
	}
	return a.printSecret(added, "\n")
}

// printSecret prints the secret of a client, and more about it.
func (a *app) printSecret(c credentials, more string) error {
	if err := a.printf("client_id:     %s\nclient_secret: %s\n\nThe secret is not shown again.%s", c.ID, c.Secret, more); err != nil {
		// Not wrapped, since main says nothing of a reader that has left.
		return fmt.Errorf("print the secret: %s; run \"client rotate %s\" to get another one", err.Error(), c.ID)
	}
	return nil
}

// clientListCmd is the client list command with its arguments.
type clientListCmd struct{ database }

// Run prints the clients as a table, in the order in which they were created.
func (c *clientListCmd) Run(ctx context.Context, a *app) error {
	var clients []listedClient
	if err := c.call(ctx, a, controlRequest{action: "list clients", method: http.MethodGet, path: "/clients", out: &clients}); err != nil {
		return err
	}
	var table strings.Builder
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "CLIENT\tORGANIZATION\tSCOPES\tCREATED\tLAST USED")
	for _, c := range clients {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\n", c.ID, c.Org, c.Scopes, formatTime(c.Created), formatTime(c.LastUsed))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	return a.printf("%s", table.String())
}

// formatTime returns t in UTC to the second, or "never" if t is zero.
func formatTime(t time.Time) string {
	if t.IsZero() {
		return "never"
	}
	return t.UTC().Format(time.RFC3339)
}

// clientRotateCmd is the client rotate command with its arguments.
type clientRotateCmd struct {
	ID    string        `arg:"" help:"The client's id, as client list shows it."`
	Grace time.Duration `default:"24h" placeholder:"DURATION" help:"Accept the old secret for this long (default: ${default}); 0s refuses it at once."`
	database
}

// Validate checks the arguments. Kong calls it before Run.
func (c *clientRotateCmd) Validate() error {
	if c.Grace < 0 || c.Grace > maxLifetime || c.Grace%time.Second != 0 {
		return errors.New("--grace must be whole seconds, from 0s to 8760h")
	}
	return checkClientID(c.ID)
}

// checkClientID returns an error if id is empty: the server would only say that it does
// not know the path of the request.
func checkClientID(id string) error {
	if id == "" {
		return errors.New(`the client id is empty; run "client list" to see the ids`)
	}
	return nil
}

// Run gives the client a new secret and prints it.
func (c *clientRotateCmd) Run(ctx context.Context, a *app) error {
	var made rotation
	grace := int64(c.Grace / time.Second)
	r := controlRequest{action: "rotate client", method: http.MethodPost, path: clientPath(c.ID) + "/secret", in: rotateRequest{&grace}, out: &made}
	if err := c.call(ctx, a, r); err != nil {
		return err
	}
	switch {
	case made.Ended:
		return a.printSecret(made.credentials, " The client had a secret of the demo data, which everyone knows, so the old secret and all of its tokens are refused from now on.\n")
	case c.Grace == 0:
		return a.printSecret(made.credentials, " The old secret is refused from now on.\n")
	}
	return a.printSecret(made.credentials, fmt.Sprintf(" The old secret is valid until %s.\n", formatTime(a.now().Add(c.Grace))))
}

// clientRemoveCmd is the client remove command with its arguments.
type clientRemoveCmd struct {
	ID string `arg:"" help:"The client's id, as client list shows it."`
	database
}

// Validate checks the arguments. Kong calls it before Run.
func (c *clientRemoveCmd) Validate() error { return checkClientID(c.ID) }

// Run removes the client.
func (c *clientRemoveCmd) Run(ctx context.Context, a *app) error {
	return c.call(ctx, a, controlRequest{action: "remove client", method: http.MethodDelete, path: clientPath(c.ID)})
}

// clientPath returns the path of a client on the control socket.
func clientPath(id string) string { return "/clients/" + url.PathEscape(id) }
