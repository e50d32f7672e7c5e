package main

// Who may do what: tokens for clients (RFC 6749 §4.4), and the check of a token
// on every request (RFC 6750).

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

const (
	// tokenLifetime is the vendor's.
	tokenLifetime = 10 * time.Hour
	// maxTokenRequest is the largest body of a token request, in bytes.
	maxTokenRequest = 64 << 10
	realm           = `realm="energy-contracts"`
)

// newSecret returns 256 random bits as 43 characters of base64url, for a token
// or a client's secret.
func newSecret() string {
	var b [32]byte
	_, _ = rand.Read(b[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(b[:])
}

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
	if id, err := parseID(org); err != nil || id != t.Org {
		return t, newProblem(http.StatusForbidden, "The token belongs to another organization than the path names.")
	}
	return t, nil
}

// bearer returns the token that a request carries (RFC 6750 §2.1).
func (a *api) bearer(r *http.Request) (Token, error) {
	scheme, text, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if !strings.EqualFold(scheme, "Bearer") {
		// No token was sent, so no error code either (§3.1).
		return Token{}, newProblem(http.StatusUnauthorized, "Send a token as Authorization: Bearer …; POST /oauth2/token/ issues one.").
			with("WWW-Authenticate", "Bearer "+realm)
	}
	refuse := func(why string) error {
		return newProblem(http.StatusUnauthorized, "The token is "+why+"; POST /oauth2/token/ issues another.").
			with("WWW-Authenticate", fmt.Sprintf(`Bearer %s, error="invalid_token", error_description="The token is %s"`, realm, why))
	}
	text = strings.Trim(text, " ")
	if !isToken68(text) {
		return Token{}, refuse("malformed")
	}
	t, err := a.store.Token(hashOf(text))
	switch {
	case errors.Is(err, ErrNotFound):
		return Token{}, refuse("unknown or revoked")
	case err != nil:
		return Token{}, err
	case !a.now().Before(t.Expires):
		return Token{}, refuse("expired")
	}
	return t, nil
}

// isToken68 is RFC 9110 §11.2's token68.
func isToken68(s string) bool {
	s = strings.TrimRight(s, "=")
	return s != "" && strings.IndexFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-._~+/", r))
	}) < 0
}

// tokenRequest is the parameters of RFC 6749 §4.4.2 and §2.3.1; nil where one
// was not sent. The vendor's examples send them as JSON.
type tokenRequest struct {
	GrantType    *string `json:"grant_type"`
	Scope        *string `json:"scope"`
	ClientID     *string `json:"client_id"`
	ClientSecret *string `json:"client_secret"`
}

// tokenResponse is RFC 6749 §5.1's.
type tokenResponse struct {
	AccessToken string `json:"access_token"`
	ExpiresIn   int64  `json:"expires_in"` // seconds
	TokenType   string `json:"token_type"`
	Scope       Scopes `json:"scope"`
}

// postToken is the token endpoint.
func (a *api) postToken(x *exchange) (answer, error) {
	body, err := x.body(maxTokenRequest)
	if err != nil {
		return answer{}, newOAuthError(problemOf(err).Status, "invalid_request", "the body cannot be read, or has more than 64 KiB")
	}
	defer body.free()
	req, err := parseTokenRequest(x.r.Header.Get("Content-Type"), body.b)
	if err != nil {
		return answer{}, err
	}
	client, err := a.authenticate(x, req)
	if err != nil {
		return answer{}, err
	}
	x.client = client.ID
	switch {
	case req.GrantType == nil:
		return answer{}, invalidRequest("grant_type is missing; it must be client_credentials")
	case *req.GrantType != "client_credentials":
		return answer{}, newOAuthError(http.StatusBadRequest, "unsupported_grant_type", "grant_type must be client_credentials")
	}
	scopes := client.Scopes
	if req.Scope != nil {
		if err := scopes.UnmarshalText([]byte(*req.Scope)); err != nil || !scopes.Within(client.Scopes) {
			return answer{}, newOAuthError(http.StatusBadRequest, "invalid_scope", "this client may ask for: "+client.Scopes.String())
		}
	}
	text := newSecret()
	token := Token{Client: client.ID, Org: client.Org, Scopes: scopes, Expires: a.now().Add(tokenLifetime)}
	if err := a.store.AddToken(x.r.Context(), hashOf(text), token); err != nil {
		return answer{}, oauthErrorOf(err)
	}
	content, err := json.Marshal(tokenResponse{text, int64(tokenLifetime / time.Second), "Bearer", scopes})
	if err != nil {
		return answer{}, oauthErrorOf(err)
	}
	return answer{status: http.StatusOK, noStore: true, content: content}, nil
}

