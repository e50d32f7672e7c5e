package main

// The login throttle: how often a client may fail to authenticate from an address, and that
// a refusal does not reveal which clients exist.

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"testing"
	"time"
)

// refusedClient is the response to a wrong id or secret.
var refusedClient = failure{
	Status: 401, Code: "invalid_client", Detail: "the client is unknown, or its secret is wrong",
	Header: http.Header{"Www-Authenticate": {`Basic realm="energy-contracts", charset="UTF-8"`}},
}

// limitedClient is the response after too many failed logins.
func limitedClient(seconds string) failure {
	return failure{
		Status: 429, Code: "temporarily_unavailable", Header: http.Header{"Retry-After": {seconds}},
		Detail: "this client failed to authenticate from this address too often; try again in " + seconds + " seconds",
	}
}

// The limits that docs/operating.md documents.
const (
	freeFailures = 10
	freeAgain    = 6 * time.Second
)

// throttled is a service with two clients and a stopped clock, so that the test decides when
// a client may fail once more.
type throttled struct {
	*service
	known, other credentials
}

func startThrottled(t testing.TB) *throttled {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("only Linux has all of 127.0.0.0/8 without being told to")
	}
	s := &throttled{service: startOn(t, shortPath(t))}
	s.clock.stop(time.Now())
	c, err := dialControl(s.db)
	if err != nil {
		t.Fatal(err)
	}
	for _, into := range []*credentials{&s.known, &s.other} {
		if err := c.call(t.Context(), controlRequest{method: "POST", path: "/clients", in: addClientRequest{demoOrg, "read write"}, out: into}); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// way is one way in which a client can authenticate.
type way struct {
	name, path string
	request    func(id, secret string) (header, body string)
}

func formBody(id, secret, more string) string {
	return url.Values{"client_id": {id}, "client_secret": {secret}}.Encode() + "&" + more
}

func basicHeader(id, secret string) string {
	r := http.Request{Header: http.Header{}}
	r.SetBasicAuth(url.QueryEscape(id), url.QueryEscape(secret))
	return "Content-Type: application/x-www-form-urlencoded\r\nAuthorization: " + r.Header.Get("Authorization") + "\r\n"
}

var ways = []way{
	{"a token, by a form", "/oauth2/token/", func(id, secret string) (string, string) {
		return "Content-Type: application/x-www-form-urlencoded\r\n", formBody(id, secret, "grant_type=client_credentials")
	}},
	{"a token, by Basic", "/oauth2/token", func(id, secret string) (string, string) {
		return basicHeader(id, secret), "grant_type=client_credentials"
	}},
	{"a token, by JSON", "/oauth2/token/", func(id, secret string) (string, string) {
		return "Content-Type: application/json\r\n", fmt.Sprintf(`{"client_id":%q,"client_secret":%q,"grant_type":"client_credentials"}`, id, secret)
	}},
	{"a revocation, by a form", "/oauth2/revoke_token/", func(id, secret string) (string, string) {
		return "Content-Type: application/x-www-form-urlencoded\r\n", formBody(id, secret, "token=none")
	}},
	{"a revocation, by Basic", "/oauth2/revoke_token", func(id, secret string) (string, string) {
		return basicHeader(id, secret), "token=none"
	}},
}

// raw sends a POST from an address and returns the response byte for byte.
func (s *throttled) raw(t testing.TB, from, path, header, body string) string {
	t.Helper()
	dialer := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(from)}}
	conn, err := dialer.DialContext(context.Background(), "tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	sent := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%sContent-Length: %d\r\n\r\n%s", path, header, len(body), body)
	if _, err := io.WriteString(conn, sent); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := described().Read(t, bytes.NewReader(b), sent); err != nil {
		t.Error(err)
	}
	return string(b)
}

func (s *throttled) attempt(t testing.TB, w way, from string, c credentials) string {
	t.Helper()
	header, body := w.request(c.ID, c.Secret)
	return s.raw(t, from, w.path, header, body)
}

// wantIn fails the test unless the client authenticates.
func (s *throttled) wantIn(t testing.TB, w way, from string, c credentials) {
	t.Helper()
	if got := s.attempt(t, w, from, c); !strings.HasPrefix(got, "HTTP/1.1 200 OK\r\n") {
		t.Errorf("right secret from %s: %s", from, got)
	}
}

