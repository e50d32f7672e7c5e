package main

// One request and its response, in the way common to all endpoints: request id, body,
// response bytes, log line.

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"github.com/google/uuid"
	"io"
	"log/slog"
	"net/http"
	"os"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"github.com/go-json-experiment/json"
)

// exchange is one request and what became of it.
type exchange struct {
	w http.ResponseWriter // sent, or what a middleware made of it
	r *http.Request

	id     string       // the request id
	route  string       // the pattern that matched, or ""
	log    slog.Handler // has said the method and the route
	client string       // the id of the client that asks or is asked about, once it is known
	pooled *buffer      // holds the answer's content, or nil
	onEnd  func()       // is called at the end, however the exchange ends; or nil

	sent  statusWriter
	bytes int64 // of the response's content
	err   error // why the response is a 5xx, or was cut off
}

// newExchange returns the exchange of a request, which exchangeOf finds from then on.
func newExchange(w http.ResponseWriter, r *http.Request, log slog.Handler) *exchange {
	x := &exchange{id: uuid.New().String(), log: log, sent: statusWriter{ResponseWriter: w}}
	x.w = &x.sent
	x.r = r.WithContext(context.WithValue(r.Context(), exchangeKey{}, x))
	return x
}

// exchangeKey is the key of an exchange in the context of its request.
type exchangeKey struct{}

// exchangeOf returns the exchange of a request. The response is written to w, which may
// be a middleware's.
func exchangeOf(w http.ResponseWriter, r *http.Request) *exchange {
	x := r.Context().Value(exchangeKey{}).(*exchange)
	x.w = w
	return x
}

// statusWriter records the status of a response, which a middleware may write too.
type statusWriter struct {
	http.ResponseWriter
	status int // 0 until a status is written
}

// WriteHeader records the status and writes it.
func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

// Unwrap returns the connection's own writer to http.ResponseController.
func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// answer is a success.
type response struct {
	status      int
	contentType string // "" is application/json, of content that is not empty
	etag        string
	location    string
	link        string
	acceptPatch string
	noStore     bool      // RFC 6749 §5.1
	header      [2]string // one field more, name and value, or empty

	content []byte
	// more gives content that did not fit, until it gives none.
	more func(buf []byte) ([]byte, error)
	size int64 // of all the content, in bytes, if there is more; 0 is unknown
}

// Values of fields that are the same in each answer. Nobody changes them.
var applicationJSON = []string{"application/json"}

// panicked answers a request whose handler panicked.
func (x *exchange) panicked(p any) {
	if p == http.ErrAbortHandler {
		panic(p) // net/http's way to break a connection off
	}
	x.fail(fmt.Errorf("panic: %v\n%s", p, debug.Stack()))
}

// set adds a field with a name in its canonical form, unless its value is empty.
func (x *exchange) set(name, value string) {
	if value == "" {
		return
	}
	x.w.Header()[name] = []string{value}
}

// send writes an answer.
func (x *exchange) send(a response) {
	h := x.w.Header()
	x.set("Etag", a.etag)
	x.set("Location", a.location)
	x.set("Link", a.link)
	x.set("Accept-Patch", a.acceptPatch)
	if a.header[0] != "" {
		h.Set(a.header[0], a.header[1])
	}
	if a.noStore {
		h.Set("Cache-Control", "no-store")
		h.Set("Pragma", "no-cache")
	}
	if a.status != http.StatusNoContent && a.status != http.StatusNotModified {
		if a.contentType == "" && len(a.content) > 0 {
			h["Content-Type"] = applicationJSON
		}
		x.set("Content-Type", a.contentType)
		if a.more == nil {
			a.size = int64(len(a.content))
		}
		if a.more == nil || a.size > 0 {
			x.set("Content-Length", strconv.FormatInt(a.size, 10))
		}
	}
	x.w.WriteHeader(a.status)
	if x.r.Method == http.MethodHead {
		return
	}
	x.write(a.content)
	for a.more != nil && x.err == nil {
		content, err := a.more(a.content[:0])
		if err != nil {
			x.abort(err)
		}
		if len(content) == 0 {
			return
		}
		x.write(content)
	}
}

