package main

// Problem documents: every error becomes an RFC 9457 problem document here, or an OAuth
// error (RFC 6749 §5.2) under /oauth2/, and nowhere else.

import (
	"errors"
	"fmt"
	"net/http"
)

// problem is a problem document and an error. Its type is about:blank: the status
// says the kind, the detail says the fact.
type problem struct {
	Type     string  `json:"type"`
	Title    string  `json:"title"`
	Status   int     `json:"status"`
	Detail   string  `json:"detail"`
	Instance string  `json:"instance"` // the request id
	Errors   []fault `json:"errors,omitempty"`

	// header is one field more, name and value, or empty.
	header [2]string
}

func (p *problem) Error() string { return fmt.Sprintf("%d: %s", p.Status, p.Detail) }

func newProblem(status int, detail string) *problem {
	return &problem{Type: "about:blank", Title: http.StatusText(status), Status: status, Detail: detail}
}

// with adds a field to the answer.
func (p *problem) with(name, value string) *problem {
	p.header = [2]string{name, value}
	return p
}

// retryAfter is the seconds after which a 503 is worth another try: the store
// mends itself at most once in that time.
const retryAfter = "1"

// problemOf is the one place that knows which error is which status.
func problemOf(err error) *problem {
	var (
		p   *problem
		bad *malformed
		inv *invalid
	)
	switch {
	case errors.As(err, &p):
		return p
	case errors.As(err, &bad):
		p := newProblem(http.StatusBadRequest, "The request cannot be read; errors says where.")
		p.Errors = []fault{bad.fault}
		return p
	case errors.As(err, &inv):
		p := newProblem(http.StatusUnprocessableEntity, "The request breaks rules; errors lists them.")
		p.Errors = inv.list()
		return p
	case errors.Is(err, errNoneMatch):
		return newProblem(http.StatusPreconditionFailed, "If-None-Match names what is there already; nothing was changed. Use another id, or leave the field out to replace.")
	case errors.Is(err, errPreconditionFailed):
		return newProblem(http.StatusPreconditionFailed, "The contract is not the one that If-Match names; nothing was changed. Get it again and decide anew.")
	case errors.Is(err, errIssuerDown):
		return newProblem(http.StatusServiceUnavailable, "The issuer of the token cannot be asked for its keys at the moment. Send the request again.").with("Retry-After", retryAfter)
	case errors.Is(err, ErrNotFound):
		return newProblem(http.StatusNotFound, "This user has no energy contract with this id.")
	case errors.Is(err, ErrKeyReused):
		p := newProblem(http.StatusUnprocessableEntity, "The Idempotency-Key stands for another request; send a new key with a new body.")
		p.Errors = []fault{{Parameter: "Idempotency-Key", Detail: "was used with another body in the last 24 hours"}}
		return p
	case errors.Is(err, ErrBusy):
		return newProblem(http.StatusServiceUnavailable, "Too many writes wait; nothing was changed. Send the request again.").with("Retry-After", retryAfter)
	case errors.Is(err, ErrUnavailable) && errors.Is(err, ErrDamaged):
		return newProblem(http.StatusServiceUnavailable, "The database file is damaged and writes are stopped; nothing was changed. The service's log says what to do.").with("Retry-After", retryAfter)
	case errors.Is(err, ErrUnavailable):
		return newProblem(http.StatusServiceUnavailable, "The disk refuses writes at the moment; nothing was changed. Send the request again.").with("Retry-After", retryAfter)
	default:
		return newProblem(http.StatusInternalServerError, "Something is wrong with the service. Its log says more under this request id.")
	}
}

// oauthError is an error of the token endpoint (RFC 6749 §5.2).
type oauthError struct {
	Code        string `json:"error"`
	Description string `json:"error_description"`

	status int
	header [2]string
	cause  error // for the log
}

func (e *oauthError) Error() string {
	if e.cause != nil {
		return e.cause.Error()
	}
	return e.Code + ": " + e.Description
}

func (e *oauthError) Unwrap() error { return e.cause }

func newOAuthError(status int, code, description string) *oauthError {
	return &oauthError{Code: code, Description: description, status: status}
}

// oauthErrorOf is an error that is none of the client's as the token endpoint
// says it. RFC 6749 has no code for that; these are those of its §4.1.2.1.
func oauthErrorOf(err error) *oauthError {
	p := problemOf(err)
	code := "server_error"
	if p.Status == http.StatusServiceUnavailable {
		code = "temporarily_unavailable"
	}
	return &oauthError{Code: code, Description: p.Detail, status: p.Status, header: p.header, cause: err}
}

// badToken says what a token is instead of good, in ASCII without quotes.
type badToken string

func (b badToken) Error() string { return "token is " + string(b) }

// errIssuerDown: whether a token is good is not known, as its issuer does not tell
// its keys.
var errIssuerDown = errors.New("the issuer's keys cannot be had")

const realm = `realm="energy-contracts"`
