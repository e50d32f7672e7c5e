package main

// The router: patterns and their handlers, the limits of the server, and responses that
// belong to no endpoint (404, 405, OPTIONS).

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/julienschmidt/httprouter"
)

// endpoints is a router whose requests are exchanges. It is an http.Handler.
type endpoints struct {
	router  *httprouter.Router
	handler http.Handler // router, or what comes before it
	log     *slog.Logger
	metrics *apiMetrics // nil: requests are not counted
	// routes is what was registered, for the tests that ask each of them.
	routes []route
}

// route is one method of one path.
type route struct {
	method, pattern string
	public          bool // needs no token
}

// params is what a path says in the places of a pattern's names.
type params = httprouter.Params

// newEndpoints answers 404 with notFound.
func newEndpoints(log *slog.Logger, notFound string) *endpoints {
	e := &endpoints{router: httprouter.New(), log: log}
	e.handler = e.router
	// A client is told what is wrong with its path, not sent to another.
	e.router.RedirectTrailingSlash, e.router.RedirectFixedPath = false, false
	e.router.NotFound = failWith(newProblem(http.StatusNotFound, notFound))
	e.router.MethodNotAllowed = failWith(newProblem(http.StatusMethodNotAllowed, "This path has no such method; Allow names those that it has."))
	e.router.GlobalOPTIONS = http.HandlerFunc(options)
	e.router.PanicHandler = func(w http.ResponseWriter, r *http.Request, p any) { exchangeOf(w, r).panicked(p) }
	return e
}

// handle registers an endpoint under a pattern that the log can name.
func (e *endpoints) handle(method, pattern string, serve func(*exchange, params) (response, error)) {
	e.routes = append(e.routes, route{method: method, pattern: pattern})
	log := e.log.Handler().WithAttrs([]slog.Attr{slog.String("method", method), slog.String("route", pattern)})
	e.router.Handle(method, pattern, func(w http.ResponseWriter, r *http.Request, ps httprouter.Params) {
		x := exchangeOf(w, r)
		x.route, x.log = pattern, log
		ans, err := serve(x, ps)
		if err != nil {
			x.fail(err)
			return
		}
		x.send(ans)
	})
}

// public registers an endpoint that needs no token.
func (e *endpoints) public(method, pattern string, serve func(*exchange) (response, error)) {
	e.handle(method, pattern, func(x *exchange, _ params) (response, error) { return serve(x) })
	e.routes[len(e.routes)-1].public = true
}

func failWith(p *problem) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { exchangeOf(w, r).fail(p) })
}

// options answers OPTIONS; the router has set Allow.
func options(w http.ResponseWriter, r *http.Request) {
	a := response{status: http.StatusNoContent}
	if strings.Contains(w.Header().Get("Allow"), http.MethodPatch) {
		a.acceptPatch = mergePatchType // RFC 5789 §3.1
	}
	exchangeOf(w, r).send(a)
}

// routed gives the router a path in which an encoded slash is part of an id, and
// so a wrong one, rather than a way to another route.
func keepEncodedSlash(u *url.URL) {
	if strings.Contains(strings.ToUpper(u.RawPath), "%2F") {
		u.Path = u.RawPath
	}
}

// ServeHTTP lets an endpoint answer, and logs one line.
func (e *endpoints) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := newExchange(w, r, e.log.Handler())
	start := time.Now()
	defer e.ended(x, start)
	x.set("X-Request-Id", x.id)
	w.Header()["X-Content-Type-Options"] = nosniff
	if r.ProtoMajor == 1 && (r.ProtoMinor == 0 || r.TransferEncoding != nil) {
		// It may have had a Content-Length beside Transfer-Encoding, or Transfer-Encoding
		// in HTTP/1.0, of which net/http does not tell; then what follows it may be no
		// request (RFC 9112 §6.1).
		w.Header()["Connection"] = closed
	}
	if n := len(r.Header["Authorization"]); n > 1 {
		x.fail(&malformed{fault{Parameter: "Authorization", Detail: fmt.Sprintf("appears %d times; send it once", n)}})
		return
	}
	keepEncodedSlash(r.URL)
	e.handler.ServeHTTP(x.w, x.r)
	if x.pooled != nil {
		x.pooled.free()
	}
}

// ended logs and counts an exchange that began at start.
func (e *endpoints) ended(x *exchange, start time.Time) {
	if x.onEnd != nil {
		x.onEnd()
	}
	if x.err == nil && x.sent.status == 0 {
		x.err = errors.New("no answer")
	}
	end := time.Now()
	took := end.Sub(start)
	level := slog.LevelInfo
	if x.err != nil && !errors.Is(x.err, errClientGone) {
		level = slog.LevelError
	}
	// Not by way of the Logger, which looks up where in the source it was called.
	if x.log.Enabled(context.Background(), level) {
		line := slog.NewRecord(end, level, "request", 0)
		if x.route == "" {
			line.AddAttrs(slog.String("method", x.r.Method), slog.String("route", ""))
		}
		line.AddAttrs(
			slog.Int("status", x.sent.status),
			slog.Int64("bytes", x.bytes),
			slog.Duration("duration", took),
			slog.String("request", x.id),
			slog.String("client", x.client),
		)
		if x.err != nil {
			line.AddAttrs(slog.Any("err", x.err))
		}
		_ = x.log.Handle(context.Background(), line) // where it could be said that it fails, it fails
	}
	if e.metrics != nil {
		e.metrics.request(x.route, x.r.Method, x.sent.status, took)
	}
}

// The server's limits on a connection.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 30 * time.Second
	idleTimeout       = 2 * time.Minute
	// writeTimeout is from the end of the header to the end of the answer. An answer of
	// more than writePiece goes on as long as its client reads.
	writeTimeout = 2 * time.Minute
	// maxHeaderBytes is 16 KiB, of which net/http adds the last 4 itself (and up to
	// 4 more that it read along with the request before).
	maxHeaderBytes = 16<<10 - 4<<10
	// shutdownTimeout is for the requests in flight.
	shutdownTimeout = 10 * time.Second
)

const mergePatchType = "application/merge-patch+json"

// Values of fields that are the same in each answer. Nobody changes them.
var (
	closed  = []string{"close"}
	nosniff = []string{"nosniff"}
)
