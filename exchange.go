package main

// One request and its response, as far as all endpoints treat them alike: the request id,
// the body, the response and the values for the log line.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/google/uuid"
)

// exchange is one request and its response.
type exchange struct {
	w http.ResponseWriter // sent, or the writer that a middleware wrapped around it
	r *http.Request

	id     string       // the request id
	route  string       // the pattern that matched, or "" if none did
	log    slog.Handler // has the attributes method and route once a pattern has matched
	client string       // the id of the client that the request is from or about, or "" if unknown
	pooled *buffer      // holds the content of the response and is freed after it is sent; or nil
	memory share        // held for the body and for what is made of it, or for the response
	onEnd  func()       // called when the exchange ends, even if it is aborted; or nil

	content contentReader
	unread  bool // a body was refused while the client may be sending it
	sent    statusWriter
	bytes   int64 // of the response's content, written so far
	err     error // the reason for a 5xx response or an aborted connection, else nil

	// reason and faults say why a 4xx response or a preflight request was refused, for the log
	// at level debug. They have no value from a body.
	reason string
	faults []fault
}

// newExchange returns a new exchange for a request, which holds a share of m. It stores the exchange
// in the context of its own copy of the request, x.r, where exchangeOf finds it.
func newExchange(w http.ResponseWriter, r *http.Request, log slog.Handler, m *memory) *exchange {
	x := &exchange{id: uuid.New().String(), log: log, memory: share{of: m}, sent: statusWriter{ResponseWriter: w}}
	x.w = &x.sent
	x.r = r.WithContext(context.WithValue(r.Context(), exchangeKey{}, x))
	return x
}

// exchangeKey is the key of the exchange in the context of a request.
type exchangeKey struct{}

// exchangeOf returns the exchange of a request. From then on the exchange writes its response
// to w, which may be the writer of a middleware.
func exchangeOf(w http.ResponseWriter, r *http.Request) *exchange {
	x := r.Context().Value(exchangeKey{}).(*exchange)
	x.w = w
	return x
}

// statusWriter records the status of a response, also if a middleware writes the response.
type statusWriter struct {
	http.ResponseWriter
	status int // 0 until a status is written
}

// WriteHeader records the status and writes it.
func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap returns the writer of net/http, on which http.ResponseController sets deadlines.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// response is the response of an endpoint that succeeded, or of an error that fail converted.
// A field of the header that is empty is not sent.
type response struct {
	status      int
	contentType string // "" means application/json if there is content
	etag        string
	// location and link are references relative to the URL of the request (RFC 3986 §5), so that
	// they hold behind a proxy that serves the API below a path of its own.
	location    string
	link        string
	acceptPatch string
	noStore     bool      // no cache may store the response (RFC 6749 §5.1)
	header      [2]string // the name and the value of one more field, or empty

	content []byte // all of the content, or its first part if more is set
	// more returns the next part of the content, or an empty one at the end. It may use the
	// memory of buf, which no longer holds anything. It is nil if content is complete.
	more func(buf []byte) ([]byte, error)
	size int64 // of all content, in bytes, if more is set or if HEAD needs no content; 0 if unknown
}

// applicationJSON is the value of Content-Type in most responses. They share the slice, to
// save an allocation for each, so it must not be modified.
var applicationJSON = []string{jsonType}

// jsonType is the media type of JSON (RFC 8259 §11).
const jsonType = "application/json"

// panicked handles a panic of a handler: it responds with a 500 and logs the stack. A panic
// with http.ErrAbortHandler continues, since net/http uses that value to abort a connection.
func (x *exchange) panicked(p any) {
	if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		panic(p)
	}
	x.fail(fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
}

// set sets a field of the response's header, unless the value is empty. The name must be in
// canonical form.
func (x *exchange) set(name, value string) {
	if value == "" {
		return
	}
	x.w.Header()[name] = []string{value}
}

