package main

// Tokens of an issuer in the process of the test. Since the test has its keys, a token can be
// wrong in one way and still be signed correctly.

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"

	"github.com/MicahParks/jwkset"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/golang-jwt/jwt/v5"
)

// ownKey is a key of an ownIssuer.
type ownKey struct {
	id     string
	method jwt.SigningMethod
	key    crypto.Signer
	use    jwkset.USE
}

// ownKeys returns the keys of every ownIssuer. They are made once, since RSA keys take time.
var ownKeys = sync.OnceValue(func() []ownKey {
	must := func(key crypto.Signer, err error) crypto.Signer {
		if err != nil {
			panic(err)
		}
		return key
	}
	newRSA := func() crypto.Signer { k, err := rsa.GenerateKey(rand.Reader, 2048); return must(k, err) }
	newEC := func() crypto.Signer { k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader); return must(k, err) }
	_, ed, err := ed25519.GenerateKey(rand.Reader)
	return []ownKey{
		{"rsa", jwt.SigningMethodRS256, newRSA(), jwkset.UseSig},
		{"ec", jwt.SigningMethodES256, newEC(), jwkset.UseSig},
		{"ed", jwt.SigningMethodEdDSA, must(ed, err), ""},
		{"ec for encryption", jwt.SigningMethodES256, newEC(), jwkset.UseEnc},
		{"not published", jwt.SigningMethodES256, newEC(), jwkset.UseSig},
	}
})

// ownIssuer is an issuer in the process of the test. It serves documents by path.
type ownIssuer struct {
	*httptest.Server
	url string // the issuer's

	mu        sync.Mutex
	documents map[string]string // "" is a 500, an URL a redirect
	asked     []string          // paths
	slow      time.Duration     // how long an answer takes
}

// newOwnIssuer returns an issuer that serves documents, in which {origin} stands for its
// address, and ownKeys at /keys unless documents has that path.
func newOwnIssuer(t testing.TB, path string, documents map[string]string) *ownIssuer {
	t.Helper()
	return listenAs(t, httptest.NewServer, path, documents)
}

func listenAs(t testing.TB, listen func(http.Handler) *httptest.Server, path string, documents map[string]string) *ownIssuer {
	t.Helper()
	i := &ownIssuer{}
	i.Server = listen(i)
	t.Cleanup(i.Close)
	i.url = i.URL + path
	i.serve(documents)
	return i
}

// serve replaces the documents.
func (i *ownIssuer) serve(documents map[string]string) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.documents = map[string]string{"/keys": publishedKeys()}
	maps.Copy(i.documents, documents)
}

func (i *ownIssuer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	i.mu.Lock()
	i.asked = append(i.asked, r.URL.Path)
	text, ok := i.documents[r.URL.Path]
	text = strings.ReplaceAll(text, "{origin}", i.URL)
	slow := i.slow
	i.mu.Unlock()
	time.Sleep(slow)
	switch {
	case !ok:
		http.NotFound(w, r)
	case text == "":
		http.Error(w, "out of order", http.StatusInternalServerError)
	case strings.HasPrefix(text, "http"):
		http.Redirect(w, r, text, http.StatusFound)
	default:
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprint(w, text)
	}
}

// publishedKeys returns the JWK Set of ownKeys without the last one.
func publishedKeys() string {
	keys := ownKeys()
	return jwkSet(keys[:len(keys)-1]...)
}

// jwkSet returns the JWK Set of some keys.
func jwkSet(keys ...ownKey) string {
	var set jwkset.JWKSMarshal
	for _, k := range keys {
		jwk, err := jwkset.NewJWKFromKey(k.key.Public(), jwkset.JWKOptions{Metadata: jwkset.JWKMetadataOptions{KID: k.id, ALG: jwkset.ALG(k.method.Alg()), USE: k.use}})
		if err != nil {
			panic(err)
		}
		set.Keys = append(set.Keys, jwk.Marshal())
	}
	b, err := json.Marshal(set)
	if err != nil {
		panic(err)
	}
	return string(b)
}

const (
	usualMetadata  = `{"issuer":"{origin}","jwks_uri":"{origin}/keys"}`
	oauthMetadata  = "/.well-known/oauth-authorization-server"
	openIDMetadata = "/.well-known/openid-configuration"
)

// usualIssuer returns an issuer with the metadata of RFC 8414.
func usualIssuer(t testing.TB) *ownIssuer {
	t.Helper()
	return newOwnIssuer(t, "", map[string]string{oauthMetadata: usualMetadata})
}

// token returns a valid token (RFC 9068 §2) with an edit.
func (i *ownIssuer) token(t testing.TB, edit func(header, claims map[string]any)) string {
	t.Helper()
	return i.tokenOf(t, ownKeys()[0], edit)
}

func (i *ownIssuer) tokenOf(t testing.TB, key ownKey, edit func(header, claims map[string]any)) string {
	t.Helper()
	return i.tokenBy(t, key.method, key.key, key.id, edit)
}

