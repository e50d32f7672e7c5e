package main

// The command serve.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

type serveCmd struct {
	Addr    string `default:"127.0.0.1:8080" placeholder:"HOST:PORT" help:"Listen on this address (default: ${default}). Port 0 takes a free one; the log says which."`
	DB      string `name:"db" placeholder:"FILE" help:"The database file, made if there is none (default: energy-contracts.db; with --demo: a temporary one)."`
	Demo    bool   `help:"Load sample data and print a request to paste. Its secrets are known to everyone, so it is for a loopback address only."`
	MaxBody int64  `default:"4194304" placeholder:"BYTES" help:"The largest request body, in bytes (default: ${default})."`

	TLSCert     string `name:"tls-cert" placeholder:"FILE" help:"Serve HTTPS with this certificate and what it is signed with, in PEM. Read again when the file changes."`
	TLSKey      string `name:"tls-key" placeholder:"FILE" help:"The key of --tls-cert, in PEM."`
	MetricsAddr string `placeholder:"HOST:PORT" help:"Serve /metrics to Prometheus on this address, over HTTP (default: not at all)."`

	LogLevel string `default:"info" enum:"debug,info,warn,error" placeholder:"LEVEL" help:"Log what is at least debug, info, warn or error (default: ${default}). A request is info."`

	TokenLifetime   time.Duration `default:"10h" placeholder:"DURATION" help:"How long a token is good (default: ${default})."`
	PublicURL       string        `name:"public-url" placeholder:"ORIGIN" help:"Where clients reach the service, such as https://energy.example (default: what a request says)."`
	Issuer          string        `placeholder:"URL" help:"Accept JWT access tokens of this authorization server too."`
	Audience        string        `placeholder:"NAME" help:"The audience that the tokens of --issuer must be for."`
	OrgClaim        string        `default:"org_id" placeholder:"NAME" help:"The claim of the tokens of --issuer that names the organization (default: ${default})."`
	NoBuiltInTokens bool          `help:"Issue no tokens and accept those of --issuer only."`

	CORSOrigin []string `name:"cors-origin" placeholder:"ORIGIN" help:"Let the pages of this origin use the API from a browser, such as https://app.example; once for each, or * for all (default: none)."`
}

// Validate is called by kong.
func (c *serveCmd) Validate() error {
	if c.MaxBody < 1 || c.MaxBody > 1<<30 {
		return errors.New("--max-body must be from 1 byte to 1 GiB")
	}
	if c.TokenLifetime < time.Second || c.TokenLifetime > maxLifetime || c.TokenLifetime%time.Second != 0 {
		return errors.New("--token-lifetime must be whole seconds, from 1s to 8760h")
	}
	if c.PublicURL != "" {
		if _, err := parseOrigin(c.PublicURL); err != nil {
			return fmt.Errorf("--public-url %s: %w", c.PublicURL, err)
		}
	}
	for _, origin := range c.CORSOrigin {
		if err := checkCORSOrigin(origin); err != nil {
			return fmt.Errorf("--cors-origin %s: %w", origin, err)
		}
	}
	switch {
	case (c.TLSCert == "") != (c.TLSKey == ""):
		return errors.New("--tls-cert and --tls-key belong together")
	case (c.Issuer == "") != (c.Audience == ""):
		return errors.New("--issuer and --audience belong together: without an audience, a token for any other service would be good here")
	case c.NoBuiltInTokens && c.Issuer == "":
		return errors.New("--no-built-in-tokens needs an --issuer, or there would be no tokens at all")
	case c.NoBuiltInTokens && c.Demo:
		return errors.New("--demo prints how to get a built-in token; leave out --no-built-in-tokens")
	}
	return nil
}

const defaultDB = "energy-contracts.db"

// ballast is memory, in bytes, that a server only reserves and never touches. The
// garbage collector runs when the heap has doubled: a heap of 4 MB, as the requests
// in flight have, would be collected 40 times a second, to free what is free in any
// case by and by. GOGC instead would make a heap that is large for a while, of large
// bodies, many times as large.
const ballast = 16 << 20

// holdBallast reserves it a second after the start, which is not to share the processor
// with the collection that this starts.
func holdBallast(ctx context.Context) {
	select {
	case <-time.After(time.Second):
		reserved := make([]byte, ballast)
		<-ctx.Done()
		runtime.KeepAlive(reserved)
	case <-ctx.Done():
	}
}

