package main

// Tokens of an issuer that is not this service: JWT access tokens (RFC 9068), checked
// against the keys that it publishes.

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
	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/time/rate"
)

const (
	// issuerTimeout is how long the issuer may take to answer.
	issuerTimeout = 5 * time.Second
	// issuerRetry is the time between two attempts to reach the issuer, and between
	// two looks for a key that it did not have.
	issuerRetry = time.Second
	// keyRefresh is how long a key is good after the issuer has withdrawn it.
	keyRefresh = time.Hour
	// clockSkew is how far the issuer's clock may be from ours (RFC 7519 §4.1.4).
	clockSkew = 10 * time.Second
	// maxMetadata is the largest metadata document, in bytes.
	maxMetadata = 1 << 20
)

// errIssuerDown: whether a token is good is not known, as its issuer does not tell
// its keys.
var errIssuerDown = errors.New("the issuer's keys cannot be had")

// issuer checks the tokens of an authorization server. Keys that were fetched once
// are used on while it cannot be reached; a key that is not among them is looked for
// at once, at most once in an issuerRetry.
type issuer struct {
	url, audience, orgClaim string

	ctx    context.Context // ends the refreshing of keys
	log    *slog.Logger
	parser *jwt.Parser
	down   atomic.Bool // the last attempt to reach the issuer failed

	mu    sync.Mutex
	keys  atomic.Pointer[keyfunc.Keyfunc] // nil until the metadata were read
	tried time.Time                       // when they were not
}

// newIssuer starts to read the issuer's metadata and keys, and does not wait for
// them. ctx ends what goes on in the background.
func newIssuer(ctx context.Context, address, audience, orgClaim string, now func() time.Time, log *slog.Logger) (*issuer, error) {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Hostname() == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return nil, fmt.Errorf("--issuer %s: must be the issuer's URL such as https://login.example/realms/energy, without query and fragment (RFC 8414 §2)", address)
	}
	if u.Scheme == "http" && !slices.Contains([]string{"localhost", "127.0.0.1", "::1"}, u.Hostname()) {
		log.Warn("the issuer's keys come over http, so that anybody on the way can forge tokens; use https", "issuer", address)
	}
	i := &issuer{
		url: address, audience: audience, orgClaim: orgClaim, ctx: ctx, log: log,
		parser: jwt.NewParser(
			// Asymmetric only: a published key must never be taken for a shared secret.
			jwt.WithValidMethods([]string{"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}),
			jwt.WithIssuer(address), jwt.WithAudience(audience),
			jwt.WithExpirationRequired(), jwt.WithLeeway(clockSkew), jwt.WithTimeFunc(now),
			jwt.WithStrictDecoding()),
	}
	go func() { _, _ = i.keyfunc() }() // the first token need not wait, and the log says if one would
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
	if kid, _ := t.Header["kid"].(string); kid == "" {
		return nil, badToken("signed with a key that it does not name")
	}
	keys, err := i.keyfunc()
	if err != nil {
		return nil, err
	}
	key, err := keys.KeyfuncCtx(i.ctx)(t)
	switch {
	case err == nil:
		return key, nil
	case i.down.Load():
		return nil, fmt.Errorf("%w: %w", errIssuerDown, err)
	default:
		return nil, badToken("signed with a key that its issuer does not publish")
	}
}

// keyfunc returns the issuer's keys, and reads its metadata if that has not been
// done yet.
func (i *issuer) keyfunc() (keyfunc.Keyfunc, error) {
	if k := i.keys.Load(); k != nil {
		return *k, nil
	}
	if !i.mu.TryLock() {
		if i.down.Load() { // and another one asks whether it still is
			return nil, errIssuerDown
		}
		i.mu.Lock()
	}
	defer i.mu.Unlock()
	if k := i.keys.Load(); k != nil {
		return *k, nil
	}
	if time.Since(i.tried) < issuerRetry {
		return nil, errIssuerDown
	}
	keysURL, err := i.discover()
	if err != nil {
		i.tried = time.Now()
		i.reached(err)
		return nil, fmt.Errorf("%w: %w", errIssuerDown, err)
	}
	k, err := i.fetch(keysURL)
	if err != nil {
		return nil, fmt.Errorf("issuer's keys at %s: %w", keysURL, err)
	}
	i.keys.Store(&k)
	return k, nil
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
	ctx, cancel := context.WithTimeout(i.ctx, issuerTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, at, nil)
	if err != nil {
		return "", err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return "", fmt.Errorf("%s: %s", at, resp.Status)
	}
	var m struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	if err := json.UnmarshalRead(io.LimitReader(resp.Body, maxMetadata), &m); err != nil {
		return "", fmt.Errorf("%s: %w", at, err)
	}
	if m.Issuer != i.url { // RFC 8414 §3.3
		return "", fmt.Errorf("%s: is of the issuer %q, not of %q; --issuer must be the same to the letter", at, m.Issuer, i.url)
	}
	if strings.HasPrefix(i.url, "https:") && !strings.HasPrefix(m.JWKSURI, "https:") {
		return "", fmt.Errorf("%s: jwks_uri is %q, not https", at, m.JWKSURI)
	}
	return m.JWKSURI, nil
}

// fetch keeps the keys at a URL, fetched now, every keyRefresh, and when one is
// unknown.
func (i *issuer) fetch(keysURL string) (keyfunc.Keyfunc, error) {
	published, err := jwkset.NewStorageFromHTTP(keysURL, jwkset.HTTPClientStorageOptions{
		Ctx:                       i.ctx,
		HTTPTimeout:               issuerTimeout,
		NoErrorReturnFirstHTTPReq: true,
		RefreshErrorHandler:       func(_ context.Context, err error) { i.reached(err) },
		RefreshInterval:           keyRefresh,
		Storage:                   published{jwkset.NewMemoryStorage(), i},
	})
	if err != nil {
		return nil, err
	}
	storage, err := jwkset.NewHTTPClient(jwkset.HTTPClientOptions{
		HTTPURLs:          map[string]jwkset.Storage{keysURL: published},
		RefreshUnknownKID: rate.NewLimiter(rate.Every(issuerRetry), 1),
		RateLimitWaitMax:  issuerTimeout,
	})
	if err != nil {
		return nil, err
	}
	return keyfunc.New(keyfunc.Options{Ctx: i.ctx, Storage: storage, UseWhitelist: []jwkset.USE{jwkset.UseSig, ""}})
}

// published is the keys of an issuer, which it was reached for when they are
// replaced.
type published struct {
	jwkset.Storage
	issuer *issuer
}

func (p published) KeyReplaceAll(ctx context.Context, keys []jwkset.JWK) error {
	p.issuer.reached(nil)
	return p.Storage.KeyReplaceAll(ctx, keys)
}

// reached takes note of an attempt to reach the issuer, and logs a change.
func (i *issuer) reached(err error) {
	switch was := i.down.Swap(err != nil); {
	case !was && err != nil:
		i.log.Warn("the issuer cannot be reached; its tokens are answered 503 if their key is not known, and it is tried again for each of them", "issuer", i.url, "err", err)
	case was && err == nil:
		i.log.Info("the issuer can be reached again", "issuer", i.url)
	}
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
