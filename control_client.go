package main

// The command's end of the control socket. Without a server, the command opens the
// database itself and sends its requests to the same endpoints, in its own process.

import (
	"bytes"
	"cmp"
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

	"github.com/go-json-experiment/json"
)

// defaultDB is the database file of a command without --db.
const defaultDB = "energy-contracts.db"

// defaultMaxBody is the default of the flag --max-body of serve, in bytes. A command without a
// server holds to it too.
const defaultMaxBody = 4 << 20

// database is the flag of all commands but serve that names the database.
type database struct {
	DB string `name:"db" placeholder:"FILE" help:"Use this database file (default: energy-contracts.db)."`
}

// AfterApply sets the default, also for a variable that is empty. Kong calls it before Run.
func (d *database) AfterApply() error {
	d.DB = cmp.Or(d.DB, defaultDB)
	return nil
}

// controlRequest is a request with a JSON body and a JSON response.
type controlRequest struct {
	action       string // names the command in errors, as in "add client"
	method, path string
	in, out      any  // the request body, and a pointer for the response; nil for none
	mayCreate    bool // the database is created if it does not exist
}

// call sends a request to the process that has the database open, which is this one if
// there is no server.
func (d database) call(ctx context.Context, a *app, r controlRequest) (err error) {
	control, err := a.connect(d.DB, r.mayCreate)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, control.close()) }()
	if err := control.call(ctx, r); err != nil {
		return fmt.Errorf("%s: %w", r.action, err)
	}
	return nil
}

// controlClient sends requests to the control endpoints of one database.
type controlClient struct {
	http  *http.Client
	close func() error // also closes the database if connect opened it
}

// connect returns a client of the server that has the database open. If there is none, it
// opens the database in this process and serves the control endpoints here. The database
// must exist unless mayCreate is set.
func (a *app) connect(db string, mayCreate bool) (*controlClient, error) {
	a.logLevel.Set(slog.LevelWarn) // without a line for each request of the command itself
	c, err := dialControl(db)
	if !errors.Is(err, errNoServer) {
		return c, err
	}
	if !mayCreate && !exists(db) {
		return nil, noDatabase(db)
	}
	store, err := Open(db, a.now, a.log)
	if errors.Is(err, ErrInUse) {
		return dialHolder(db)
	}
	if err != nil {
		return nil, err
	}
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	server := &http.Server{Handler: newControl(context.Background(), store, a.now, a.log, defaultMaxBody)}
	go server.Serve(l) // until the client is closed
	return newControlClient(l.dial, func() error {
		finishRequests(server) // a request that was interrupted still uses the store
		return store.Close()
	}), nil
}

// noDatabase returns the error of a command that needs an existing database.
func noDatabase(path string) error {
	leads := ""
	if real := withoutLinks(path); real != path {
		leads = ", which is a link to " + real
	}
	return fmt.Errorf("there is no database %s%s; name an existing one with --db", path, leads)
}

// errNoServer is returned by dialControl when no process listens on the control socket. A
// server may still have the database open, if it could not create the socket.
var errNoServer = errors.New("no server listens on the control socket")

// dialControl returns a client of the server that has the database open. It returns
// errNoServer if there is none. Each connection of the client is checked with checkServer before
// anything is sent.
func dialControl(db string) (*controlClient, error) {
	dial := func(ctx context.Context, _, _ string) (conn net.Conn, err error) {
		err = atSocket(controlPath(db), func(address string) (err error) {
			conn, err = new(net.Dialer).DialContext(ctx, "unix", address)
			return err
		})
		switch {
		case errors.Is(err, fs.ErrPermission):
			err = fmt.Errorf("control socket %s; use the account that the server runs under", err.Error())
			if stranger := checkSocket(db); errors.Is(stranger, errStranger) {
				err = stranger
			}
		case err != nil:
			err = fmt.Errorf("%w %s", errNoServer, err.Error())
		default:
			if err = checkServer(db, conn); err != nil {
				conn.Close()
				conn = nil
			}
		}
		return conn, err
	}
	conn, err := dial(context.Background(), "", "")
	if err != nil {
		return nil, err
	}
	conn.Close()
	return newControlClient(dial, func() error { return nil }), nil
}

