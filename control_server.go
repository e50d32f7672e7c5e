package main

// The server's end of the control socket. Whoever may read the database file may use it.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"
)

// newControl is what commands may ask of the process that has the database.
func newControl(store *Store, now func() time.Time, log *slog.Logger) *endpoints {
	e := newEndpoints(log, "The server does not know this; is it of the same version as the command?")
	c := &clientControl{store: store, now: now}
	e.public(http.MethodGet, "/clients", c.list)
	e.public(http.MethodPost, "/clients", c.add)
	e.handle(http.MethodPost, "/clients/:client_id/secret", c.rotate)
	e.handle(http.MethodDelete, "/clients/:client_id", c.remove)
	e.public(http.MethodGet, "/backup", backupControl{store}.get)
	e.public(http.MethodGet, "/contracts", exportControl{store}.get)
	e.public(http.MethodPost, "/contracts", importControl{store}.post)
	return e
}

// controlServer serves commands.
type controlServer struct {
	server   *http.Server
	listener net.Listener // nil where there can be no socket
}

// serveControl serves commands on the socket of a database file that this process
// has open, and so in place of a socket that a crash left. Where there can be none,
// there is a warning: a path may be too long for a socket, which takes about 100
// bytes, its directory may be read-only, or a file in its place.
func serveControl(db string, handler http.Handler, log *slog.Logger) *controlServer {
	c := &controlServer{server: &http.Server{Handler: handler, ReadHeaderTimeout: readHeaderTimeout}}
	var err error
	if c.listener, err = listenControl(controlPath(db)); err != nil {
		log.Warn("there is no control socket, so commands beside this server do not work; see to what err says, or use another directory for the database", "err", err)
		return c
	}
	go c.serve(log)
	return c
}

func (c *controlServer) serve(log *slog.Logger) {
	if err := c.server.Serve(c.listener); !errors.Is(err, http.ErrServerClosed) {
		log.Error("commands are not served any more; the API is", "err", err)
	}
}

// listenControl makes the socket, which goes when it is closed.
func listenControl(path string) (net.Listener, error) {
	switch info, err := os.Lstat(path); {
	case err == nil && info.Mode().Type() != fs.ModeSocket:
		return nil, fmt.Errorf("%s is there and no socket", path)
	case err == nil:
		// Nobody listens to it: who does has the database file locked, as this process has.
		if err := os.Remove(path); err != nil {
			return nil, err
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// stop finishes the commands in flight, as serve does with requests.
func (c *controlServer) stop() {
	if c.listener == nil {
		return
	}
	grace, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if c.server.Shutdown(grace) != nil {
		c.server.Close()
	}
	c.listener.Close() // which the server did, unless it was stopped before it began
}
