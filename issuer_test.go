package main

// Tokens of another issuer: of a real one in a process of its own (testdata/issuer),
// and of one in this process whose keys are ours, so that a token can be wrong in one
// way and signed all the same.

import (
	"bufio"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

// audience is what testdata/issuer has its tokens for, but those of the clients
// elsewhere and web.
const audience = "energy-contracts"

var issuerProgram = nestedProgram("issuer")

// realIssuer is testdata/issuer. Its keys and its address outlive the process.
type realIssuer struct {
	url  string
	keys string
	cmd  *exec.Cmd // nil: it is down
}

func startIssuer(t testing.TB) *realIssuer {
	t.Helper()
	i := &realIssuer{keys: filepath.Join(t.TempDir(), "keys.json")}
	i.start(t)
	t.Cleanup(func() { i.stop(t) })
	return i
}

// start waits until it listens, where it did before.
func (i *realIssuer) start(t testing.TB) {
	t.Helper()
	path := needNested(t, issuerProgram)
	addr := "127.0.0.1:0"
	if i.url != "" {
		addr = strings.TrimPrefix(i.url, "http://")
	}
	// Another process may have the port for a moment, for a connection to elsewhere.
	waitUntil(t, 20*time.Second, "the issuer listens", func() error {
		cmd := exec.Command(path, "--addr", addr, "--keys", i.keys)
		stderr := &lockedBuffer{}
		cmd.Stderr = stderr
		pipe, err := cmd.StdoutPipe()
		if err != nil {
			return err
		}
		if err := cmd.Start(); err != nil {
			return err
		}
		line, err := bufio.NewReader(pipe).ReadString('\n')
		if err != nil {
			return fmt.Errorf("%w, %w\n%s", err, cmd.Wait(), stderr)
		}
		i.url, i.cmd = strings.TrimSpace(line), cmd
		return nil
	})
}

// stop ends it in no orderly way.
func (i *realIssuer) stop(t testing.TB) {
	t.Helper()
	if i.cmd == nil {
		return
	}
	if err := i.cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = i.cmd.Wait()
	i.cmd = nil
}

// token gets an access token for one of its clients.
func (i *realIssuer) token(t testing.TB, id string) string {
	t.Helper()
	c := clientcredentials.Config{ClientID: id, ClientSecret: id + "-secret", TokenURL: i.url + "/oauth/token", AuthStyle: oauth2.AuthStyleInHeader}
	got, err := c.Token(context.Background())
	if err != nil {
		t.Fatalf("the issuer's token for %s: %v", id, err)
	}
	return got.AccessToken
}

// rotate has it sign with a new key.
func (i *realIssuer) rotate(t testing.TB, algorithm string) {
	t.Helper()
	i.control(t, "rotate?alg="+algorithm)
}

// withdraw has it publish no other key.
func (i *realIssuer) withdraw(t testing.TB) { t.Helper(); i.control(t, "withdraw") }

func (i *realIssuer) control(t testing.TB, what string) {
	t.Helper()
	if resp, got := do(t, http.DefaultClient, "POST", i.url+"/"+what, nil, ""); resp.StatusCode != 200 {
		t.Fatalf("%s: %s\n%s", what, resp.Status, got)
	}
}

// publicKey is one of those that it publishes, by its place.
func (i *realIssuer) publicKey(t testing.TB, n int) crypto.PublicKey {
	t.Helper()
	_, got := do(t, http.DefaultClient, "GET", i.url+"/keys", nil, "")
	var set jwkset.JWKSMarshal
	if err := json.Unmarshal([]byte(got), &set); err != nil || len(set.Keys) <= n {
		t.Fatalf("%v\n%s", err, got)
	}
	key, err := jwkset.NewJWKFromMarshal(set.Keys[n], jwkset.JWKMarshalOptions{}, jwkset.JWKValidateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return key.Key()
}

// login is a user's way through the authorization code flow in a browser.
func (i *realIssuer) login(t testing.TB) (accessToken, idToken string) {
	t.Helper()
	c := oauth2.Config{
		ClientID: "web", ClientSecret: "web-secret", RedirectURL: "http://127.0.0.1:9999/callback", Scopes: []string{"openid", "read", "write"},
		Endpoint: oauth2.Endpoint{AuthURL: i.url + "/auth", TokenURL: i.url + "/oauth/token", AuthStyle: oauth2.AuthStyleInHeader},
	}
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	browser := &http.Client{Jar: jar, CheckRedirect: func(r *http.Request, _ []*http.Request) error {
		if strings.HasPrefix(r.URL.String(), c.RedirectURL) {
			return http.ErrUseLastResponse
		}
		return nil
	}}
	form, page := do(t, browser, "GET", c.AuthCodeURL("a-state"), nil, "")
	id := form.Request.URL.Query().Get("authRequestID")
	if form.StatusCode != 200 || id == "" {
		t.Fatalf("the login form: %s at %s\n%s", form.Status, form.Request.URL, page)
	}
	filled := url.Values{"username": {"test-user@127.0.0.1"}, "password": {"verysecure"}, "id": {id}}
	header := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
	resp, page := do(t, browser, "POST", form.Request.URL.String(), header, filled.Encode())
	back, err := resp.Location()
	if err != nil || back.Query().Get("state") != "a-state" {
		t.Fatalf("the login: %s to %v, %v\n%s", resp.Status, back, err, page)
	}
	got, err := c.Exchange(context.Background(), back.Query().Get("code"))
	if err != nil {
		t.Fatal(err)
	}
	idToken, _ = got.Extra("id_token").(string)
	return got.AccessToken, idToken
}

// relying is the service with an issuer.
type relying struct {
	*service
	issuers  string // as answers name where tokens come from
	builtIn  string // a token of its own, good for everything
	document string // of the contract that is read and replaced
}

// replacement is what each PUT here sends, so that the document is always the same.
const replacement = `{"supplier":"Jämtkraft"}`

// relyOn starts the service with the demo data, and the audience unless args has
// another.
func relyOn(t testing.TB, issuer string, args ...string) *relying {
	t.Helper()
	if !slices.Contains(args, "--audience") {
		args = append(args, "--audience", audience)
	}
	s := &relying{service: start(t, append([]string{"--demo", "--issuer", issuer}, args...)...), issuers: "POST /oauth2/token/ or " + issuer}
	s.builtIn = token(t, s.url, "demo", "demo-secret")
	resp, got := s.send(t, "PUT", s.builtIn)
	if s.document = got; resp.StatusCode != 200 || !strings.Contains(got, demoContract) {
		t.Fatalf("PUT with a built-in token: %s\n%s", resp.Status, got)
	}
	return s
}

// send reads or replaces the contract.
func (s *relying) send(t testing.TB, method, token string) (*http.Response, string) {
	t.Helper()
	header, body := http.Header{"Authorization": {"Bearer " + token}}, ""
	if method == "PUT" {
		header.Set("Content-Type", "application/json")
		body = replacement
	}
	return do(t, http.DefaultClient, method, contractsURL(s.url, demoOrg, demoUser)+"/"+demoContract, header, body)
}

// wantGood fails unless a token reads the contract, and replaces it.
func (s *relying) wantGood(t testing.TB, token string) {
	t.Helper()
	s.wantRead(t, token)
	s.wantDocument(t, "PUT", token)
}

// wantRead fails unless a token reads the contract.
func (s *relying) wantRead(t testing.TB, token string) {
	t.Helper()
	s.wantDocument(t, "GET", token)
}

func (s *relying) wantDocument(t testing.TB, method, token string) {
	t.Helper()
	resp, got := s.send(t, method, token)
	if resp.StatusCode != 200 || got != s.document || resp.Header.Get("Content-Type") != "application/json" || resp.Header.Get("WWW-Authenticate") != "" {
		t.Errorf("%s: got %s\n%v\n%s\nwant 200\n%s", method, resp.Status, resp.Header, got, s.document)
	}
}

// wantAnswer fails unless a token's answer is a problem, and nothing else.
func (s *relying) wantAnswer(t testing.TB, method, token string, status int, challenge, retry, detail string) {
	t.Helper()
	resp, got := s.send(t, method, token)
	p := wantProblem(t, resp, got, status)
	if c, r := resp.Header.Get("WWW-Authenticate"), resp.Header.Get("Retry-After"); c != challenge || r != retry || p.Detail != detail || p.Errors != nil {
		t.Errorf("%s: got\nWWW-Authenticate: %s\nRetry-After: %s\n%s\nwant\nWWW-Authenticate: %s\nRetry-After: %s\ndetail: %s", method, c, r, got, challenge, retry, detail)
	}
}

func (s *relying) wantInvalid(t testing.TB, token, why string) {
	t.Helper()
	methods := []string{"GET", "PUT"}
	if why == noSuchKey {
		methods = methods[:1] // each one may wait for its turn to look for the key
	}
	for _, method := range methods {
		s.wantAnswer(t, method, token, 401,
			`Bearer realm="energy-contracts", error="invalid_token", error_description="The token is `+why+`"`, "",
			"The token is "+why+"; "+s.issuers+" issues another.")
	}
}

func (s *relying) wantTooLittle(t testing.TB, method, token, has, need string) {
	t.Helper()
	s.wantAnswer(t, method, token, 403,
		`Bearer realm="energy-contracts", error="insufficient_scope", scope="`+need+`"`, "",
		fmt.Sprintf("The token has the scope %q, but this request needs %q.", has, need))
}

func (s *relying) wantForbidden(t testing.TB, token, detail string) {
	t.Helper()
	s.wantAnswer(t, "GET", token, 403, "", "", detail)
	s.wantAnswer(t, "PUT", token, 403, "", "", detail)
}

// wantUnknowable is for a token whose issuer cannot be asked.
func (s *relying) wantUnknowable(t testing.TB, token string) {
	t.Helper()
	s.wantAnswer(t, "GET", token, 503, "", "1", "The issuer of the token cannot be asked for its keys at the moment. Send the request again.")
}

const (
	noSuchKey   = "signed with a key that its issuer does not publish"
	notSigned   = "not signed by its issuer"
	notAnAccess = "not an access token"
	notNamed    = "signed with a key that it does not name"
	incomplete  = "missing iss, aud or exp"
)

func TestIssuersTokensAreGoodForWhatTheySay(t *testing.T) {
	t.Parallel()
	i := startIssuer(t)
	s := relyOn(t, i.url)
	for _, tt := range []struct {
		client string
		check  func(t *testing.T, token string)
	}{
		{"good", func(t *testing.T, token string) { s.wantGood(t, token) }},
		{"reader", func(t *testing.T, token string) {
			s.wantRead(t, token)
			s.wantTooLittle(t, "PUT", token, "read", "write")
		}},
		{"other-org", func(t *testing.T, token string) {
			s.wantForbidden(t, token, "The token does not belong to the organization in the path.")
		}},
		{"no-org", func(t *testing.T, token string) {
			s.wantForbidden(t, token, "The token belongs to no organization: its claim org_id must be a UUID.")
		}},
		{"elsewhere", func(t *testing.T, token string) { s.wantInvalid(t, token, "for another audience") }},
		{"expired", func(t *testing.T, token string) { s.wantInvalid(t, token, "expired") }},
		{"early", func(t *testing.T, token string) { s.wantInvalid(t, token, "not valid yet") }},
	} {
		t.Run(tt.client, func(t *testing.T) { tt.check(t, i.token(t, tt.client)) })
	}
	s.wantGood(t, s.builtIn)
	s.stop()
	if !regexp.MustCompile(`msg=request method=PUT .* status=200 .* client=external/good\n`).MatchString(s.log.String()) {
		t.Errorf("the log does not name the client\n%s", s.log)
	}
}

func TestIssuerIsTheOnlyOneWithoutBuiltInTokens(t *testing.T) {
	t.Parallel()
	i := startIssuer(t)
	with := relyOn(t, i.url)
	with.stop()
	s := &relying{issuers: i.url, builtIn: with.builtIn, document: with.document}
	s.service = startOn(t, with.db, "--issuer", i.url, "--audience", audience, "--no-built-in-tokens")
	s.wantGood(t, i.token(t, "good"))
	s.wantInvalid(t, s.builtIn, "not a JWT")
	for _, tt := range []struct{ method, path string }{
		{"POST", "/oauth2/token/"}, {"POST", "/oauth2/token"}, {"POST", "/oauth2/revoke_token/"}, {"POST", "/oauth2/revoke_token"},
		{"GET", "/.well-known/oauth-authorization-server"}, {"HEAD", "/.well-known/oauth-authorization-server"},
	} {
		t.Run(tt.method+" "+tt.path, func(t *testing.T) {
			header := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}, "Authorization": {"Basic ZGVtbzpkZW1vLXNlY3JldA=="}}
			resp, got := do(t, http.DefaultClient, tt.method, s.url+tt.path, header, "grant_type=client_credentials&token="+s.builtIn)
			if tt.method == "HEAD" {
				if resp.StatusCode != 404 {
					t.Errorf("got %s", resp.Status)
				}
				return
			}
			p := wantProblem(t, resp, got, 404)
			if want := "There is nothing under this path; contracts are under /api/partners/v2.0/org/{org_id}/users/{user_id}/energy-contracts, and /api/partners/v2.0/docs describes all."; p.Detail != want {
				t.Errorf("detail %q, want %q", p.Detail, want)
			}
		})
	}
	resp, got := do(t, http.DefaultClient, "GET", contractsURL(s.url, demoOrg, demoUser), nil, "")
	p := wantProblem(t, resp, got, 401)
	if want := "Send a token as Authorization: Bearer …; " + i.url + " issues one."; p.Detail != want || resp.Header.Get("WWW-Authenticate") != `Bearer realm="energy-contracts"` {
		t.Errorf("detail %q, want %q\n%v", p.Detail, want, resp.Header)
	}
}