// wantRefused fails the test unless the whole response is refusedClient.
func (s *throttled) wantRefused(t testing.TB, w way, from string, c credentials) {
	t.Helper()
	wantFailure(t, s.attempt(t, w, from, c), refusedClient)
}

// wantLimited fails the test unless the whole response is limitedClient.
func (s *throttled) wantLimited(t testing.TB, w way, from string, c credentials, seconds string) {
	t.Helper()
	wantFailure(t, s.attempt(t, w, from, c), limitedClient(seconds))
}

// wantFailure fails the test unless a response, given as text, is the failure.
func wantFailure(t testing.TB, answer string, f failure) {
	t.Helper()
	resp, err := http.ReadResponse(bufio.NewReader(strings.NewReader(answer)), &http.Request{Method: http.MethodPost})
	if err != nil {
		t.Fatalf("%v\n%s", err, answer)
	}
	defer resp.Body.Close()
	got, _ := io.ReadAll(resp.Body)
	f.Want(t, resp, string(got))
}

func wrong(c credentials) credentials { return credentials{c.ID, "wrong"} }

// address returns a loopback address.
func address(n int) string { return fmt.Sprintf("127.0.0.%d", n) }

func TestFailedLoginsAreLimitedByClientAndAddress(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			s := startThrottled(t)
			here, elsewhere := address(1), address(2)
			for range freeFailures {
				s.wantRefused(t, w, here, wrong(s.known))
			}
			for range 3 { // which are not counted, else there would be no end
				s.wantLimited(t, w, here, wrong(s.known), "6")
			}
			for _, other := range ways {
				s.wantLimited(t, other, here, s.known, "6") // the right secret too
				s.wantIn(t, other, here, s.other)
			}
			s.wantIn(t, w, elsewhere, s.known)
			s.wantIn(t, w, elsewhere, s.other)
			s.wantLimited(t, w, here, s.known, "6") // whatever happens elsewhere
			s.clock.move(freeAgain - time.Nanosecond)
			s.wantLimited(t, w, here, s.known, "1")
			s.clock.move(time.Nanosecond)
			s.wantIn(t, w, here, s.known)
		})
	}
}

func TestFailedLoginIsAllowedAgainAfterTheWait(t *testing.T) {
	s := startThrottled(t)
	w, here := ways[0], address(1)
	for range freeFailures {
		s.wantRefused(t, w, here, wrong(s.known))
	}
	for range 3 {
		s.wantLimited(t, w, here, wrong(s.known), "6")
		s.clock.move(freeAgain / 2)
		s.wantLimited(t, w, here, wrong(s.known), "3")
		s.clock.move(freeAgain / 2)
		s.wantRefused(t, w, here, wrong(s.known))
	}
	s.clock.move(1000 * freeAgain) // no more than ten, however long it was
	for range freeFailures {
		s.wantRefused(t, w, here, wrong(s.known))
	}
	s.wantLimited(t, w, here, wrong(s.known), "6")
}

// Behind a proxy, a NAT or a container bridge all clients come from one address.
func TestClientThatFailsMakesNoOtherClientOfItsAddressWait(t *testing.T) {
	s := startThrottled(t)
	w, proxy := ways[0], address(1)
	for range freeFailures {
		s.wantRefused(t, w, proxy, wrong(s.other))
	}
	for range 3 {
		s.wantLimited(t, w, proxy, wrong(s.other), "6")
	}
	for i := range 2 * freeFailures {
		s.wantRefused(t, w, proxy, credentials{fmt.Sprint("somebody", i), "wrong"})
		s.wantIn(t, w, proxy, s.known)
	}
	s.wantRefused(t, w, proxy, wrong(s.known)) // it has all its own failures before it
	s.wantLimited(t, w, proxy, s.other, "6")
}

// Otherwise a client could try secrets without end, with a right one in between.
func TestClientThatIsRightInBetweenHasFailedAllTheSame(t *testing.T) {
	s := startThrottled(t)
	w, here := ways[0], address(1)
	for range freeFailures {
		s.wantIn(t, w, here, s.known)
		s.wantRefused(t, w, here, wrong(s.known))
	}
	s.wantLimited(t, w, here, s.known, "6")
}

