package main

// The built-in authorization server: tokens for clients (RFC 6749 §4.4), their
// revocation (RFC 7009) and the metadata document (RFC 8414).

import (
	"errors"
	"fmt"
	"math"
	"mime"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// The paths, of which the first two are the vendor's, with a slash at the end.
const (
	tokenPath      = "/oauth2/token"
	revocationPath = "/oauth2/revoke_token"
)

// maxTokenRequest is the largest body of a request here, in bytes.
const maxTokenRequest = 64 << 10

// oauthRequest is the parameters of RFC 6749 §4.4.2 and §2.3.1 and of RFC 7009
// §2.1; nil where one was not sent. The vendor's examples send them as JSON.
type oauthRequest struct {
	ClientID     *string `json:"client_id"`
	ClientSecret *string `json:"client_secret"`
	GrantType    *string `json:"grant_type"`
	Scope        *string `json:"scope"`
	Token        *string `json:"token"`
}

// tokenResponse is RFC 6749 §5.1's.
type tokenResponse struct {
	AccessToken string `json:"access_token"`
	ExpiresIn   int64  `json:"expires_in"` // seconds
	TokenType   string `json:"token_type"`
	Scope       Scopes `json:"scope"`
}

// postToken is the token endpoint.
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

// postRevocation is the revocation endpoint. A token that is unknown is as good as
// revoked (RFC 7009 §2.2); token_type_hint is of no use here.
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
	case errors.Is(err, ErrForeign): // as RFC 6749 §5.2 has it for one "issued to another client"
		return response{}, newOAuthError(http.StatusBadRequest, "invalid_grant", "the token was issued to another client, and stays as it is")
	case err != nil && !errors.Is(err, ErrNotFound):
		return response{}, oauthErrorOf(err)
	}
	return response{status: http.StatusOK, noStore: true}, nil
}

// metadata is RFC 8414 §2's.
type metadata struct {
	Issuer                string   `json:"issuer"`
	TokenEndpoint         string   `json:"token_endpoint"`
	TokenAuthMethods      []string `json:"token_endpoint_auth_methods_supported"`
	RevocationEndpoint    string   `json:"revocation_endpoint"`
	RevocationAuthMethods []string `json:"revocation_endpoint_auth_methods_supported"`
	GrantTypes            []string `json:"grant_types_supported"`
	// ResponseTypes is empty, as there is no authorization endpoint, and there, as
	// it is required.
	ResponseTypes []string `json:"response_types_supported"`
	Scopes        []string `json:"scopes_supported"`
}

func (a *api) getMetadata(x *exchange) (response, error) {
	origin := a.publicURL
	if origin == "" {
		origin = "http://" + x.r.Host
		if x.r.TLS != nil {
			origin = "https://" + x.r.Host
		}
		if _, err := parseOrigin(origin); err != nil {
			return response{}, &malformed{fault{Parameter: "Host", Detail: "must be a host, and a port if it is not the usual one"}}
		}
	}
	methods := []string{"client_secret_basic", "client_secret_post"}
	content, err := json.Marshal(metadata{
		Issuer:        origin,
		TokenEndpoint: origin + tokenPath + "/", TokenAuthMethods: methods,
		RevocationEndpoint: origin + revocationPath + "/", RevocationAuthMethods: methods,
		GrantTypes: []string{"client_credentials"}, ResponseTypes: []string{}, Scopes: []string{"read", "write"},
	})
	return response{status: http.StatusOK, content: content}, err
}

// clientRequest reads a request to one of the endpoints and authenticates its
// client.
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

// authenticate returns the client whose id and secret a request carries, in the
// Authorization field or in the body, not in both (RFC 6749 §2.3.1).
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
			return Client{}, invalidRequest("client id and secret must be percent-encoded inside of Basic")
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
	// Of an unknown client too, so that it takes the same time.
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

func tooManyFailures(wait time.Duration) *oauthError {
	seconds := strconv.Itoa(int(math.Ceil(wait.Seconds())))
	e := newOAuthError(http.StatusTooManyRequests, "temporarily_unavailable",
		fmt.Sprintf("this client failed to authenticate from this address too often; try again in %s seconds", seconds))
	e.header = [2]string{"Retry-After", seconds}
	return e
}

func invalidRequest(description string) *oauthError {
	return newOAuthError(http.StatusBadRequest, "invalid_request", description)
}

// refuseNull has JSON say no more than a form can. Package json takes null for a pointer.
var refuseNull = json.WithUnmarshalers(json.UnmarshalFromFunc(func(d *jsontext.Decoder, _ **string) error {
	if d.PeekKind() == jsontext.KindNull {
		return errors.New("null is no string")
	}
	return errors.ErrUnsupported // to the usual way
}))

// parseOAuthRequest reads a form, or JSON. A parameter without a value is as if
// it were not there, one that stands twice is refused (RFC 6749 §3.2).
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
