package main

// The built-in authorization server: it issues access tokens to clients (RFC 6749 §4.4),
// revokes them (RFC 7009) and serves its metadata document (RFC 8414).

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// The paths of the token endpoint and the revocation endpoint in the vendor's API. There
// they end in a slash; both are served with it and without it.
const (
	tokenPath      = "/oauth2/token"
	revocationPath = "/oauth2/revoke_token"
)

// maxTokenRequest is the largest body of a token or revocation request, in bytes.
const maxTokenRequest = 64 << 10

// oauthRequest holds the parameters of a token request (RFC 6749 §4.4.2) or a revocation
// request (RFC 7009 §2.1), and the credentials of the client (RFC 6749 §2.3.1). A field is
// empty if its parameter was not sent or has no value, which RFC 6749 §3.2 treats alike.
type oauthRequest struct {
	ClientID, ClientSecret, GrantType, Scope, Token string
}

// parameter returns the field for the parameter called name, or nil for an unknown one.
func (r *oauthRequest) parameter(name string) *string {
	switch name {
	case "client_id":
		return &r.ClientID
	case "client_secret":
		return &r.ClientSecret
	case "grant_type":
		return &r.GrantType
	case "scope":
		return &r.Scope
	case "token":
		return &r.Token
	}
	return nil
}

// set sets a parameter. Unknown parameters are ignored, even if they are repeated, as resource
// may be (RFC 8707 §2). A known one may be repeated with the same value only.
func (r *oauthRequest) set(name, value string) error {
	field := r.parameter(name)
	if field == nil || value == "" {
		return nil
	}
	if *field != "" && *field != value {
		return invalidRequest(name + " appears twice, with different values")
	}
	*field = value
	return nil
}

// tokenResponse is a successful response of the token endpoint (RFC 6749 §5.1).
type tokenResponse struct {
	AccessToken string `json:"access_token"`
	ExpiresIn   int64  `json:"expires_in"` // seconds
	TokenType   string `json:"token_type"`
	Scope       Scopes `json:"scope"`
}

// postToken is the token endpoint: it authenticates the client and issues an access token.
func (a *api) postToken(x *exchange) (_ response, err error) {
	defer func() {
		var refused *oauthError
		if errors.As(err, &refused) {
			a.metrics.tokenRequestRefused(refused.Code)
		}
	}()
	req, client, err := a.clientRequest(x)
	if err != nil {
		return response{}, err
	}
	switch {
	case req.GrantType == "":
		return response{}, invalidRequest("grant_type is missing; send grant_type=client_credentials as a form, or as a JSON object")
	case req.GrantType != "client_credentials":
		return response{}, newOAuthError(http.StatusBadRequest, "unsupported_grant_type", "grant_type must be client_credentials")
	}
	scopes := client.Scopes
	if req.Scope != "" {
		if err := scopes.UnmarshalText([]byte(req.Scope)); err != nil || !scopes.Within(client.Scopes) {
			return response{}, newOAuthError(http.StatusBadRequest, "invalid_scope", "this client may ask for: "+client.Scopes.String())
		}
	}
	text := newSecret()
	now := a.now()
	token := Token{Client: client.ID, ClientCreated: client.Created, Org: client.Org, Scopes: scopes, Issued: now, Expires: now.Add(a.tokenLifetime)}
	if err := a.store.AddToken(hashOf(text), token); err != nil {
		return response{}, oauthErrorOf(err)
	}
	content, err := json.Marshal(tokenResponse{text, int64(a.tokenLifetime / time.Second), "Bearer", scopes})
	if err != nil {
		return response{}, oauthErrorOf(err)
	}
	a.metrics.issued.Inc()
	return response{status: http.StatusOK, noStore: true, content: content}, nil
}

// postRevocation is the revocation endpoint. It responds to an unknown token as to a token
// that it revoked (RFC 7009 §2.2). It ignores token_type_hint, since there is only one type
// of token.
func (a *api) postRevocation(x *exchange) (response, error) {
	req, client, err := a.clientRequest(x)
	if err != nil {
		return response{}, err
	}
	if req.Token == "" {
		return response{}, invalidRequest("token is missing; send the access token to revoke")
	}
	err = a.store.RevokeToken(hashOf(req.Token), client.ID)
	switch {
	case errors.Is(err, ErrForeign): // invalid_grant covers a grant "issued to another client" (RFC 6749 §5.2)
		return response{}, newOAuthError(http.StatusBadRequest, "invalid_grant", "the token was issued to another client, so it was not revoked")
	case err != nil && !errors.Is(err, ErrNotFound):
		return response{}, oauthErrorOf(err)
	}
	return response{status: http.StatusOK, noStore: true}, nil
}