// Otherwise anybody who knows the id of a client could lock it out.
func TestFailuresElsewhereMakeNoClientWait(t *testing.T) {
	s := startThrottled(t)
	w := ways[0]
	for i := range 3 * freeFailures {
		s.wantRefused(t, w, address(10+i), wrong(s.known))
	}
	for _, from := range []int{10, 10 + 3*freeFailures - 1, 50} {
		s.wantIn(t, w, address(from), s.known)
	}
}

var perRequest = regexp.MustCompile(`(?m)^(X-Request-Id|Date): .*$`)

// Two services differ only in whether the client exists.
func TestRefusalDoesNotRevealWhichClientsExist(t *testing.T) {
	const id = "0b6e5a9c-7d43-4c1e-9d55-2f1b1d3c7a10"
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			with, without := startThrottled(t), startThrottled(t)
			at := time.Now()
			with.clock.stop(at)
			without.clock.stop(at)
			known, unknown := wrong(with.known), credentials{id, "wrong"}
			seen := map[string]int{}
			step := func(name, from string) {
				t.Helper()
				one := perRequest.ReplaceAllString(with.attempt(t, w, from, known), "$1: -")
				other := perRequest.ReplaceAllString(without.attempt(t, w, from, unknown), "$1: -")
				if one != other {
					t.Errorf("%s: a known client is told\n%s\nan unknown one\n%s", name, one, other)
				}
				seen[strings.Fields(one)[1]]++
			}
			move := func(d time.Duration) { with.clock.move(d); without.clock.move(d) }
			for i := range freeFailures + 2 {
				step(fmt.Sprint("failed login ", i), address(1))
			}
			for _, d := range []time.Duration{time.Second, 2500 * time.Millisecond, freeAgain, 30 * time.Second} {
				move(d)
				for range 3 {
					step("after "+d.String(), address(1))
				}
			}
			for i := range freeFailures + 2 {
				step("from many addresses", address(10+i))
			}
			move(time.Hour)
			step("an hour later", address(1))
			if len(seen) != 2 || seen["401"] == 0 || seen["429"] == 0 {
				t.Errorf("statuses: %v", seen)
			}
		})
	}
}

func TestRequestWithoutCredentialsIsNoFailedLogin(t *testing.T) {
	s := startThrottled(t)
	here := address(1)
	const form = "Content-Type: application/x-www-form-urlencoded\r\n"
	basic, _ := ways[1].request(s.known.ID, "wrong")
	for _, tt := range []struct {
		name, header, body string
		status             int
	}{
		{"nothing", "", "", 401},
		{"no secret", form, "grant_type=client_credentials&client_id=" + s.known.ID, 401},
		{"no id", form, "grant_type=client_credentials&client_secret=wrong", 401},
		{"an empty secret", form, "grant_type=client_credentials&client_secret=&client_id=" + s.known.ID, 401},
		{"another scheme", form + "Authorization: Bearer wrong\r\n", "", 401},
		{"Basic that is not base64", form + "Authorization: Basic !\r\n", "", 401},
		{"Basic without a colon", form + "Authorization: Basic d3Jvbmc=\r\n", "", 401},
		{"Basic with half of a percent-encoding", form + "Authorization: Basic JTo=\r\n", "", 400},
		{"two places that differ", basic, formBody(s.known.ID, "another", ""), 400},
		{"two Authorization fields", basic + "Authorization: Basic eDp5\r\n", "", 400},
		{"a parameter twice", form, formBody(s.known.ID, "wrong", "client_id=x"), 400},
		{"JSON that is broken", "Content-Type: application/json\r\n", `{"client_id":"` + s.known.ID + `","client_secret":"wrong"`, 400},
		// The credentials are right, but the request is refused for another reason.
		{"no grant type", form, formBody(s.known.ID, s.known.Secret, ""), 400},
		{"another grant type", form, formBody(s.known.ID, s.known.Secret, "grant_type=password"), 400},
		{"another scope", form, formBody(s.known.ID, s.known.Secret, "grant_type=client_credentials&scope=admin"), 400},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for range freeFailures + 1 {
				if got := s.raw(t, here, "/oauth2/token/", tt.header, tt.body); !strings.HasPrefix(got, fmt.Sprintf("HTTP/1.1 %d ", tt.status)) {
					t.Fatalf("want %d\n%s", tt.status, got)
				}
			}
		})
	}
	for range freeFailures {
		s.wantRefused(t, ways[0], here, wrong(s.known))
	}
	s.wantLimited(t, ways[0], here, wrong(s.known), "6")
}

