package main

// The control endpoints that manage clients.

import (
	"errors"
	"net/http"
	"time"

	"github.com/google/uuid"
)

// addClientRequest is the body of the request that adds a client.
type addClientRequest struct {
	Org    ID     `json:"org_id"`
	Scopes Scopes `json:"scope"`
}

// credentials are the response when a client is added or its secret is rotated. No other
// response contains the secret.
type credentials struct {
	ID     string `json:"client_id"`
	Secret string `json:"client_secret"`
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
	GraceSeconds int64 `json:"grace_seconds"` // for which the old secret stays valid
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
	if _, err := parseID(string(req.Org)); err != nil {
		return response{}, newProblem(http.StatusUnprocessableEntity, "The organization "+err.Error())
	}
	secret := newSecret()
	client := Client{ID: uuid.NewString(), Org: req.Org, Scopes: req.Scopes, Secret: hashOf(secret), Created: c.now()}
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
		return response{}, err
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
	id, secret := ps.ByName("client_id"), newSecret()
	x.client = withoutLongNames(id)
	err := c.store.RotateClient(id, hashOf(secret), c.now().Add(time.Duration(req.GraceSeconds)*time.Second))
	if err != nil {
		return response{}, unknownClient(err)
	}
	return controlResponse(credentials{id, secret})
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
