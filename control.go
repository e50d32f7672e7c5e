package main

// How a command reaches the database while a server has it: through a Unix socket
// beside the file, which whoever may read the file may use. Without a server, the
// command opens the file and asks itself, in the same way.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/go-json-experiment/json"
)

// database is the flag of all commands but serve.
type database struct {
	DB string `name:"db" default:"energy-contracts.db" placeholder:"FILE" help:"The database file (default: ${default})."`
}

// controlRequest is what a command asks for.
type controlRequest struct {
	what         string // in words, for an error
	method, path string
	in, out      any  // JSON, or nil
	mayCreate    bool // the database
}

// ask has the process with the database do what a command is for.
func (d database) ask(ctx context.Context, a *app, r controlRequest) (err error) {
	control, err := a.control(d.DB, r.mayCreate)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, control.close()) }()
	if err := control.call(ctx, r); err != nil {
		return fmt.Errorf("%s: %w", r.what, err)
	}
	return nil
}

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

// maxControlBody is the largest body of a command's request, in bytes.
const maxControlBody = 64 << 10

// controlServer serves commands.
type controlServer struct {
	server   *http.Server
	listener net.Listener // nil where there can be no socket
}

// controlPath is where the socket of a database file is.
func controlPath(db string) string { return withoutLinks(db) + ".sock" }

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

// controlClient is how a command asks.
type controlClient struct {
	http  *http.Client
	close func() error
}

// control reaches the process that has a database open, or opens it in this one. The
// file must be there, unless it may be made.
func (a *app) control(db string, mayCreate bool) (*controlClient, error) {
	a.logLevel.Set(slog.LevelWarn) // a command's own requests are not worth a line
	c, err := dialControl(db)
	if !errors.Is(err, errNoServer) {
		return c, err
	}
	if !mayCreate && !exists(db) {
		return nil, noDatabase(db)
	}
	store, err := Open(db, a.now, a.log)
	if errors.Is(err, ErrInUse) { // by a server that has just started
		if c, dialErr := dialControl(db); dialErr == nil {
			return c, nil
		}
	}
	if err != nil {
		return nil, err
	}
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	server := &http.Server{Handler: newControl(store, a.now, a.log)}
	go server.Serve(l) // until it is closed
	return newControlClient(l.dial, func() error { return errors.Join(server.Close(), store.Close()) }), nil
}

func noDatabase(path string) error {
	return fmt.Errorf("there is no database %s; name it with --db", path)
}

// errNoServer: no server has the database open, or none that can be asked.
var errNoServer = errors.New("no server listens")

// dialControl finds out whether a server listens. It returns errNoServer if none does.
func dialControl(db string) (*controlClient, error) {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", controlPath(db))
	}
	conn, err := dial(context.Background(), "", "")
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.EINVAL): // too long a path
		return nil, fmt.Errorf("%w: %w", errNoServer, err)
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("%w; use the account that the server runs under", err)
	case err != nil:
		return nil, err
	}
	conn.Close()
	return newControlClient(dial, func() error { return nil }), nil
}

func newControlClient(dial func(context.Context, string, string) (net.Conn, error), closeIt func() error) *controlClient {
	return &controlClient{
		http:  &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}},
		close: closeIt,
	}
}

// call sends a request with a JSON body, and decodes the answer.
func (c *controlClient) call(ctx context.Context, r controlRequest) error {
	var body []byte
	if r.in != nil {
		var err error
		if body, err = json.Marshal(r.in); err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
	}
	content, _, err := c.send(ctx, r.method, r.path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	defer content.Close()
	if r.out == nil {
		return nil
	}
	if err := json.UnmarshalRead(content, r.out); err != nil {
		return fmt.Errorf("decode the server's answer: %w", err)
	}
	return nil
}

// send sends a request and returns the content of the answer, and how many bytes it
// has; -1 is unknown. Its error is what a problem document says.
func (c *controlClient) send(ctx context.Context, method, path string, body io.Reader) (content io.ReadCloser, size int64, err error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://control"+path, body)
	if err != nil {
		return nil, 0, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, 0, fmt.Errorf("ask the server: %w", errors.Unwrap(err)) // without the URL, which is none
	}
	if resp.StatusCode < 400 {
		return resp.Body, resp.ContentLength, nil
	}
	defer resp.Body.Close()
	var p problem
	if err := json.UnmarshalRead(resp.Body, &p); err != nil {
		return nil, 0, fmt.Errorf("the server answered %s", resp.Status)
	}
	details := []string{p.Detail}
	for _, f := range p.Errors {
		details = append(details, f.String())
	}
	if resp.StatusCode >= 500 {
		details = append(details, "(request "+p.Instance+")")
	}
	return nil, 0, errors.New(strings.Join(details, " "))
}

// answerLeft says why an answer ends too early, as its reader sees it.
func answerLeft(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the server broke off its answer, and its log says why: %w", err)
	}
	return err
}

// pipeListener accepts the connections that dial makes, in the same process.
type pipeListener struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

func (l *pipeListener) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	near, far := net.Pipe()
	select {
	case l.conns <- far:
		return near, nil
	case <-l.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case conn := <-l.conns:
		return conn, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{Name: "pipe", Net: "unix"} }

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
func tellOperator(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, ErrClosed) {
		return err
	}
	p := *problemOf(err)
	p.Detail = err.Error()
	return &p
}

func answerControl(content any) (answer, error) {
	b, err := json.Marshal(content)
	return answer{status: http.StatusOK, noStore: true, content: b}, err
}