// The flags as variables, and the program as it is started.
func TestIssuerOfTheProgram(t *testing.T) {
	i := startIssuer(t)
	t.Setenv("ENERGY_CONTRACTS_ISSUER", i.url)
	t.Setenv("ENERGY_CONTRACTS_AUDIENCE", audience)
	p := startProcess(t, nil, "--demo")
	resp, got := do(t, http.DefaultClient, "GET", contractsURL(p.url, demoOrg, demoUser)+"/"+demoContract, http.Header{"Authorization": {"Bearer " + i.token(t, "good")}}, "")
	if resp.StatusCode != 200 || !strings.Contains(got, demoContract) {
		t.Errorf("got %s\n%s", resp.Status, got)
	}
	if err := p.terminate(t); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
	if strings.Contains(p.stderr.String(), "level=WARN") {
		t.Errorf("the log warns\n%s", p.stderr)
	}
}

func TestIssuersIDTokenIsNoAccessToken(t *testing.T) {
	t.Parallel()
	i := startIssuer(t)
	s := relyOn(t, i.url, "--audience", "web") // so that nothing but its kind is wrong
	access, id := i.login(t)
	_, claims := parts(t, id)
	if !slices.Equal(claims["aud"].([]any), []any{"web"}) || claims["org_id"] != demoOrg || claims["iss"] != i.url {
		t.Fatalf("the ID token has %v", claims)
	}
	s.wantGood(t, access)
	s.wantInvalid(t, id, notAnAccess)
}

