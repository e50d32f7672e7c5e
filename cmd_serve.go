package main

// The serve command.

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// serveCmd is the serve command with its arguments.
type serveCmd struct {
	Addr       string `default:"127.0.0.1:8080" placeholder:"HOST:PORT" help:"Listen on this address (default: ${default}). Port 0 picks a free port, which the log shows."`
	DB         string `name:"db" placeholder:"FILE" help:"Use this database file, creating it if it does not exist (default: energy-contracts.db, or a temporary file with --demo)."`
	Demo       bool   `help:"Load sample data and print commands that try the API. Everyone knows its secrets, so only a loopback address is allowed."`
	MaxBody    int64  `default:"4194304" placeholder:"BYTES" help:"Refuse request bodies larger than this many bytes (default: ${default})."`
	BodyMemory int64  `default:"268435456" placeholder:"BYTES" help:"Answer 503 rather than let the bodies of requests, and what is made of them, take more memory than about this many bytes together (default: ${default})."`

	TLSCert     string `name:"tls-cert" placeholder:"FILE" help:"Serve HTTPS with the certificate and its chain in this PEM file. A changed file is loaded without a restart."`
	TLSKey      string `name:"tls-key" placeholder:"FILE" help:"Use the private key of --tls-cert in this PEM file. A changed file is loaded without a restart."`
	MetricsAddr string `placeholder:"HOST:PORT" help:"Serve metrics for Prometheus at /metrics on this address, over plain HTTP (default: none)."`

	LogLevel string `default:"info" enum:"debug,info,warn,error" placeholder:"LEVEL" help:"Log messages of this level and above: debug, info, warn or error (default: ${default}). Requests are logged at info."`

	TokenLifetime   time.Duration `default:"10h" placeholder:"DURATION" help:"Issue tokens that are valid for this long (default: ${default})."`
	PublicURL       string        `name:"public-url" placeholder:"URL" help:"Name this URL in the OAuth metadata and in openapi.json, such as https://energy.example or https://energy.example/energy (default: the origin of the request)."`
	Issuer          string        `placeholder:"URL" help:"Also accept JWT access tokens issued by this authorization server."`
	Audience        string        `placeholder:"NAME" help:"Require this audience in tokens of --issuer."`
	OrgClaim        string        `default:"org_id" placeholder:"NAME" help:"Read the organization from this claim in tokens of --issuer (default: ${default})."`
	NoBuiltInTokens bool          `help:"Issue no tokens; accept only tokens of --issuer."`

	CORSOrigin []string `name:"cors-origin" placeholder:"ORIGIN" help:"Let web pages of this origin, such as https://app.example, use the API from a browser; repeat the flag for more origins, or use * for all (default: none)."`
}

// Validate checks the flags, alone and together. Kong calls it before Run.
func (c *serveCmd) Validate() error {
	if err := checkAddress(c.Addr); err != nil {
		return ofAddress("--addr", err)
	}
	if c.MetricsAddr != "" {
		if err := checkAddress(c.MetricsAddr); err != nil {
			return ofAddress("--metrics-addr", err)
		}
	}
	if c.MaxBody < 1 || c.MaxBody > 1<<30 {
		return errors.New("--max-body must be from 1 byte to 1 GiB")
	}
	if c.BodyMemory < 16<<20 || c.BodyMemory > 1<<40 {
		return errors.New("--body-memory must be from 16 MiB to 1 TiB, in bytes")
	}
	if c.TokenLifetime < time.Second || c.TokenLifetime > maxLifetime || c.TokenLifetime%time.Second != 0 {
		return errors.New("--token-lifetime must be whole seconds, from 1s to 8760h")
	}
	if c.PublicURL != "" {
		if err := checkPublicURL(c.PublicURL); err != nil {
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
		return errors.New("--tls-cert and --tls-key must be used together")
	case (c.Issuer == "") != (c.Audience == ""):
		return errors.New("--issuer and --audience must be used together; without an audience, tokens for other services would be accepted")
	case c.NoBuiltInTokens && c.Issuer == "":
		return errors.New("--no-built-in-tokens requires --issuer; otherwise no tokens would be accepted")
	case c.NoBuiltInTokens && c.Demo:
		return errors.New("--demo requires built-in tokens; remove --no-built-in-tokens")
	}
	return nil
}

// checkAddress returns an error unless s has a host and a port. Go would take an empty port for a
// free one.
func checkAddress(s string) error {
	_, port, err := net.SplitHostPort(s)
	if err == nil && port == "" {
		err = errors.New("address " + s + ": there is no port")
	}
	return err
}

// ofAddress adds to an error the flag of the address that caused it, and what to do about it.
func ofAddress(flag string, err error) error {
	advice := "use HOST:PORT with a host of this machine, such as 127.0.0.1:8080 or [::1]:8080"
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		advice = "stop the process that listens there, or name another address"
	case errors.Is(err, fs.ErrPermission):
		advice = "name a port from 1024 on, since lower ones need root"
	}
	return fmt.Errorf("%s: %w; %s", flag, err, advice)
}

