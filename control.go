package main

// The control socket, over which a command reaches the server that has the database
// open: its path and the form of requests and responses.

import (
	"context"
	"errors"
	"net/http"

	"github.com/go-json-experiment/json"
)

// controlPath is where the socket of a database file is.
func controlPath(db string) string { return withoutLinks(db) + ".sock" }

// maxControlBody is the largest body of a command's request, in bytes.
const maxControlBody = 64 << 10

// readControl decodes what a command sent.
func readControl(x *exchange, into any) error {
	body, err := x.body(maxControlBody)
	if err != nil {
		return err
	}
	defer body.free()
	if err := json.Unmarshal(body.b, into, json.RejectUnknownMembers(true)); err != nil {
		return newProblem(http.StatusBadRequest, "The server does not understand this; is it of the same version as the command?")
	}
	return nil
}

// tellOperator has an error be told as it is: who may use the socket may read the log.
func withDetail(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, ErrClosed) {
		return err
	}
	p := *problemOf(err)
	p.Detail = err.Error()
	return &p
}

func controlResponse(content any) (response, error) {
	b, err := json.Marshal(content)
	return response{status: http.StatusOK, noStore: true, content: b}, err
}

// jsonLinesType is the usual name of the media type, which is not registered.
const jsonLinesType = "application/jsonl"
