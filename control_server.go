package main

// The server's end of the control socket. Its mode is 0600, like that of the database file:
// only the account that may read the file may use the socket.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"syscall"
	"time"
)

// newControl returns the endpoints for commands, in the process that has the database open. A
// contract may have maxBody bytes. stopping is done when the process is told to stop.
func newControl(stopping context.Context, store *Store, now func() time.Time, log *slog.Logger, maxBody int64) *endpoints {
	e := newEndpoints(log, "The server does not know this request; use a command of the same version as the server.")
	c := &clientControl{store: store, now: now}
	e.public(http.MethodGet, "/clients", c.list)
	e.public(http.MethodPost, "/clients", c.add)
	e.handle(http.MethodPost, "/clients/:client_id/secret", c.rotate)
	e.handle(http.MethodDelete, "/clients/:client_id", c.remove)
	e.public(http.MethodGet, "/backup", backupControl{store}.get)
	e.public(http.MethodGet, "/contracts", exportControl{store}.get)
	e.public(http.MethodPost, "/contracts", importControl{store, maxBody, stopping}.post)
	return e
}

// controlServer serves the control socket.
type controlServer struct {
	server   *http.Server
	path     string       // of the socket
	listener net.Listener // nil if there is no socket
	socket   fs.FileInfo  // of the socket that the listener has created
}

// serveControl starts to serve commands on the control socket of a database file that
// this process has open. It logs a warning if it cannot create the socket: the directory may
// be read-only, or another file may have the socket's name.
func serveControl(db string, handler http.Handler, log *slog.Logger) *controlServer {
	c := &controlServer{server: &http.Server{Handler: handler, ReadHeaderTimeout: readHeaderTimeout}, path: controlPath(db)}
	var err error
	if c.listener, c.socket, err = listenControl(c.path); err != nil {
		log.Warn("there is no control socket, so commands cannot use the database while this server runs; fix the cause, or move the database to another directory", "err", err)
		return c
	}
	go c.serve(log)
	return c
}

// serve serves the control socket until stop.
func (c *controlServer) serve(log *slog.Logger) {
	if err := c.server.Serve(c.listener); !errors.Is(err, http.ErrServerClosed) {
		log.Error("the control socket failed, so commands cannot use the database while this server runs; the API is still served; restart the server to use commands", "err", err)
	}
}

// listenControl creates the socket, in place of one that a crash left behind. A socket on which
// a process listens is left alone.
func listenControl(path string) (net.Listener, fs.FileInfo, error) {
	switch info, err := os.Lstat(path); {
	case err == nil && info.Mode().Type() != fs.ModeSocket:
		return nil, nil, fmt.Errorf("%s exists and is not a socket", path)
	case err == nil:
		if err := checkDeserted(path); err != nil {
			return nil, nil, err
		}
		if err := os.Remove(path); err != nil {
			return nil, nil, err
		}
	}
	var l *net.UnixListener
	err := atSocket(path, func(address string) (err error) {
		l, err = net.ListenUnix("unix", &net.UnixAddr{Name: address, Net: "unix"})
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	l.SetUnlinkOnClose(false) // it would remove what is at the address, which may lead nowhere by then
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, nil, errors.Join(err, l.Close(), os.Remove(path))
	}
	info, err := os.Lstat(path)
	if err != nil {
		return nil, nil, errors.Join(err, l.Close())
	}
	return l, info, nil
}

// checkDeserted returns an error unless no process listens on the socket at path. This process
// holds the lock of the database file, so a server that listens there has another file open,
// which was at the path of the database before.
func checkDeserted(path string) error {
	err := atSocket(path, func(address string) error {
		c, err := net.Dial("unix", address)
		if err == nil {
			c.Close()
		}
		return err
	})
	switch {
	case err == nil:
		return fmt.Errorf("%s: another process listens on it, perhaps a server whose database was moved, replaced or removed, or somebody else who may write to the directory; stop that process, and start this server again", path)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist):
		return nil
	}
	return fmt.Errorf("%w; remove it if no server uses it", err)
}

// stop removes the socket, unless another one is in its place, and waits for the requests of
// commands that are in flight, for at most shutdownTimeout.
func (c *controlServer) stop() {
	if c.listener == nil {
		return
	}
	// While the listener is open, no other file has the numbers of its socket.
	if info, err := os.Lstat(c.path); err == nil && os.SameFile(info, c.socket) {
		os.Remove(c.path)
	}
	finishRequests(c.server)
	c.listener.Close() // the server has not closed it if stop came before Serve
}

// finishRequests waits for the requests of commands that are in flight, for at most
// shutdownTimeout, and closes the server.
func finishRequests(server *http.Server) {
	grace, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if server.Shutdown(grace) != nil {
		server.Close()
	}
}