func (i *ownIssuer) tokenBy(t testing.TB, method jwt.SigningMethod, key any, kid string, edit func(header, claims map[string]any)) string {
	t.Helper()
	now := time.Now().Unix()
	header := map[string]any{"typ": "at+jwt", "kid": kid}
	claims := map[string]any{
		"iss": i.url, "aud": audience, "sub": "someone", "client_id": "own", "jti": "1",
		"iat": now, "exp": now + 3600, "scope": "read write", "org_id": demoOrg,
	}
	if edit != nil {
		edit(header, claims)
	}
	return signed(t, method, key, header, claims)
}

func header(name string, value any) func(_, _ map[string]any) {
	return func(header, _ map[string]any) { header[name] = value }
}

func claim(name string, value any) func(_, _ map[string]any) {
	return func(_, claims map[string]any) { claims[name] = value }
}

func withoutClaim(name string) func(_, _ map[string]any) {
	return func(_, claims map[string]any) { delete(claims, name) }
}

// all combines edits into one.
func all(edits ...func(_, _ map[string]any)) func(_, _ map[string]any) {
	return func(header, claims map[string]any) {
		for _, edit := range edits {
			edit(header, claims)
		}
	}
}

func TestJWTThatIsSignedAndWrongIsRefused(t *testing.T) {
	slow(t)
	t.Parallel()
	i := usualIssuer(t)
	s := relyOn(t, i.url)
	keys := ownKeys()
	rsaKey, ec, ed, enc, unpublished := keys[0], keys[1], keys[2], keys[3], keys[4]
	now := time.Now().Unix()
	jwk, err := jwkset.NewJWKFromKey(unpublished.key.Public(), jwkset.JWKOptions{})
	if err != nil {
		t.Fatal(err)
	}
	edits := map[string][]struct {
		name string
		edit func(_, _ map[string]any)
	}{
		"": { // good
			{"as it should be", nil},
			{"typ in capitals", header("typ", "AT+JWT")},
			{"typ in full", header("typ", "application/at+jwt")},
			{"typ JWT", header("typ", "JWT")},
			{"several audiences", claim("aud", []string{"another", audience})},
			{"an organization in capitals", claim("org_id", strings.ToUpper(demoOrg))},
			{"an end of a fraction", claim("exp", float64(now)+3600.5)},
			{"a token on behalf of another", claim("act", map[string]string{"sub": "b"})},
			{"an access token with a time of login", all(header("typ", "at+jwt"), claim("auth_time", now))},
		},
		"expired": {
			{"expired", claim("exp", now-60)},
			{"expired since 1970", claim("exp", 1)},
			{"expired, and for another audience", all(claim("exp", now-60), claim("aud", "another"))},
		},
		"not valid yet": {{"not valid yet", claim("nbf", now+60)}},
		"for another audience": {
			{"wrong audience", claim("aud", "another")},
			{"an audience in other letters", claim("aud", strings.ToUpper(audience))},
			{"an audience that starts so", claim("aud", audience+"/")},
			{"wrong audiences", claim("aud", []string{"another", "energy"})},
		},
		incomplete: {
			{"no exp", withoutClaim("exp")},
			{"no aud", withoutClaim("aud")},
			{"an empty aud", claim("aud", "")},
			{"no aud in a list", claim("aud", []string{})},
			{"aud as a number", claim("aud", 1)},
			{"no iss", withoutClaim("iss")},
		},
		"from another issuer": {
			{"another iss", claim("iss", "https://login.example")},
			{"an iss with a slash more", claim("iss", i.url+"/")},
			{"an iss in capitals", claim("iss", strings.ToUpper(i.url))},
		},
		"invalid": {
			{"exp as a text", claim("exp", fmt.Sprint(now+3600))},
			{"nbf as a text", claim("nbf", "0")},
			{"iss as a list", claim("iss", []string{i.url})},
		},
		notAnAccess: {
			{"no typ", func(header, _ map[string]any) { delete(header, "typ") }},
			{"an empty typ", header("typ", "")},
			{"typ of a logout token", header("typ", "logout+jwt")},
			{"typ of a security event", header("typ", "secevent+jwt")},
			{"typ of another media type", header("typ", "text/at+jwt")},
			{"typ as a list", header("typ", []string{"at+jwt"})},
			{"an ID token without scopes", all(header("typ", "JWT"), withoutClaim("scope"))},
			{"an ID token with a nonce", all(header("typ", "JWT"), claim("nonce", "n"))},
			{"an ID token with the hash of an access token", all(header("typ", "JWT"), claim("at_hash", "h"))},
			{"an ID token with the hash of a code", all(header("typ", "JWT"), claim("c_hash", "h"))},
			{"an ID token of Keycloak", all(header("typ", "JWT"), claim("typ", "ID"))},
			{"an ID token of Cognito", all(header("typ", "JWT"), claim("token_use", "id"))},
		},
		"bound to a key, of which this service takes no proof": { // RFC 7800
			{"bound to a certificate", claim("cnf", map[string]string{"x5t#S256": "bwcK0esc3ACC3DB2Y5_lESsXE8o9ltc05O89jdN-dg2"})},
			{"bound to a key of DPoP", claim("cnf", map[string]string{"jkt": "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I"})},
			{"bound to a key, of the type JWT", all(header("typ", "JWT"), claim("cnf", map[string]string{"kid": "a"}))},
			{"bound in a way that there is not", claim("cnf", "a")},
			{"bound to nothing", claim("cnf", nil)},
		},
		"signed with an extension that is not understood": {
			{"crit", all(header("crit", []string{"b64"}), header("b64", true))},
			{"an empty crit", header("crit", []string{})},
			{"crit of nothing", header("crit", nil)},
		},
		notNamed: {
			{"no kid", func(header, _ map[string]any) { delete(header, "kid") }},
			{"an empty kid", header("kid", "")},
			{"kid as a number", header("kid", 1)},
		},
		noSuchKey: {
			{"a kid that there is not", header("kid", "RSA")},
			{"a kid of a key of another kind", header("kid", ec.id)},
		},
	}
	for why, same := range edits {
		for _, tt := range same {
			t.Run(tt.name, func(t *testing.T) {
				if text := i.token(t, tt.edit); why == "" {
					s.wantGood(t, text)
				} else {
					s.wantInvalid(t, text, why)
				}
			})
		}
	}
	for _, tt := range []struct{ name, token, why string }{
		{"ES256", i.tokenOf(t, ec, nil), ""},
		{"EdDSA", i.tokenOf(t, ed, nil), ""},
		{"a key that is not published", i.tokenOf(t, unpublished, nil), noSuchKey},
		{"a key that is not published under the name of one that is", i.tokenOf(t, unpublished, header("kid", ec.id)), notSigned},
		{"a key in the header", i.tokenOf(t, unpublished, all(header("kid", ec.id), header("jwk", jwk.Marshal()))), notSigned},
		{"a place for keys in the header", i.tokenOf(t, unpublished, all(header("kid", ec.id), header("jku", i.URL+"/keys"))), notSigned},
		{"a key for encryption", i.tokenOf(t, enc, nil), noSuchKey},
		{"an algorithm that the key is not for", i.tokenBy(t, jwt.SigningMethodPS256, rsaKey.key, rsaKey.id, nil), noSuchKey},
		{"alg none", i.tokenBy(t, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, rsaKey.id, nil), notSigned},
		{"nothing between dots", "..", "malformed"},
		{"no JWT with a dot", "a.b", "malformed"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.why == "" {
				s.wantGood(t, tt.token)
			} else {
				s.wantInvalid(t, tt.token, tt.why)
			}
		})
	}
	for _, k := range []ownKey{rsaKey, ec} {
		for name, secret := range publicForms(t, k.key.Public()) {
			for _, method := range []jwt.SigningMethod{jwt.SigningMethodHS256, jwt.SigningMethodHS512} {
				t.Run(fmt.Sprintf("%s with the key %s, %s", method.Alg(), k.id, name), func(t *testing.T) {
					s.wantInvalid(t, i.tokenBy(t, method, secret, k.id, nil), notSigned)
				})
			}
		}
	}
	s.wantGood(t, i.token(t, nil))
}