// parts is a JWT's header and claims.
func parts(t testing.TB, token string) (header, claims map[string]any) {
	t.Helper()
	text := strings.Split(token, ".")
	for n, into := range []*map[string]any{&header, &claims} {
		b, err := base64.RawURLEncoding.DecodeString(text[n])
		if err == nil {
			err = json.Unmarshal(b, into)
		}
		if err != nil {
			t.Fatalf("%v\n%s", err, token)
		}
	}
	return header, claims
}

// edited is a JWT with another text in its header (0) or its claims (1), and the
// signature that it had.
func edited(t testing.TB, token string, part int, from, to string) string {
	t.Helper()
	text := strings.Split(token, ".")
	b, err := base64.RawURLEncoding.DecodeString(text[part])
	if err != nil || strings.Count(string(b), from) != 1 {
		t.Fatalf("%v, or not one %s in\n%s", err, from, b)
	}
	text[part] = base64.RawURLEncoding.EncodeToString([]byte(strings.Replace(string(b), from, to, 1)))
	return strings.Join(text, ".")
}

// signed is a JWT whose header and claims are those of another.
func signed(t testing.TB, method jwt.SigningMethod, key any, header, claims map[string]any) string {
	t.Helper()
	made := jwt.NewWithClaims(method, jwt.MapClaims(claims))
	alg := made.Header["alg"]
	made.Header = maps.Clone(header)
	made.Header["alg"] = alg
	text, err := made.SignedString(key)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// publicForms is the ways to write a public key as the bytes of a secret.
func publicForms(t testing.TB, key crypto.PublicKey) map[string][]byte {
	t.Helper()
	pkix, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		t.Fatal(err)
	}
	forms := map[string][]byte{
		"its DER":                             pkix,
		"its PEM":                             pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pkix}),
		"its PEM without the last line's end": []byte(strings.TrimSpace(string(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: pkix})))),
	}
	if k, ok := key.(*rsa.PublicKey); ok {
		pkcs1 := x509.MarshalPKCS1PublicKey(k)
		forms["its DER of PKCS #1"] = pkcs1
		forms["its PEM of PKCS #1"] = pem.EncodeToMemory(&pem.Block{Type: "RSA PUBLIC KEY", Bytes: pkcs1})
		forms["its modulus"] = k.N.Bytes()
	}
	return forms
}