// metadata is the metadata document of an authorization server (RFC 8414 §2).
type metadata struct {
	Issuer                string   `json:"issuer"`
	TokenEndpoint         string   `json:"token_endpoint"`
	TokenAuthMethods      []string `json:"token_endpoint_auth_methods_supported"`
	RevocationEndpoint    string   `json:"revocation_endpoint"`
	RevocationAuthMethods []string `json:"revocation_endpoint_auth_methods_supported"`
	GrantTypes            []string `json:"grant_types_supported"`
	// ResponseTypes is empty, since there is no authorization endpoint. It is sent
	// nevertheless, since RFC 8414 requires it.
	ResponseTypes []string `json:"response_types_supported"`
	Scopes        []string `json:"scopes_supported"`
}

// getMetadata responds with the metadata document. Its URLs begin with the base URL of the
// service.
func (a *api) getMetadata(x *exchange) (response, error) {
	base, err := a.baseURL(x.r)
	if err != nil {
		return response{}, err
	}
	methods := []string{"client_secret_basic", "client_secret_post"}
	content, err := json.Marshal(metadata{
		Issuer:        base,
		TokenEndpoint: base + tokenPath + "/", TokenAuthMethods: methods,
		RevocationEndpoint: base + revocationPath + "/", RevocationAuthMethods: methods,
		GrantTypes: []string{"client_credentials"}, ResponseTypes: []string{}, Scopes: []string{"read", "write"},
	})
	return response{status: http.StatusOK, content: content}, err
}

// clientRequest reads a token or revocation request and authenticates its client. All its
// errors are of type oauthError.
func (a *api) clientRequest(x *exchange) (oauthRequest, Client, error) {
	if err := checkOnce(x.r.Header, "Content-Type"); err != nil {
		return oauthRequest{}, Client{}, invalidRequest("Content-Type appears more than once; send it once")
	}
	if err := checkCoding(x.r.Header); err != nil {
		return oauthRequest{}, Client{}, invalidRequest("Content-Encoding must be identity; send the body without compression")
	}
	body, err := x.body(maxTokenRequest)
	if err != nil {
		return oauthRequest{}, Client{}, unreadable(err)
	}
	req, err := parseOAuthRequest(body)
	if err != nil {
		return req, Client{}, err
	}
	client, err := a.authenticate(x, req)
	if err == nil {
		x.client = client.ID
		a.store.MarkUsed(client.ID)
	}
	return req, client, err
}

// unreadable returns the error for a body that cannot be read.
func unreadable(err error) *oauthError {
	if errors.Is(err, errNoMemory) {
		return oauthErrorOf(err)
	}
	p := problemOf(err)
	description := p.Detail
	switch {
	case p.Status == http.StatusRequestEntityTooLarge:
		description = "The body may have at most 64 KiB."
	case len(p.Errors) > 0:
		description = p.Errors[0].Detail
	}
	return newOAuthError(p.Status, "invalid_request", description)
}

// authenticate returns the client whose id and secret the request carries in the Authorization
// field or in the body (RFC 6749 §2.3.1). Many libraries send the id in both, and some the
// secret too. An id or a secret that is in both must be the same.
func (a *api) authenticate(x *exchange, req oauthRequest) (Client, error) {
	refused := newOAuthError(http.StatusUnauthorized, "invalid_client", "the client is unknown, or its secret is wrong")
	refused.header = [2]string{"WWW-Authenticate", "Basic " + realm + `, charset="UTF-8"`}
	scheme, rest, _ := strings.Cut(x.r.Header.Get("Authorization"), " ")
	credentials := http.Request{Header: http.Header{"Authorization": {scheme + " " + strings.TrimLeft(rest, " ")}}}
	id, secret, basic := credentials.BasicAuth()
	switch {
	case basic:
		var err1, err2 error
		id, err1 = url.QueryUnescape(id)
		secret, err2 = url.QueryUnescape(secret)
		if err1 != nil || err2 != nil {
			return Client{}, invalidRequest("client id and secret must be percent-encoded in Authorization: Basic")
		}
		if req.ClientID != "" && req.ClientID != id || req.ClientSecret != "" && req.ClientSecret != secret {
			return Client{}, invalidRequest("the client authenticates twice, and differently; send its id and secret in the Authorization field or in the body")
		}
	case !strings.EqualFold(scheme, "Basic") && req.ClientID != "" && req.ClientSecret != "":
		id, secret = req.ClientID, req.ClientSecret
	case strings.EqualFold(scheme, "Basic"):
		refused.Description = "Authorization: Basic cannot be decoded; send the base64 of the client's id, a colon and its secret"
		return Client{}, refused
	default:
		refused.Description = "send client id and secret as Authorization: Basic, or as client_id and client_secret in the body"
		return Client{}, refused
	}
	from, now := addressOf(x.r), a.now()
	if wait := a.throttle.wait(id, from, now); wait > 0 {
		return Client{}, tooManyFailures(wait)
	}
	client, err := a.store.Client(id)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return Client{}, oauthErrorOf(err)
	}
	// The secret is compared for an unknown client too, and Store.Client reads a dummy client
	// for it: so an unknown client takes the same time as a wrong secret, and the time of
	// the response does not reveal which clients exist.
	if known := client.HasSecret(hashOf(secret), now); !known || err != nil {
		if wait := a.throttle.failed(id, from, now); wait > 0 {
			return Client{}, tooManyFailures(wait)
		}
		return Client{}, refused
	}
	return client, nil
}