// send writes a response. It aborts the connection if the client is gone, or if a part of the
// content cannot be read. Of the memory of the exchange it keeps what the response needs.
func (x *exchange) send(resp response) {
	if resp.more == nil {
		x.memory.shrink(int64(cap(resp.content)))
	}
	h := x.w.Header()
	x.set("Etag", resp.etag)
	x.set("Location", resp.location)
	x.set("Link", resp.link)
	x.set("Accept-Patch", resp.acceptPatch)
	if resp.header[0] != "" {
		h.Set(resp.header[0], resp.header[1])
	}
	if resp.noStore {
		h.Set("Cache-Control", "no-store")
		h.Set("Pragma", "no-cache")
	}
	if resp.status != http.StatusNoContent && resp.status != http.StatusNotModified {
		if resp.more == nil && resp.size == 0 {
			resp.size = int64(len(resp.content))
		}
		if resp.contentType == "" && (len(resp.content) > 0 || resp.size > 0) {
			h["Content-Type"] = applicationJSON
		}
		x.set("Content-Type", resp.contentType)
		if resp.more == nil || resp.size > 0 {
			x.set("Content-Length", strconv.FormatInt(resp.size, 10))
		}
	}
	x.w.WriteHeader(resp.status)
	if x.r.Method == http.MethodHead {
		return
	}
	x.write(resp.content)
	for resp.more != nil && x.err == nil {
		content, err := resp.more(resp.content[:0])
		if err != nil {
			x.abort(err)
		}
		if len(content) == 0 {
			return
		}
		x.write(content)
	}
}

// The time that the content of a request or a response may take.
const (
	// readTimeout is for the content of a request, and writeTimeout is for the time from the end
	// of its header to the end of the response.
	readTimeout  = 30 * time.Second
	writeTimeout = 2 * time.Minute
	// Content longer than pieceSize, in bytes, may take longer: a client must send or accept each
	// piece of that size within pieceTimeout.
	pieceSize    = 64 << 10
	pieceTimeout = 30 * time.Second
)

// write writes content, with a write deadline for each piece of a long response. A client that
// stops reading would otherwise hold the response's memory for ever, and one deadline for the
// whole response would cut off a client that reads slowly but steadily. It aborts the
// connection if the client is gone.
func (x *exchange) write(b []byte) {
	long := len(b) > pieceSize || x.bytes > 0
	for len(b) > 0 {
		if long {
			_ = http.NewResponseController(x.w).SetWriteDeadline(time.Now().Add(pieceTimeout)) // which net/http supports
		}
		n, err := x.w.Write(b[:min(len(b), pieceSize)])
		x.bytes += int64(n)
		if err != nil {
			x.abort(fmt.Errorf("%w: %w", errClientGone, err))
		}
		b = b[n:]
	}
}

// errClientGone is the error of an exchange whose client closed the connection or stopped
// reading before the response was complete. It is logged at level info, since it is no fault
// of the service.
var errClientGone = errors.New("the client left, or read too slowly")

// abort closes the connection at once and records err for the log. It is used after a part of
// the response was sent, since a client could take a truncated response for a complete one,
// and when no response would be true.
func (x *exchange) abort(err error) {
	x.err = err
	panic(http.ErrAbortHandler)
}

// fail sends an error as the response. It aborts the connection instead if a response was
// started, or if no response may be sent.
func (x *exchange) fail(err error) {
	if x.sent.status != 0 {
		x.abort(err)
	}
	if errors.Is(err, context.Canceled) {
		// net/http cancels the context of a request when it reads the end of the connection.
		// A client that closes only its sending half (a half-closed connection) could still
		// read a response, but cannot be told from a client that is gone.
		x.abort(fmt.Errorf("%w: %w", errClientGone, err))
	}
	if errors.Is(err, ErrClosed) || errors.Is(err, ErrUnknown) {
		// The store was closed before it returned the result of the write, or the disk hangs.
		// Whether the write was committed is unknown, and any status would claim one or the
		// other. Without a response, the client knows that it must check or send the request
		// again.
		x.abort(err)
	}
	resp := response{}
	var body any
	var oerr *oauthError
	if errors.As(err, &oerr) {
		resp.status, resp.noStore, resp.header, body = oerr.status, true, oerr.header, oerr
		x.reason = oerr.Code + ": " + oerr.Description
	} else {
		p := *problemOf(err)
		p.Instance = x.id
		resp.status, resp.contentType, resp.header, body = p.Status, "application/problem+json", p.header, &p
		x.reason, x.faults = p.Detail, p.Errors
	}
	if resp.status >= 500 {
		x.err = err
	}
	content, err := json.Marshal(body)
	if err != nil {
		x.abort(fmt.Errorf("encode error: %w", err))
	}
	resp.content = content
	x.send(resp)
	x.discard()
}