func TestJWTIsGoodToWithinTheClockSkew(t *testing.T) {
	t.Parallel()
	i := usualIssuer(t)
	s := relyOn(t, i.url)
	at := time.Now().Truncate(time.Second)
	s.clock.stop(at)
	text := i.token(t, all(claim("nbf", at.Unix()), claim("exp", at.Unix()+60)))
	for _, tt := range []struct {
		name  string
		moved time.Duration
		why   string // "": it is good
	}{
		{"before its start", -10*time.Second - 1, "not valid yet"},
		{"at its start", -10 * time.Second, ""},
		{"before its end", 70*time.Second - 1, ""},
		{"at its end", 70 * time.Second, "expired"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.clock.move(tt.moved)
			defer s.clock.move(-tt.moved)
			if tt.why == "" {
				s.wantGood(t, text)
			} else {
				s.wantInvalid(t, text, tt.why)
			}
		})
	}
}

func TestJWTScopes(t *testing.T) {
	t.Parallel()
	i := usualIssuer(t)
	s := relyOn(t, i.url)
	for _, tt := range []struct {
		name string
		edit func(_, _ map[string]any)
		has  string
	}{
		{"scope", claim("scope", "read write"), "read write"},
		{"scope with others", claim("scope", "openid write offline_access read"), "read write"},
		{"scope of reading", claim("scope", "openid read"), "read"},
		{"scope of writing", claim("scope", "write"), "write"},
		{"scope of others only", claim("scope", "openid reader READ read:write re\tad"), ""},
		{"scope of nothing", claim("scope", ""), ""},
		{"scope as a list", claim("scope", []string{"openid", "read"}), "read"},
		{"scope as a number", claim("scope", 1), ""},
		{"scp", all(withoutClaim("scope"), claim("scp", "read write")), "read write"},
		{"scp with others", all(withoutClaim("scope"), claim("scp", "User.Read read")), "read"},
		{"scp as a list", all(withoutClaim("scope"), claim("scp", []string{"read", "write"})), "read write"},
		{"scp as a list with others", all(withoutClaim("scope"), claim("scp", []any{"openid", 1, nil, "write"})), "write"},
		{"scp as a list of one text", all(withoutClaim("scope"), claim("scp", []string{"read write"})), ""},
		{"scope before scp", all(claim("scope", "read"), claim("scp", "read write")), "read"},
		{"neither", withoutClaim("scope"), ""},
	} {
		for _, typ := range []string{"at+jwt", "JWT"} {
			t.Run(tt.name+" of "+typ, func(t *testing.T) {
				text := i.token(t, all(header("typ", typ), tt.edit))
				if tt.name == "neither" && typ == "JWT" {
					s.wantInvalid(t, text, notAnAccess)
					return
				}
				for method, need := range map[string]string{"GET": "read", "PUT": "write"} {
					if strings.Contains(tt.has, need) {
						s.wantDocument(t, method, text)
					} else {
						s.wantTooLittle(t, method, text, tt.has, need)
					}
				}
			})
		}
	}
}

