package main

// The external issuer (--issuer): access tokens that another authorization server issues
// as JWTs (RFC 9068), verified with the keys that it publishes.

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/time/rate"
)

// clockSkew is the largest difference between the issuer's clock and ours that the checks of exp and
// nbf tolerate (RFC 7519 §4.1.4).
const clockSkew = 10 * time.Second

// issuer verifies the tokens of an external authorization server, with the keys that it publishes.
type issuer struct {
	issuerKeys
	parser   *jwt.Parser
	orgClaim string
}

// newIssuer returns an issuer that accepts tokens for audience and reads the organization
// from the claim orgClaim. It returns an error if address is not the URL of an issuer. It
// starts to fetch the keys but does not wait for them, so that the service can start while
// the issuer is down. The keys are fetched again until ctx is done.
func newIssuer(ctx context.Context, address, audience, orgClaim string, now func() time.Time, log *slog.Logger) (*issuer, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return nil, fmt.Errorf("--issuer %s: must be the issuer's URL such as https://login.example/realms/energy, without query and fragment (RFC 8414 §2)", address)
	}
	if u.Scheme == "http" && !slices.Contains([]string{"localhost", "127.0.0.1", "::1"}, u.Hostname()) {
		log.Warn("the issuer's keys are fetched over http, so anyone on the network path can replace them and forge tokens; use https", "issuer", address)
	}
	i := &issuer{
		issuerKeys: issuerKeys{url: address, log: log, now: now, lookups: rate.NewLimiter(rate.Every(lookupInterval), lookupBurst)},
		orgClaim:   orgClaim,
		parser: jwt.NewParser(
			// Only asymmetric algorithms: with HS256 among them, anyone could sign a token
			// using a published public key as the shared secret (RFC 8725 §2.1).
			jwt.WithValidMethods([]string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}),
			jwt.WithIssuer(address), jwt.WithAudience(audience),
			jwt.WithExpirationRequired(), jwt.WithLeeway(clockSkew), jwt.WithTimeFunc(now),
			jwt.WithStrictDecoding()),
	}
	go i.refresh(ctx)
	return i, nil
}

// token verifies a JWT and returns its client, scopes and organization. It returns badToken if the
// JWT is not acceptable, and errIssuerDown or errLookups if that cannot be decided.
func (i *issuer) token(text string) (Token, error) {
	claims := jwt.MapClaims{}
	parsed, err := i.parser.ParseWithClaims(text, claims, i.key)
	var bad badToken
	switch {
	case err == nil:
	case errors.Is(err, errIssuerDown), errors.Is(err, errLookups):
		return Token{}, err
	case errors.As(err, &bad):
		return Token{}, bad
	case errors.Is(err, jwt.ErrTokenExpired):
		return Token{}, badToken("expired")
	case errors.Is(err, jwt.ErrTokenNotValidYet):
		return Token{}, badToken("not valid yet")
	case errors.Is(err, jwt.ErrTokenInvalidAudience):
		return Token{}, badToken("for another audience")
	case errors.Is(err, jwt.ErrTokenInvalidIssuer):
		return Token{}, badToken("from another issuer")
	case errors.Is(err, jwt.ErrTokenRequiredClaimMissing):
		return Token{}, badToken("missing iss, aud or exp")
	case errors.Is(err, jwt.ErrTokenMalformed):
		return Token{}, badToken("malformed")
	case errors.Is(err, jwt.ErrTokenSignatureInvalid):
		return Token{}, badToken("not signed by its issuer")
	default:
		return Token{}, badToken("invalid")
	}
	if !isAccessToken(parsed.Header, claims) {
		return Token{}, badToken("not an access token")
	}
	if _, ok := claims["cnf"]; ok {
		// Who sends the token must prove to have a key (RFC 7800 §3), by a client certificate (RFC
		// 8705 §3) or a DPoP proof (RFC 9449 §7.1). To take it without would void what its issuer
		// bound it for: that it is of no use to a thief.
		return Token{}, badToken("bound to a key, of which this service takes no proof")
	}
	expires, err := claims.GetExpirationTime()
	if err != nil || expires == nil {
		return Token{}, badToken("invalid")
	}
	t := Token{Client: "external/" + clientOf(claims), Scopes: scopesOf(claims), Expires: expires.Time}
	if org, ok := claims[i.orgClaim].(string); ok {
		t.Org, _ = parseID(org) // an invalid UUID leaves "", which authorize refuses
	}
	return t, nil
}