// errStranger is returned when the control socket belongs to a user who is not trusted. In a
// directory in which other users may create files, one of them may have created the socket before
// the server did.
var errStranger = errors.New("nothing was sent to it; if you trust that user, use that account; otherwise remove the socket, and keep the database in a directory in which nobody else may make files")

// checkServer returns an error unless conn, a connection to the control socket of db, leads to a
// process of a trusted user.
func checkServer(db string, conn net.Conn) error {
	if err := checkSocket(db); err != nil {
		return err
	}
	raw, err := conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return err
	}
	var user uint32
	var failed error
	if err := raw.Control(func(fd uintptr) { user, failed = peerUser(int(fd)) }); err != nil {
		return err
	}
	if errors.Is(failed, errors.ErrUnsupported) {
		return nil
	}
	if failed != nil {
		return fmt.Errorf("control socket %s: ask who serves it: %w", controlPath(db), failed)
	}
	return checkUser(db, user)
}

// checkSocket returns an error unless the control socket of db is a socket of a trusted user, and
// errNoServer if it is gone. A link is refused, since it could lead to a server of another
// database.
func checkSocket(db string) error {
	path := controlPath(db)
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w %s: it was removed just now", errNoServer, path)
	case err != nil:
		return fmt.Errorf("control socket: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("control socket %s is a link or another file, and not a socket, so nothing was sent to it; remove it", path)
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok {
		return checkUser(db, stat.Uid)
	}
	return nil
}

// checkUser returns errStranger unless a user is trusted to serve the control socket of db: root,
// the user of this process, and the owner of the database.
func checkUser(db string, user uint32) error {
	if user == 0 || int(user) == os.Geteuid() {
		return nil
	}
	if info, err := os.Stat(db); err == nil {
		if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Uid == user {
			return nil
		}
	}
	return fmt.Errorf("control socket %s belongs to user %d, who is neither root, nor you, nor the owner of the database; %w", controlPath(db), user, errStranger)
}

// dialHolder is dialControl for a database that another process has open, perhaps a server
// that has just started. Its error says why the process cannot be reached.
func dialHolder(db string) (*controlClient, error) {
	c, err := dialControl(db)
	if errors.Is(err, errNoServer) {
		err = fmt.Errorf("database %s: another process has it open, but %w; if that process is a server, its log says why; otherwise try again when it has ended", db, err)
	}
	return c, err
}

// newControlClient returns a client that connects with dial and is closed with closeFunc.
func newControlClient(dial func(context.Context, string, string) (net.Conn, error), closeFunc func() error) *controlClient {
	return &controlClient{
		http:  &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}},
		close: closeFunc,
	}
}

// call sends r and decodes the response.
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
		return fmt.Errorf("decode the server's response: %w", err)
	}
	return nil
}

// send sends a request and returns the content of the response and its size in bytes, or
// -1 if the size is unknown. The error for a problem document has its detail and faults.
func (c *controlClient) send(ctx context.Context, method, path string, body io.Reader) (content io.ReadCloser, size int64, err error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://control"+path, body)
	if err != nil {
		return nil, 0, err
	}
	req.Header.Set("Content-Type", jsonType)
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, 0, fmt.Errorf("request to the server: %w", errors.Unwrap(err)) // without the URL, which does not exist
	}
	if resp.StatusCode < 400 {
		return resp.Body, resp.ContentLength, nil
	}
	defer resp.Body.Close()
	var p problem
	if err := json.UnmarshalRead(resp.Body, &p); err != nil {
		return nil, 0, fmt.Errorf("the server responded with status %s", resp.Status)
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

// receive copies the response to a GET request to w, with a progress bar.
func (a *app) receive(ctx context.Context, control *controlClient, path string, w io.Writer) error {
	content, size, err := control.send(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer content.Close()
	bar := a.startProgress("copying", size, "")
	defer bar.done()
	_, err = io.Copy(io.MultiWriter(w, bar), content)
	return explainTruncation(err)
}

// explainTruncation adds to io.ErrUnexpectedEOF that the server broke off its response.
func explainTruncation(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("the server broke off its response, and its log says why: %w", err)
	}
	return err
}

// pipeListener is a net.Listener whose connections come from its dial method, in the same
// process.
type pipeListener struct {
	conns  chan net.Conn
	once   sync.Once
	closed chan struct{}
}

// dial connects to the listener. It returns net.ErrClosed once the listener is closed.
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