func TestJWTOrganizationIsInTheClaimThatIsConfigured(t *testing.T) {
	t.Parallel()
	i := usualIssuer(t)
	for _, name := range []string{"tenant", "https://login.example/organization", "org_id"} {
		t.Run(name, func(t *testing.T) {
			s := relyOn(t, i.url, "--org-claim", name)
			s.wantGood(t, i.token(t, all(withoutClaim("org_id"), claim(name, demoOrg))))
			s.wantForbidden(t, i.token(t, claim(name, demoOtherOrg)), "The token does not belong to the organization in the path.")
			for kind, edit := range map[string]func(_, _ map[string]any){
				"missing":     all(withoutClaim("org_id"), claim("Org_id", demoOrg)),
				"no UUID":     claim(name, "Nordlys"),
				"of braces":   claim(name, "{"+demoOrg+"}"),
				"a list":      claim(name, []string{demoOrg}),
				"a number":    claim(name, 1),
				"empty":       claim(name, ""),
				"a UUID more": claim(name, demoOrg+" "+demoOrg),
			} {
				t.Run(kind, func(t *testing.T) {
					s.wantForbidden(t, i.token(t, edit), "The token belongs to no organization: its claim "+name+" must be a UUID.")
				})
			}
		})
	}
}

func TestIssuersMetadataAreFound(t *testing.T) {
	t.Parallel()
	const realm = "/realms/energy"
	for _, tt := range []struct {
		name      string
		path      string
		documents map[string]string
		asked     []string
	}{
		{"as RFC 8414 has it", "", map[string]string{
			oauthMetadata: usualMetadata,
		}, []string{oauthMetadata, "/keys"}},
		{"as RFC 8414 has it, with a path", realm, map[string]string{
			oauthMetadata + realm: `{"issuer":"{origin}/realms/energy","jwks_uri":"{origin}/keys"}`,
		}, []string{oauthMetadata + realm, "/keys"}},
		{"as RFC 8414 has it, with a path that ends in a slash", realm + "/", map[string]string{
			oauthMetadata + realm: `{"issuer":"{origin}/realms/energy/","jwks_uri":"{origin}/keys"}`,
		}, []string{oauthMetadata + realm, "/keys"}},
		{"as OpenID Connect has it", "", map[string]string{
			openIDMetadata: usualMetadata,
		}, []string{oauthMetadata, openIDMetadata, "/keys"}},
		{"as OpenID Connect has it, with a path", realm, map[string]string{
			realm + openIDMetadata: `{"issuer":"{origin}/realms/energy","jwks_uri":"{origin}/keys"}`,
		}, []string{oauthMetadata + realm, realm + openIDMetadata, "/keys"}},
		{"as OpenID Connect has it, with a slash", "/", map[string]string{
			openIDMetadata: `{"issuer":"{origin}/","jwks_uri":"{origin}/keys"}`,
		}, []string{oauthMetadata, openIDMetadata, "/keys"}},
		{"RFC 8414's first", "", map[string]string{
			oauthMetadata:  usualMetadata,
			openIDMetadata: `{"issuer":"{origin}","jwks_uri":"{origin}/not-these-keys"}`,
		}, []string{oauthMetadata, "/keys"}},
		{"OpenID Connect's where the other fails", "", map[string]string{
			oauthMetadata:  ``,
			openIDMetadata: usualMetadata,
		}, []string{oauthMetadata, openIDMetadata, "/keys"}},
		{"OpenID Connect's where the other is no JSON", "", map[string]string{
			oauthMetadata:  `<!doctype html>`,
			openIDMetadata: usualMetadata,
		}, []string{oauthMetadata, openIDMetadata, "/keys"}},
		{"OpenID Connect's where the other is of another issuer", realm, map[string]string{
			oauthMetadata + realm:  `{"issuer":"{origin}","jwks_uri":"{origin}/not-these-keys"}`,
			realm + openIDMetadata: `{"issuer":"{origin}/realms/energy","jwks_uri":"{origin}/keys"}`,
		}, []string{oauthMetadata + realm, realm + openIDMetadata, "/keys"}},
		{"OpenID Connect's where the other names no keys", "", map[string]string{ // jwks_uri is optional in RFC 8414 §2
			oauthMetadata:  `{"issuer":"{origin}"}`,
			openIDMetadata: usualMetadata,
		}, []string{oauthMetadata, openIDMetadata, "/keys"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			i := newOwnIssuer(t, tt.path, tt.documents)
			s := relyOn(t, i.url)
			s.wantGood(t, i.token(t, nil))
			s.wantGood(t, i.token(t, nil))
			s.stop()
			if got := i.paths(); !slices.Equal(got, tt.asked) {
				t.Errorf("asked for %q, want %q", got, tt.asked)
			}
		})
	}
}

