package main

// The router: the patterns with their handlers, the responses that belong to no endpoint
// (404, 405, OPTIONS), the log line of each request, and the limits of the server.

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"runtime"
	"strings"
	"syscall"
	"time"

	"github.com/julienschmidt/httprouter"
)

// endpoints is an http.Handler that serves each request as an exchange, with the endpoint that
// is registered for its method and path. The API and the control socket have one each.
type endpoints struct {
	router  *httprouter.Router
	handler http.Handler // the router, or a middleware that wraps it
	log     *slog.Logger
	memory  *memory     // of all requests; nil: unbounded
	metrics *apiMetrics // nil: requests are not counted
	// routes are the registered endpoints, for tests that send a request to each.
	routes []route
}

// route is one method of one pattern.
type route struct {
	method, pattern string
	public          bool // registered with public
}

// params are the values of a pattern's parameters in the path of a request.
type params = httprouter.Params

// newEndpoints returns a router without endpoints. notFound is the detail of the 404 for a path
// that matches no pattern.
func newEndpoints(log *slog.Logger, notFound string) *endpoints {
	e := &endpoints{router: httprouter.New(), log: log}
	e.handler = e.router
	// A wrong path gets a 404 that explains it. A redirect would hide the mistake.
	e.router.RedirectTrailingSlash, e.router.RedirectFixedPath = false, false
	e.router.NotFound = failWith(newProblem(http.StatusNotFound, notFound))
	e.router.MethodNotAllowed = failWith(newProblem(http.StatusMethodNotAllowed, "This path does not support the method; the Allow field lists the methods that it supports."))
	e.router.GlobalOPTIONS = http.HandlerFunc(options)
	e.router.PanicHandler = func(w http.ResponseWriter, r *http.Request, p any) { exchangeOf(w, r).panicked(p) }
	return e
}

// handle registers the endpoint of a method and a pattern. The log names the pattern, not the
// path, whose ids would make each line different.
func (e *endpoints) handle(method, pattern string, serve func(*exchange, params) (response, error)) {
	e.routes = append(e.routes, route{method: method, pattern: pattern})
	log := e.log.Handler().WithAttrs([]slog.Attr{slog.String("method", method), slog.String("route", pattern)})
	e.router.Handle(method, pattern, func(w http.ResponseWriter, r *http.Request, ps httprouter.Params) {
		x := exchangeOf(w, r)
		x.route, x.log = pattern, log
		resp, err := serve(x, ps)
		if err != nil {
			x.fail(err)
			return
		}
		x.send(resp)
	})
}

// public registers an endpoint that requires no token and whose pattern has no parameters.
func (e *endpoints) public(method, pattern string, serve func(*exchange) (response, error)) {
	e.handle(method, pattern, func(x *exchange, _ params) (response, error) { return serve(x) })
	e.routes[len(e.routes)-1].public = true
}

// failWith returns a handler that responds with a problem.
func failWith(p *problem) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { exchangeOf(w, r).fail(p) })
}

// options responds to OPTIONS. The router has set the Allow field.
func options(w http.ResponseWriter, r *http.Request) {
	resp := response{status: http.StatusNoContent}
	if strings.Contains(w.Header().Get("Allow"), http.MethodPatch) {
		resp.acceptPatch = mergePatchType // RFC 5789 §3.1
	}
	exchangeOf(w, r).send(resp)
}

// completePath sets the path of a request for a URL without one, such as http://localhost. It is "/"
// (RFC 9110 §4.2.3), or "*", the server as a whole, for OPTIONS without a query (RFC 9112 §3.2.4).
func completePath(r *http.Request) {
	switch {
	case r.URL.Path != "" || r.Method == http.MethodConnect: // which names no path
	case r.Method == http.MethodOptions && r.URL.RawQuery == "":
		r.URL.Path = "*"
	default:
		r.URL.Path = "/"
	}
}

// keepEncodedSlash makes the router match the encoded path if that has an encoded slash. The
// slash is then part of an id, which is refused as invalid. In the decoded path it would
// separate two segments and could lead to another endpoint.
func keepEncodedSlash(u *url.URL) {
	if strings.Contains(strings.ToUpper(u.RawPath), "%2F") {
		u.Path = u.RawPath
	}
}

