package e2e

// What has an end, while the wall clock of the machine is set forward and back by an
// hour: tokens, secrets, idempotency keys. The clock is that of a process of its own,
// whose program has one line of main.go changed, and testdata/clock in it.

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

// movedProgram builds the program with a clock that jumps, once.
var movedProgram = sync.OnceValues(func() (string, error) {
	const line = "now:       time.Now,"
	source, err := os.ReadFile(servicetest.InModule("main.go"))
	if err != nil {
		return "", err
	}
	if n := strings.Count(string(source), line); n != 1 {
		return "", fmt.Errorf("main.go has the line %q %d times, and must have it once", line, n)
	}
	changed := filepath.Join(servicetest.BuildDir(), "main.go")
	edited := strings.Replace(string(source), line, "now: movedClock,", 1) + "\nvar _ time.Time // main.go may use the package nowhere else\n"
	if err := os.WriteFile(changed, []byte(edited), 0o600); err != nil {
		return "", err
	}
	return buildWith("moved-clock", map[string]string{"main.go": changed, "movedclock.go": "testdata/clock/clock.go"})
})

// What the README says of when things end.
const (
	tokenLifetime       = 10 * time.Hour // the default of --token-lifetime
	idempotencyLifetime = 24 * time.Hour
	expiredKept         = time.Hour       // how long a token at least is called expired
	freeGuesses         = 10              // failures to authenticate of a client
	freeAgain           = 6 * time.Second // when there is one more
)

// moved is the service in a process whose clock the test sets.
type moved struct {
	*process
	db    string
	args  []string
	file  string        // says how far the clock is ahead
	ahead time.Duration // of this process's
	text  string        // of a token that was issued since the clock was set, or ""

	document string // of demoContract
}

// startMoved runs "serve --demo" until the test ends, by a clock that is right.
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
	// In the place of the program that it is the wrapper of.
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

// set has the clock be so far ahead from now on.
func (m *moved) set(t testing.TB, ahead time.Duration) {
	t.Helper()
	m.ahead, m.text = ahead, ""
	whole := m.file + ".new"
	writeTo(t, whole, []byte(ahead.String()))
	if err := os.Rename(whole, m.file); err != nil {
		t.Fatal(err)
	}
}

func (m *moved) contracts() string { return contractsURL(m.URL, demoOrg, demoUser) }

// fresh is the text of a token that was issued by the clock as it is.
func (m *moved) fresh(t testing.TB) string {
	t.Helper()
	if m.text == "" {
		m.text = token(t, m.URL, "demo", "demo-secret")
	}
	return m.text
}

// commit replaces a contract that nothing else here is about, so that what may leave the
// file does.
func (m *moved) commit(t testing.TB) {
	t.Helper()
	resp, got := do(t, http.DefaultClient, "PUT", m.contracts()+"/"+demoOtherContract, with(jsonBody, "Authorization", "Bearer "+m.fresh(t)), "{}")
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("PUT: %s\n%s", resp.Status, got)
	}
}

// get gets a contract by a token.
func (m *moved) get(t testing.TB, text string) (*http.Response, string) {
	t.Helper()
	return do(t, http.DefaultClient, "GET", m.contracts()+"/"+demoContract, http.Header{"Authorization": {"Bearer " + text}}, "")
}

// wantToken uses a token twice, as the second time it is remembered. why is "" if it is
// good.
func (m *moved) wantToken(t testing.TB, what, text, why string) {
	t.Helper()
	for range 2 {
		resp, got := m.get(t, text)
		switch {
		case why == "" && (resp.StatusCode != http.StatusOK || got != m.document):
			t.Errorf("%s, with the clock %v ahead: %s, want 200\n%s\nwant\n%s", what, m.ahead, resp.Status, got, m.document)
		case why != "" && !strings.Contains(got, why):
			t.Errorf("%s, with the clock %v ahead: %s, want it %s\n%s", what, m.ahead, resp.Status, why, got)
		case why != "":
			refusedToken(why).Want(t, resp, got)
		}
	}
}