// The service runs in a process of its own, since it takes the trusted certificates from its
// environment.
func TestIssuersKeysComeOverHTTPSOnlyWhereItIsHTTPS(t *testing.T) {
	if runtime.GOOS == "darwin" {
		t.Skip("macOS has no SSL_CERT_FILE")
	}
	plain := newOwnIssuer(t, "", nil)
	for _, tt := range []struct {
		name      string
		documents map[string]string
		good      bool
	}{
		{"all of it", map[string]string{oauthMetadata: usualMetadata}, true},
		{"keys redirected", map[string]string{oauthMetadata: `{"issuer":"{origin}","jwks_uri":"{origin}/old"}`, "/old": "{origin}/keys"}, true},
		{"keys redirected to http", map[string]string{oauthMetadata: usualMetadata, "/keys": plain.URL + "/keys"}, false},
		{"keys redirected without end", map[string]string{oauthMetadata: usualMetadata, "/keys": "{origin}/keys"}, false},
		{"keys at http", map[string]string{oauthMetadata: `{"issuer":"{origin}","jwks_uri":"` + plain.URL + `/keys"}`}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			i := listenAs(t, httptest.NewTLSServer, "", tt.documents)
			trusted := filepath.Join(t.TempDir(), "trusted.pem")
			if err := os.WriteFile(trusted, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: i.Certificate().Raw}), 0o600); err != nil {
				t.Fatal(err)
			}
			t.Setenv("SSL_CERT_FILE", trusted)
			p := startProcess(t, nil, "--demo", "--issuer", i.url, "--audience", audience)
			s := &relying{service: &service{url: p.URL}}
			_, s.document = s.send(t, "PUT", token(t, p.URL, "demo", "demo-secret"))
			if tt.good {
				s.wantGood(t, i.token(t, nil))
			} else {
				s.wantUnknowable(t, i.token(t, nil))
			}
			if err := p.Terminate(t); err != nil {
				t.Errorf("SIGTERM: %v", err)
			}
		})
	}
}

func TestIssuerOutOfOrderIsA503UntilItIsMended(t *testing.T) {
	slow(t)
	t.Parallel()
	mended := map[string]string{oauthMetadata: usualMetadata}
	for _, tt := range []struct {
		name      string
		documents map[string]string
		logged    string
	}{
		{"no metadata", nil, "404 Not Found"},
		{"metadata that fail", map[string]string{oauthMetadata: ``, openIDMetadata: ``}, "500 Internal Server Error"},
		{"metadata of another issuer", map[string]string{oauthMetadata: `{"issuer":"{origin}/","jwks_uri":"{origin}/keys"}`}, "must be exactly the same"},
		{"metadata of no issuer", map[string]string{oauthMetadata: `{"jwks_uri":"{origin}/keys"}`}, "must be exactly the same"},
		{"metadata that are no JSON", map[string]string{oauthMetadata: `<!doctype html>`}, oauthMetadata},
		{"metadata that are too large", map[string]string{oauthMetadata: `{"issuer":"{origin}","jwks_uri":"{origin}/keys","x":"` + strings.Repeat("x", 2<<20) + `"}`}, oauthMetadata},
		{"no jwks_uri", map[string]string{oauthMetadata: `{"issuer":"{origin}"}`}, "jwks_uri"},
		{"a jwks_uri that is none", map[string]string{oauthMetadata: `{"issuer":"{origin}","jwks_uri":"keys"}`}, "jwks_uri"},
		{"keys that fail", map[string]string{oauthMetadata: mended[oauthMetadata], "/keys": ``}, "500"},
		{"keys that are no JSON", map[string]string{oauthMetadata: mended[oauthMetadata], "/keys": `<!doctype html>`}, "/keys: jsontext"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			i := newOwnIssuer(t, "", tt.documents)
			s := relyOn(t, i.url)
			text := i.token(t, nil)
			for range 2 {
				s.wantUnknowable(t, text)
				s.wantGood(t, s.builtIn)
			}
			said := regexp.MustCompile(`(?m)^.*level=WARN msg="the issuer cannot be reached.*$`).FindAllString(s.log.String(), -1)
			if len(said) != 1 || !strings.Contains(said[0], tt.logged) {
				t.Errorf("the log says %q, want one line with %q", said, tt.logged)
			}
			i.serve(mended)
			waitUntil(t, 20*time.Second, "tokens are good", func() error {
				if resp, got := s.send(t, "GET", text); resp.StatusCode != 200 {
					return fmt.Errorf("%s\n%s", resp.Status, got)
				}
				return nil
			})
			s.wantGood(t, text)
		})
	}
}

