package main

// The Idempotency-Key field (draft-ietf-httpapi-idempotency-key-header): its parser, and the set
// of keys whose request is in flight. The store keeps the first response for each key.

import (
	"net/http"
	"strings"
	"sync"
)

// maxIdempotencyKey is the maximum length of a key, in characters; a UUID has 36.
const maxIdempotencyKey = 255

// parseIdempotencyKey returns the key of a request, or "" if it has none. It returns a
// *malformed for a key that is not valid. The draft requires a quoted string (RFC 9651 §3.3.3),
// but most clients send the text without quotes; both forms of a text are the same key.
func parseIdempotencyKey(h http.Header) (string, error) {
	lines := h["Idempotency-Key"]
	if len(lines) == 0 {
		return "", nil
	}
	wrong := &malformed{fault{
		Parameter: "Idempotency-Key", rule: "string",
		Detail: `must be one string of 1 to 255 printable ASCII characters, such as "8e03978e-40d5-43e8-bc93-6894a57f9324"`,
	}}
	key := lines[0]
	if quoted, ok := strings.CutPrefix(key, `"`); ok {
		var ok bool
		if key, ok = unquoteString(quoted); !ok {
			return "", wrong
		}
	}
	if len(lines) > 1 || key == "" || len(key) > maxIdempotencyKey {
		return "", wrong
	}
	for i := range len(key) {
		if key[i] < ' ' || key[i] > '~' {
			return "", wrong
		}
	}
	return key, nil
}

// unquoteString decodes a quoted string of RFC 9651 §3.3.3, given without its first quote. It
// reports whether the string is valid and ends with s.
func unquoteString(s string) (text string, ok bool) {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '"':
			return b.String(), i == len(s)-1
		case s[i] == '\\' && i+1 < len(s) && (s[i+1] == '"' || s[i+1] == '\\'):
			i++
		case s[i] == '\\':
			return "", false
		}
		b.WriteByte(s[i])
	}
	return "", false
}

// inFlightKeys is the set of keys that have a request in flight. As the draft asks, a second
// request with such a key gets a 409: there is no first response yet that it could repeat. The
// set is not what prevents a second contract; Store.Create checks the key in its transaction.
// The zero value is an empty set.
type inFlightKeys struct {
	mu   sync.Mutex
	keys map[string]struct{}
}

// begin adds a key for a new request, and reports whether no other request with the key is in
// flight. If it reports true, the caller must call done when the request has ended.
func (f *inFlightKeys) begin(key string) (done func(), ok bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, taken := f.keys[key]; taken {
		return nil, false
	}
	if f.keys == nil {
		f.keys = make(map[string]struct{})
	}
	f.keys[key] = struct{}{}
	return func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		delete(f.keys, key)
	}, true
}