// refusedToken is the answer to a token that is not good.
func refusedToken(why string) failure {
	return failure{
		Status: 401, Detail: "The token is " + why + "; POST /oauth2/token/ issues another.",
		Header: http.Header{"Www-Authenticate": {`Bearer realm="energy-contracts", error="invalid_token", error_description="The token is ` + why + `"`}},
	}
}

// refusedClient is the answer to a wrong id or secret.
var refusedClient = failure{
	Status: 401, Code: "invalid_client", Detail: "the client is unknown, or its secret is wrong",
	Header: http.Header{"Www-Authenticate": {`Basic realm="energy-contracts", charset="UTF-8"`}},
}

// limitedClient is the answer after too many of them.
func limitedClient(seconds string) failure {
	return failure{
		Status: 429, Code: "temporarily_unavailable", Header: http.Header{"Retry-After": {seconds}},
		Detail: "this client failed to authenticate from this address too often; try again in " + seconds + " seconds",
	}
}

// wantSecret gets a token, or is told that the client is unknown.
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

func TestTokenIsGoodExactlyWhileAClockThatJumpsSaysSo(t *testing.T) {
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
						what := fmt.Sprintf("token %d, issued with the clock %v ahead", i, at)
						why := "expired"
						if ahead < at+lifetime {
							why = ""
						}
						m.wantToken(t, what, issued[i], why)
						m.wantToken(t, what+" and revoked", revoked[i], "unknown or revoked")
					}
				}
			})
		}
	}
}

func TestOldSecretIsGoodExactlyWhileAClockThatJumpsSaysSo(t *testing.T) {
	long(t)
	t.Parallel()
	for _, tt := range []struct {
		grace string
		good  map[time.Duration]bool // by how far the clock is ahead
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
				wantSecret(t, m.URL, old, tt.good[ahead])
				wantSecret(t, m.URL, current, true)
			}
		})
	}
}

// keyUser is a user of the demo organization whose contracts all have a key.
const keyUser = "00000000-0000-4000-8000-000000000007"

// madeOnce is an idempotency key, how far the clock is ahead at its end, and the first
// answer to it.
type madeOnce struct {
	key    string
	end    time.Duration
	answer string
}

// post makes a contract of keyUser, once for each key, and returns the answer.
func (m *moved) post(t testing.TB, key, body string) (*http.Response, string) {
	t.Helper()
	header := http.Header{
		"Content-Type": {"application/json"}, "Idempotency-Key": {`"` + key + `"`},
		"Authorization": {"Bearer " + m.fresh(t)},
	}
	return do(t, http.DefaultClient, "POST", contractsURL(m.URL, demoOrg, keyUser), header, body)
}

// list gets the contracts of keyUser.
func (m *moved) list(t testing.TB) string {
	t.Helper()
	_, list := do(t, http.DefaultClient, "GET", contractsURL(m.URL, demoOrg, keyUser), http.Header{"Authorization": {"Bearer " + m.fresh(t)}}, "")
	return list
}