func TestIssuerThatIsDownIsNotAskedForEachToken(t *testing.T) {
	t.Parallel()
	started := time.Now()
	i := newOwnIssuer(t, "", nil)
	s := relyOn(t, i.url)
	text := i.token(t, nil)
	for range 50 {
		s.wantUnknowable(t, text)
	}
	// For each of its two documents: once at first, and then as often as lookups allows.
	if n, most := len(i.paths()), 2*(1+lookupBurst+int(time.Since(started)/lookupInterval)); n < 2 || n > most {
		t.Errorf("it was asked %d times, want from 2 to %d", n, most)
	}
}

func TestIssuerThatIsSlowToFailIsDownForAllWhoWait(t *testing.T) {
	slow(t)
	t.Parallel()
	i := newOwnIssuer(t, "", nil)
	i.mu.Lock()
	i.slow = time.Second
	i.mu.Unlock()
	s := relyOn(t, i.url)
	text := i.token(t, nil)
	var clients sync.WaitGroup
	for range 8 {
		clients.Go(func() {
			resp, got := s.send(t, "GET", text)
			if resp.StatusCode != 503 || resp.Header.Get("Retry-After") != "1" {
				t.Errorf("got %s\n%s", resp.Status, got)
			}
		})
	}
	clients.Wait()
}

// The response that replaces the keys when the service looks for an unknown one.
func TestIssuerThatGetsOutOfOrderLeavesTheKeysThatAreKnown(t *testing.T) {
	slow(t)
	t.Parallel()
	for _, tt := range []struct{ name, keys string }{
		{"it fails", ``},
		{"it answers with a page", `<!doctype html>`},
		{"it answers with another document", `{"error":"temporarily_unavailable"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			i := usualIssuer(t)
			s := relyOn(t, i.url)
			known, unknown := i.token(t, nil), i.token(t, header("kid", "new"))
			s.wantGood(t, known)
			i.serve(map[string]string{oauthMetadata: usualMetadata, "/keys": tt.keys})
			for range 2 {
				s.wantUnknowable(t, unknown)
				s.wantGood(t, known)
				s.wantGood(t, s.builtIn)
			}
			i.serve(map[string]string{oauthMetadata: usualMetadata, "/keys": strings.ReplaceAll(publishedKeys(), `"kid":"rsa"`, `"kid":"new"`)})
			waitUntil(t, 20*time.Second, "the new key is good", func() error {
				if resp, got := s.send(t, "GET", unknown); resp.StatusCode != 200 {
					return fmt.Errorf("%s\n%s", resp.Status, got)
				}
				return nil
			})
			s.wantGood(t, unknown)
			s.wantInvalid(t, known, noSuchKey)
		})
	}
}

func TestIssuersKeyIsForItsAlgorithmOnlyAlsoWhileItIsDown(t *testing.T) {
	slow(t)
	t.Parallel()
	i := usualIssuer(t)
	s := relyOn(t, i.url)
	s.wantGood(t, i.token(t, nil))
	i.serve(map[string]string{"/keys": ``})
	s.wantUnknowable(t, i.token(t, header("kid", "new")))
	s.wantInvalid(t, i.tokenBy(t, jwt.SigningMethodPS256, ownKeys()[0].key, ownKeys()[0].id, nil), noSuchKey)
}

// A key that is not understood is ignored, and not the whole set (RFC 7517 §5).
func TestIssuersKeysThatAreNotUnderstoodAreIgnored(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, key string }{
		{"another kind", `{"kty":"AKP","kid":"x","alg":"ML-DSA-44","pub":"AAAA"}`},
		{"another curve", `{"kty":"EC","kid":"x","alg":"ES256K","crv":"secp256k1","x":"AAAA","y":"AAAA"}`},
		{"a curve of the other kind", `{"kty":"OKP","kid":"x","alg":"EdDSA","crv":"Ed448","x":"AAAA"}`},
		{"another algorithm", `{"kty":"RSA","kid":"x","use":"enc","alg":"RSA-OAEP-512","n":"4f5wg5l2hKsTeNem_V41fGnJm6gOdrj8ym3rFkEU_wT8RDtnSgFEZOQpHEgQ7JL38xUfU0Y3g6aYw9QT0hJ7mCpz9Er5qLaMXJwZxzHzAahlfA0icqabvJOMvQtzD6uQv6wPEyZtDTWiQi9AXwBpHssPnpYGIn20ZZuNlX2BrClciHhCPUIIZOQn_MmqTD31jSyjoQoV7MhhMTATKJx2XrHhR-1DcKJzQBSTAGnpYVaqpsARap-nwRipr3nUTuxyGohBTSmjJ2usSeQXHI3bODIRe1AuTyHceAbewn8b462yEWKARdpd9AjQW5SIVPfdsz5B6GlYQ5LdYKtznTuy7w","e":"AQAB"}`},
		{"a member missing", `{"kty":"RSA","kid":"x","alg":"RS256","e":"AQAB"}`},
		{"a value that is none", `{"kty":"RSA","kid":"x","alg":"RS256","n":"!","e":"AQAB"}`},
		{"no kind", `{"kid":"x"}`},
		{"a secret", `{"kty":"oct","kid":"x","alg":"HS256","k":"AAAA"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			i := newOwnIssuer(t, "", map[string]string{
				oauthMetadata: usualMetadata,
				"/keys":       strings.Replace(publishedKeys(), `[`, `[`+tt.key+`,`, 1),
			})
			s := relyOn(t, i.url)
			s.wantGood(t, i.token(t, nil))
			s.wantInvalid(t, i.tokenBy(t, jwt.SigningMethodHS256, []byte{0, 0, 0}, "x", nil), notSigned)
		})
	}
}

