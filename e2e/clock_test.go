package e2e

// These tests check the expiry of tokens, secrets and idempotency keys while the wall clock is set
// forward and back by an hour. The service runs in another process; its program is built with
// one line of main.go changed and with the file of testdata/clock added.

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

// movedProgram builds, on its first call, the program with a clock that jumps.
var movedProgram = sync.OnceValues(func() (string, error) {
	const line = "now:       time.Now,"
	source, err := os.ReadFile(servicetest.InModule("main.go"))
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(source), line); n != 1 {
		return "", fmt.Errorf("main.go has the line %q %d times, want once", line, n)
	}
	changed := filepath.Join(servicetest.BuildDir(), "main.go")
	edited := strings.Replace(string(source), line, "now: movedClock,", 1) + "\nvar _ time.Time // main.go may use the package nowhere else\n"
	if err := os.WriteFile(changed, []byte(edited), 0o600); err != nil {
		return "", err
	}
	return buildWith("moved-clock", map[string]string{"main.go": changed, "movedclock.go": "testdata/clock/clock.go"})
})

// The lifetimes and limits that the README documents.
const (
	tokenLifetime       = 10 * time.Hour // the default of --token-lifetime
	idempotencyLifetime = 24 * time.Hour
	expiredKept         = time.Hour       // minimum time for which a token is reported as expired
	freeLogins          = 10              // failed logins of a client before the limit applies
	freeLoginInterval   = 6 * time.Second // time after which one more is allowed
)

// moved is the service in a process whose clock the test sets.
type moved struct {
	*process
	db    string
	args  []string
	file  string        // path of the file with the duration by which the clock is ahead
	ahead time.Duration // relative to the clock of the test process
	text  string        // text of a token that was issued since the clock was set, or ""

	document string // current document of demoContract
}

// startMoved runs "serve --demo" until the test ends, with a clock that is right at first.
func startMoved(t testing.TB, args ...string) *moved {
	t.Helper()
	db := shortPath(t)
	m := &moved{db: db, args: append([]string{"--demo", "--db", db}, args...), file: filepath.Join(t.TempDir(), "clock")}
	m.set(t, 0)
	m.start(t)
	_, m.document = m.get(t, m.fresh(t))
	return m
}

func (m *moved) start(t testing.TB) {
	t.Helper()
	path, err := movedProgram()
	if err != nil {
		t.Fatal(err)
	}
	// The wrapper drops the path of the ordinary program and runs the one with the moved clock.
	wrapper := []string{"env", "MOVED_CLOCK=" + m.file, "sh", "-c", `shift; exec "$0" "$@"`, path}
	m.process = startProcess(t, wrapper, m.args...)
}

func (m *moved) restart(t testing.TB) {
	t.Helper()
	if err := m.Terminate(t); err != nil {
		t.Fatalf("after SIGTERM: %v\n%s", err, m.Stderr)
	}
	m.start(t)
}

// set sets the clock ahead of that of the test process.
func (m *moved) set(t testing.TB, ahead time.Duration) {
	t.Helper()
	m.ahead, m.text = ahead, ""
	newFile := m.file + ".new"
	writeTo(t, newFile, []byte(ahead.String()))
	if err := os.Rename(newFile, m.file); err != nil {
		t.Fatal(err)
	}
}

func (m *moved) contracts() string { return contractsURL(m.URL, demoOrg, demoUser) }

// fresh returns a token that was issued since the clock was set.
func (m *moved) fresh(t testing.TB) string {
	t.Helper()
	if m.text == "" {
		m.text = token(t, m.URL, "demo", "demo-secret")
	}
	return m.text
}

// commit replaces a contract that the tests do not check, since each commit also removes expired
// values from the file.
func (m *moved) commit(t testing.TB) {
	t.Helper()
	resp, got := do(t, http.DefaultClient, "PUT", m.contracts()+"/"+demoOtherContract, with(jsonBody, "Authorization", "Bearer "+m.fresh(t)), "{}")
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("PUT: %s\n%s", resp.Status, got)
	}
}

// get gets demoContract with a token.
func (m *moved) get(t testing.TB, text string) (*http.Response, string) {
	t.Helper()
	return do(t, http.DefaultClient, "GET", m.contracts()+"/"+demoContract, http.Header{"Authorization": {"Bearer " + text}}, "")
}

