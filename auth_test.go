package main

// Every route with every kind of wrong token.

import (
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

// publicRoutes are all routes that need no token.
var publicRoutes = append([]string{
	"GET /api/partners/v2.0/docs", "HEAD /api/partners/v2.0/docs",
	"GET /api/partners/v2.0/openapi.json", "HEAD /api/partners/v2.0/openapi.json",
	"GET /.well-known/oauth-authorization-server", "HEAD /.well-known/oauth-authorization-server",
	"GET /healthz", "HEAD /healthz", "GET /readyz", "HEAD /readyz",
	"POST /oauth2/revoke_token", "POST /oauth2/revoke_token/",
	"POST /oauth2/token", "POST /oauth2/token/",
}, servicetest.Undescribed...)

// wrongToken is a request without a valid token, and the response to it.
type wrongToken struct {
	name   string
	sent   http.Header
	query  string
	answer failure
}

func challenge(text string) http.Header { return http.Header{"Www-Authenticate": {text}} }

// refused returns a wrongToken with one Authorization field.
func refused(name, authorization, why string) wrongToken {
	return wrongToken{name, http.Header{"Authorization": {authorization}}, "", failure{
		Status: 401,
		Header: challenge(`Bearer realm="energy-contracts", error="invalid_token", error_description="The token is ` + why + `"`),
		Detail: "The token is " + why + "; POST /oauth2/token/ issues another.",
	}}
}

// notSent returns a wrongToken that is not in the Authorization field.
func notSent(name string, sent http.Header, query string) wrongToken {
	return wrongToken{name, sent, query, failure{
		Status: 401, Header: challenge(`Bearer realm="energy-contracts"`),
		Detail: "Send a token as Authorization: Bearer …; POST /oauth2/token/ issues one.",
	}}
}

func TestEveryRouteRefusesEveryWrongToken(t *testing.T) {
	a, err := newAPI(nil, time.Now, slog.New(slog.DiscardHandler), apiSettings{builtInTokens: true})
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, "--demo")
	expired := token(t, s.url, "demo", "demo-secret")
	s.clock.move(tokenLifetime + time.Second)
	good := token(t, s.url, "demo", "demo-secret")
	revoked := token(t, s.url, "demo", "demo-secret")
	form := http.Header{"Authorization": {"Basic ZGVtbzpkZW1vLXNlY3JldA=="}, "Content-Type": {"application/x-www-form-urlencoded"}}
	if resp, got := do(t, http.DefaultClient, "POST", s.url+"/oauth2/revoke_token/", form, "token="+revoked); resp.StatusCode != 200 || got != "" {
		t.Fatalf("revoke: %s\n%s", resp.Status, got)
	}
	scoped := map[string]string{"read": token(t, s.url, "demo", "demo-secret", "read"), "write": token(t, s.url, "demo", "demo-secret", "write")}
	contracts := contractsURL(s.url, demoOrg, demoUser)
	bearer := func(text string) http.Header { return http.Header{"Authorization": {"Bearer " + text}} }
	_, before := do(t, http.DefaultClient, "GET", contracts, bearer(good), "")

	wrong := []wrongToken{
		notSent("none", nil, ""),
		notSent("in the query", nil, "?access_token="+good),
		notSent("in a cookie", http.Header{"Cookie": {"access_token=" + good}}, ""),
		notSent("of another scheme", http.Header{"Authorization": {"Token " + good}}, ""),
		notSent("as Basic", http.Header{"Authorization": {"Basic ZGVtbzpkZW1vLXNlY3JldA=="}}, ""),
		notSent("without a scheme", http.Header{"Authorization": {good}}, ""),
		refused("empty", "Bearer", "malformed"),
		refused("malformed", "Bearer "+good+" "+good, "malformed"),
		refused("a client's secret", "Bearer demo-secret", "unknown or revoked"),
		refused("unknown", "Bearer "+strings.Repeat("0", 43), "unknown or revoked"),
		refused("changed in one place", "Bearer "+changedAt(good, 20), "unknown or revoked"),
		refused("a JWT, with no issuer of any", "Bearer a.b.c", "unknown or revoked"),
		refused("expired", "Bearer "+expired, "expired"),
		refused("revoked", "Bearer "+revoked, "unknown or revoked"),
		refused("of a removed client", "Bearer "+tokenOfRemovedClient(t, s), "unknown or revoked"),
		{"of another organization", bearer(token(t, s.url, "demo-other", "demo-other-secret")), "", failure{
			Status: 403, Detail: "The token does not belong to the organization in the path.",
		}},
		{"in two header fields", http.Header{"Authorization": {"Bearer " + good, "Bearer " + good}}, "", failure{
			Status: 400, Detail: "The request cannot be parsed; see errors.",
			Errors: `,"errors":[{"parameter":"Authorization","detail":"appears 2 times; send it once"}]`,
		}},
	}
	var public []string
	for _, r := range a.routes {
		name := r.method + " " + r.pattern
		if r.public {
			public = append(public, name)
			continue
		}
		need, has := "write", "read"
		if r.method == http.MethodGet || r.method == http.MethodHead {
			need, has = "read", "write"
		}
		tooLittle := wrongToken{"of too little scope", bearer(scoped[has]), "", failure{
			Status: 403, Header: challenge(fmt.Sprintf(`Bearer realm="energy-contracts", error="insufficient_scope", scope=%q`, need)),
			Detail: fmt.Sprintf("The token has the scope %q, but this request needs %q.", has, need),
		}}
		path := strings.NewReplacer(":org_id", demoOrg, ":user_id", demoUser, ":energy_contract_id", demoContract).Replace(r.pattern)
		if strings.ContainsAny(path, ":*") {
			t.Fatalf("%s: say what stands for the names in it", name)
		}
		for _, w := range append(wrong, tooLittle) {
			t.Run(name+"/"+w.name, func(t *testing.T) {
				resp, got := do(t, http.DefaultClient, r.method, s.url+path+w.query, w.sent, "")
				w.answer.Want(t, resp, got)
			})
		}
	}
	slices.Sort(public)
	if want := slices.Sorted(slices.Values(publicRoutes)); !slices.Equal(public, want) {
		t.Errorf("routes without a token:\n%q\nwant\n%q", public, want)
	}
	if _, after := do(t, http.DefaultClient, "GET", contracts, bearer(good), ""); after != before {
		t.Errorf("a refused request changed\n%s\nto\n%s", before, after)
	}
}