func TestIssuersTokenThatWasChangedIsRefused(t *testing.T) {
	t.Parallel()
	i, other := startIssuer(t), startIssuer(t)
	s := relyOn(t, i.url)
	first := i.token(t, "good")
	firstHeader, _ := parts(t, first)
	i.rotate(t, "RS256")
	good := i.token(t, "good")
	header, claims := parts(t, good)
	kid, firstKID := fmt.Sprint(header["kid"]), fmt.Sprint(firstHeader["kid"])
	s.wantGood(t, first)
	s.wantGood(t, good)
	signature := strings.LastIndex(good, ".") + 1

	type forgery struct{ name, token, why string }
	forgeries := []forgery{
		{"alg none", signed(t, jwt.SigningMethodNone, jwt.UnsafeAllowNoneSignatureType, header, claims), notSigned},
		{"alg none and the signature", edited(t, good, 0, "RS256", "none"), notSigned},
		{"an alg that there is not", edited(t, good, 0, "RS256", "None"), "invalid"},
		{"another alg", edited(t, good, 0, "RS256", "RS512"), noSuchKey},
		{"no signature", good[:signature], notSigned},
		{"no signature nor its dot", good[:signature-1], "malformed"},
		{"the signature of another token", good[:signature] + first[strings.LastIndex(first, ".")+1:], notSigned},
		{"a byte of the signature changed", good[:signature] + changedAt(good[signature:], 50), notSigned},
		{"a bit of the signature changed that stands for nothing", good[:len(good)-1] + string(good[len(good)-1]+1), "malformed"},
		{"a byte of the claims changed", edited(t, good, 1, demoOrg, "4"+demoOrg[1:]), notSigned},
		{"the scope changed", edited(t, i.token(t, "reader"), 1, `"scope":"read"`, `"scope":"read write"`), notSigned},
		{"an organization added", edited(t, i.token(t, "no-org"), 1, `"jti"`, `"org_id":"`+demoOrg+`","jti"`), notSigned},
		{"the end put off", edited(t, i.token(t, "expired"), 1, `"exp":1`, `"exp":9`), notSigned},
		{"a kid that there is not", edited(t, good, 0, kid, "another"), noSuchKey},
		{"a kid of another key", edited(t, good, 0, kid, firstKID), notSigned},
		{"no kid", edited(t, good, 0, `"kid"`, `"kit"`), notNamed},
		{"a token of another issuer", other.token(t, "good"), noSuchKey},
		{"a part more", good + "." + good[signature:], "malformed"},
	}
	for _, n := range []int{0, 1} {
		for name, secret := range publicForms(t, i.publicKey(t, n)) {
			h := header
			if n == 0 {
				h = firstHeader
			}
			forgeries = append(forgeries, forgery{fmt.Sprintf("alg HS256 with key %d, %s", n, name), signed(t, jwt.SigningMethodHS256, secret, h, claims), notSigned})
		}
	}
	for _, tt := range forgeries {
		t.Run(tt.name, func(t *testing.T) { s.wantInvalid(t, tt.token, tt.why) })
	}
	s.wantGood(t, good)
}