// discardTime is how long the rest of a body is read that has been refused.
const discardTime = 5 * time.Second

// discard reads the rest of a body that was refused for its memory, after the response. Most clients
// send all of a body before they read the response, and would only see that the connection breaks.
func (x *exchange) discard() {
	if !x.unread {
		return
	}
	connection := http.NewResponseController(x.sent.ResponseWriter)
	if connection.Flush() != nil {
		return // the client is gone
	}
	_ = connection.SetReadDeadline(time.Now().Add(discardTime)) // which net/http supports
	_, _ = io.Copy(io.Discard, x.r.Body)                        // whatever ends it, the connection is closed
}

// explanation returns what the log has of a request at level debug beyond its usual line: the
// path, without the query, which may have a secret, and why the request was refused.
func (x *exchange) explanation() []slog.Attr {
	attrs := []slog.Attr{slog.String("path", withoutLongNames(x.r.URL.Path))}
	if x.err != nil { // the line has it already
		return attrs
	}
	if x.reason != "" {
		attrs = append(attrs, slog.String("reason", x.reason))
	}
	if len(x.faults) > 0 {
		rules := make([]string, 0, len(x.faults))
		for _, f := range x.faults {
			rules = append(rules, withoutLongNames(f.broken()))
		}
		attrs = append(attrs, slog.Any("faults", rules))
	}
	return attrs
}

// withoutLongNames returns a path, a pointer or an id with an ellipsis for each name in it that is
// as long as a token or a secret, since a mistaken client or person may have put one there. The
// names of the API are shorter.
func withoutLongNames(path string) string {
	names := strings.Split(path, "/")
	for i, name := range names {
		if len(name) >= secretLength {
			names[i] = "…"
		}
	}
	return strings.Join(names, "/")
}

// checkOnce returns a *malformed if a header has more than one line of a field that is not a list,
// even if they are equal: a sender must not do that (RFC 9110 §5.3), and another recipient may have
// decided by a line that this service would ignore. The name must be in canonical form.
func checkOnce(h http.Header, name string) error {
	if n := len(h[name]); n > 1 {
		return &malformed{fault{Parameter: name, rule: "once", Detail: fmt.Sprintf("appears %d times; send it once", n)}}
	}
	return nil
}

// checkCoding returns a 415 if the content of a request has a content coding.
func checkCoding(h http.Header) error {
	coding := strings.Join(h["Content-Encoding"], ", ") // a list (RFC 9110 §8.4)
	if coding != "" && !strings.EqualFold(coding, "identity") {
		return newProblem(http.StatusUnsupportedMediaType, "Content-Encoding must be identity, is "+quoted(coding)+".").
			with("Accept-Encoding", "identity") // RFC 9110 §12.5.3
	}
	return nil
}

// hold counts content of some bytes, and times as much memory as that, to what the exchange holds.
// It returns errNoMemory if all exchanges together would then hold too much.
func (x *exchange) hold(content, times int) error {
	return x.memory.resize(int64(content), int64(times), x.client != "")
}

