package main

// Problem documents: only this file turns an error into an RFC 9457 problem document, or into
// an OAuth error (RFC 6749 §5.2) for the endpoints under /oauth2/.

import (
	"errors"
	"fmt"
	"net/http"
)

// problem is an error with the problem document that is sent for it. Its type is always
// about:blank, so its kind is that of the status (RFC 9457 §4.2.1); Detail explains the case.
type problem struct {
	Type     string  `json:"type"`
	Title    string  `json:"title"`
	Status   int     `json:"status"`
	Detail   string  `json:"detail"`
	Instance string  `json:"instance"` // the request id
	Errors   []fault `json:"errors,omitempty"`

	// header is the name and the value of one more field of the response, or empty.
	header [2]string
}

// Error returns the status and the detail.
func (p *problem) Error() string { return fmt.Sprintf("%d: %s", p.Status, p.Detail) }

// newProblem returns a problem whose title is the text of the status.
func newProblem(status int, detail string) *problem {
	return &problem{Type: "about:blank", Title: http.StatusText(status), Status: status, Detail: detail}
}

// with sets the one more field of the response, and returns p.
func (p *problem) with(name, value string) *problem {
	p.header = [2]string{name, value}
	return p
}

// retryAfter is the time in seconds after which a client should repeat a request that got a
// 503. It equals reopenInterval: the store tries to recover at most once in that time.
const retryAfter = "1"

// lookupRetryAfter is the time in seconds after which a token with an unknown key may be accepted if
// there are too many of them. It equals lookupInterval.
const lookupRetryAfter = "10"

// problemOf returns the problem for an error. It is the only place that maps errors to
// statuses. An unknown error is a 500 without its text, which only the log has.
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
		p := newProblem(http.StatusBadRequest, "The request cannot be parsed; see errors.")
		p.Errors = []fault{bad.fault}
		return p
	case errors.As(err, &inv):
		p := newProblem(http.StatusUnprocessableEntity, "The request breaks rules of the API; see errors.")
		p.Errors = inv.list()
		return p
	case errors.Is(err, errNoneMatch):
		return newProblem(http.StatusPreconditionFailed, "If-None-Match matches the existing contract; nothing was changed. Use another id, or send no If-None-Match to change the contract.")
	case errors.Is(err, errAlteredTag):
		return newProblem(http.StatusPreconditionFailed, "If-Match has an entity tag that a compressing proxy has changed: it is weak (W/…) or has a suffix such as -gzip, and so never matches; nothing was changed. Send the tag without W/ and the suffix, or configure the proxy not to compress the responses of this service.")
	case errors.Is(err, errPreconditionFailed):
		return newProblem(http.StatusPreconditionFailed, "If-Match does not name the current version of the contract; nothing was changed. Get the contract and decide again.")
	case errors.Is(err, errIssuerDown):
		return newProblem(http.StatusServiceUnavailable, "The keys of the token's issuer cannot be fetched at the moment. Send the request again.").with("Retry-After", retryAfter)
	case errors.Is(err, errLookups):
		return newProblem(http.StatusServiceUnavailable, "The token is signed with a key that is not known yet, and too many other tokens with unknown keys came before it. Send the request again.").with("Retry-After", lookupRetryAfter)
	case errors.Is(err, errNoMemory):
		return newProblem(http.StatusServiceUnavailable, "The requests in progress take all the memory that --body-memory allows; nothing was changed. Send the request again.").with("Retry-After", retryAfter)
	case errors.Is(err, ErrNotFound):
		return newProblem(http.StatusNotFound, "This user has no energy contract with this id.")
	case errors.Is(err, ErrKeyReused):
		p := newProblem(http.StatusUnprocessableEntity, "The Idempotency-Key was used for another request; use a new key for a new body.")
		p.Errors = []fault{{Parameter: "Idempotency-Key", rule: "once", Detail: "was used with another body in the last 24 hours"}}
		return p
	case errors.Is(err, ErrBusy):
		return newProblem(http.StatusServiceUnavailable, "Other writes took so long that this one was not begun; nothing was changed. Send the request again.").with("Retry-After", retryAfter)
	case errors.Is(err, ErrDisplaced):
		return newProblem(http.StatusServiceUnavailable, "The database file was moved, replaced or removed, so writes are stopped; nothing was changed. The service's log says what to do.").with("Retry-After", retryAfter)
	case errors.Is(err, ErrUnavailable) && errors.Is(err, ErrDamaged):
		return newProblem(http.StatusServiceUnavailable, "The database file is damaged and writes are stopped; nothing was changed. The service's log says what to do.").with("Retry-After", retryAfter)
	case errors.Is(err, ErrUnavailable):
		return newProblem(http.StatusServiceUnavailable, "The disk refuses writes at the moment; nothing was changed. Send the request again.").with("Retry-After", retryAfter)
	default:
		return newProblem(http.StatusInternalServerError, "Something is wrong with the service. Its log says more under this request id.")
	}
}

// oauthError is an error response of the token or revocation endpoint (RFC 6749 §5.2, RFC 7009
// §2.2.1).
type oauthError struct {
	Code        string `json:"error"`
	Description string `json:"error_description"`

	status int
	header [2]string // the name and the value of one more field of the response, or empty
	cause  error     // for the log; or nil
}

// Error returns the text of the cause, or the code and the description if there is none.
func (e *oauthError) Error() string {
	if e.cause != nil {
		return e.cause.Error()
	}
	return e.Code + ": " + e.Description
}

// Unwrap returns the cause, or nil.
func (e *oauthError) Unwrap() error { return e.cause }

// newOAuthError returns an error that the client caused.
func newOAuthError(status int, code, description string) *oauthError {
	return &oauthError{Code: code, Description: description, status: status}
}

// oauthErrorOf returns the OAuth error for an error that the client did not cause. RFC 6749
// §5.2 has no codes for such errors, so those of its §4.1.2.1 are used.
func oauthErrorOf(err error) *oauthError {
	p := problemOf(err)
	code := "server_error"
	if p.Status == http.StatusServiceUnavailable {
		code = "temporarily_unavailable"
	}
	return &oauthError{Code: code, Description: p.Detail, status: p.Status, header: p.header, cause: err}
}

// badToken is the reason why a token is refused, worded to follow "the token is". It must be
// ASCII without quotes and backslashes, since it is sent in a quoted string in
// WWW-Authenticate.
type badToken string

// Error returns a text for the log.
func (b badToken) Error() string { return "token is " + string(b) }

// The errors for a token that cannot be verified: its key is unknown, and the keys of its issuer
// cannot be fetched, or were fetched too often for unknown keys.
var (
	errIssuerDown = errors.New("the issuer's keys cannot be fetched")
	errLookups    = errors.New("the issuer's keys were fetched too often for keys that it does not publish")
)

// realm is the parameter realm of each WWW-Authenticate field (RFC 9110 §11.5).
const realm = `realm="energy-contracts"`