func TestIssuersNewKeyIsGoodAtOnceAndTheOldOneWhilePublished(t *testing.T) {
	t.Parallel()
	i := startIssuer(t)
	s := relyOn(t, i.url)
	first := i.token(t, "good")
	s.wantGood(t, first)
	i.rotate(t, "ES256")
	second := i.token(t, "good")
	if h, _ := parts(t, second); h["alg"] != "ES256" {
		t.Fatalf("the token's header is %v", h)
	}
	s.wantGood(t, second)
	s.wantGood(t, first)
	i.withdraw(t)
	i.rotate(t, "RS256")
	third := i.token(t, "good")
	s.wantGood(t, third) // which fetches the keys anew
	s.wantGood(t, second)
	s.wantInvalid(t, first, noSuchKey)
	s.wantGood(t, s.builtIn)
}

func TestIssuerThatIsDown(t *testing.T) {
	t.Parallel()
	i := startIssuer(t)
	first := i.token(t, "good")
	i.stop(t)
	s := relyOn(t, i.url)
	logged := func(down, up int) {
		t.Helper()
		for text, want := range map[string]int{
			`level=WARN msg="the issuer cannot be reached`:     down,
			`level=INFO msg="the issuer can be reached again"`: up,
		} {
			if n := strings.Count(s.log.String(), text); n != want {
				t.Errorf("the log has %q %d times, want %d\n%s", text, n, want, s.log)
			}
		}
	}
	for range 3 {
		s.wantUnknowable(t, first)
		s.wantGood(t, s.builtIn)
	}
	logged(1, 0)

	i.start(t)
	// A 503 that turns into 200, and nothing in between.
	good := func(token string) func() error {
		return func() error {
			resp, got := s.send(t, "GET", token)
			if resp.StatusCode == 503 {
				return errors.New(got)
			}
			if resp.StatusCode != 200 {
				t.Fatalf("got %s\n%s", resp.Status, got)
			}
			return nil
		}
	}
	waitUntil(t, 20*time.Second, "tokens are good again", good(first))
	s.wantGood(t, first)
	logged(1, 1)

	i.rotate(t, "ES256")
	second := i.token(t, "good")
	i.stop(t)
	for range 2 {
		s.wantGood(t, first) // its key is known
		s.wantUnknowable(t, second)
		s.wantGood(t, s.builtIn)
		s.wantInvalid(t, edited(t, first, 1, demoOrg, "4"+demoOrg[1:]), notSigned)
	}
	logged(2, 1)

	i.start(t)
	waitUntil(t, 20*time.Second, "tokens of the new key are good", good(second))
	s.wantGood(t, first)
	s.wantGood(t, second)
	s.stop()
	logged(2, 2)
	for _, token := range []string{first, second, s.builtIn} {
		for _, part := range strings.Split(token, ".") {
			if strings.Contains(s.log.String(), part) {
				t.Errorf("the log has %q of a token", part)
			}
		}
	}
}

