package main

// Authorization: every request for contracts carries a bearer token (RFC 6750).

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
)

// authorize returns the token of a request if it has the scopes in need and belongs to
// org, the organization in the path. It checks in the order of the specification: first
// the token (401), then its scopes and its organization (403). All of that comes before a
// contract is looked up, so that a 403 does not reveal whether the contract exists.
func (a *api) authorize(x *exchange, need Scopes, org string) (Token, error) {
	t, err := a.bearer(x.r)
	if err != nil {
		return t, err
	}
	x.client = t.Client
	if !need.Within(t.Scopes) {
		return t, newProblem(http.StatusForbidden, fmt.Sprintf("The token has the scope %q, but this request needs %q.", t.Scopes, need)).
			with("WWW-Authenticate", fmt.Sprintf(`Bearer %s, error="insufficient_scope", scope=%q`, realm, need))
	}
	if t.Org == "" {
		return t, newProblem(http.StatusForbidden, fmt.Sprintf("The token belongs to no organization: its claim %s must be a UUID.", a.issuer.orgClaim))
	}
	if id, err := parseID(org); err != nil || id != t.Org {
		return t, newProblem(http.StatusForbidden, "The token does not belong to the organization in the path.")
	}
	return t, nil
}

// bearer returns the token in the Authorization field of a request (RFC 6750 §2.1). A
// token in the body or the query is not accepted, since it would end up in logs.
func (a *api) bearer(r *http.Request) (Token, error) {
	scheme, text, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		// A request without a token gets no error code (§3.1).
		return Token{}, newProblem(http.StatusUnauthorized, "Send a token as Authorization: Bearer …; "+a.issuers()+" issues one.").
			with("WWW-Authenticate", "Bearer "+realm)
	}
	t, err := a.token(strings.Trim(text, " "))
	if err == nil {
		return t, nil
	}
	var bad badToken // declared late: it is allocated, and a good token should cost no allocation
	if errors.As(err, &bad) {
		a.metrics.tokenRefused(string(bad))
		return t, newProblem(http.StatusUnauthorized, "The token is "+string(bad)+"; "+a.issuers()+" issues another.").
			with("WWW-Authenticate", fmt.Sprintf(`Bearer %s, error="invalid_token", error_description="The token is %s"`, realm, string(bad)))
	}
	return t, err
}

// token returns the token that text is the secret of, or the error badToken. A text with
// a dot is a JWT of the issuer, if there is one: each JWT has dots, and no built-in token
// does.
func (a *api) token(text string) (Token, error) {
	if !isToken68(text) {
		return Token{}, badToken("malformed")
	}
	if a.issuer != nil && strings.Contains(text, ".") {
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

// issuers returns where a client gets a token, for the details of problems: the path or the
// public URL of the token endpoint, the URL of the issuer, or both.
func (a *api) issuers() string {
	switch {
	case a.issuer == nil:
		return "POST " + a.publicURL + tokenPath + "/"
	case a.builtInTokens:
		return "POST " + a.publicURL + tokenPath + "/ or " + a.issuer.url
	default:
		return a.issuer.url
	}
}

// isToken68 reports whether s has the syntax token68 (RFC 9110 §11.2).
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