func TestAddressesOfOneNetworkAreOneSource(t *testing.T) {
	for _, tt := range []struct {
		name, one, other string
		same             bool
	}{
		{"two ports", "192.0.2.1:1", "192.0.2.1:2", true},
		{"IPv4, and as IPv6", "192.0.2.1:1", "[::ffff:192.0.2.1]:1", true},
		{"two of IPv4", "192.0.2.1:1", "192.0.2.2:1", false},
		{"two of IPv4 as IPv6", "[::ffff:192.0.2.1]:1", "[::ffff:192.0.2.2]:1", false},
		{"one /64", "[2001:db8:0:1::1]:1", "[2001:db8:0:1:ffff:ffff:ffff:ffff]:1", true},
		{"two /64", "[2001:db8:0:1::1]:1", "[2001:db8:0:2::1]:1", false},
		{"two zones of one link", "[fe80::1%eth0]:1", "[fe80::2%eth1]:1", true},
		{"loopbacks", "127.0.0.1:1", "[::1]:1", false},
		{"none at all", "", "@", true},
		{"none and one", "", "0.0.0.0:1", false},
		{"none and one of IPv6", "", "[::]:1", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			one, other := addressOf(&http.Request{RemoteAddr: tt.one}), addressOf(&http.Request{RemoteAddr: tt.other})
			throttle, now := newLoginThrottle(), time.Now()
			for i := range freeFailures {
				if wait := throttle.failed("a", one, now); wait != 0 {
					t.Fatalf("failure %d: wait %s", i, wait)
				}
			}
			if wait := throttle.failed("a", one, now); wait != freeAgain {
				t.Errorf("one too many: wait %s", wait)
			}
			if wait := throttle.wait("a", other, now); (wait > 0) != tt.same {
				t.Errorf("the other waits %s", wait)
			}
			if wait := throttle.wait("b", one, now); wait != 0 {
				t.Errorf("another client waits %s", wait)
			}
		})
	}
}

func TestFailuresAreForgottenSoonerThanMemoryRunsOut(t *testing.T) {
	slow(t)
	throttle, now := newLoginThrottle(), time.Now()
	n := 1_000_000
	if raceEnabled() { // which is slow, and finds nothing here in more of them
		n = 3 * maxLoginSources
	}
	for i := range n {
		ip := netip.AddrFrom4([4]byte{byte(i >> 24), byte(i >> 16), byte(i >> 8), byte(i)})
		id := fmt.Sprint(i)
		if wait := throttle.failed(id, ip, now); wait != 0 {
			t.Fatalf("first failure of %s from %s: wait %s", id, ip, wait)
		}
		if remembered := throttle.failures.Len(); remembered > maxLoginSources {
			t.Fatalf("%d sources are remembered after %d failures", remembered, i+1)
		}
	}
	if remembered := throttle.failures.Len(); remembered != maxLoginSources {
		t.Errorf("%d sources are remembered, want %d", remembered, maxLoginSources)
	}
}

// A source that keeps failing is not forgotten in favor of sources that fail once each.
func TestSourceThatKeepsFailingIsNotForgotten(t *testing.T) {
	throttle, now := newLoginThrottle(), time.Now()
	source := netip.MustParseAddr("192.0.2.1")
	for i := range 3 * maxLoginSources {
		throttle.failed(fmt.Sprint(i), netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), now)
		if i%1000 == 0 {
			throttle.failed("a", source, now)
		}
	}
	if wait := throttle.wait("a", source, now); wait != freeAgain {
		t.Errorf("wait %s", wait)
	}
}