// Run serves the API until ctx is done. Then it stops in this order: it accepts no more
// connections, waits for the requests in flight, closes the control socket, commits the
// waiting writes and closes the database.
func (c *serveCmd) Run(ctx context.Context, a *app) (err error) {
	a.detach()
	if err := a.logLevel.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return fmt.Errorf("--log-level: %w", err)
	}
	program := readBuild()
	a.log.Info("starting", "version", program.Version, "commit", program.Commit, "go", program.Go)
	addr, err := net.ResolveTCPAddr("tcp", c.Addr)
	if err != nil {
		return ofAddress("--addr", err)
	}
	loopback := addr.IP.IsLoopback()
	if c.Demo && !loopback {
		return fmt.Errorf("--demo is refused on %s, since everyone knows its secrets; use a loopback address such as 127.0.0.1:8080", c.Addr)
	}
	if c.DB == "" {
		c.DB = defaultDB
		if c.Demo {
			dir, err := os.MkdirTemp("", "energy-contracts-demo-")
			if err != nil {
				return fmt.Errorf("create a directory for the demo database: %w; name a file with --db, or a directory for temporary files with the variable TMPDIR", err)
			}
			defer os.RemoveAll(dir)
			c.DB = filepath.Join(dir, defaultDB)
		}
	}
	settings := apiSettings{maxBody: c.MaxBody, bodyMemory: c.BodyMemory, builtInTokens: !c.NoBuiltInTokens, tokenLifetime: c.TokenLifetime, publicURL: strings.TrimSuffix(c.PublicURL, "/"), origins: c.CORSOrigin}
	if c.Issuer != "" {
		ctx, cancel := context.WithCancel(context.Background()) // not ctx: requests in flight may need the issuer after ctx is done
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
	demo, err := c.prepare(a, store, loopback)
	if err != nil {
		return err
	}
	handler, err := newAPI(store, a.now, a.log, settings)
	if err != nil {
		return err
	}
	control := serveControl(c.DB, newControl(ctx, store, a.now, a.log, c.MaxBody), a.log)
	defer control.stop()
	server := a.newServer(handler)
	scheme := "http"
	switch {
	case certificate != nil:
		server.TLSConfig, scheme = certificate.config(), "https"
	case !loopback:
		a.log.Warn("tokens and secrets travel unencrypted; use --tls-cert and --tls-key, or a proxy that serves HTTPS", "addr", c.Addr)
	}
	stopMetrics, err := c.serveMetrics(a, metricsHandler(handler.metrics, store.metrics))
	if err != nil {
		return err
	}
	defer stopMetrics()
	listener, err := net.ListenTCP("tcp", addr)
	if err != nil {
		return ofAddress("--addr", err)
	}
	a.log.Info("listening", "addr", listener.Addr().String(), "scheme", scheme, "db", c.DB)
	if demo {
		// In a goroutine, since the reader of standard output may hang.
		go fmt.Fprint(a.stdout, demoCommands(scheme+"://"+listener.Addr().String()))
	}
	a.listening(listener.Addr())
	return a.serve(ctx, server, listener)
}