// wantMany sends a token of each key at once, and fails the test unless each response is a 401 for a
// key that is not published, or the 503 for too many of them. It returns the number of the latter.
func (s *relying) wantMany(t *testing.T, i *ownIssuer, kids ...string) (tooMany int) {
	t.Helper()
	var refused atomic.Int64
	var clients sync.WaitGroup
	for _, kid := range kids {
		text := i.token(t, header("kid", kid))
		clients.Go(func() {
			req, err := http.NewRequest("GET", contractsURL(s.url, demoOrg, demoUser), nil)
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Authorization", "Bearer "+text)
			resp, got, err := servicetest.AnswerOf(http.DefaultClient, req)
			switch {
			case err != nil:
				t.Error(err)
			case resp.StatusCode == 503 && strings.Contains(got, tooManyKeys) && resp.Header.Get("Retry-After") == "10":
				refused.Add(1)
			case resp.StatusCode != 401 || !strings.Contains(got, noSuchKey):
				t.Errorf("got %s\n%s", resp.Status, got)
			}
		})
	}
	clients.Wait()
	return int(refused.Load())
}

const tooManyKeys = "The token is signed with a key that is not known yet, and too many other tokens with unknown keys came before it. Send the request again."

// kidsOf returns n key ids that begin alike.
func kidsOf(begin string, n int) (kids []string) {
	for i := range n {
		kids = append(kids, fmt.Sprint(begin, i))
	}
	return kids
}

// Anybody can send tokens that name unknown keys.
func TestTokensOfUnknownKeysAtOnceAreRefusedAndTheIssuerIsNotBlamed(t *testing.T) {
	slow(t)
	t.Parallel()
	i := usualIssuer(t)
	s := relyOn(t, i.url)
	s.clock.stop(time.Now())
	s.wantGood(t, i.token(t, nil))
	i.mu.Lock()
	i.slow = time.Second // so that they arrive while two fetches last
	i.mu.Unlock()
	before := len(i.paths())
	if n := s.wantMany(t, i, kidsOf("at once ", 20)...); n > 0 {
		t.Errorf("%d of them got a 503", n)
	}
	if n := len(i.paths()) - before; n < 1 || n > lookupBurst {
		t.Errorf("the keys were fetched %d times", n)
	}
	if log := s.log.String(); strings.Contains(log, "the issuer cannot be reached") {
		t.Errorf("the log says that the issuer cannot be reached\n%s", log)
	}
}

func TestKeyThatIsNotPublishedIsRemembered(t *testing.T) {
	t.Parallel()
	i := usualIssuer(t)
	s := relyOn(t, i.url)
	s.clock.stop(time.Now())
	s.wantGood(t, i.token(t, nil))
	long := strings.Repeat("new", 1000)
	text := i.token(t, header("kid", long))
	for range 10 {
		s.wantInvalid(t, text, noSuchKey)
	}
	if got, want := i.paths(), []string{oauthMetadata, "/keys", "/keys"}; !slices.Equal(got, want) {
		t.Errorf("asked for %q, want %q", got, want)
	}
	// It is published after all, and good when it is looked for again.
	i.serve(map[string]string{oauthMetadata: usualMetadata, "/keys": strings.ReplaceAll(publishedKeys(), `"kid":"rsa"`, `"kid":"`+long+`"`)})
	s.clock.move(missingTime - time.Second)
	s.wantInvalid(t, text, noSuchKey)
	s.clock.move(time.Second)
	s.wantGood(t, text)
	if n := len(i.paths()); n != 4 {
		t.Errorf("asked for %q", i.paths())
	}
}