// authenticate returns the client whose id and secret a request carries, in the
// Authorization field or in the body, not in both (RFC 6749 §2.3.1).
func (a *api) authenticate(x *exchange, req tokenRequest) (Client, error) {
	refused := newOAuthError(http.StatusUnauthorized, "invalid_client", "the client is unknown, or its secret is wrong")
	refused.header = [2]string{"WWW-Authenticate", "Basic " + realm + `, charset="UTF-8"`}
	id, secret, basic := x.r.BasicAuth()
	switch {
	case basic && (req.ClientID != nil || req.ClientSecret != nil):
		return Client{}, invalidRequest("the client authenticates twice; send its id and secret in the Authorization field or in the body")
	case basic:
		var err1, err2 error
		id, err1 = url.QueryUnescape(id)
		secret, err2 = url.QueryUnescape(secret)
		if err1 != nil || err2 != nil {
			return Client{}, invalidRequest("client id and secret must be percent-encoded inside of Basic")
		}
	case x.r.Header.Get("Authorization") == "" && req.ClientID != nil && req.ClientSecret != nil:
		id, secret = *req.ClientID, *req.ClientSecret
	default:
		refused.Description = "send client id and secret as Authorization: Basic, or as client_id and client_secret in the body"
		return Client{}, refused
	}
	client, err := a.store.Client(id)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return Client{}, oauthErrorOf(err)
	}
	// Of an unknown client too, so that it takes the same time.
	if same := hashOf(secret).Equal(client.Secret); !same || err != nil {
		return Client{}, refused
	}
	return client, nil
}

func invalidRequest(description string) *oauthError {
	return newOAuthError(http.StatusBadRequest, "invalid_request", description)
}

// parseTokenRequest reads a form, or JSON. A parameter without a value is as if
// it were not there, one that stands twice is refused (RFC 6749 §3.2).
func parseTokenRequest(contentType string, body []byte) (req tokenRequest, err error) {
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil && len(body) > 0 {
		return req, invalidRequest("Content-Type must be application/x-www-form-urlencoded or application/json")
	}
	fields := map[string]**string{
		"grant_type": &req.GrantType, "scope": &req.Scope,
		"client_id": &req.ClientID, "client_secret": &req.ClientSecret,
	}
	switch {
	case len(body) == 0:
	case media == "application/json":
		if err := json.Unmarshal(body, &req); err != nil {
			description := "the body must be a JSON object whose members are strings"
			if errors.Is(err, jsontext.ErrDuplicateName) {
				description = "a parameter appears twice"
			}
			return tokenRequest{}, invalidRequest(description)
		}
	case media == "application/x-www-form-urlencoded":
		form, err := url.ParseQuery(string(body))
		if err != nil {
			return req, invalidRequest("the body is not application/x-www-form-urlencoded")
		}
		for name, values := range form {
			if len(values) > 1 {
				return req, invalidRequest("a parameter appears twice")
			}
			if field := fields[name]; field != nil {
				*field = &values[0]
			}
		}
	default:
		return req, invalidRequest("Content-Type must be application/x-www-form-urlencoded or application/json")
	}
	for _, field := range fields {
		if *field != nil && **field == "" {
			*field = nil
		}
	}
	return req, nil
}
