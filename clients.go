package main

// The commands that manage clients, and what they ask of the process that has the
// database (control.go).

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"text/tabwriter"
	"time"

	"github.com/google/uuid"
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

// newClient is what a client is made from.
type newClient struct {
	Org    ID     `json:"org_id"`
	Scopes Scopes `json:"scope"`
}

// credentials are for the client's owner only, once.
type credentials struct {
	ID     string `json:"client_id"`
	Secret string `json:"client_secret"`
}

// Run makes a client and prints its secret, of which only a hash is kept.
func (c *clientAddCmd) Run(ctx context.Context, a *app) error {
	org, err := parseID(c.Org)
	if err != nil {
		return fmt.Errorf("--org %w", err)
	}
	wanted := newClient{Org: org}
	if err := wanted.Scopes.UnmarshalText([]byte(c.Scope)); err != nil {
		return fmt.Errorf("--scope: %w", err)
	}
	var made credentials
	r := controlRequest{what: "add client", method: http.MethodPost, path: "/clients", in: wanted, out: &made, mayCreate: true}
	if err := c.ask(ctx, a, r); err != nil {
		return err
	}
	fmt.Fprintf(a.stdout, "client_id:     %s\nclient_secret: %s\n\nThe secret is not shown again.\n", made.ID, made.Secret)
	return nil
}

type clientListCmd struct{ database }

// listedClient is a client without its secrets.
type listedClient struct {
	ID       string    `json:"client_id"`
	Org      ID        `json:"org_id"`
	Scopes   Scopes    `json:"scope"`
	Created  time.Time `json:"created"`
	LastUsed time.Time `json:"last_used,omitzero"`
}

// Run prints the clients as a table, in the order of their making.
func (c *clientListCmd) Run(ctx context.Context, a *app) error {
	var clients []listedClient
	if err := c.ask(ctx, a, controlRequest{what: "list clients", method: http.MethodGet, path: "/clients", out: &clients}); err != nil {
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

// rotation is how a secret is to be replaced.
type rotation struct {
	GraceSeconds int64 `json:"grace_seconds"`
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
	r := controlRequest{what: "rotate client", method: http.MethodPost, path: clientPath(c.ID) + "/secret", in: rotation{int64(c.Grace / time.Second)}, out: &made}
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
	return c.ask(ctx, a, controlRequest{what: "remove client", method: http.MethodDelete, path: clientPath(c.ID)})
}

func clientPath(id string) string { return "/clients/" + url.PathEscape(id) }

// clientControl is the other end: the endpoints behind the commands.
type clientControl struct {
	store *Store
	now   func() time.Time
}

func (c *clientControl) add(x *exchange) (answer, error) {
	var wanted newClient
	if err := readControl(x, &wanted); err != nil {
		return answer{}, err
	}
	if _, err := parseID(string(wanted.Org)); err != nil {
		return answer{}, newProblem(http.StatusUnprocessableEntity, "The organization "+err.Error())
	}
	secret := newSecret()
	client := Client{ID: uuid.NewString(), Org: wanted.Org, Scopes: wanted.Scopes, Secret: hashOf(secret), Created: c.now()}
	x.client = client.ID
	if err := c.store.AddClient(x.r.Context(), client); err != nil {
		return answer{}, err
	}
	return answerControl(credentials{client.ID, secret})
}

func (c *clientControl) list(*exchange) (answer, error) {
	clients, err := c.store.Clients()
	if err != nil {
		return answer{}, err
	}
	listed := make([]listedClient, len(clients))
	for i, c := range clients {
		listed[i] = listedClient{c.ID, c.Org, c.Scopes, c.Created, c.LastUsed}
	}
	return answerControl(listed)
}

func (c *clientControl) rotate(x *exchange, ps params) (answer, error) {
	var how rotation
	if err := readControl(x, &how); err != nil {
		return answer{}, err
	}
	id, secret := ps.ByName("client_id"), newSecret()
	x.client = id
	err := c.store.RotateClient(x.r.Context(), id, hashOf(secret), c.now().Add(time.Duration(how.GraceSeconds)*time.Second))
	if err != nil {
		return answer{}, unknownClient(err)
	}
	return answerControl(credentials{id, secret})
}

func (c *clientControl) remove(x *exchange, ps params) (answer, error) {
	x.client = ps.ByName("client_id")
	err := c.store.RemoveClient(x.r.Context(), x.client)
	return answer{status: http.StatusNoContent}, unknownClient(err)
}

func unknownClient(err error) error {
	if errors.Is(err, ErrNotFound) {
		return newProblem(http.StatusNotFound, "There is no client with this id; client list shows those that there are.")
	}
	return err
}
