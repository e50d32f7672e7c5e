package main

// The built-in authorization server: it issues access tokens to clients (RFC 6749 §4.4),
// revokes them (RFC 7009) and serves its metadata document (RFC 8414).

import (
	"errors"
	"fmt"
	"math"
	"mime"
	"net/http"
	"net/netip"
	"net/url"
	"path"
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
// nil if its parameter was not sent. The json tags are there because the vendor's examples
// send the parameters as JSON, although the RFCs require a form.
type oauthRequest struct {
	ClientID     *string `json:"client_id"`
	ClientSecret *string `json:"client_secret"`
	GrantType    *string `json:"grant_type"`
	Scope        *string `json:"scope"`
	Token        *string `json:"token"`
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
	case req.GrantType == nil:
		return response{}, invalidRequest("grant_type is missing; it must be client_credentials")
	case *req.GrantType != "client_credentials":
		return response{}, newOAuthError(http.StatusBadRequest, "unsupported_grant_type", "grant_type must be client_credentials")
	}
	scopes := client.Scopes
	if req.Scope != nil {
		if err := scopes.UnmarshalText([]byte(*req.Scope)); err != nil || !scopes.Within(client.Scopes) {
			return response{}, newOAuthError(http.StatusBadRequest, "invalid_scope", "this client may ask for: "+client.Scopes.String())
		}
	}
	text := newSecret()
	token := Token{Client: client.ID, ClientCreated: client.Created, Org: client.Org, Scopes: scopes, Expires: a.now().Add(a.tokenLifetime)}
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
	if req.Token == nil {
		return response{}, invalidRequest("token is missing; send the access token to revoke")
	}
	err = a.store.RevokeToken(hashOf(*req.Token), client.ID)
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

// checkPublicURL returns an error unless s is an origin with an optional path, which may end in a
// slash.
func checkPublicURL(s string) error {
	u, err := url.Parse(s)
	if err == nil {
		_, err = parseOrigin(strings.TrimSuffix(s, u.EscapedPath()))
	}
	if err == nil {
		if p := strings.TrimSuffix(u.Path, "/") + tokenPath; path.Clean(p) == p {
			return nil
		}
	}
	return errors.New("must be a URL such as https://energy.example or https://energy.example/energy, without query and fragment")
}

// getMetadata responds with the metadata document. Its URLs begin with --public-url or, without
// that flag, with the origin that the request was sent to.
func (a *api) getMetadata(x *exchange) (response, error) {
	base := strings.TrimSuffix(a.publicURL, "/")
	if base == "" {
		base = "http://" + x.r.Host
		if x.r.TLS != nil {
			base = "https://" + x.r.Host
		}
		if _, err := parseOrigin(base); err != nil {
			return response{}, &malformed{fault{Parameter: "Host", Detail: "must be a host name or address, with an optional port"}}
		}
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
	body, err := x.body(maxTokenRequest)
	if err != nil {
		return oauthRequest{}, Client{}, newOAuthError(problemOf(err).Status, "invalid_request", "the body cannot be read, or has more than 64 KiB")
	}
	defer body.free()
	req, err := parseOAuthRequest(x.r.Header.Get("Content-Type"), body.b)
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

// authenticate returns the client whose id and secret the request carries, either in the
// Authorization field or in the body, but not in both (RFC 6749 §2.3.1).
func (a *api) authenticate(x *exchange, req oauthRequest) (Client, error) {
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
			return Client{}, invalidRequest("client id and secret must be percent-encoded in Authorization: Basic")
		}
	case x.r.Header.Get("Authorization") == "" && req.ClientID != nil && req.ClientSecret != nil:
		id, secret = *req.ClientID, *req.ClientSecret
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

// refuseNull makes a JSON null for a parameter an error. A form cannot express null, and
// package json would treat it like a parameter that is missing.
var refuseNull = json.WithUnmarshalers(json.UnmarshalFromFunc(func(d *jsontext.Decoder, _ **string) error {
	if d.PeekKind() == jsontext.KindNull {
		return errors.New("null is not a string")
	}
	return errors.ErrUnsupported // let package json unmarshal the string
}))

// parseOAuthRequest parses a body that is a form or a JSON object. It treats a parameter
// with an empty value as missing, ignores unknown parameters, and returns an error if a
// parameter appears twice (RFC 6749 §3.2).
func parseOAuthRequest(contentType string, body []byte) (req oauthRequest, err error) {
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil && len(body) > 0 {
		return req, invalidRequest("Content-Type must be application/x-www-form-urlencoded or application/json")
	}
	fields := map[string]**string{
		"client_id": &req.ClientID, "client_secret": &req.ClientSecret,
		"grant_type": &req.GrantType, "scope": &req.Scope, "token": &req.Token,
	}
	switch {
	case len(body) == 0:
	case media == "application/json":
		if err := json.Unmarshal(body, &req, refuseNull); err != nil {
			description := "the body must be a JSON object whose members are strings"
			if errors.Is(err, jsontext.ErrDuplicateName) {
				description = "a parameter appears twice"
			}
			return oauthRequest{}, invalidRequest(description)
		}
	case media == "application/x-www-form-urlencoded":
		form, err := url.ParseQuery(string(body))
		if err != nil {
			return req, invalidRequest("the body is not application/x-www-form-urlencoded")
		}
		for name, values := range form {
			if len(values) > 1 {
				return oauthRequest{}, invalidRequest("a parameter appears twice")
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