// body reads the request's content, and holds memory for it as it arrives. It returns a *problem if
// the content has more than maxBytes bytes or arrives too slowly, errNoMemory if other requests hold
// too much, and a *malformed if it cannot be read completely.
func (x *exchange) body(maxBytes int64) ([]byte, error) {
	if x.r.ContentLength > maxBytes {
		return nil, tooLarge(maxBytes)
	}
	most := maxBytes
	if x.r.ContentLength >= 0 {
		most = x.r.ContentLength
	}
	most += bytes.MinRead // room to read the end
	// The time of the header does not count.
	_ = http.NewResponseController(x.sent.ResponseWriter).SetReadDeadline(time.Now().Add(readTimeout)) // which net/http supports
	x.content = contentReader{ReadCloser: x.r.Body, w: x.sent.ResponseWriter}
	from := http.MaxBytesReader(x.sent.ResponseWriter, &x.content, maxBytes)
	b := make([]byte, 0, min(most, firstBuffer))
	var err error
	for err == nil {
		if len(b) == cap(b) {
			larger := 2 * cap(b)
			if int64(larger) >= most-bytes.MinRead {
				larger = int(most)
			}
			if err = x.hold(larger, madeOfBody); err != nil {
				break
			}
			b = append(make([]byte, 0, larger), b...)
		}
		var n int
		n, err = from.Read(b[len(b):cap(b)])
		b = b[:len(b)+n]
	}
	var exceeded *http.MaxBytesError
	switch {
	case errors.Is(err, io.EOF):
		return b, nil
	case errors.Is(err, errNoMemory):
		if x.r.ProtoMajor == 1 {
			x.w.Header().Set("Connection", "close") // rather than wait for the rest of the body
			x.unread = true
			_ = http.NewResponseController(x.sent.ResponseWriter).EnableFullDuplex() // which net/http supports
		}
		return nil, err
	case errors.As(err, &exceeded):
		return nil, tooLarge(maxBytes)
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, newProblem(http.StatusRequestTimeout, "The content arrived too slowly; send at least 64 KiB every 30 seconds.")
	case errors.Is(err, io.ErrUnexpectedEOF):
		return nil, &malformed{fault{Pointer: "#", rule: "complete", Detail: "the connection ended before all of the content arrived"}}
	}
	return nil, &malformed{fault{Pointer: "#", rule: "complete", Detail: "the content could not be read completely"}}
}

// firstBuffer is the size in bytes of the buffer for a body of which nothing has arrived. It doubles
// whenever it is full.
const firstBuffer = 4 << 10

// contentReader reads the content of a request. When more than pieceSize bytes have arrived, the
// client has pieceTimeout for as many more, and the response has writeTimeout after that. The first
// bytes have readTimeout.
type contentReader struct {
	io.ReadCloser
	w    http.ResponseWriter
	read int // bytes since the deadlines were set
}

// Read reads the next bytes.
func (c *contentReader) Read(b []byte) (int, error) {
	n, err := c.ReadCloser.Read(b)
	if c.read += n; c.read > pieceSize {
		c.read = 0
		now, connection := time.Now(), http.NewResponseController(c.w)
		_ = connection.SetReadDeadline(now.Add(pieceTimeout)) // which net/http supports
		_ = connection.SetWriteDeadline(now.Add(pieceTimeout + writeTimeout))
	}
	return n, err
}

// tooLarge returns the problem of a request with more than maxBytes bytes of content.
func tooLarge(maxBytes int64) error {
	return newProblem(http.StatusRequestEntityTooLarge,
		fmt.Sprintf("The content may have at most %d bytes; send fewer prices, or start the service with a larger --max-body.", maxBytes))
}

// buffer is memory for a document. Requests reuse it one after another. (A body has memory of its
// own: while it arrives, a long buffer of the pool would be held for a few bytes.)
type buffer struct{ b []byte }

// buffers is the pool of buffers that no request uses. After two garbage collections it is empty
// again, so it holds no more than requests held not long before.
var buffers = sync.Pool{New: func() any { return &buffer{make([]byte, 0, 4<<10)} }}

// maxPooled is the capacity in bytes above which a buffer does not go back to the pool. It has
// room for a page of a list, or for a contract with a year of hourly prices.
const maxPooled = 1 << 20

// free returns the buffer to the pool, unless it is too large. The caller must not use the
// buffer, or a slice of it, afterwards.
func (b *buffer) free() {
	if cap(b.b) <= maxPooled {
		buffers.Put(b)
	}
}

// fit moves what is in the buffer to memory of its size, if the buffer is much larger: a client
// that takes a short document slowly would otherwise keep a long buffer from the pool.
func (b *buffer) fit() {
	if cap(b.b) > max(2*len(b.b), tinyContent) {
		long := &buffer{b.b}
		b.b = bytes.Clone(b.b)
		long.free()
	}
}
