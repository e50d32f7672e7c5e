package main

// The external issuer (--issuer): access tokens that another authorization server issues
// as JWTs (RFC 9068), verified with the keys that it publishes.

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
	// issuerTimeout is the timeout of a request to the issuer.
	issuerTimeout = 5 * time.Second
	// issuerRetry is the shortest time between two attempts to fetch the issuer's keys.
	// Anyone can send tokens with made-up key ids, so an attempt for each token would let
	// them flood the issuer.
	issuerRetry = time.Second
	// keyRefresh is the time after which the keys are fetched again. A key that the issuer
	// has withdrawn is accepted for as long at most, or, if the issuer cannot be reached,
	// until keyRefreshRetry after it can be reached again.
	keyRefresh      = time.Hour
	keyRefreshRetry = time.Minute
	// clockSkew is the largest difference between the issuer's clock and ours that the
	// checks of exp and nbf tolerate (RFC 7519 §4.1.4).
	clockSkew = 10 * time.Second
	// maxIssuerDocument is the largest document that is read from the issuer, in bytes.
	maxIssuerDocument = 1 << 20
)

// issuer verifies the tokens of an external authorization server.
//
// It fetches the issuer's keys at the start and again every keyRefresh. A token that is
// signed with a key it does not have may be signed with a new key, so it makes the issuer
// fetch the keys at once. All requests that need the keys at the same time wait for one
// fetch, and a fetch begins at most once per issuerRetry. (The HTTP storage of package
// jwkset is not used: it fetches for each such token, subject to a rate limit, and so
// refuses good tokens when many arrive at once.)
//
// While the issuer is down, tokens signed with a key that was fetched before are verified
// as usual. Other tokens get errIssuerDown, a 503 for the client, since nobody can know
// whether they are good.
type issuer struct {
	url, audience, orgClaim string

	log    *slog.Logger
	parser *jwt.Parser
	keys   atomic.Pointer[keySet] // nil until the first fetch succeeds
	down   atomic.Bool            // whether the last fetch failed

	// fetching is held during a fetch, and guards the fields below. A request that needs
	// the result waits for it.
	fetching sync.Mutex
	fetched  time.Time // when the last fetch began, whether it succeeded or not
	keysURL  string    // jwks_uri of the metadata; "" if the metadata must be read first
}

// keySet is the set of keys that the issuer published when they were fetched.
type keySet struct {
	jwkset.Storage
	keyfunc.Keyfunc
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
		url: address, audience: audience, orgClaim: orgClaim, log: log,
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

// token verifies a JWT and returns its client, scopes and organization. It returns
// badToken if the JWT is not acceptable, and errIssuerDown if that cannot be decided since
// the key is unknown and the issuer is down.
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
	keys, err := i.keysWith(kid)
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

// keysWith returns keys that include the one with the id kid, if the issuer publishes it.
// If not, the keys it returns are current and do not include it. It returns errIssuerDown
// if the key is unknown and the keys cannot be fetched.
func (i *issuer) keysWith(kid string) (*keySet, error) {
	if keys := i.keys.Load(); keys.has(kid) {
		return keys, nil
	}
	if err := i.fetch(kid); err != nil {
		return nil, err
	}
	return i.keys.Load(), nil
}

// has reports whether the set, which may be nil, has a key with the id kid. It is false for
// "", even if a key was published without an id, so that fetch("") always fetches.
func (k *keySet) has(kid string) bool {
	if k == nil || kid == "" {
		return false
	}
	_, err := k.KeyRead(context.Background(), kid)
	return err == nil
}

// refresh fetches the keys now and then every keyRefresh, or every keyRefreshRetry while
// that fails, until ctx is done. Without it, a key that the issuer has withdrawn would be
// accepted until some token with an unknown key makes keysWith fetch.
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

// fetch returns nil once the keys include kid, or a fetch that began after the call has
// succeeded: a key that is still missing then is not published. All callers that wait
// meanwhile share that fetch. It returns errIssuerDown if the fetch fails.
//
// After a failed fetch callers no longer wait: one of them tries again, at most once per
// issuerRetry, and the others get errIssuerDown at once. So an issuer that is known to be
// down delays one request at a time.
func (i *issuer) fetch(kid string) error {
	called := time.Now()
	if !i.fetching.TryLock() {
		if i.down.Load() {
			return errIssuerDown
		}
		i.fetching.Lock()
	}
	defer i.fetching.Unlock()
	sinceLast := time.Since(i.fetched)
	switch {
	case i.keys.Load().has(kid):
		return nil
	case i.down.Load() && (i.fetched.After(called) || sinceLast < issuerRetry):
		return errIssuerDown
	case i.fetched.After(called):
		return nil
	case sinceLast < issuerRetry:
		time.Sleep(issuerRetry - sinceLast)
	}
	i.fetched = time.Now()
	keys, err := i.fetchKeys()
	if err != nil {
		i.keysURL = "" // the keys may have moved, so read the metadata again
		if !i.down.Swap(true) {
			i.log.Warn("the issuer cannot be reached, so tokens signed with a key that is not known yet get status 503; each of them makes the server try again, at most once a second", "issuer", i.url, "err", err)
		}
		return fmt.Errorf("%w: %w", errIssuerDown, err)
	}
	i.keys.Store(keys)
	if i.down.Swap(false) {
		i.log.Info("the issuer can be reached again", "issuer", i.url)
	}
	return nil
}

// fetchKeys fetches the issuer's JWK Set. It ignores keys that are malformed or of an
// unknown type, so that the other keys can be used (RFC 7517 §5). The caller must hold
// fetching.
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
		return nil, fmt.Errorf("%s: not a JWK Set: the member keys is missing", i.keysURL)
	}
	storage := jwkset.NewMemoryStorage()
	for _, raw := range set.Keys {
		jwk, err := jwkset.NewJWKFromRawJSON([]byte(raw), jwkset.JWKMarshalOptions{}, jwkset.JWKValidateOptions{})
		if err == nil {
			err = storage.KeyWrite(context.Background(), jwk)
		}
		if err != nil {
			i.log.Debug("ignoring a key of the issuer that cannot be used", "issuer", i.url, "err", err)
		}
	}
	keys, err := keyfunc.New(keyfunc.Options{Storage: storage, UseWhitelist: []jwkset.USE{jwkset.UseSig, ""}})
	return &keySet{storage, keys}, err
}