// Whoever sends random key ids makes the issuer be asked a few times, and delays tokens of a really
// new key a little, and others not at all.
func TestFloodOfUnknownKeysIsBounded(t *testing.T) {
	t.Parallel()
	i := usualIssuer(t)
	s := relyOn(t, i.url)
	s.clock.stop(time.Now())
	known, fresh := i.token(t, nil), i.token(t, header("kid", "new"))
	s.wantGood(t, known)
	before := len(i.paths())
	for n := range lookupBurst {
		s.wantInvalid(t, i.token(t, header("kid", fmt.Sprint(n))), noSuchKey)
	}
	if n := s.wantMany(t, i, kidsOf("flood ", 50)...); n != 50 {
		t.Errorf("%d of 50 got a 503", n)
	}
	newKey := ownKeys()[0]
	newKey.id = "new"
	i.serve(map[string]string{oauthMetadata: usualMetadata, "/keys": jwkSet(ownKeys()[0], newKey)})
	i.mu.Lock()
	i.slow = 10 * time.Second // nobody must wait for it
	i.mu.Unlock()
	began := time.Now()
	s.wantAnswer(t, "GET", fresh, 503, "", "10", tooManyKeys)
	s.wantInvalid(t, i.token(t, header("kid", "0")), noSuchKey) // remembered
	s.wantGood(t, known)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("they took %v", took)
	}
	if n := len(i.paths()) - before; n != lookupBurst {
		t.Errorf("the keys were fetched %d times, want %d", n, lookupBurst)
	}
	i.mu.Lock()
	i.slow = 0
	i.mu.Unlock()
	s.clock.move(lookupInterval)
	s.wantMany(t, i, kidsOf("more ", 50)...) // one of them makes the service fetch the keys
	s.wantGood(t, fresh)
	s.wantGood(t, known)
	if n := len(i.paths()) - before; n != lookupBurst+1 {
		t.Errorf("the keys were fetched %d times, want %d", n, lookupBurst+1)
	}
}

// paths returns the paths of the requests so far.
func (i *ownIssuer) paths() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Clone(i.asked)
}

// FuzzJWT checks that of all headers and claims signed with the issuer's key only those are
// accepted that have this service as audience, are valid now and name the issuer, and that no
// other signature is accepted.
func FuzzJWT(f *testing.F) {
	const url, audience, header = "http://127.0.0.1:1", "energy-contracts", `{"alg":"EdDSA","typ":"at+jwt","kid":"a"}`
	now := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC) // 1795392000
	i, err := newIssuer(f.Context(), url, audience, "org_id", func() time.Time { return now }, slog.New(slog.DiscardHandler))
	if err != nil {
		f.Fatal(err)
	}
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	jwk, err := jwkset.NewJWKFromKey(key.Public(), jwkset.JWKOptions{Metadata: jwkset.JWKMetadataOptions{KID: "a"}})
	if err != nil {
		f.Fatal(err)
	}
	storage := jwkset.NewMemoryStorage()
	if err := storage.KeyWrite(f.Context(), jwk); err != nil {
		f.Fatal(err)
	}
	keys, err := keyfunc.New(keyfunc.Options{Storage: storage})
	if err != nil {
		f.Fatal(err)
	}
	i.keys.Store(&keySet{storage, keys})
	f.Add([]byte(header), []byte(`{"iss":"http://127.0.0.1:1","aud":"energy-contracts","exp":1795392060,"scope":"read","org_id":"`+demoOrg+`","client_id":"a"}`))
	f.Add([]byte(header), []byte(`{"iss":"http://127.0.0.1:1","aud":"energy-contracts","exp":1795392060,"scope":"read","org_id":"`+demoOrg+`","client_id":"a","cnf":{"jkt":"a"}}`))
	encoded := base64.RawURLEncoding.EncodeToString
	f.Fuzz(func(t *testing.T, header, claims []byte) {
		var h, c map[string]any
		if json.Unmarshal(header, &h) != nil || h["kid"] != "a" {
			t.Skip("of another key, for which the issuer would be asked")
		}
		isObject := json.Unmarshal(claims, &c) == nil
		content := encoded(header) + "." + encoded(claims)
		signature := ed25519.Sign(key, []byte(content))
		got, err := i.token(content + "." + encoded(signature))
		if bad := badToken(""); err != nil && !errors.As(err, &bad) {
			t.Fatalf("refused with %v", err)
		}
		signature[0] ^= 1
		if forged, err := i.token(content + "." + encoded(signature)); err == nil {
			t.Fatalf("a forged one is %+v", forged)
		}
		if err != nil {
			return
		}
		_, critical := h["crit"]
		_, bound := c["cnf"]
		typ, _ := h["typ"].(string)
		if !isObject || h["alg"] != "EdDSA" || critical || bound || !regexp.MustCompile(`(?i)^(application/)?(at\+)?jwt$`).MatchString(typ) {
			t.Fatalf("accepted as %+v", got)
		}
		exp, _ := c["exp"].(float64)
		nbf, _ := c["nbf"].(float64)
		at := float64(now.Unix())
		forUs := c["aud"] == audience
		if list, ok := c["aud"].([]any); ok {
			forUs = slices.Contains(list, any(audience))
		}
		if c["iss"] != url || !forUs || exp <= at-10 || nbf > at+10 {
			t.Fatalf("accepted as %+v", got)
		}
		org, _ := c["org_id"].(string)
		if string(got.Org) != strings.ToLower(org) && got.Org != "" || (got.Org != "") != uuidForm.MatchString(org) {
			t.Fatalf("accepted as %+v", got)
		}
	})
}