// Run serves until ctx ends. It stops in this order: no new connections, the
// requests in flight, the control socket, the writes that wait, the file.
func (c *serveCmd) Run(ctx context.Context, a *app) (err error) {
	if err := a.logLevel.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return fmt.Errorf("--log-level: %w", err)
	}
	this := readBuild()
	a.log.Info("starting", "version", this.Version, "commit", this.Commit, "go", this.Go)
	addr, err := net.ResolveTCPAddr("tcp", c.Addr)
	if err != nil {
		return fmt.Errorf("--addr %s: %w", c.Addr, err)
	}
	loopback := addr.IP.IsLoopback()
	if c.Demo && !loopback {
		return fmt.Errorf("--demo is refused on %s: everyone knows its secrets, so it listens on a loopback address only, such as 127.0.0.1:8080", c.Addr)
	}
	if c.DB == "" {
		c.DB = defaultDB
		if c.Demo {
			dir, err := os.MkdirTemp("", "energy-contracts-demo-")
			if err != nil {
				return fmt.Errorf("directory for the demo database: %w", err)
			}
			defer os.RemoveAll(dir)
			c.DB = filepath.Join(dir, defaultDB)
		}
	}
	settings := apiSettings{maxBody: c.MaxBody, builtInTokens: !c.NoBuiltInTokens, tokenLifetime: c.TokenLifetime, publicURL: c.PublicURL, origins: c.CORSOrigin}
	if c.Issuer != "" {
		ctx, cancel := context.WithCancel(context.Background()) // later than ctx: the requests in flight may need it
		defer cancel()
		if settings.issuer, err = newIssuer(ctx, c.Issuer, c.Audience, c.OrgClaim, a.now, a.log); err != nil {
			return err
		}
	}
	var certificate *certificate
	if c.TLSCert != "" {
		if certificate, err = newCertificate(c.TLSCert, c.TLSKey, a.log); err != nil {
			return err
		}
	}
	store, err := Open(c.DB, a.now, a.log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	if err := c.prepare(a, store, loopback); err != nil {
		return err
	}
	handler, err := newAPI(store, a.now, a.log, settings)
	if err != nil {
		return err
	}
	control := serveControl(c.DB, newControl(store, a.now, a.log), a.log)
	defer control.stop()
	server := a.newServer(handler)
	scheme := "http"
	switch {
	case certificate != nil:
		server.TLSConfig, scheme = certificate.config(), "https"
	case !loopback:
		a.log.Warn("tokens and secrets can be read on their way: use --tls-cert and --tls-key, unless a proxy in front has a certificate", "addr", c.Addr)
	}
	stopMetrics, err := c.serveMetrics(a, metricsHandler(handler.metrics, store.metrics))
	if err != nil {
		return err
	}
	defer stopMetrics()
	listener, err := net.ListenTCP("tcp", addr)
	if err != nil {
		return fmt.Errorf("%w; stop what listens there or name another address with --addr", err)
	}
	a.log.Info("listening", "addr", listener.Addr().String(), "scheme", scheme, "db", c.DB)
	if c.Demo {
		fmt.Fprint(a.stdout, demoCommands(scheme+"://"+listener.Addr().String()))
	}
	a.listening(listener.Addr())
	go holdBallast(ctx)
	return a.serve(ctx, server, listener)
}

func (a *app) newServer(handler http.Handler) *http.Server {
	return &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		HTTP2:             &http.HTTP2Config{WriteByteTimeout: pieceTimeout}, // of a connection, for what is no stream's
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(a.log.Handler(), slog.LevelWarn),
	}
}

// serveMetrics begins to serve what is counted, if it is to be served.
func (c *serveCmd) serveMetrics(a *app, handler http.Handler) (stop func(), err error) {
	if c.MetricsAddr == "" {
		return func() {}, nil
	}
	listener, err := net.Listen("tcp", c.MetricsAddr)
	if err != nil {
		return nil, fmt.Errorf("--metrics-addr: %w", err)
	}
	server := a.newServer(handler)
	a.log.Info("serving metrics", "addr", listener.Addr().String())
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("metrics are not served any more; the API is", "err", err)
		}
	}()
	return func() { server.Close() }, nil
}

// prepare looks at what is in the store before anybody else can.
func (c *serveCmd) prepare(a *app, store *Store, loopback bool) error {
	if c.Demo {
		return loadDemo(store, a.now())
	}
	demo, err := hasDemoClient(store, a.now())
	if err != nil {
		return fmt.Errorf("database %s: look for demo clients: %w; restore a backup", c.DB, err)
	}
	if demo && !loopback {
		return fmt.Errorf("%s has the clients of --demo, whose secrets everyone knows, so it is refused on %s; listen on a loopback address or start with a new file", c.DB, c.Addr)
	}
	if c.NoBuiltInTokens {
		return nil
	}
	has, err := store.HasClients()
	if err != nil {
		return fmt.Errorf("database %s: look for clients: %w; restore a backup", c.DB, err)
	}
	if !has {
		a.log.Warn("there is no client yet, so nobody can get a token; add one",
			"command", fmt.Sprintf("energy-contracts client add --org ORGANIZATION_UUID --db %q", c.DB))
	}
	return nil
}

// serve returns when the server has stopped, and nil if ctx was the reason. It tells
// systemd, if that wants to know, when the service is ready and when it is stopping.
func (a *app) serve(ctx context.Context, server *http.Server, listener net.Listener) error {
	failed := make(chan error, 1)
	go func() {
		if server.TLSConfig != nil {
			failed <- server.ServeTLS(listener, "", "")
		} else {
			failed <- server.Serve(listener)
		}
	}()
	a.notify(daemon.SdNotifyReady)
	select {
	case err := <-failed:
		return fmt.Errorf("serve: %w", err)
	case <-ctx.Done():
	}
	a.notify(daemon.SdNotifyStopping)
	a.log.Info("stopping: finishing the requests in flight")
	grace, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
	defer cancel()
	if err := server.Shutdown(grace); err != nil {
		a.log.Warn("requests were still in flight and are broken off", "err", err)
		return server.Close()
	}
	a.log.Info("stopped")
	return nil
}

func (a *app) notify(state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		a.log.Warn("systemd is not told of the state of the service", "state", state, "err", err)
	}
}