// Each token is good, or of a key that there never was, so that what else happens
// changes no answer.
func TestIssuersKeysRotateUnderManyRequests(t *testing.T) {
	t.Parallel()
	i := startIssuer(t)
	s := relyOn(t, i.url)
	url := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
	var current atomic.Pointer[string]
	renew := func() {
		token := i.token(t, "good")
		current.Store(&token)
	}
	renew()
	unknown := edited(t, *current.Load(), 0, `"kid":"`, `"kid":"un`)
	var (
		stop    = make(chan struct{})
		fresh   atomic.Int64 // answers to the current token
		wrong   atomic.Int64
		clients sync.WaitGroup
	)
	transport := validated{&http.Transport{MaxIdleConnsPerHost: 32}}
	defer transport.CloseIdleConnections()
	ask := func(token string, want int) {
		req, err := http.NewRequest("GET", url, nil)
		if err != nil {
			t.Error(err)
			return
		}
		req.Header.Set("Authorization", "Bearer "+token)
		resp, err := transport.RoundTrip(req)
		if err != nil {
			t.Error(err)
			return
		}
		defer resp.Body.Close()
		got, _ := io.ReadAll(resp.Body)
		if resp.StatusCode != want || want == 200 && string(got) != s.document {
			if wrong.Add(1) <= 3 {
				t.Errorf("got %s, want %d\n%s", resp.Status, want, got)
			}
		}
	}
	for n := range 32 {
		clients.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if n%4 == 3 {
					ask(unknown, 401)
					continue
				}
				token := current.Load()
				ask(*token, 200)
				if token == current.Load() {
					fresh.Add(1)
				}
			}
		})
	}
	for _, algorithm := range []string{"ES256", "RS256", "ES256"} {
		i.rotate(t, algorithm)
		renew()
		fresh.Store(0)
		waitFor(t, "each client has an answer to a token of the new key", func() bool { return fresh.Load() >= 2*24 })
	}
	close(stop)
	clients.Wait()
	if n := wrong.Load(); n > 0 {
		t.Errorf("%d wrong answers", n)
	}
	if log := s.log.String(); strings.Contains(log, "the issuer cannot be reached") {
		t.Error("the log says that the issuer cannot be reached")
	}
}