// writePiece is how much of an answer, in bytes, a client must take in pieceTimeout.
// One that has no more than that is under the server's writeTimeout alone.
const (
	writePiece   = 64 << 10
	pieceTimeout = 30 * time.Second
)

// write writes content. A client that does not read would hold its memory for ever; one
// that reads slowly may take as long as it needs.
func (x *exchange) write(b []byte) {
	long := len(b) > writePiece || x.bytes > 0
	for len(b) > 0 {
		if long {
			_ = http.NewResponseController(x.w).SetWriteDeadline(time.Now().Add(pieceTimeout)) // HTTP has them
		}
		n, err := x.w.Write(b[:min(len(b), writePiece)])
		x.bytes += int64(n)
		if err != nil {
			x.abort(fmt.Errorf("%w: %w", errClientGone, err))
		}
		b = b[n:]
	}
}

// errLeft: the client does not wait for its answer.
var errClientGone = errors.New("the client left")

// abort breaks the connection off, where half an answer could be taken for a
// whole one, or no answer is true.
func (x *exchange) abort(err error) {
	x.err = err
	panic(http.ErrAbortHandler)
}

// fail writes an error as the answer.
func (x *exchange) fail(err error) {
	if x.sent.status != 0 {
		x.abort(err)
	}
	if errors.Is(err, context.Canceled) {
		x.abort(fmt.Errorf("%w: %w", errClientGone, err))
	}
	if errors.Is(err, ErrClosed) {
		x.abort(err) // what became of the change is not known, and no answer says just that
	}
	a := response{}
	var body any
	var oerr *oauthError
	if errors.As(err, &oerr) {
		a.status, a.noStore, a.header, body = oerr.status, true, oerr.header, oerr
	} else {
		p := *problemOf(err)
		p.Instance = x.id
		a.status, a.contentType, a.header, body = p.Status, "application/problem+json", p.header, &p
	}
	if a.status >= 500 {
		x.err = err
	}
	content, err := json.Marshal(body)
	if err != nil {
		x.abort(fmt.Errorf("encode error: %w", err))
	}
	a.content = content
	x.send(a)
}

// body reads the request's content into a buffer from the pool, at most maxBytes
// of it.
func (x *exchange) body(maxBytes int64) (*buffer, error) {
	if x.r.ContentLength > maxBytes {
		return nil, tooLarge(maxBytes)
	}
	b := buffers.Get().(*buffer)
	w := bytes.NewBuffer(b.b[:0])
	_, err := w.ReadFrom(http.MaxBytesReader(x.sent.ResponseWriter, x.r.Body, maxBytes))
	b.b = w.Bytes()
	var exceeded *http.MaxBytesError
	switch {
	case err == nil:
		return b, nil
	case errors.As(err, &exceeded):
		err = tooLarge(maxBytes)
	case errors.Is(err, os.ErrDeadlineExceeded):
		err = newProblem(http.StatusRequestTimeout, "The content took too long to arrive; send it within 30 seconds.")
	case errors.Is(err, io.ErrUnexpectedEOF):
		err = &malformed{fault{Pointer: "#", Detail: "the content ends before its Content-Length"}}
	default:
		err = &malformed{fault{Pointer: "#", Detail: "the content cannot be read to its end"}}
	}
	b.free()
	return nil, err
}

func tooLarge(maxBytes int64) error {
	return newProblem(http.StatusRequestEntityTooLarge,
		fmt.Sprintf("The content may have at most %d bytes; send fewer prices, or start the service with a larger --max-body.", maxBytes))
}

// buffer is a piece of memory that requests take turns with.
type buffer struct{ b []byte }

var buffers = sync.Pool{New: func() any { return &buffer{make([]byte, 0, 4<<10)} }}

// maxPooled is the largest buffer that is kept, in bytes: a list's page, or a
// year of hourly prices.
const maxPooled = 1 << 20

func (b *buffer) free() {
	if cap(b.b) <= maxPooled {
		buffers.Put(b)
	}
}
