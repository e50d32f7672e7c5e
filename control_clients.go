package main

// The control endpoints that manage clients.

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/google/uuid"
)

// addClientRequest is the body of the request that adds a client. Its members are text here, so
// that a wrong one can be named.
type addClientRequest struct {
	Org   string `json:"org_id"`
	Scope string `json:"scope"`
}

// credentials are the response when a client is added or its secret is rotated. No other
// response contains the secret.
type credentials struct {
	ID     string `json:"client_id"`
	Secret string `json:"client_secret"`
}

// rotation is the response when a client's secret is rotated.
type rotation struct {
	credentials
	// Ended is true if the client had a secret of the demo data, so that its old secret and its
	// tokens ended at once.
	Ended bool `json:"ended,omitzero"`
}

// listedClient is a client without its secrets, in the response that lists clients.
type listedClient struct {
	ID       string    `json:"client_id"`
	Org      ID        `json:"org_id"`
	Scopes   Scopes    `json:"scope"`
	Created  time.Time `json:"created"`
	LastUsed time.Time `json:"last_used,omitzero"` // zero: never
}

// rotateRequest is the body of the request that rotates a client's secret.
type rotateRequest struct {
	GraceSeconds *int64 `json:"grace_seconds"` // for which the old secret stays valid
}

// clientControl serves the endpoints of the client commands.
type clientControl struct {
	store *Store
	now   func() time.Time
}

// add creates a client with a new secret.
func (c *clientControl) add(x *exchange) (response, error) {
	var req addClientRequest
	if err := readControl(x, &req); err != nil {
		return response{}, err
	}
	org, err := parseID(req.Org)
	if err != nil {
		return response{}, newProblem(http.StatusUnprocessableEntity, "org_id "+err.Error())
	}
	var scopes Scopes
	if err := scopes.UnmarshalText([]byte(req.Scope)); err != nil {
		return response{}, newProblem(http.StatusUnprocessableEntity, "scope: "+err.Error())
	}
	secret := newSecret()
	client := Client{ID: uuid.NewString(), Org: org, Scopes: scopes, Secret: hashOf(secret), Created: c.now()}
	x.client = client.ID
	if err := c.store.AddClient(client); err != nil {
		return response{}, err
	}
	return controlResponse(credentials{client.ID, secret})
}

// list returns all clients.
func (c *clientControl) list(*exchange) (response, error) {
	clients, err := c.store.Clients()
	if err != nil {
		return response{}, withDetail(fmt.Errorf("%w; run check", err))
	}
	listed := make([]listedClient, len(clients))
	for i, c := range clients {
		listed[i] = listedClient{c.ID, c.Org, c.Scopes, c.Created, c.LastUsed}
	}
	return controlResponse(listed)
}

// rotate gives a client a new secret.
func (c *clientControl) rotate(x *exchange, ps params) (response, error) {
	var req rotateRequest
	if err := readControl(x, &req); err != nil {
		return response{}, err
	}
	const longest = int64(maxLifetime / time.Second)
	if req.GraceSeconds == nil || *req.GraceSeconds < 0 || *req.GraceSeconds > longest {
		return response{}, newProblem(http.StatusUnprocessableEntity, fmt.Sprintf("grace_seconds must be a number from 0 to %d", longest))
	}
	published, err := publishedSecrets()
	if err != nil {
		return response{}, err
	}
	id, secret := ps.ByName("client_id"), newSecret()
	x.client = withoutLongNames(id)
	ended, err := c.store.RotateClient(id, hashOf(secret), c.now().Add(time.Duration(*req.GraceSeconds)*time.Second), published)
	if err != nil {
		return response{}, unknownClient(err)
	}
	return controlResponse(rotation{credentials{id, secret}, ended})
}

// remove removes a client.
func (c *clientControl) remove(x *exchange, ps params) (response, error) {
	id := ps.ByName("client_id")
	x.client = withoutLongNames(id)
	err := c.store.RemoveClient(id)
	return response{status: http.StatusNoContent}, unknownClient(err)
}

// unknownClient returns a 404 in place of ErrNotFound, and other errors unchanged.
func unknownClient(err error) error {
	if errors.Is(err, ErrNotFound) {
		return newProblem(http.StatusNotFound, "There is no client with this id; run \"client list\" to see the ids.")
	}
	return err
}