// prepare loads the demo data if --demo is set, and reports whether the commands that --demo prints
// will work. Without --demo it returns an error if the store has demo clients and the address is not
// a loopback address, and warns if there are no clients. It must run before the first request.
func (c *serveCmd) prepare(a *app, store *Store, loopback bool) (demo bool, err error) {
	if c.Demo {
		switch err := loadDemo(store, a.now()); {
		case errors.Is(err, ErrHadSamples):
			a.log.Info("the file has had the demo data before, so it is left as it is; name another file with --db to get the demo data anew", "db", c.DB)
		case err != nil:
			return false, err
		}
	}
	open, err := demoClients(store, a.now())
	if err != nil {
		return false, fmt.Errorf("database %s: look for demo clients: %w; restore a backup", c.DB, err)
	}
	if c.Demo {
		if demo = slices.Contains(open, demoClient); !demo {
			a.log.Info("the client of the demo was rotated or removed, so --demo prints no commands", "client", demoClient)
		}
		return demo, nil
	}
	if len(open) > 0 && !loopback {
		return false, fmt.Errorf("%s has the clients of --demo, whose secrets everyone knows, so it is not served on %s; use a loopback address, or name another file with --db", c.DB, c.Addr)
	}
	if c.NoBuiltInTokens {
		return false, nil
	}
	has, err := store.HasClients()
	if err != nil {
		return false, fmt.Errorf("database %s: look for clients: %w; restore a backup", c.DB, err)
	}
	if !has {
		a.log.Warn("there is no client yet, so nobody can get a token; add one",
			"command", fmt.Sprintf("energy-contracts client add --org ORGANIZATION_UUID --db %q", c.DB))
	}
	return false, nil
}

// newServer returns an HTTP server with the limits that all servers of the service share.
func (a *app) newServer(handler http.Handler) *http.Server {
	return &http.Server{
		Handler:           handler,
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { limitUnsent(c); return ctx },
		ReadHeaderTimeout: readHeaderTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: maxConcurrentStreams,
			WriteByteTimeout:     pieceTimeout, // also for frames that belong to no stream
		},
		MaxHeaderBytes: maxHeaderBytes,
		ErrorLog:       slog.NewLogLogger(a.log.Handler(), slog.LevelWarn),

		// The router responds to OPTIONS *, so that it is logged as every request is.
		DisableGeneralOptionsHandler: true,
	}
}

// serveMetrics starts to serve the metrics if --metrics-addr is set. The caller must call
// stop.
func (c *serveCmd) serveMetrics(a *app, handler http.Handler) (stop func(), err error) {
	if c.MetricsAddr == "" {
		return func() {}, nil
	}
	listener, err := net.Listen("tcp", c.MetricsAddr)
	if err != nil {
		return nil, ofAddress("--metrics-addr", err)
	}
	server := a.newServer(handler)
	a.log.Info("serving metrics", "addr", listener.Addr().String())
	go func() {
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			a.log.Error("the metrics server failed; the API is still served; restart the server to get metrics again", "err", err)
		}
	}()
	return func() { server.Close() }, nil
}

// serve serves on listener until ctx is done, and then finishes the requests in flight, for
// at most shutdownTimeout. It returns an error if the server fails before that. If systemd
// supervises the service, serve notifies it when the service is ready and when it is
// stopping.
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
		a.log.Warn("some requests did not finish in time; closing their connections", "err", err)
		return server.Close()
	}
	a.log.Info("stopped")
	return nil
}

// notify sends a state to systemd, if systemd supervises the service. It does not wait for a
// socket that takes nothing.
func (a *app) notify(state string) {
	sent := make(chan error, 1)
	go func() {
		_, err := daemon.SdNotify(false, state)
		sent <- err
	}()
	var err error
	select {
	case err = <-sent:
	case <-time.After(notifyTimeout):
		err = errors.New("its socket takes nothing")
	}
	if err != nil {
		a.log.Warn("cannot notify systemd of the state of the service", "state", state, "err", err)
	}
}

// notifyTimeout is how long systemd may take to accept a state.
const notifyTimeout = time.Second