const someToken = "0123456789012345678901234567890123456789012"

// bearerCheck returns a function that checks someToken, which is in the token cache.
func bearerCheck(t testing.TB) (*Store, func()) {
	t.Helper()
	s, _, _ := tokenStore(t, someToken)
	a, err := newAPI(s, time.Now, slog.New(slog.DiscardHandler), apiSettings{builtInTokens: true})
	if err != nil {
		t.Fatal(err)
	}
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.Header.Set("Authorization", "Bearer "+someToken)
	check := func() {
		if _, err := a.bearer(r); err != nil {
			t.Fatal(err)
		}
	}
	check() // reads it from the file
	return s, check
}

func TestBearerCheckTakesNoTransactionAndAllocatesNothingButTheHash(t *testing.T) {
	s, check := bearerCheck(t)
	before := s.db.Stats().TxN
	allocations, ofHash := testing.AllocsPerRun(100, check), testing.AllocsPerRun(100, func() { hashOf(someToken) })
	if n := s.db.Stats().TxN - before; n != 0 || allocations != ofHash {
		t.Errorf("%d transactions; %v allocations, the hash has %v", n, allocations, ofHash)
	}
}

// changedAt returns text with another letter at one position.
func changedAt(text string, i int) string {
	b := []byte(text)
	if b[i] == 'A' {
		b[i] = 'B'
	} else {
		b[i] = 'A'
	}
	return string(b)
}