// metadataPath is the path of the metadata document of an authorization server (RFC 8414
// §3): of the issuer's, and of the one that the built-in authorization server serves.
const metadataPath = "/.well-known/oauth-authorization-server"

// discover returns the URL of the issuer's JWK Set. It reads the URL from the metadata
// document of RFC 8414 §3 or, if that fails, from the one of OpenID Connect Discovery §4,
// which more issuers serve. The two differ in where they put the path of the issuer.
func (i *issuer) discover() (keysURL string, err error) {
	u, err := url.Parse(i.url)
	if err != nil {
		return "", err
	}
	issuerPath := strings.TrimSuffix(u.Path, "/")
	oauth, openID := *u, *u
	oauth.Path = metadataPath + issuerPath
	openID.Path = issuerPath + "/.well-known/openid-configuration"
	for _, address := range []string{oauth.String(), openID.String()} {
		keysURL, metadataErr := i.readMetadata(address)
		if metadataErr == nil {
			return keysURL, nil
		}
		err = errors.Join(err, metadataErr)
	}
	return "", err
}

// readMetadata returns jwks_uri from the metadata document at address. It returns an error
// if the document is of another issuer, or if the keys of an https issuer would be fetched
// over http.
func (i *issuer) readMetadata(address string) (keysURL string, err error) {
	var m struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	if err := readDocument(address, &m); err != nil {
		return "", err
	}
	if m.Issuer != i.url { // RFC 8414 §3.3
		return "", fmt.Errorf("%s: names the issuer %q, but --issuer is %q; they must be exactly the same", address, m.Issuer, i.url)
	}
	u, err := url.Parse(m.JWKSURI)
	if err != nil || u.Host == "" || u.Scheme != "https" && (u.Scheme != "http" || strings.HasPrefix(i.url, "https:")) {
		return "", fmt.Errorf("%s: jwks_uri is %q, but must be an https URL", address, m.JWKSURI)
	}
	return m.JWKSURI, nil
}

// issuerHTTP is the client for requests to the issuer. It follows up to 10 redirects, but
// not from https to http: a key is trusted only because it comes from the issuer's server,
// which http does not prove.
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

// readDocument gets the JSON document at address and unmarshals it into the value that
// into points to.
func readDocument(address string, into any) error {
	resp, err := issuerHTTP.Get(address)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", address, resp.Status)
	}
	if err := json.UnmarshalRead(io.LimitReader(resp.Body, maxIssuerDocument), into); err != nil {
		return fmt.Errorf("%s: %w", address, err)
	}
	return nil
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
