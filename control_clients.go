package main

// The control endpoints that manage clients.

import (
	"errors"
	"net/http"
	"time"

	"github.com/google/uuid"
)

// newClient is what a client is made from.
type addClientRequest struct {
	Org    ID     `json:"org_id"`
	Scopes Scopes `json:"scope"`
}

// credentials are for the client's owner only, once.
type credentials struct {
	ID     string `json:"client_id"`
	Secret string `json:"client_secret"`
}

// listedClient is a client without its secrets.
type listedClient struct {
	ID       string    `json:"client_id"`
	Org      ID        `json:"org_id"`
	Scopes   Scopes    `json:"scope"`
	Created  time.Time `json:"created"`
	LastUsed time.Time `json:"last_used,omitzero"`
}

// rotation is how a secret is to be replaced.
type rotateRequest struct {
	GraceSeconds int64 `json:"grace_seconds"`
}

// clientControl is the other end: the endpoints behind the commands.
type clientControl struct {
	store *Store
	now   func() time.Time
}

func (c *clientControl) add(x *exchange) (response, error) {
	var wanted addClientRequest
	if err := readControl(x, &wanted); err != nil {
		return response{}, err
	}
	if _, err := parseID(string(wanted.Org)); err != nil {
		return response{}, newProblem(http.StatusUnprocessableEntity, "The organization "+err.Error())
	}
	secret := newSecret()
	client := Client{ID: uuid.NewString(), Org: wanted.Org, Scopes: wanted.Scopes, Secret: hashOf(secret), Created: c.now()}
	x.client = client.ID
	if err := c.store.AddClient(client); err != nil {
		return response{}, err
	}
	return controlResponse(credentials{client.ID, secret})
}

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

func (c *clientControl) rotate(x *exchange, ps params) (response, error) {
	var how rotateRequest
	if err := readControl(x, &how); err != nil {
		return response{}, err
	}
	id, secret := ps.ByName("client_id"), newSecret()
	x.client = id
	err := c.store.RotateClient(id, hashOf(secret), c.now().Add(time.Duration(how.GraceSeconds)*time.Second))
	if err != nil {
		return response{}, unknownClient(err)
	}
	return controlResponse(credentials{id, secret})
}

func (c *clientControl) remove(x *exchange, ps params) (response, error) {
	x.client = ps.ByName("client_id")
	err := c.store.RemoveClient(x.client)
	return response{status: http.StatusNoContent}, unknownClient(err)
}

func unknownClient(err error) error {
	if errors.Is(err, ErrNotFound) {
		return newProblem(http.StatusNotFound, "There is no client with this id; client list shows those that there are.")
	}
	return err
}