// ownKey is a key of an issuer in this process.
type ownKey struct {
	id     string
	method jwt.SigningMethod
	key    crypto.Signer
	use    jwkset.USE
}

// ownKeys is made once: RSA keys take time.
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

// ownIssuer is an issuer in this process: documents at paths.
type ownIssuer struct {
	*httptest.Server
	url string // the issuer's

	mu        sync.Mutex
	documents map[string]string // "" is a 500, an URL a redirect
	asked     []string          // paths
	slow      time.Duration     // how long an answer takes
}

// newOwnIssuer serves its keys at /keys unless it is told other ones, and documents,
// in which {origin} is where it listens.
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

// serve replaces what it serves.
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

// publishedKeys is the JWKS of ownKeys, but the last.
func publishedKeys() string {
	keys := ownKeys()
	var set jwkset.JWKSMarshal
	for _, k := range keys[:len(keys)-1] {
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

// usualIssuer serves metadata as RFC 8414 has it.
func usualIssuer(t testing.TB) *ownIssuer {
	t.Helper()
	return newOwnIssuer(t, "", map[string]string{oauthMetadata: usualMetadata})
}

// token is a good one (RFC 9068 §2), but for an edit.
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

// all makes one edit of several.
func all(edits ...func(_, _ map[string]any)) func(_, _ map[string]any) {
	return func(header, claims map[string]any) {
		for _, edit := range edits {
			edit(header, claims)
		}
	}
}

func TestJWTThatIsSignedAndWrongIsRefused(t *testing.T) {
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

// In a process of its own, which is told whom to trust as it is by the system.
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
			s := &relying{service: &service{url: p.url}}
			_, s.document = s.send(t, "PUT", token(t, p.url, "demo", "demo-secret"))
			if tt.good {
				s.wantGood(t, i.token(t, nil))
			} else {
				s.wantUnknowable(t, i.token(t, nil))
			}
			if err := p.terminate(t); err != nil {
				t.Errorf("SIGTERM: %v", err)
			}
		})
	}
}

