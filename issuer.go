package main

// Access tokens of an external issuer: JWTs (RFC 9068), verified with the keys that the
// issuer publishes.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/golang-jwt/jwt/v5"
)

const (
	// issuerTimeout is how long the issuer may take for one of its documents.
	issuerTimeout = 5 * time.Second
	// issuerRetry is the least time between two attempts to fetch its keys.
	issuerRetry = time.Second
	// keyRefresh is how long a key is good after the issuer has withdrawn it, and
	// keyRefreshRetry how much longer while it cannot be reached.
	keyRefresh      = time.Hour
	keyRefreshRetry = time.Minute
	// clockSkew is how far the issuer's clock may be from ours (RFC 7519 §4.1.4).
	clockSkew = 10 * time.Second
	// maxIssuerDocument is the largest of its documents, in bytes.
	maxIssuerDocument = 1 << 20
)

// issuer checks the tokens of an authorization server. Keys that were fetched once
// are used on while it cannot be reached. A token of another key has them fetched
// again, at most once in an issuerRetry and for all such tokens together: jwkset's
// own HTTP storage fetches for each of them, and so refuses good ones when there are
// many.
type issuer struct {
	url, audience, orgClaim string

	log    *slog.Logger
	parser *jwt.Parser
	keys   atomic.Pointer[keySet] // nil until they were fetched
	down   atomic.Bool            // the last attempt failed

	// fetching is held by the one who fetches, for all who wait for it.
	fetching sync.Mutex
	tried    time.Time // when the last attempt began
	keysURL  string    // "" until the metadata were read
}

// keySet is the keys that an issuer published at one time.
type keySet struct {
	jwkset.Storage
	keyfunc.Keyfunc
}

// newIssuer begins to fetch the issuer's keys, and does not wait for them. ctx ends
// that they are kept fresh.
func newIssuer(ctx context.Context, address, audience, orgClaim string, now func() time.Time, log *slog.Logger) (*issuer, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return nil, fmt.Errorf("--issuer %s: must be the issuer's URL such as https://login.example/realms/energy, without query and fragment (RFC 8414 §2)", address)
	}
	if u.Scheme == "http" && !slices.Contains([]string{"localhost", "127.0.0.1", "::1"}, u.Hostname()) {
		log.Warn("the issuer's keys come over http, so that anybody on the way can forge tokens; use https", "issuer", address)
	}
	i := &issuer{
		url: address, audience: audience, orgClaim: orgClaim, log: log,
		parser: jwt.NewParser(
			// Asymmetric only: a published key must never be taken for a shared secret.
			jwt.WithValidMethods([]string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}),
			jwt.WithIssuer(address), jwt.WithAudience(audience),
			jwt.WithExpirationRequired(), jwt.WithLeeway(clockSkew), jwt.WithTimeFunc(now),
			jwt.WithStrictDecoding()),
	}
	go i.refresh(ctx)
	return i, nil
}

// token returns what a JWT stands for, a badToken, or errIssuerDown.
func (i *issuer) token(text string) (Token, error) {
	claims := jwt.MapClaims{}
	parsed, err := i.parser.ParseWithClaims(text, claims, i.key)
	var bad badToken
	switch {
	case err == nil:
	case errors.Is(err, errIssuerDown):
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
		return Token{}, badToken("without iss, aud or exp")
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
	expires, err := claims.GetExpirationTime()
	if err != nil || expires == nil {
		return Token{}, badToken("invalid")
	}
	t := Token{Client: "external/" + clientOf(claims), Scopes: scopesOf(claims), Expires: expires.Time}
	if org, ok := claims[i.orgClaim].(string); ok {
		t.Org, _ = parseID(org) // "" is in no organization
	}
	return t, nil
}

// key returns the key that a token says it is signed with.
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
	keys, err := i.keysWith(kid)
	if err != nil {
		return nil, err
	}
	// Also of another algorithm than the key is for, or of a key that is not for
	// signatures (RFC 7517 §4.2, §4.4).
	key, err := keys.Keyfunc.Keyfunc(t)
	if err != nil {
		return nil, badToken("signed with a key that its issuer does not publish")
	}
	return key, nil
}

// keysWith returns keys that have a certain one, unless the issuer has none such.
func (i *issuer) keysWith(kid string) (*keySet, error) {
	if keys := i.keys.Load(); keys.has(kid) {
		return keys, nil
	}
	if err := i.fetch(kid); err != nil {
		return nil, err
	}
	return i.keys.Load(), nil
}

func (k *keySet) has(kid string) bool {
	if k == nil || kid == "" { // a key may have no id
		return false
	}
	_, err := k.KeyRead(context.Background(), kid)
	return err == nil
}

// refresh keeps the keys fresh, so that a key which the issuer withdraws is not good
// for much longer.
func (i *issuer) refresh(ctx context.Context) {
	for {
		next := keyRefresh
		if i.fetch("") != nil {
			next = keyRefreshRetry
		}
		select {
		case <-time.After(next):
		case <-ctx.Done():
			return
		}
	}
}

