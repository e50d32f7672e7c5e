package main

// Tokens of an external issuer: a real one, testdata/issuer, in a process of its own.

import (
	"bufio"
	"context"
	"crypto"
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
	"net/url"
	"os/exec"
	"path/filepath"
	"regexp"
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

// audience is the audience of the tokens of testdata/issuer, except those of the clients
// elsewhere and web.
const audience = "energy-contracts"

var issuerProgram = nestedProgram("issuer")

// realIssuer is testdata/issuer. It keeps its keys and its address when the process is
// restarted.
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

// start starts the issuer at the address it had before, and waits until it listens.
func (i *realIssuer) start(t testing.TB) {
	t.Helper()
	path := needNested(t, issuerProgram)
	addr := "127.0.0.1:0"
	if i.url != "" {
		addr = strings.TrimPrefix(i.url, "http://")
	}
	// Another process may use the port briefly for an outgoing connection.
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

// stop kills the issuer.
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

// token returns an access token for one of the issuer's clients.
func (i *realIssuer) token(t testing.TB, id string) string {
	t.Helper()
	c := clientcredentials.Config{ClientID: id, ClientSecret: id + "-secret", TokenURL: i.url + "/oauth/token", AuthStyle: oauth2.AuthStyleInHeader}
	got, err := c.Token(context.Background())
	if err != nil {
		t.Fatalf("the issuer's token for %s: %v", id, err)
	}
	return got.AccessToken
}

// rotate makes the issuer sign with a new key.
func (i *realIssuer) rotate(t testing.TB, algorithm string) {
	t.Helper()
	i.control(t, "rotate?alg="+algorithm)
}

// withdraw makes the issuer publish only its current key.
func (i *realIssuer) withdraw(t testing.TB) { t.Helper(); i.control(t, "withdraw") }

func (i *realIssuer) control(t testing.TB, what string) {
	t.Helper()
	if resp, got := do(t, http.DefaultClient, "POST", i.url+"/"+what, nil, ""); resp.StatusCode != 200 {
		t.Fatalf("%s: %s\n%s", what, resp.Status, got)
	}
}

// publicKey returns the key at a position of the keys that the issuer publishes.
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

// login goes through the authorization code flow as a user does in a browser.
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

// relying is a service that accepts the tokens of an issuer.
type relying struct {
	*service
	issuers  string // as answers name where tokens come from
	builtIn  string // a token of its own, good for everything
	document string // of the contract that is read and replaced
}

// replacement is the body of each PUT here, so that the document is always the same.
const replacement = `{"supplier":"Jämtkraft"}`

// relyOn starts a service with the demo data, and with the audience unless args has one.
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

// send reads or replaces the contract with a token.
func (s *relying) send(t testing.TB, method, token string) (*http.Response, string) {
	t.Helper()
	header, body := http.Header{"Authorization": {"Bearer " + token}}, ""
	if method == "PUT" {
		header.Set("Content-Type", "application/json")
		body = replacement
	}
	return do(t, http.DefaultClient, method, contractsURL(s.url, demoOrg, demoUser)+"/"+demoContract, header, body)
}

// wantGood fails the test unless the token may read and replace the contract.
func (s *relying) wantGood(t testing.TB, token string) {
	t.Helper()
	s.wantRead(t, token)
	s.wantDocument(t, "PUT", token)
}

// wantRead fails the test unless the token may read the contract.
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

// wantAnswer fails the test unless the response to a request with the token is this problem.
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
	for _, method := range []string{"GET", "PUT"} {
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

// wantUnknowable fails the test unless the token gets the 503 for an issuer that is down.
func (s *relying) wantUnknowable(t testing.TB, token string) {
	t.Helper()
	s.wantAnswer(t, "GET", token, 503, "", "1", "The keys of the token's issuer cannot be fetched at the moment. Send the request again.")
}

const (
	noSuchKey   = "signed with a key that its issuer does not publish"
	notSigned   = "not signed by its issuer"
	notAnAccess = "not an access token"
	notNamed    = "signed with a key that it does not name"
	incomplete  = "missing iss, aud or exp"
)

func TestIssuersTokensAreGoodForWhatTheySay(t *testing.T) {
	slow(t)
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
	slow(t)
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
			if want := "There is nothing under this path; contracts are under /api/partners/v2.0/org/{org_id}/users/{user_id}/energy-contracts, and /api/partners/v2.0/docs describes the API."; p.Detail != want {
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

// The flags are set as variables, and the program runs in a process of its own.
func TestIssuerOfTheProgram(t *testing.T) {
	slow(t)
	i := startIssuer(t)
	t.Setenv("ENERGY_CONTRACTS_ISSUER", i.url)
	t.Setenv("ENERGY_CONTRACTS_AUDIENCE", audience)
	p := startProcess(t, nil, "--demo")
	resp, got := do(t, http.DefaultClient, "GET", contractsURL(p.URL, demoOrg, demoUser)+"/"+demoContract, http.Header{"Authorization": {"Bearer " + i.token(t, "good")}}, "")
	if resp.StatusCode != 200 || !strings.Contains(got, demoContract) {
		t.Errorf("got %s\n%s", resp.Status, got)
	}
	if err := p.Terminate(t); err != nil {
		t.Errorf("SIGTERM: %v", err)
	}
	if strings.Contains(p.Stderr.String(), "level=WARN") {
		t.Errorf("the log warns\n%s", p.Stderr)
	}
}

func TestIssuersIDTokenIsNoAccessToken(t *testing.T) {
	slow(t)
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

// parts returns the header and the claims of a JWT.
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

// edited returns a JWT with a change in its header (part 0) or its claims (part 1) and with
// its old signature.
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

// signed returns a JWT with this header and these claims, signed with key.
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

// publicForms returns the encodings of a public key that could be mistaken for a shared
// secret.
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
	slow(t)
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
	slow(t)
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
	slow(t)
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
	// The status changes from 503 to 200 without another one in between.
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

// Each token is valid, or names a key that never existed, so that the other requests do not
// change its response.
func TestIssuersKeysRotateUnderManyRequests(t *testing.T) {
	slow(t)
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
	transport := validated{Transport: &http.Transport{MaxIdleConnsPerHost: 32}}
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