// ServeHTTP serves one request with its endpoint, and logs one line for it.
func (e *endpoints) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	x := newExchange(w, r, e.log.Handler(), e.memory)
	start := time.Now()
	defer e.ended(x, start)
	x.set("X-Request-Id", x.id)
	w.Header()["X-Content-Type-Options"] = nosniff
	if r.ProtoMajor == 1 && (r.ProtoMinor == 0 || r.TransferEncoding != nil) {
		// A request with both Content-Length and Transfer-Encoding, or with Transfer-Encoding
		// in HTTP/1.0, may be an attempt at request smuggling: bytes after its content could
		// be taken for another request. The connection must be closed after such a request
		// (RFC 9112 §6.1). net/http hides which fields a request had, so the connection is
		// closed after every chunked request and every HTTP/1.0 request.
		w.Header()["Connection"] = connectionClose
	}
	if err := checkOnce(r.Header, "Authorization"); err != nil {
		x.fail(err)
		return
	}
	completePath(r)
	keepEncodedSlash(r.URL)
	e.handler.ServeHTTP(x.w, x.r)
	if x.pooled != nil {
		x.pooled.free()
	}
}

// ended calls onEnd, gives back the memory of an exchange that began at start, and logs and counts
// it. It is deferred, so it runs also when a panic aborts the connection.
func (e *endpoints) ended(x *exchange, start time.Time) {
	x.memory.shrink(0)
	if x.onEnd != nil {
		x.onEnd()
	}
	if x.err == nil && x.sent.status == 0 {
		x.err = errors.New("no response was sent")
	}
	end := time.Now()
	took := end.Sub(start)
	level := slog.LevelInfo
	if x.err != nil && !errors.Is(x.err, errClientGone) {
		level = slog.LevelError
	}
	// The handler is called directly: a slog.Logger would look up its caller in the source for
	// each line.
	if x.log.Enabled(context.Background(), level) {
		line := slog.NewRecord(end, level, "request", 0)
		if x.route == "" {
			line.AddAttrs(slog.String("method", knownMethod(x.r.Method)), slog.String("route", ""))
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
		if x.log.Enabled(context.Background(), slog.LevelDebug) {
			line.AddAttrs(x.explanation()...)
		}
		_ = x.log.Handle(context.Background(), line) // there is no other place to report that logging failed
	}
	if e.metrics != nil {
		e.metrics.request(x.route, x.r.Method, x.sent.status, took)
	}
}

// knownMethod returns a method, or "other" for one that RFC 9110 §9.3 and RFC 5789 do not define.
// Such a method may be a part of the body of a request whose Content-Length was too small.
func knownMethod(method string) string {
	switch method {
	case http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete,
		http.MethodOptions, http.MethodConnect, http.MethodTrace:
		return method
	}
	return "other"
}

// limitUnsent limits the bytes that the operating system buffers for a connection before it can
// send them, to pieceSize. By default Linux buffers megabytes, and a blocked write continues only
// when a third of them was acknowledged: the deadline of a piece would cut off a client that reads
// slowly but steadily. limitUnsent does nothing on systems without such a limit.
func limitUnsent(c net.Conn) {
	option := map[string]int{"linux": 25, "darwin": 0x201}[runtime.GOOS] // TCP_NOTSENT_LOWAT
	if secure, ok := c.(*tls.Conn); ok {
		c = secure.NetConn()
	}
	tcp, ok := c.(*net.TCPConn)
	if !ok || option == 0 {
		return
	}
	raw, err := tcp.SyscallConn()
	if err != nil {
		return // the connection is closed
	}
	_ = raw.Control(func(fd uintptr) { _ = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, option, pieceSize) })
}

// Limits of an HTTP server.
const (
	readHeaderTimeout = 5 * time.Second
	idleTimeout       = 2 * time.Minute
	// maxConcurrentStreams is the maximum of requests at once on a connection of HTTP/2, the
	// smallest that RFC 9113 §6.5.2 recommends.
	maxConcurrentStreams = 100
	// maxHeaderBytes makes the limit of a request's header 16 KiB, since net/http allows 4 KiB
	// more than its setting. It may accept up to 4 KiB more, if it had read that much of the
	// header along with the request before.
	maxHeaderBytes = 16<<10 - 4<<10
	// shutdownTimeout is how long a server that stops waits for the requests in flight.
	shutdownTimeout = 10 * time.Second
)

// mergePatchType is the media type of a JSON Merge Patch (RFC 7396 §4).
const mergePatchType = "application/merge-patch+json"

// Values of header fields. All responses share these slices, to save an allocation for each, so
// they must not be modified.
var (
	connectionClose = []string{"close"}
	nosniff         = []string{"nosniff"}
)