// wantToken uses a token twice, since it is cached the second time. The reason is that of the
// expected refusal, or "" if the token must be valid. The name describes the token.
func (m *moved) wantToken(t testing.TB, name, text, reason string) {
	t.Helper()
	for range 2 {
		resp, got := m.get(t, text)
		switch {
		case reason == "" && (resp.StatusCode != http.StatusOK || got != m.document):
			t.Errorf("%s, with the clock %v ahead: %s, want 200\n%s\nwant\n%s", name, m.ahead, resp.Status, got, m.document)
		case reason != "" && !strings.Contains(got, reason):
			t.Errorf("%s, with the clock %v ahead: %s, want the token to be %s\n%s", name, m.ahead, resp.Status, reason, got)
		case reason != "":
			refusedToken(reason).Want(t, resp, got)
		}
	}
}

// refusedToken is the response to a token that is not valid.
func refusedToken(reason string) failure {
	return failure{
		Status: 401, Detail: "The token is " + reason + "; POST /oauth2/token/ issues another.",
		Header: http.Header{"Www-Authenticate": {`Bearer realm="energy-contracts", error="invalid_token", error_description="The token is ` + reason + `"`}},
	}
}

// refusedClient is the response to a wrong client id or secret.
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

// wantSecret requests a token. The test fails if works is true and the service issues none, or if
// works is false and the response is not refusedClient.
func wantSecret(t testing.TB, url string, c credentials, works bool) {
	t.Helper()
	form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
	resp, got := do(t, http.DefaultClient, "POST", url+"/oauth2/token/", form,
		"grant_type=client_credentials&client_id="+c.ID+"&client_secret="+c.Secret)
	switch {
	case !works:
		refusedClient.Want(t, resp, got)
	case resp.StatusCode != http.StatusOK:
		t.Errorf("secret of %s: %s, want it to work\n%s", c.ID, resp.Status, got)
	}
}

func TestTokenExpiresByAClockThatJumps(t *testing.T) {
	long(t)
	t.Parallel()
	for _, lifetime := range []time.Duration{30 * time.Minute, tokenLifetime} {
		for name, between := range map[string]func(*moved, testing.TB){"": (*moved).commit, ", over restarts": (*moved).restart} {
			t.Run(fmt.Sprintf("for %v%s", lifetime, name), func(t *testing.T) {
				t.Parallel()
				m := startMoved(t, "--token-lifetime", lifetime.String())
				form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}, "Authorization": {"Basic ZGVtbzpkZW1vLXNlY3JldA=="}}
				revoke := func(text string) {
					if resp, got := do(t, http.DefaultClient, "POST", m.URL+"/oauth2/revoke_token/", form, "token="+text); resp.StatusCode != http.StatusOK {
						t.Errorf("revoke: %s\n%s", resp.Status, got)
					}
				}
				var issuedAt []time.Duration
				var issued, revoked []string
				for _, ahead := range []time.Duration{0, time.Hour, 0, -time.Hour, 0} {
					m.set(t, ahead)
					issuedAt = append(issuedAt, ahead)
					issued = append(issued, token(t, m.URL, "demo", "demo-secret"))
					revoked = append(revoked, token(t, m.URL, "demo", "demo-secret"))
					revoke(revoked[len(revoked)-1])
					between(m, t)
					for i, at := range issuedAt {
						name := fmt.Sprintf("token %d, issued with the clock %v ahead", i, at)
						reason := "expired"
						if ahead < at+lifetime {
							reason = ""
						}
						m.wantToken(t, name, issued[i], reason)
						m.wantToken(t, name+" and revoked", revoked[i], "unknown or revoked")
					}
				}
			})
		}
	}
}

func TestOldSecretExpiresByAClockThatJumps(t *testing.T) {
	long(t)
	t.Parallel()
	for _, tt := range []struct {
		grace string
		valid map[time.Duration]bool // by the duration by which the clock is ahead
	}{
		{"30m", map[time.Duration]bool{-time.Hour: true, 0: true, time.Hour: false}},
		{"0s", map[time.Duration]bool{-time.Hour: false, 0: false, time.Hour: false}},
	} {
		t.Run(tt.grace, func(t *testing.T) {
			t.Parallel()
			m := startMoved(t)
			old := addClient(t, m.db)
			current := credentialsOf(t, m.db, "client", "rotate", "--grace", tt.grace, old.ID)
			if current.ID != old.ID {
				t.Fatalf("client rotate %s rotated %s", old.ID, current.ID)
			}
			for _, ahead := range []time.Duration{time.Hour, 0, -time.Hour, 0} {
				m.set(t, ahead)
				m.commit(t)
				wantSecret(t, m.URL, old, tt.valid[ahead])
				wantSecret(t, m.URL, current, true)
			}
		})
	}
}

