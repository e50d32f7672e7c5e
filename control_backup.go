package main

// The control endpoint that sends a copy of the database.

import (
	"errors"
	"io"
	"net/http"
)

// backupControl serves the backup endpoint.
type backupControl struct{ store *Store }

// get sends a snapshot of the database.
func (c backupControl) get(x *exchange) (response, error) {
	f, size, err := c.store.Snapshot(x.r.Context())
	if err != nil {
		return response{}, withDetail(err)
	}
	x.onEnd = func() { f.Close() }
	buf := make([]byte, pageBytes)
	return response{status: http.StatusOK, contentType: "application/octet-stream", size: size, more: func([]byte) ([]byte, error) {
		n, err := f.Read(buf)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		return buf[:n], err
	}}, nil
}
