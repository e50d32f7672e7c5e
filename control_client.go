package main

// The command's end of the control socket. Without a server, the command opens the
// database itself and sends its requests to the same endpoints in its own process.

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
	"strings"
	"sync"
	"syscall"

	"github.com/go-json-experiment/json"
)

// database is the flag of all commands but serve.
type database struct {
	DB string `name:"db" default:"energy-contracts.db" placeholder:"FILE" help:"The database file (default: ${default})."`
}

// controlRequest is what a command asks for.
type controlRequest struct {
	action       string // in words, for an error
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
		return fmt.Errorf("%s: %w", r.action, err)
	}
	return nil
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
func explainTruncation(err error) error {
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

// receive writes what the process with the database answers.
func (a *app) receive(ctx context.Context, control *controlClient, path string, to io.Writer) error {
	content, size, err := control.send(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer content.Close()
	bar := a.progress("copying", size, "")
	defer bar.done()
	_, err = io.Copy(io.MultiWriter(to, bar), content)
	return explainTruncation(err)
}