// keyUser is a user of the demo organization whose contracts are all created with a key.
const keyUser = "00000000-0000-4000-8000-000000000007"

// usedKey is an idempotency key, the duration by which the clock is ahead at its end, and the
// first response to it.
type usedKey struct {
	key      string
	end      time.Duration
	response string
}

// post creates a contract of keyUser, once for each key, and returns the response.
func (m *moved) post(t testing.TB, key, body string) (*http.Response, string) {
	t.Helper()
	header := http.Header{
		"Content-Type": {"application/json"}, "Idempotency-Key": {`"` + key + `"`},
		"Authorization": {"Bearer " + m.fresh(t)},
	}
	return do(t, http.DefaultClient, "POST", contractsURL(m.URL, demoOrg, keyUser), header, body)
}

// list returns the list of the contracts of keyUser.
func (m *moved) list(t testing.TB) string {
	t.Helper()
	_, list := do(t, http.DefaultClient, "GET", contractsURL(m.URL, demoOrg, keyUser), http.Header{"Authorization": {"Bearer " + m.fresh(t)}}, "")
	return list
}

func TestIdempotencyKeyCreatesOneContractAlthoughTheClockJumps(t *testing.T) {
	long(t)
	t.Parallel()
	for name, between := range map[string]func(*moved, testing.TB){"commits": (*moved).commit, "restarts": (*moved).restart} {
		t.Run("over "+name, func(t *testing.T) {
			t.Parallel()
			m := startMoved(t)
			var made []usedKey
			// wantSame repeats the requests whose keys have not expired.
			wantSame := func() {
				t.Helper()
				for _, first := range made {
					if m.ahead >= first.end {
						continue
					}
					if resp, got := m.post(t, first.key, "{}"); resp.StatusCode != http.StatusOK || got != first.response {
						t.Errorf("key %s, with the clock %v ahead: %s\n%s\nwant the first response\n%s", first.key, m.ahead, resp.Status, got, first.response)
					}
				}
			}
			for i, ahead := range []time.Duration{0, time.Hour, 0, -time.Hour, 0} {
				m.set(t, ahead)
				key := fmt.Sprintf("%d, made with the clock %v ahead", i, ahead)
				resp, got := m.post(t, key, "{}")
				if resp.StatusCode != http.StatusOK {
					t.Fatalf("POST: %s\n%s", resp.Status, got)
				}
				made = append(made, usedKey{key, ahead + idempotencyLifetime, got})
				between(m, t)
				wantSame()
			}
			// Half an hour before each end, the clock is an hour ahead for a while, during which
			// no key is sent.
			for _, end := range []time.Duration{-time.Hour, 0, time.Hour} {
				before := end + idempotencyLifetime - 30*time.Minute
				m.set(t, before)
				wantSame()
				m.set(t, before+time.Hour)
				for range 10 { // each removes two expired values
					m.commit(t)
				}
				between(m, t)
				m.set(t, before)
				wantSame()
				resp, got := m.post(t, made[1].key, "{ }") // the key that ends last
				wantProblem(t, resp, got, http.StatusUnprocessableEntity)
			}
			if list := m.list(t); strings.Count(list, `"id"`) != len(made) {
				t.Errorf("want one contract for each of %d keys, got\n%s", len(made), list)
			}
			m.set(t, idempotencyLifetime+2*time.Hour)
			if resp, got := m.post(t, made[0].key, "{}"); resp.StatusCode != http.StatusOK || got == made[0].response {
				t.Errorf("key %s, with the clock %v ahead: %s\n%s\nwant another contract than the first", made[0].key, m.ahead, resp.Status, got)
			}
		})
	}
}