// tokenOfRemovedClient adds a client, uses a token of it, removes the client and returns the
// token.
func tokenOfRemovedClient(t *testing.T, s *service) string {
	t.Helper()
	c, err := dialControl(s.db)
	if err != nil {
		t.Fatal(err)
	}
	var made credentials
	if err := c.call(t.Context(), controlRequest{method: "POST", path: "/clients", in: addClientRequest{demoOrg, "read write"}, out: &made}); err != nil {
		t.Fatal(err)
	}
	text := token(t, s.url, made.ID, made.Secret)
	header := http.Header{"Authorization": {"Bearer " + text}}
	if resp, got := do(t, http.DefaultClient, "GET", contractsURL(s.url, demoOrg, demoUser), header, ""); resp.StatusCode != 200 {
		t.Fatalf("before the client is removed: %s\n%s", resp.Status, got)
	}
	if err := c.call(t.Context(), controlRequest{method: "DELETE", path: clientPath(made.ID)}); err != nil {
		t.Fatal(err)
	}
	return text
}

// BenchmarkBearerCheck compares the check of a cached token with the hash that it needs.
func BenchmarkBearerCheck(b *testing.B) {
	s, check := bearerCheck(b)
	b.Run("hash", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			hashOf(someToken)
		}
	})
	b.Run("check", func(b *testing.B) {
		b.ReportAllocs()
		before := s.db.Stats().TxN
		for b.Loop() {
			check()
		}
		b.ReportMetric(float64(s.db.Stats().TxN-before)/float64(b.N), "transactions/op")
	})
}

// FuzzAuthorization checks that of all values of the field only the right token may read,
// and only the right id and secret authenticate the client.
func FuzzAuthorization(f *testing.F) {
	heads, _ := storyRequests(f)
	for _, head := range heads {
		if _, value, ok := strings.Cut(head, "Authorization: "); ok {
			value, _, _ = strings.Cut(value, "\n")
			f.Add(value)
		}
	}
	const good = "0123456789-ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcde"
	f.Add("Bearer " + good)
	a := fuzzAPI(f)
	token := Token{Client: "demo", Org: demoOrg, Scopes: Scopes{Read: true}, Expires: time.Now().Add(time.Hour)}
	clients, err := a.store.Clients()
	if err != nil {
		f.Fatal(err)
	}
	token.ClientCreated = clients[slices.IndexFunc(clients, func(c Client) bool { return c.ID == "demo" })].Created
	if err := a.store.AddToken(hashOf(good), token); err != nil {
		f.Fatal(err)
	}
	bearer := regexp.MustCompile(`(?i)^bearer +` + good + ` *$`)
	basic := regexp.MustCompile(`(?i)^basic +(.*)$`)
	f.Fuzz(func(t *testing.T, field string) {
		isClient := false
		if m := basic.FindStringSubmatch(field); m != nil {
			pair, err := base64.StdEncoding.DecodeString(m[1])
			id, secret, _ := strings.Cut(string(pair), ":")
			id, err1 := url.QueryUnescape(id)
			secret, err2 := url.QueryUnescape(secret)
			isClient = errors.Join(err, err1, err2) == nil && id == "demo" && secret == "demo-secret"
		}
		for _, tt := range []struct {
			method, path, body, challenge string
			good                          bool
		}{
			{"GET", contractsURL("", demoOrg, demoUser) + "/" + demoContract, "", "Bearer ", bearer.MatchString(field)},
			{"POST", revocationPath, "token=none", "Basic ", isClient},
		} {
			r := httptest.NewRequest(tt.method, tt.path, strings.NewReader(tt.body))
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			r.Header["Authorization"] = []string{field}
			w := httptest.NewRecorder()
			a.ServeHTTP(w, r)
			challenged := strings.HasPrefix(w.Header().Get("WWW-Authenticate"), tt.challenge)
			if tt.good != (w.Code == 200) || !tt.good && w.Code != 400 && (w.Code != 401 || !challenged) {
				t.Fatalf("%s: %d %v\n%s\nwant it good: %v", tt.path, w.Code, w.Header(), w.Body, tt.good)
			}
			if strings.Contains(w.Body.String(), good) {
				t.Fatalf("the answer has the token\n%s", w.Body)
			}
		}
	})
}