func TestIssuerOutOfOrderIsA503UntilItIsMended(t *testing.T) {
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
	// For each of its two documents; once at first, and then once in an issuerRetry.
	if n, most := len(i.paths()), 2*(1+int(time.Since(started)/issuerRetry)); n < 2 || n > most {
		t.Errorf("it was asked %d times, want from 2 to %d", n, most)
	}
}

func TestIssuerThatIsSlowToFailIsDownForAllWhoWait(t *testing.T) {
	t.Parallel()
	i := newOwnIssuer(t, "", nil)
	i.mu.Lock()
	i.slow = issuerRetry // so that an attempt takes longer than the time between two
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

// What the keys are replaced by when the service looks for one that it does not know.
func TestIssuerThatGetsOutOfOrderLeavesTheKeysThatAreKnown(t *testing.T) {
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
	t.Parallel()
	i := usualIssuer(t)
	s := relyOn(t, i.url)
	s.wantGood(t, i.token(t, nil))
	i.serve(map[string]string{"/keys": ``})
	s.wantUnknowable(t, i.token(t, header("kid", "new")))
	s.wantInvalid(t, i.tokenBy(t, jwt.SigningMethodPS256, ownKeys()[0].key, ownKeys()[0].id, nil), noSuchKey)
}

// RFC 7517 §5: what is not understood is ignored, not the whole set.
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

// Anybody can send such tokens.
func TestTokensOfUnknownKeysAtOnceAreRefusedAndTheIssuerIsNotBlamed(t *testing.T) {
	t.Parallel()
	i := usualIssuer(t)
	s := relyOn(t, i.url)
	s.wantGood(t, i.token(t, nil))
	i.mu.Lock()
	i.slow = 200 * time.Millisecond // as one is that is far away
	i.mu.Unlock()
	before, started := len(i.paths()), time.Now()
	var clients sync.WaitGroup
	for n := range 6 {
		text := i.token(t, header("kid", fmt.Sprint(n)))
		clients.Go(func() {
			req, err := http.NewRequest("GET", contractsURL(s.url, demoOrg, demoUser), nil)
			if err != nil {
				t.Error(err)
				return
			}
			req.Header.Set("Authorization", "Bearer "+text)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			if got, _ := io.ReadAll(resp.Body); resp.StatusCode != 401 || !strings.Contains(string(got), noSuchKey) {
				t.Errorf("got %s\n%s", resp.Status, got)
			}
		})
	}
	clients.Wait()
	// Once at first, and then once in an issuerRetry.
	if n, most := len(i.paths())-before, 1+int(time.Since(started)/issuerRetry); n < 1 || n > most {
		t.Errorf("the keys were fetched %d times, want from 1 to %d", n, most)
	}
	if log := s.log.String(); strings.Contains(log, "the issuer cannot be reached") {
		t.Errorf("the log says that the issuer cannot be reached\n%s", log)
	}
}

// paths is what it was asked for.
func (i *ownIssuer) paths() []string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return slices.Clone(i.asked)
}