// TestLimitOfFailedLoginsHoldsAlthoughTheClockJumps checks that more failed logins are allowed as
// time passes, whatever the wall clock shows.
func TestLimitOfFailedLoginsHoldsAlthoughTheClockJumps(t *testing.T) {
	long(t)
	t.Parallel()
	m := startMoved(t)
	began, failed := time.Now(), 0
	for _, ahead := range []time.Duration{0, -time.Hour, 0, time.Hour, 0} {
		m.set(t, ahead)
		for {
			resp, got := do(t, http.DefaultClient, "POST", m.URL+"/oauth2/token/", http.Header{"Content-Type": {"application/x-www-form-urlencoded"}},
				"grant_type=client_credentials&client_id=demo&client_secret=wrong")
			if resp.StatusCode != http.StatusUnauthorized {
				seconds := resp.Header.Get("Retry-After")
				if n, err := strconv.Atoi(seconds); err != nil || n < 1 || n > int(freeLoginInterval/time.Second) {
					t.Errorf("with the clock %v ahead: Retry-After is %q", ahead, seconds)
				}
				limitedClient(seconds).Want(t, resp, got)
				break
			}
			refusedClient.Want(t, resp, got)
			failed++
			if most := freeLogins + int(time.Since(began)/freeLoginInterval); failed > most {
				t.Fatalf("with the clock %v ahead, %d failed logins were allowed, want at most %d", ahead, failed, most)
			}
		}
	}
	if failed < freeLogins {
		t.Errorf("%d failed logins were allowed, want at least %d", failed, freeLogins)
	}
}

func TestLastUseIsNotInTheFutureWhenTheClockIsSetBack(t *testing.T) {
	long(t)
	t.Parallel()
	m := startMoved(t)
	c := addClient(t, m.db)
	for _, ahead := range []time.Duration{time.Hour, 0, -time.Hour} {
		m.set(t, ahead)
		from := time.Now().Add(ahead).Truncate(time.Second)
		token(t, m.URL, c.ID, c.Secret)
		to := time.Now().Add(ahead)
		m.restart(t) // writes the last use to the file and drops it from memory
		list := ok(t, m.db, "client", "list")
		cells := strings.Fields(list) // the last row is that of the newest client
		if at, err := time.Parse(time.RFC3339, cells[len(cells)-1]); err != nil || at.Before(from) || at.After(to) {
			t.Errorf("with the clock %v ahead, used between %v and %v: client list says\n%s", ahead, from.UTC(), to.UTC(), list)
		}
	}
}

// span is an instant of which only the bounds are known, such as the time on the service's clock
// at which it handled a request.
type span struct{ from, to time.Time }

func (s span) String() string { return fmt.Sprintf("%v to %v", s.from, s.to) }

func (s span) add(d time.Duration) span { return span{s.from.Add(d), s.to.Add(d)} }

// expiring is a token or an idempotency key, with its end.
type expiring struct {
	text     string
	end      span
	response string // first response to a key
}

// jumping checks the responses of a service while its clock jumps.
type jumping struct {
	*moved
	random       *rand.Rand
	tokens, keys []*expiring
	contracts    int            // number of contracts created
	latest       time.Time      // latest time on the clock at the end of a request
	seen         map[string]int // number of responses, by kind
}

// upTo returns a random duration of less than d, in whole seconds.
func (j *jumping) upTo(d time.Duration) time.Duration {
	return time.Duration(j.random.Int64N(int64(d))).Truncate(time.Second)
}

// during calls do and returns when that was on the service's clock.
func (j *jumping) during(do func()) (at span) {
	at.from = time.Now().Add(j.ahead)
	do()
	at.to = time.Now().Add(j.ahead)
	if at.to.After(j.latest) {
		j.latest = at.to
	}
	return at
}

// one returns a random element of all: half of the time any, otherwise the one whose end is
// nearest.
func (j *jumping) one(all []*expiring) *expiring {
	if j.random.IntN(2) > 0 {
		return all[j.random.IntN(len(all))]
	}
	now := time.Now().Add(j.ahead)
	return slices.MinFunc(all, func(a, b *expiring) int {
		return cmp.Compare(a.end.from.Sub(now).Abs(), b.end.from.Sub(now).Abs())
	})
}

// issue issues a token.
func (j *jumping) issue(t testing.TB, lifetime time.Duration) {
	t.Helper()
	one := &expiring{}
	one.end = j.during(func() { one.text = token(t, j.URL, "demo", "demo-secret") }).add(lifetime)
	j.tokens = append(j.tokens, one)
}