func TestIdempotencyKeyMakesOneContractThoughTheClockJumps(t *testing.T) {
	long(t)
	t.Parallel()
	for name, between := range map[string]func(*moved, testing.TB){"commits": (*moved).commit, "restarts": (*moved).restart} {
		t.Run("over "+name, func(t *testing.T) {
			t.Parallel()
			m := startMoved(t)
			var made []madeOnce
			// wantSame sends again what is not over its time.
			wantSame := func() {
				t.Helper()
				for _, first := range made {
					if m.ahead >= first.end {
						continue
					}
					if resp, got := m.post(t, first.key, "{}"); resp.StatusCode != http.StatusOK || got != first.answer {
						t.Errorf("key %s, with the clock %v ahead: %s\n%s\nwant the first answer\n%s", first.key, m.ahead, resp.Status, got, first.answer)
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
				made = append(made, madeOnce{key, ahead + idempotencyLifetime, got})
				between(m, t)
				wantSame()
			}
			// Half an hour before each end the clock is an hour ahead for a while, and nobody
			// sends a key meanwhile.
			for _, end := range []time.Duration{-time.Hour, 0, time.Hour} {
				before := end + idempotencyLifetime - 30*time.Minute
				m.set(t, before)
				wantSame()
				m.set(t, before+time.Hour)
				for range 10 { // each removes two things
					m.commit(t)
				}
				between(m, t)
				m.set(t, before)
				wantSame()
				resp, got := m.post(t, made[1].key, "{ }") // which ends last
				wantProblem(t, resp, got, http.StatusUnprocessableEntity)
			}
			if list := m.list(t); strings.Count(list, `"id"`) != len(made) {
				t.Errorf("%d keys made\n%s", len(made), list)
			}
			m.set(t, idempotencyLifetime+2*time.Hour)
			if resp, got := m.post(t, made[0].key, "{}"); resp.StatusCode != http.StatusOK || got == made[0].answer {
				t.Errorf("key %s, with the clock %v ahead: %s\n%s\nwant another contract than first", made[0].key, m.ahead, resp.Status, got)
			}
		})
	}
}

// Failures are free again as time goes by, not as the clock says.
func TestLimitOfGuessesStandsThoughTheClockJumps(t *testing.T) {
	long(t)
	t.Parallel()
	m := startMoved(t)
	began, free := time.Now(), 0
	for _, ahead := range []time.Duration{0, -time.Hour, 0, time.Hour, 0} {
		m.set(t, ahead)
		for {
			resp, got := do(t, http.DefaultClient, "POST", m.URL+"/oauth2/token/", http.Header{"Content-Type": {"application/x-www-form-urlencoded"}},
				"grant_type=client_credentials&client_id=demo&client_secret=wrong")
			if resp.StatusCode != http.StatusUnauthorized {
				seconds := resp.Header.Get("Retry-After")
				if n, err := strconv.Atoi(seconds); err != nil || n < 1 || n > int(freeAgain/time.Second) {
					t.Errorf("with the clock %v ahead: Retry-After is %q", ahead, seconds)
				}
				limitedClient(seconds).Want(t, resp, got)
				break
			}
			refusedClient.Want(t, resp, got)
			free++
			if most := freeGuesses + int(time.Since(began)/freeAgain); free > most {
				t.Fatalf("with the clock %v ahead, %d failures are free, want %d", ahead, free, most)
			}
		}
	}
	if free < freeGuesses {
		t.Errorf("%d failures are free, want %d", free, freeGuesses)
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
		m.restart(t) // which writes it down, and forgets it
		list := ok(t, m.db, "client", "list")
		cells := strings.Fields(list) // the last row is of the one that was made last
		if at, err := time.Parse(time.RFC3339, cells[len(cells)-1]); err != nil || at.Before(from) || at.After(to) {
			t.Errorf("with the clock %v ahead, used between %v and %v: client list says\n%s", ahead, from.UTC(), to.UTC(), list)
		}
	}
}

// span is an instant of which only the bounds are known, such as when a request was
// answered by the clock of the service.
type span struct{ from, to time.Time }

func (s span) String() string { return fmt.Sprintf("%v to %v", s.from, s.to) }

func (s span) add(d time.Duration) span { return span{s.from.Add(d), s.to.Add(d)} }

// mayEnd is a token or a key, and when it ends.
type mayEnd struct {
	text   string
	end    span
	answer string // the first to a key
}

// jumping says what a service must answer while its clock jumps.
type jumping struct {
	*moved
	random       *rand.Rand
	tokens, keys []*mayEnd
	contracts    int            // that were made
	latest       time.Time      // that the clock was when something was done
	seen         map[string]int // what was answered, how often
}

// upTo is a time in whole seconds.
func (j *jumping) upTo(d time.Duration) time.Duration {
	return time.Duration(j.random.Int64N(int64(d))).Truncate(time.Second)
}

// during tells when something was done, by the clock.
func (j *jumping) during(do func()) (at span) {
	at.from = time.Now().Add(j.ahead)
	do()
	at.to = time.Now().Add(j.ahead)
	if at.to.After(j.latest) {
		j.latest = at.to
	}
	return at
}

// one of all is half of the time the one whose end is nearest.
func (j *jumping) one(all []*mayEnd) *mayEnd {
	if j.random.IntN(2) > 0 {
		return all[j.random.IntN(len(all))]
	}
	now := time.Now().Add(j.ahead)
	return slices.MinFunc(all, func(a, b *mayEnd) int {
		return cmp.Compare(a.end.from.Sub(now).Abs(), b.end.from.Sub(now).Abs())
	})
}

func (j *jumping) issue(t testing.TB, lifetime time.Duration) {
	t.Helper()
	one := &mayEnd{}
	one.end = j.during(func() { one.text = token(t, j.URL, "demo", "demo-secret") }).add(lifetime)
	j.tokens = append(j.tokens, one)
}

// useToken uses one that was issued.
func (j *jumping) useToken(t testing.TB) {
	t.Helper()
	one := j.one(j.tokens)
	var resp *http.Response
	var got string
	wasOver := j.latest.After(one.end.to)
	at := j.during(func() { resp, got = j.get(t, one.text) })
	switch {
	case resp.StatusCode == http.StatusOK && at.from.Before(one.end.to):
		j.seen["a token is good"]++
		if wasOver {
			j.seen["a token is good again"]++
		}
	case resp.StatusCode == http.StatusUnauthorized && !at.to.Before(one.end.from):
		j.seen["a token is expired"]++
		why := "expired"
		if !j.latest.Before(one.end.from.Add(expiredKept)) && strings.Contains(got, "unknown") { // it may have left the file
			why = "unknown or revoked"
		}
		refusedToken(why).Want(t, resp, got)
	default:
		t.Errorf("token that ends at %v, at %v: %s\n%s", one.end, at, resp.Status, got)
	}
}

// useKey makes a contract with a key, which is often one that was used before.
func (j *jumping) useKey(t testing.TB) {
	t.Helper()
	one := &mayEnd{text: strconv.Itoa(len(j.keys))}
	if len(j.keys) > 0 && j.random.IntN(4) > 0 {
		one = j.one(j.keys)
	} else {
		j.keys = append(j.keys, one)
	}
	var resp *http.Response
	var got string
	wasOver := j.latest.After(one.end.to)
	at := j.during(func() { resp, got = j.post(t, one.text, "{}") })
	switch {
	case resp.StatusCode != http.StatusOK:
		t.Errorf("POST with the key %s: %s\n%s", one.text, resp.Status, got)
	case got == one.answer && at.from.Before(one.end.to):
		j.seen["a key is repeated"]++
		if wasOver {
			j.seen["a key is good again"]++
		}
	case got != one.answer && !at.to.Before(one.end.from):
		if one.answer != "" {
			j.seen["a key is over"]++
		}
		one.answer, one.end = got, at.add(idempotencyLifetime)
		one.end.to = one.end.to.Add(time.Second) // a key ends at a whole second
		j.contracts++
	default:
		t.Errorf("key %s that ends at %v, at %v\n%s\nfirst\n%s", one.text, one.end, at, got, one.answer)
	}
}

// Many days go by, in which the clock is set now and then, at most half an hour away
// from the true time: by up to an hour.
func TestNothingEndsEarlyThoughTheClockJumpsAtRandom(t *testing.T) {
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
			"a token is good": 0, "a token is good again": 0, "a token is expired": 0,
			"a key is repeated": 0, "a key is good again": 0, "a key is over": 0,
		},
	}
	var passed time.Duration // of the true time
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
		t.Errorf("%d contracts are there, and %d were answered", n, j.contracts)
	}
	for what, times := range j.seen {
		if times < servicetest.Amount(0, 1) { // in a few days not all may happen
			t.Errorf("in %v it never happened that %s", passed, what)
		}
	}
	t.Logf("in %v: %v", passed, j.seen)
}