// addressOf returns the address that a request comes from. X-Forwarded-For is ignored,
// since a client can forge it.
func addressOf(r *http.Request) netip.Addr {
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return netip.Addr{} // not TCP: these requests share one address
	}
	return from.Addr().Unmap()
}

// tooManyFailures returns the error for a client that the login throttle makes wait. The
// wait is rounded up to whole seconds, the unit of Retry-After, so that a client that waits
// for as long is not refused again.
func tooManyFailures(wait time.Duration) *oauthError {
	seconds := strconv.Itoa(int(math.Ceil(wait.Seconds())))
	e := newOAuthError(http.StatusTooManyRequests, "temporarily_unavailable",
		fmt.Sprintf("this client failed to authenticate from this address too often; try again in %s seconds", seconds))
	e.header = [2]string{"Retry-After", seconds}
	return e
}

// invalidRequest returns the error for a malformed request (RFC 6749 §5.2).
func invalidRequest(description string) *oauthError {
	return newOAuthError(http.StatusBadRequest, "invalid_request", description)
}

// parseOAuthRequest parses a body that is a form (RFC 6749 §4.4.2) or a JSON object, as the
// vendor's examples have it. Clients also send either under the media type of the other, as
// text/plain or without a type, so the first character decides: no form begins with a brace.
func parseOAuthRequest(body []byte) (oauthRequest, error) {
	body = withoutBOM(body)
	var (
		req oauthRequest
		err error
	)
	switch {
	case isUTF16(body):
		err = invalidRequest("the body is in UTF-16; save it as UTF-8")
	case bytes.HasPrefix(bytes.TrimLeft(body, " \t\r\n"), []byte("{")):
		err = req.parseJSON(body)
	default:
		err = req.parseForm(string(body))
	}
	if err != nil {
		return oauthRequest{}, err
	}
	return req, nil
}

// parseForm sets the parameters of a form.
func (r *oauthRequest) parseForm(body string) error {
	form, err := url.ParseQuery(strings.TrimRight(body, "\r\n")) // a file often ends with a line end
	if err != nil {
		return invalidRequest("the body is not application/x-www-form-urlencoded")
	}
	for name, values := range form {
		for _, value := range values {
			if err := r.set(name, value); err != nil {
				return err
			}
		}
	}
	return nil
}

// parseJSON sets the parameters of a JSON object. A null counts as missing, since many libraries
// send one for a parameter that has no value.
func (r *oauthRequest) parseJSON(body []byte) error {
	wrong := invalidRequest("the body must be a JSON object whose parameters are strings")
	d := jsontext.NewDecoder(bytes.NewBuffer(body), jsontext.AllowDuplicateNames(true))
	if begin, err := d.ReadToken(); err != nil || begin.Kind() != jsontext.KindBeginObject {
		return wrong
	}
	for d.PeekKind() == jsontext.KindString {
		token, err := d.ReadToken()
		if err != nil {
			return wrong
		}
		name := token.String()
		if r.parameter(name) == nil {
			if d.SkipValue() != nil {
				return wrong
			}
			continue
		}
		value, err := d.ReadToken()
		if err != nil || value.Kind() != jsontext.KindString && value.Kind() != jsontext.KindNull {
			return wrong
		}
		if value.Kind() == jsontext.KindNull {
			continue
		}
		if err := r.set(name, value.String()); err != nil {
			return err
		}
	}
	if _, err := d.ReadToken(); err != nil { // the end of the object
		return wrong
	}
	if _, err := d.ReadToken(); !errors.Is(err, io.EOF) {
		return wrong
	}
	return nil
}