// useToken uses a token and checks the response.
func (j *jumping) useToken(t testing.TB) {
	t.Helper()
	one := j.one(j.tokens)
	var resp *http.Response
	var got string
	hadEnded := j.latest.After(one.end.to)
	at := j.during(func() { resp, got = j.get(t, one.text) })
	switch {
	case resp.StatusCode == http.StatusOK && at.from.Before(one.end.to):
		j.seen["a token is valid"]++
		if hadEnded {
			j.seen["a token is valid again"]++
		}
	case resp.StatusCode == http.StatusUnauthorized && !at.to.Before(one.end.from):
		j.seen["a token is expired"]++
		reason := "expired"
		if !j.latest.Before(one.end.from.Add(expiredKept)) && strings.Contains(got, "unknown") { // it may have been removed from the file
			reason = "unknown or revoked"
		}
		refusedToken(reason).Want(t, resp, got)
	default:
		t.Errorf("token that ends at %v, at %v: %s\n%s", one.end, at, resp.Status, got)
	}
}

// useKey creates a contract with a key, which often was used before, and checks the response.
func (j *jumping) useKey(t testing.TB) {
	t.Helper()
	one := &expiring{text: strconv.Itoa(len(j.keys))}
	if len(j.keys) > 0 && j.random.IntN(4) > 0 {
		one = j.one(j.keys)
	} else {
		j.keys = append(j.keys, one)
	}
	var resp *http.Response
	var got string
	hadEnded := j.latest.After(one.end.to)
	at := j.during(func() { resp, got = j.post(t, one.text, "{}") })
	switch {
	case resp.StatusCode != http.StatusOK:
		t.Errorf("POST with the key %s: %s\n%s", one.text, resp.Status, got)
	case got == one.response && at.from.Before(one.end.to):
		j.seen["a key is repeated"]++
		if hadEnded {
			j.seen["a key is valid again"]++
		}
	case got != one.response && !at.to.Before(one.end.from):
		if one.response != "" {
			j.seen["a key has expired"]++
		}
		one.response, one.end = got, at.add(idempotencyLifetime)
		one.end.to = one.end.to.Add(time.Second) // a key ends at a whole second
		j.contracts++
	default:
		t.Errorf("key %s that ends at %v, at %v\n%s\nfirst\n%s", one.text, one.end, at, got, one.response)
	}
}

// TestNothingExpiresEarlyAlthoughTheClockJumpsAtRandom simulates many days. Now and then the clock
// is set to within half an hour of the true time, so that it jumps by up to an hour.
func TestNothingExpiresEarlyAlthoughTheClockJumpsAtRandom(t *testing.T) {
	long(t)
	t.Parallel()
	seed := rand.Uint64()
	defer func() {
		if t.Failed() {
			t.Logf("seed %d", seed)
		}
	}()
	const lifetime, wrong = 30 * time.Minute, 30 * time.Minute
	j := &jumping{
		moved:  startMoved(t, "--token-lifetime", lifetime.String()),
		random: rand.New(rand.NewPCG(seed, 0)),
		seen: map[string]int{
			"a token is valid": 0, "a token is valid again": 0, "a token is expired": 0,
			"a key is repeated": 0, "a key is valid again": 0, "a key has expired": 0,
		},
	}
	var passed time.Duration // true time since the start
	for range servicetest.Amount(150, 10_000) {
		if t.Failed() {
			return
		}
		switch n := j.random.IntN(100); {
		case n < 30:
			passed += j.upTo(15 * time.Minute)
			if j.random.IntN(4) == 0 {
				passed += j.upTo(6 * time.Hour)
			}
			j.set(t, passed-wrong+j.upTo(2*wrong))
			if j.random.IntN(20) == 0 {
				j.during(func() { j.restart(t) })
			}
		case n < 45 || len(j.tokens) == 0:
			j.issue(t, lifetime)
		case n < 70:
			j.useToken(t)
		default:
			j.useKey(t)
		}
	}
	if n := strings.Count(j.list(t), `"id"`); n != j.contracts {
		t.Errorf("%d contracts exist, want %d", n, j.contracts)
	}
	for kind, times := range j.seen {
		if times < servicetest.Amount(0, 1) { // a short run may not see every kind
			t.Errorf("in %v it never happened that %s", passed, kind)
		}
	}
	t.Logf("in %v: %v", passed, j.seen)
}
