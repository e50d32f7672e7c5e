package main

// The Idempotency-Key field (draft-ietf-httpapi-idempotency-key-header): parsing it, and
// the set of keys whose request is in flight. The store keeps the first response to a key.

import (
	"net/http"
	"strings"
	"sync"
)

// maxIdempotencyKey is the longest key, in characters; a UUID has 36.
const maxIdempotencyKey = 255

// parseIdempotencyKey returns "" when there is none, or a *malformed. The draft
// asks for a quoted string (RFC 9651 §3.3.3); most clients send the bare text,
// which is taken as the same key.
func parseIdempotencyKey(h http.Header) (string, error) {
	lines := h["Idempotency-Key"]
	if len(lines) == 0 {
		return "", nil
	}
	wrong := &malformed{fault{
		Parameter: "Idempotency-Key",
		Detail:    `must be one string of 1 to 255 printable ASCII characters, such as "8e03978e-40d5-43e8-bc93-6894a57f9324"`,
	}}
	key := lines[0]
	if quoted, ok := strings.CutPrefix(key, `"`); ok {
		var closed bool
		if key, closed = unquoteString(quoted); !closed {
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

// unquoteString reads an RFC 9651 string after its first quote. It is closed
// when the second quote is the last character.
func unquoteString(s string) (text string, closed bool) {
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

// running is the keys that have a request running.
type inFlightKeys struct {
	mu   sync.Mutex
	keys map[string]struct{}
}

// start tells whether no other request with the key is running; then done must
// be called.
func (r *inFlightKeys) begin(key string) (done func(), ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, taken := r.keys[key]; taken {
		return nil, false
	}
	if r.keys == nil {
		r.keys = make(map[string]struct{})
	}
	r.keys[key] = struct{}{}
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.keys, key)
	}, true
}
