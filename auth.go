package main

// Authorization: the check of the bearer token on every request (RFC 6750).

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// authorize returns the token of a request if it allows what is needed in the
// organization of the path. The order is the specification's: the token (401),
// then scope and organization (403), before anything is looked up.
func (a *api) authorize(x *exchange, need Scopes, org string) (Token, error) {
	t, err := a.bearer(x.r)
	if err != nil {
		return t, err
	}
	x.client = t.Client
	if !need.Within(t.Scopes) {
		return t, newProblem(http.StatusForbidden, fmt.Sprintf("The token has the scope %q, this needs %q.", t.Scopes, need)).
			with("WWW-Authenticate", fmt.Sprintf(`Bearer %s, error="insufficient_scope", scope=%q`, realm, need))
	}
	if t.Org == "" {
		return t, newProblem(http.StatusForbidden, fmt.Sprintf("The token belongs to no organization: its claim %s must be a UUID.", a.issuer.orgClaim))
	}
	if id, err := parseID(org); err != nil || id != t.Org {
		return t, newProblem(http.StatusForbidden, "The token belongs to another organization than the path names.")
	}
	return t, nil
}

// bearer returns the token that a request carries in its Authorization field (RFC
// 6750 §2.1): in a body or a query it would end up in logs.
func (a *api) bearer(r *http.Request) (Token, error) {
	scheme, text, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		// No token was sent, so no error code either (§3.1).
		return Token{}, newProblem(http.StatusUnauthorized, "Send a token as Authorization: Bearer …; "+a.issuers()+" issues one.").
			with("WWW-Authenticate", "Bearer "+realm)
	}
	t, err := a.token(strings.Trim(text, " "))
	if err == nil {
		return t, nil
	}
	var bad badToken // allocated, so not before
	if errors.As(err, &bad) {
		a.metrics.tokenRefused(string(bad))
		return t, newProblem(http.StatusUnauthorized, "The token is "+string(bad)+"; "+a.issuers()+" issues another.").
			with("WWW-Authenticate", fmt.Sprintf(`Bearer %s, error="invalid_token", error_description="The token is %s"`, realm, string(bad)))
	}
	return t, err
}

// token returns what a token's text stands for, or a badToken.
func (a *api) token(text string) (Token, error) {
	if !isToken68(text) {
		return Token{}, badToken("malformed")
	}
	if a.issuer != nil && strings.Contains(text, ".") { // as all of a JWT's have, and none of ours
		return a.issuer.token(text)
	}
	if !a.builtInTokens {
		return Token{}, badToken("not a JWT")
	}
	t, err := a.store.Token(hashOf(text))
	switch {
	case errors.Is(err, ErrNotFound):
		return t, badToken("unknown or revoked")
	case errors.Is(err, ErrExpired):
		return t, badToken("expired")
	}
	return t, err
}

// issuers says where tokens come from.
func (a *api) issuers() string {
	switch {
	case a.issuer == nil:
		return "POST " + tokenPath + "/"
	case a.builtInTokens:
		return "POST " + tokenPath + "/ or " + a.issuer.url
	default:
		return a.issuer.url
	}
}

// isToken68 is RFC 9110 §11.2's token68.
func isToken68(s string) bool {
	s = strings.TrimRight(s, "=")
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case strings.IndexByte("-._~+/", c) < 0:
			return false
		}
	}
	return s != ""
}