// fetch has the keys fetched from now on, unless a certain one turns up earlier. Many
// who wait get it together, and nobody waits for an issuer that is known to be down.
func (i *issuer) fetch(kid string) error {
	asked := time.Now()
	if !i.fetching.TryLock() {
		if i.down.Load() {
			return errIssuerDown
		}
		i.fetching.Lock()
	}
	defer i.fetching.Unlock()
	since := time.Since(i.tried)
	switch {
	case i.keys.Load().has(kid):
		return nil
	case i.down.Load() && (i.tried.After(asked) || since < issuerRetry):
		return errIssuerDown
	case i.tried.After(asked):
		return nil
	case since < issuerRetry:
		time.Sleep(issuerRetry - since)
	}
	i.tried = time.Now()
	keys, err := i.fetchKeys()
	if err != nil {
		i.keysURL = "" // it may have moved
		if !i.down.Swap(true) {
			i.log.Warn("the issuer cannot be reached; its tokens are answered 503 if their key is not known, and it is tried again for each of them", "issuer", i.url, "err", err)
		}
		return fmt.Errorf("%w: %w", errIssuerDown, err)
	}
	i.keys.Store(keys)
	if i.down.Swap(false) {
		i.log.Info("the issuer can be reached again", "issuer", i.url)
	}
	return nil
}

// fetchKeys reads the issuer's JWK Set (RFC 7517 §5). Keys that are not understood
// are no obstacle to the others.
func (i *issuer) fetchKeys() (*keySet, error) {
	if i.keysURL == "" {
		var err error
		if i.keysURL, err = i.discover(); err != nil {
			return nil, err
		}
	}
	var set struct {
		Keys []jsontext.Value `json:"keys"`
	}
	if err := readDocument(i.keysURL, &set); err != nil {
		return nil, err
	}
	if set.Keys == nil {
		return nil, fmt.Errorf("%s: is no JWK Set", i.keysURL)
	}
	storage := jwkset.NewMemoryStorage()
	for _, raw := range set.Keys {
		jwk, err := jwkset.NewJWKFromRawJSON([]byte(raw), jwkset.JWKMarshalOptions{}, jwkset.JWKValidateOptions{})
		if err == nil {
			err = storage.KeyWrite(context.Background(), jwk)
		}
		if err != nil {
			i.log.Debug("a key of the issuer is left out", "issuer", i.url, "err", err)
		}
	}
	keys, err := keyfunc.New(keyfunc.Options{Storage: storage, UseWhitelist: []jwkset.USE{jwkset.UseSig, ""}})
	return &keySet{storage, keys}, err
}

// discover returns where the issuer publishes its keys: by RFC 8414 §3, or as OpenID
// Connect Discovery §4 has it, which more issuers serve.
func (i *issuer) discover() (keysURL string, err error) {
	u, err := url.Parse(i.url)
	if err != nil {
		return "", err
	}
	issuerPath := strings.TrimSuffix(u.Path, "/")
	oauth, openID := *u, *u
	oauth.Path = metadataPath + issuerPath
	openID.Path = issuerPath + "/.well-known/openid-configuration"
	for _, at := range []string{oauth.String(), openID.String()} {
		keysURL, one := i.readMetadata(at)
		if one == nil {
			return keysURL, nil
		}
		err = errors.Join(err, one)
	}
	return "", err
}

func (i *issuer) readMetadata(at string) (keysURL string, err error) {
	var m struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	if err := readDocument(at, &m); err != nil {
		return "", err
	}
	if m.Issuer != i.url { // RFC 8414 §3.3
		return "", fmt.Errorf("%s: is of the issuer %q, not of %q; --issuer must be the same to the letter", at, m.Issuer, i.url)
	}
	u, err := url.Parse(m.JWKSURI)
	if err != nil || u.Host == "" || u.Scheme != "https" && (u.Scheme != "http" || strings.HasPrefix(i.url, "https:")) {
		return "", fmt.Errorf("%s: jwks_uri is %q, and must be an https URL", at, m.JWKSURI)
	}
	return m.JWKSURI, nil
}

// issuerHTTP follows redirects as usual, but not away from https: all that tells a
// true key from a forged one is where it came from.
var issuerHTTP = &http.Client{
	Timeout: issuerTimeout,
	CheckRedirect: func(to *http.Request, via []*http.Request) error {
		switch {
		case via[0].URL.Scheme == "https" && to.URL.Scheme != "https":
			return errors.New("redirects from https to " + to.URL.Scheme)
		case len(via) >= 10:
			return errors.New("redirects too often")
		}
		return nil
	},
}

// readDocument gets a JSON document of the issuer.
func readDocument(at string, into any) error {
	resp, err := issuerHTTP.Get(at)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", at, resp.Status)
	}
	if err := json.UnmarshalRead(io.LimitReader(resp.Body, maxIssuerDocument), into); err != nil {
		return fmt.Errorf("%s: %w", at, err)
	}
	return nil
}

// typeOf is the media type of a JWT (RFC 9068 §4): at+jwt, or jwt with issuers that
// do not know RFC 9068.
func typeOf(header map[string]any) string {
	typ, _ := header["typ"].(string)
	return strings.TrimPrefix(strings.ToLower(typ), "application/")
}

// isAccessToken tells an access token from an ID token, which the same issuer signs
// with the same key. RFC 9068 gave access tokens a type of their own for that.
// Before, what tells them apart is that an access token has scopes, and what only an
// ID token has: OpenID Connect Core §2 and §3.3.2.11, and what issuers add to it.
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

// scopesOf reads scope (RFC 9068 §2.2.3), or scp where there is none. Scopes of
// others are let be.
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

// clientOf is RFC 9068 §2.2's client_id, or what issuers had for it before.
func clientOf(claims jwt.MapClaims) string {
	for _, name := range []string{"client_id", "azp", "cid", "sub"} {
		if id, ok := claims[name].(string); ok {
			return id
		}
	}
	return ""
}

// The paths, of which the first two are the vendor's, with a slash at the end.
const metadataPath = "/.well-known/oauth-authorization-server"