// key returns the key that the header of a token names by its kid. The parser calls it
// before it verifies the signature, so nothing in t can be trusted yet.
func (i *issuer) key(t *jwt.Token) (any, error) {
	if typ := typeOf(t.Header); typ != "at+jwt" && typ != "jwt" {
		return nil, badToken("not an access token")
	}
	if _, ok := t.Header["crit"]; ok { // RFC 7515 §4.1.11
		return nil, badToken("signed with an extension that is not understood")
	}
	kid, _ := t.Header["kid"].(string)
	if kid == "" {
		return nil, badToken("signed with a key that it does not name")
	}
	keys, err := i.with(kid)
	if err != nil {
		return nil, err
	}
	// Keyfunc also refuses a key that is published for another algorithm or not for
	// signatures (RFC 7517 §4.2, §4.4).
	key, err := keys.Keyfunc.Keyfunc(t)
	if err != nil {
		return nil, badToken("signed with a key that its issuer does not publish")
	}
	return key, nil
}

// typeOf returns the media type of a JWT from its header typ, in lower case and without
// "application/" (RFC 7515 §4.1.9). It is at+jwt for an access token (RFC 9068 §2.1), or jwt
// from issuers that do not implement RFC 9068.
func typeOf(header map[string]any) string {
	typ, _ := header["typ"].(string)
	return strings.TrimPrefix(strings.ToLower(typ), "application/")
}

// isAccessToken reports whether a JWT of the type at+jwt or jwt is an access token. It must
// not accept an ID token, which only proves to a client that a user has logged in: the same
// issuer signs it with the same key. RFC 9068 gave access tokens the type at+jwt of their
// own for that reason. Issuers that do not implement it use the type jwt for both, and
// then a JWT is an access token if it has scopes and no claim that only ID tokens have:
// those of OpenID Connect Core §2 and §3.3.2.11, and those that Keycloak and Amazon Cognito
// add.
func isAccessToken(header map[string]any, claims jwt.MapClaims) bool {
	if typeOf(header) == "at+jwt" {
		return true
	}
	for _, name := range []string{"nonce", "at_hash", "c_hash"} {
		if _, ok := claims[name]; ok {
			return false
		}
	}
	if claims["typ"] == "ID" || claims["token_use"] == "id" { // Keycloak; Amazon Cognito
		return false
	}
	_, scope := claims["scope"]
	_, scp := claims["scp"]
	return scope || scp
}

// scopesOf returns the scopes in the claim scope (RFC 9068 §2.2.3) or, if there is none, in
// the claim scp, which some issuers use instead. Either is a string of names with spaces
// between them or an array. Scopes other than read and write belong to other services and
// are ignored.
func scopesOf(claims jwt.MapClaims) (s Scopes) {
	granted, ok := claims["scope"]
	if !ok {
		granted = claims["scp"]
	}
	var names []any
	switch g := granted.(type) {
	case string:
		for name := range strings.SplitSeq(g, " ") {
			names = append(names, name)
		}
	case []any:
		names = g
	}
	return Scopes{Read: slices.Contains(names, any("read")), Write: slices.Contains(names, any("write"))}
}

// clientOf returns the client id: the claim client_id (RFC 9068 §2.2), or the claim that
// issuers used for it before RFC 9068. It returns "" if there is none.
func clientOf(claims jwt.MapClaims) string {
	for _, name := range []string{"client_id", "azp", "cid", "sub"} {
		if id, ok := claims[name].(string); ok {
			return id
		}
	}
	return ""
}