// raceEnabled reports whether the test is built with -race, which drops elements of a
// sync.Pool at random.
func raceEnabled() bool {
	info, ok := debug.ReadBuildInfo()
	return ok && slices.Contains(info.Settings, debug.BuildSetting{Key: "-race", Value: "true"})
}

// rotated is the id of a client with a longer record: it was used and rotated.
const rotated = "wrong-secret of one that was used and rotated"

// refusals returns requests that are refused for different reasons and must cost the same.
// The clock moves with each request, so that none of them is throttled.
func refusals(t testing.TB) (a *api, ids map[string]oauthRequest) {
	t.Helper()
	s, _ := openStore(t, newPath(t))
	now := time.Now()
	a, err := newAPI(s, func() time.Time { now = now.Add(freeAgain); return now }, slog.New(slog.DiscardHandler), apiSettings{builtInTokens: true, tokenLifetime: tokenLifetime})
	if err != nil {
		t.Fatal(err)
	}
	secret := "wrong-wrong-wrong-wrong-wrong-wrong-wrong-w"
	ids = make(map[string]oauthRequest)
	for i, name := range []string{"unknown", "wrong-secret", rotated} {
		id := fmt.Sprintf("0b6e5a9c-7d43-4c1e-9d55-%012d", i) // all of one length
		ids[name] = oauthRequest{ClientID: id, ClientSecret: secret}
		if name == "unknown" {
			continue
		}
		c := Client{ID: id, Org: demoOrg, Scopes: Scopes{true, true}, Secret: hashOf(id), Created: now}
		if i == 2 {
			c.Previous, c.PreviousUntil, c.LastUsed = hashOf("previous"), now.Add(time.Hour), now
		}
		if err := s.AddClient(c); err != nil {
			t.Fatal(err)
		}
	}
	return a, ids
}

// refuse sends a request that the authentication must refuse.
func refuse(t testing.TB, a *api, x *exchange, req oauthRequest) {
	var refused *oauthError
	if _, err := a.authenticate(x, req); !errors.As(err, &refused) || refused.status != 401 {
		t.Fatalf("got %v", err)
	}
}

func TestRefusedClientAllocatesTheSameKnownOrNot(t *testing.T) {
	if raceEnabled() {
		t.Skip("with -race what is in a pool is chance")
	}
	a, ids := refusals(t)
	x := &exchange{r: httptest.NewRequest(http.MethodPost, tokenPath, nil)}
	got := map[string]float64{}
	for name, req := range ids {
		refuse(t, a, x, req) // its entries in the lists
		got[name] = testing.AllocsPerRun(1000, func() { refuse(t, a, x, req) })
	}
	for name, n := range got {
		if n != got["unknown"] {
			t.Errorf("%s: %v allocations; unknown: %v", name, n, got["unknown"])
		}
	}
}

// BenchmarkRefusedClient measures the refusal of an unknown client and of a wrong secret.
// The ratio of the two counts: 1 means that the time does not reveal which clients exist.
func BenchmarkRefusedClient(b *testing.B) {
	a, ids := refusals(b)
	x := &exchange{r: httptest.NewRequest(http.MethodPost, tokenPath, nil)}
	for _, name := range []string{"unknown", "wrong-secret", rotated} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				refuse(b, a, x, ids[name])
			}
		})
	}
	// The two alternate, so that other load on the machine affects both. The median of the
	// pairs ignores a garbage collection in one of them.
	for _, name := range []string{"wrong-secret", rotated} {
		b.Run("interleaved with "+name, func(b *testing.B) {
			const batch = 64
			timed := func(req oauthRequest) float64 {
				began := time.Now()
				for range batch {
					refuse(b, a, x, req)
				}
				return float64(time.Since(began))
			}
			var ratios []float64
			for b.Loop() {
				if len(ratios)%2 == 0 { // neither is always the first
					ratios = append(ratios, timed(ids[name])/timed(ids["unknown"]))
				} else {
					ratios = append(ratios, 1/(timed(ids["unknown"])/timed(ids[name])))
				}
			}
			slices.Sort(ratios)
			b.ReportMetric(ratios[len(ratios)/2], "known/unknown")
		})
	}
}
