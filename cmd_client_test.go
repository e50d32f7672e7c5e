package main

// Tests of the commands that manage clients, run as a person runs them.

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// unknownClientSays is the error text for a client ID that is not in the database.
const unknownClientSays = "There is no client with this id; run \"client list\" to see the ids.\n"

// clientCommand runs "client verb" on the database db and returns its standard output. It
// fails the test unless the command succeeds with nothing on standard error.
func clientCommand(t testing.TB, db, verb string, args ...string) (stdout string) {
	t.Helper()
	got := run(t, nil, append([]string{"client", verb, "--db", db}, args...)...)
	if got.status != 0 || got.stderr != "" {
		t.Fatalf("client %s %q: %+v", verb, args, got)
	}
	return got.stdout
}

// secretNotShownAgain matches the beginning of the output of "client add" and "client
// rotate". Its groups are the client's ID and secret.
const secretNotShownAgain = `^client_id:     (\S{36})\nclient_secret: (\S{43})\n\nThe secret is not shown again\.`

var (
	addedPattern   = regexp.MustCompile(secretNotShownAgain + `\n$`)
	rotatedPattern = regexp.MustCompile(secretNotShownAgain + ` The old secret is (?:valid until (\S{20})|refused from now on)\.\n$`)
	timePattern    = regexp.MustCompile(`\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ`)
)

// addedClient returns the credentials printed by "client add".
func addedClient(t testing.TB, stdout string) credentials {
	t.Helper()
	m := addedPattern.FindStringSubmatch(stdout)
	if m == nil {
		t.Fatalf("client add printed\n%s", stdout)
	}
	known.Add(m[2])
	return credentials{m[1], m[2]}
}

// addClient runs "client add" for the organization demoOrg.
func addClient(t testing.TB, db string, args ...string) credentials {
	t.Helper()
	return addedClient(t, clientCommand(t, db, "add", append([]string{"--org", demoOrg}, args...)...))
}

// rotatedClient returns the credentials printed by "client rotate", and the time until
// which the old secret is valid; "" means that it is refused from now on.
func rotatedClient(t testing.TB, stdout string) (c credentials, until string) {
	t.Helper()
	m := rotatedPattern.FindStringSubmatch(stdout)
	if m == nil {
		t.Fatalf("client rotate printed\n%s", stdout)
	}
	known.Add(m[2])
	return credentials{m[1], m[2]}, m[3]
}

// rotateClient runs "client rotate"; its results are those of rotatedClient.
func rotateClient(t testing.TB, db, id string, args ...string) (c credentials, until string) {
	t.Helper()
	c, until = rotatedClient(t, clientCommand(t, db, "rotate", append(args, id)...))
	if c.ID != id {
		t.Fatalf("client rotate %s rotated %s", id, c.ID)
	}
	return c, until
}

// commandAt runs a command in this process, with now as its clock, and returns its standard
// output.
func commandAt(t testing.TB, now func() time.Time, args ...string) (stdout string) {
	t.Helper()
	var out bytes.Buffer
	a := &app{stdout: &out, log: slog.New(slog.DiscardHandler), logLevel: new(slog.LevelVar), now: now}
	if err := a.run(t.Context(), args); err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return out.String()
}

const (
	aTime = "YYYY-MM-DDTHH:MM:SSZ" // replaces a time that the test cannot predict
	never = "never"
)

// listedRow is one line of the output of "client list".
type listedRow struct{ id, org, scopes, created, used string }

// listing returns the output of "client list" with these rows. Each column is as wide as
// its widest cell.
func listing(rows ...listedRow) string {
	rows = append([]listedRow{{"CLIENT", "ORGANIZATION", "SCOPES", "CREATED", "LAST USED"}}, rows...)
	var width [4]int
	for _, r := range rows {
		for i, cell := range []string{r.id, r.org, r.scopes, r.created} {
			width[i] = max(width[i], len(cell))
		}
	}
	var b strings.Builder
	for _, r := range rows {
		fmt.Fprintf(&b, "%-*s  %-*s  %-*s  %-*s  %s\n", width[0], r.id, width[1], r.org, width[2], r.scopes, width[3], r.created, r.used)
	}
	return b.String()
}

// wantListing checks the whole output of "client list", with times replaced by aTime.
func wantListing(t testing.TB, db string, rows ...listedRow) {
	t.Helper()
	got := timePattern.ReplaceAllString(clientCommand(t, db, "list"), aTime)
	if want := listing(rows...); got != want {
		t.Errorf("client list printed\n%swant\n%s", got, want)
	}
}

// wantListed checks the client IDs listed by "client list", and their order.
func wantListed(t testing.TB, db string, ids ...string) {
	t.Helper()
	out := clientCommand(t, db, "list")
	var got []string
	for line := range strings.Lines(out) {
		got = append(got, strings.Fields(line)[0])
	}
	if !slices.Equal(got[1:], ids) {
		t.Errorf("client list printed\n%swant the ids %q", out, ids)
	}
}

// wantSecret requests a token with c. If works is false, the response must be the error
// invalid_client.
func wantSecret(t testing.TB, url string, c credentials, works bool) {
	t.Helper()
	form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
	resp, got := do(t, http.DefaultClient, "POST", url+"/oauth2/token/", form,
		"grant_type=client_credentials&client_id="+c.ID+"&client_secret="+c.Secret)
	const refused = `{"error":"invalid_client","error_description":"the client is unknown, or its secret is wrong"}`
	switch {
	case works && resp.StatusCode != 200:
		t.Errorf("secret of %s: %s, want a token\n%s", c.ID, resp.Status, got)
	case !works && (resp.StatusCode != 401 || got != refused):
		t.Errorf("secret of %s: %s, want it refused\n%s", c.ID, resp.Status, got)
	}
}

// wantTokenStatus checks the status of a request with the token text.
func wantTokenStatus(t testing.TB, url, text string, status int) {
	t.Helper()
	resp, got := do(t, http.DefaultClient, "GET", contractsURL(url, demoOrg, demoUser), http.Header{"Authorization": {"Bearer " + text}}, "")
	if resp.StatusCode != status {
		t.Errorf("token: %s, want %d\n%s", resp.Status, status, got)
	}
}

func TestClientAddMakesCredentialsThatWorkAtOnce(t *testing.T) {
	besideAndWithout(t, func(t *testing.T, db string, served func() string) {
		// A UUID may be in upper case.
		all := addedClient(t, clientCommand(t, db, "add", "--org", strings.ToUpper(demoOrg)))
		reader := addClient(t, db, "--scope", "read")
		stranger := addedClient(t, clientCommand(t, db, "add", "--org", demoOtherOrg))
		info, err := os.Stat(db)
		if err != nil || info.Mode() != 0o600 {
			t.Errorf("the file's mode is %v, %v", info.Mode(), err)
		}
		url := served()
		contracts := contractsURL(url, demoOrg, demoUser)
		for _, tt := range []struct {
			name   string
			c      credentials
			method string
			status int
		}{
			{"a client with all scopes writes", all, "POST", 200},
			{"a reader reads", reader, "GET", 200},
			{"a reader does not write", reader, "POST", 403},
			{"a client does not read another organization", stranger, "GET", 403},
		} {
			if resp, got := do(t, client(url, tt.c.ID, tt.c.Secret), tt.method, contracts, jsonBody, "{}"); resp.StatusCode != tt.status {
				t.Errorf("%s: %s, want %d\n%s", tt.name, resp.Status, tt.status, got)
			}
		}
		wantSecret(t, url, credentials{all.ID, reader.Secret}, false)
		for _, c := range []credentials{all, reader, stranger} {
			if strings.Contains(readFile(t, db), c.Secret) {
				t.Errorf("the secret of %s is in the file", c.ID)
			}
		}
	})
}

func TestClientListIsInOrderOfCreation(t *testing.T) {
	besideAndWithout(t, func(t *testing.T, db string, served func() string) {
		began := time.Now().Truncate(time.Second)
		var rows []listedRow
		for _, add := range []struct{ org, scope, shown string }{
			{demoOrg, "read write", "read write"},
			{demoOtherOrg, "read", "read"},
			{demoOrg, "write", "write"},
			{demoOrg, " write  read", "read write"},
			{demoOtherOrg, "read read", "read"},
		} {
			c := addedClient(t, clientCommand(t, db, "add", "--org", add.org, "--scope", add.scope))
			rows = append(rows, listedRow{c.ID, add.org, add.shown, aTime, never})
		}
		wantListing(t, db, rows...)
		url := served()
		used, _ := rotateClient(t, db, rows[1].id) // rotation changes neither the order nor the time of last use
		wantListing(t, db, rows...)
		token(t, url, used.ID, used.Secret)
		rows[1].used = aTime
		wantListing(t, db, rows...)
		for _, text := range timePattern.FindAllString(clientCommand(t, db, "list"), -1) {
			if at, err := time.Parse(time.RFC3339, text); err != nil || at.Before(began) || at.After(time.Now()) {
				t.Errorf("time %s, %v; the test began at %s", text, err, began.UTC())
			}
		}
	})
}

func TestClientListWithoutClients(t *testing.T) {
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		clientCommand(t, db, "remove", addClient(t, db).ID)
		wantListing(t, db)
	})
}

func TestClientIsLastUsedWhenItsTokenIs(t *testing.T) {
	s := startOn(t, shortPath(t))
	at := time.Date(2026, 11, 23, 17, 0, 0, 0, time.UTC)
	s.clock.stop(at)
	c := addClient(t, s.db)
	row := listedRow{c.ID, demoOrg, "read write", "2026-11-23T17:00:00Z", never}
	want := func(when, used string) {
		t.Helper()
		row.used = used
		if got, want := clientCommand(t, s.db, "list"), listing(row); got != want {
			t.Errorf("%s: client list printed\n%swant\n%s", when, got, want)
		}
	}
	want("before", never)
	s.clock.move(time.Hour)
	wantSecret(t, s.url, credentials{c.ID, "wrong"}, false)
	want("after a wrong secret", never)
	text := token(t, s.url, c.ID, c.Secret)
	want("after it got a token", "2026-11-23T18:00:00Z")
	s.clock.move(2 * time.Hour)
	wantTokenStatus(t, s.url, text, 200)
	want("after the token was used", "2026-11-23T20:00:00Z")
	s.clock.move(tokenLifetime)
	wantTokenStatus(t, s.url, text, 401)
	want("after the token was refused", "2026-11-23T20:00:00Z")
	s.stop()
	want("after the server stopped", "2026-11-23T20:00:00Z")
}

func TestClientRotateKeepsTheOldSecretForTheGracePeriod(t *testing.T) {
	for _, tt := range []struct {
		flag  string
		grace time.Duration
	}{{"", 24 * time.Hour}, {"--grace=1s", time.Second}, {"--grace=1h30m", 90 * time.Minute}, {"--grace=8760h", 8760 * time.Hour}, {"--grace=0s", 0}, {"--grace=0", 0}} {
		t.Run(fmt.Sprintf("%s is %s", tt.flag, tt.grace), func(t *testing.T) {
			s := startOn(t, shortPath(t))
			at := time.Date(2026, 11, 23, 17, 0, 0, 0, time.UTC)
			s.clock.stop(at)
			old := addClient(t, s.db)
			text := token(t, s.url, old.ID, old.Secret)
			args := []string{"client", "rotate", "--db", s.db, old.ID}
			if tt.flag != "" {
				args = append(args, tt.flag)
			}
			c, until := rotatedClient(t, commandAt(t, s.clock.now, args...))
			want := at.Add(tt.grace).Format(time.RFC3339)
			if tt.grace == 0 {
				want = ""
			}
			if c.ID != old.ID || c.Secret == old.Secret || until != want {
				t.Errorf("%+v until %q, want another secret of %s and %q", c, until, old.ID, want)
			}
			wantTokenStatus(t, s.url, text, 200)
			wantSecret(t, s.url, c, true)
			wantSecret(t, s.url, old, tt.grace > 0)
			if tt.grace > 0 {
				s.clock.move(tt.grace - time.Nanosecond)
				wantSecret(t, s.url, old, true)
				s.clock.move(time.Nanosecond)
			}
			wantSecret(t, s.url, old, false)
			wantSecret(t, s.url, c, true)
			if tt.grace < tokenLifetime { // a token outlives the secret it was issued for
				wantTokenStatus(t, s.url, text, 200)
			}
			wantListed(t, s.db, c.ID)
		})
	}
}

func TestClientRotateTwiceKeepsOnlyTheLastOldSecret(t *testing.T) {
	besideAndWithout(t, func(t *testing.T, db string, served func() string) {
		first := addClient(t, db)
		second, _ := rotateClient(t, db, first.ID)
		third, until := rotateClient(t, db, first.ID, "--grace", "2h")
		end, err := time.Parse(time.RFC3339, until)
		if d := time.Until(end); err != nil || d > 2*time.Hour || d < 2*time.Hour-time.Minute {
			t.Errorf("the old secret is valid until %q, %v; want two hours from now", until, err)
		}
		url := served()
		text := token(t, url, first.ID, third.Secret)
		wantSecret(t, url, first, false)
		wantSecret(t, url, second, true)
		wantSecret(t, url, third, true)
		fourth, until := rotateClient(t, db, first.ID, "--grace", "0s")
		if until != "" {
			t.Errorf("--grace 0s: the old secret is valid until %q", until)
		}
		for _, old := range []credentials{first, second, third} {
			wantSecret(t, url, old, false)
		}
		wantSecret(t, url, fourth, true)
		wantTokenStatus(t, url, text, 200)
	})
}

func TestClientRemoveEndsItsTokensAtOnceAndForGood(t *testing.T) {
	db := shortPath(t)
	p := startProcess(t, nil, "--db", db)
	kept, removed := addClient(t, db), addClient(t, db)
	used, unused := token(t, p.URL, removed.ID, removed.Secret), token(t, p.URL, removed.ID, removed.Secret)
	other := token(t, p.URL, kept.ID, kept.Secret)
	wantTokenStatus(t, p.URL, used, 200)
	rotated, _ := rotateClient(t, db, removed.ID)
	if got := clientCommand(t, db, "remove", removed.ID); got != "" {
		t.Errorf("client remove printed %q", got)
	}
	for round := range 2 {
		url := p.URL
		if round == 1 {
			if err := p.Terminate(t); err != nil {
				t.Error(err)
			}
			wantListed(t, db, kept.ID) // without a server
			url = startProcess(t, nil, "--db", db).URL
		}
		for _, text := range []string{used, unused} {
			wantTokenStatus(t, url, text, 401)
		}
		for _, secret := range []credentials{removed, rotated} {
			wantSecret(t, url, secret, false)
		}
		wantSecret(t, url, kept, true)
		wantTokenStatus(t, url, other, 200)
		wantListed(t, db, kept.ID)
		for _, verb := range []string{"remove", "rotate"} {
			want := ran{"", "energy-contracts: " + verb + " client: " + unknownClientSays, 1}
			if got := run(t, nil, "client", verb, "--db", db, removed.ID); got != want {
				t.Errorf("%s again: %+v, want %+v", verb, got, want)
			}
		}
	}
}

func TestClientRemoveWithoutAServer(t *testing.T) {
	db := shortPath(t)
	p := startProcess(t, nil, "--db", db)
	kept, removed := addClient(t, db), addClient(t, db)
	text := token(t, p.URL, removed.ID, removed.Secret)
	wantTokenStatus(t, p.URL, text, 200)
	if err := p.Terminate(t); err != nil {
		t.Error(err)
	}
	if got := clientCommand(t, db, "remove", removed.ID); got != "" {
		t.Errorf("client remove printed %q", got)
	}
	wantListed(t, db, kept.ID)
	p = startProcess(t, nil, "--db", db)
	wantTokenStatus(t, p.URL, text, 401)
	wantSecret(t, p.URL, removed, false)
	wantSecret(t, p.URL, kept, true)
}

func TestClientCommandsOfAnUnknownClientFail(t *testing.T) {
	slow(t)
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		c := addClient(t, db)
		// Without escaping, some of these ids would change the path of the control request.
		for _, id := range []string{"nobody", "7d8a4c0e-0000-4000-8000-000000000000", c.ID[:35], c.ID + "/secret", "a/b", ".", "..", "../clients", "%2e", "?", "#", "å b", strings.Repeat("x", 1000)} {
			for _, verb := range []string{"rotate", "remove"} {
				want := ran{"", "energy-contracts: " + verb + " client: " + unknownClientSays, 1}
				if got := run(t, nil, "client", verb, "--db", db, id); got != want {
					t.Errorf("%s %q: %+v, want %+v", verb, id, got, want)
				}
			}
		}
		wantListed(t, db, c.ID)
	})
}

func TestClientCommandsCreateNoDatabase(t *testing.T) {
	for _, args := range [][]string{{"list"}, {"rotate", "x"}, {"remove", "x"}} {
		t.Run(args[0], func(t *testing.T) {
			db := shortPath(t)
			want := ran{"", "energy-contracts: there is no database " + db + "; name an existing one with --db\n", 1}
			if got := run(t, nil, append([]string{"client", args[0], "--db", db}, args[1:]...)...); got != want {
				t.Errorf("%+v, want %+v", got, want)
			}
			wantFiles(t, filepath.Dir(db))
		})
	}
}

func TestClientCommandsReportWrongArguments(t *testing.T) {
	const graceRange = "--grace must be whole seconds, from 0s to 8760h; --help explains the commands and flags"
	db := shortPath(t)
	for _, tt := range []struct {
		name, want string
		args       []string
	}{
		{"a negative grace", graceRange, []string{"rotate", "--grace=-1s", "x"}},
		{"a grace of a fraction of seconds", graceRange, []string{"rotate", "--grace=1500ms", "x"}},
		{"a grace of less than a second", graceRange, []string{"rotate", "--grace=1ns", "x"}},
		{"a grace of more than a year", graceRange, []string{"rotate", "--grace=8760h1s", "x"}},
		{"a grace that is no duration", "--grace", []string{"rotate", "--grace=1d", "x"}},
		{"a grace without a unit", "--grace", []string{"rotate", "--grace=60", "x"}},
		{"a grace too large for a number", "--grace", []string{"rotate", "--grace=9999999h", "x"}},
		{"an empty grace", "--grace", []string{"rotate", "--grace=", "x"}},
		{"rotation without an id", "the client id is empty", []string{"rotate"}},
		{"rotation of an empty id", "the client id is empty", []string{"rotate", ""}},
		{"removal without an id", "the client id is empty", []string{"remove"}},
		{"removal of an empty id", "the client id is empty", []string{"remove", ""}},
		{"removal of two", "unexpected argument y", []string{"remove", "x", "y"}},
		{"a list with an argument", "unexpected argument x", []string{"list", "x"}},
		{"an unknown command", "unexpected argument show", []string{"show"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			args := append([]string{"client"}, tt.args...)
			if tt.args[0] != "show" {
				args = append(args, "--db", db)
			}
			got := run(t, nil, args...)
			if got.status != 1 || got.stdout != "" || !strings.Contains(got.stderr, tt.want) || strings.Count(got.stderr, "\n") != 1 {
				t.Errorf("%+v, want one line with %q", got, tt.want)
			}
		})
	}
	wantFiles(t, filepath.Dir(db))
}

// adding is a running "client add".
type adding struct {
	cmd            *exec.Cmd
	stdout, stderr bytes.Buffer
}

// startAdds starts n processes of "client add" at the same time.
func startAdds(t testing.TB, db string, n int) (adds []*adding) {
	t.Helper()
	for range n {
		adds = append(adds, &adding{cmd: command(t, nil, "client", "add", "--db", db, "--org", demoOrg)})
	}
	for _, a := range adds {
		a.cmd.Stdout, a.cmd.Stderr = &a.stdout, &a.stderr
		if err := a.cmd.Start(); err != nil {
			t.Fatal(err)
		}
	}
	return adds
}

func TestClientsAddedAtTheSameTimeAreAllKept(t *testing.T) {
	db := shortPath(t)
	p := startProcess(t, nil, "--db", db)
	var made []credentials
	for _, a := range startAdds(t, db, 8) {
		if err := a.cmd.Wait(); err != nil || a.stderr.Len() > 0 {
			t.Errorf("%v\n%s", err, &a.stderr)
			continue
		}
		made = append(made, addedClient(t, a.stdout.String()))
	}
	list := clientCommand(t, db, "list")
	if n := strings.Count(list, "\n") - 1; n != 8 {
		t.Errorf("%d clients are listed, want 8", n)
	}
	for _, c := range made {
		wantSecret(t, p.URL, c, true)
		if !strings.Contains(list, c.ID) {
			t.Errorf("%s is not listed\n%s", c.ID, list)
		}
	}
}

func TestClientAddedWhileTheServerStopsIsKept(t *testing.T) {
	t.Run("its request is in flight", func(t *testing.T) {
		db := shortPath(t)
		p := startProcess(t, nil, "--db", db)
		conn, err := net.Dial("unix", controlPath(db))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		body, err := json.Marshal(map[string]string{"org_id": demoOrg, "scope": "read"})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(conn, "POST /clients HTTP/1.1\r\nHost: control\r\nContent-Type: application/json\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", len(body))
		in := bufio.NewReader(conn)
		const proceed = "HTTP/1.1 100 Continue\r\n\r\n"
		got := make([]byte, len(proceed))
		if _, err := io.ReadFull(in, got); err != nil || string(got) != proceed {
			t.Fatalf("%q, %v", got, err)
		}
		if err := p.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the socket is gone", func() bool { return !exists(controlPath(db)) })
		if _, err := conn.Write(body); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		var made struct {
			ID     string `json:"client_id"`
			Secret string `json:"client_secret"`
		}
		if err := json.NewDecoder(resp.Body).Decode(&made); err != nil || resp.StatusCode != 200 {
			t.Fatalf("%s, %v", resp.Status, err)
		}
		if err := <-p.Ended; err != nil {
			t.Errorf("%v\n%s", err, p.Stderr)
		}
		wantListing(t, db, listedRow{made.ID, demoOrg, "read", aTime, never})
		wantSecret(t, startProcess(t, nil, "--db", db).URL, credentials(made), true)
	})
	t.Run("by commands at the same time", func(t *testing.T) {
		db := shortPath(t)
		p := startProcess(t, nil, "--db", db)
		adds := startAdds(t, db, 8)
		var ids []string
		for i, a := range adds {
			err := a.cmd.Wait()
			switch {
			case err == nil: // added by the server, or after its end by the command itself
				ids = append(ids, addedClient(t, a.stdout.String()).ID)
			case a.cmd.ProcessState.ExitCode() != 1 || a.stdout.Len() > 0 || strings.Count(a.stderr.String(), "\n") != 1:
				t.Errorf("%v, want success or one line on standard error\n%s%s", err, &a.stdout, &a.stderr)
			}
			if i == 0 {
				if err := p.Terminate(t); err != nil {
					t.Error(err)
				}
			}
		}
		list := clientCommand(t, db, "list")
		for _, id := range ids {
			if !strings.Contains(list, id) {
				t.Errorf("%s was added, but is not listed\n%s", id, list)
			}
		}
		wantFiles(t, filepath.Dir(db), "c.db")
	})
}

func TestClientCommandsAreLoggedWithoutSecrets(t *testing.T) {
	db := shortPath(t)
	p := startProcess(t, nil, "--db", db)
	first := addClient(t, db)
	second, _ := rotateClient(t, db, first.ID)
	clientCommand(t, db, "list")
	clientCommand(t, db, "remove", first.ID)
	run(t, nil, "client", "remove", "--db", db, first.ID)
	run(t, nil, "client", "remove", "--db", db, second.Secret) // a person's mistake
	if err := p.Terminate(t); err != nil {
		t.Error(err)
	}
	log := p.Stderr.String()
	var lines []string
	for line := range strings.Lines(log) {
		if strings.Contains(line, `"msg":"request"`) {
			lines = append(lines, line)
		}
	}
	want := []string{
		`"method":"POST","route":"/clients","status":200,"bytes":\d+,"duration":\d+,"request":"\S{36}","client":"` + first.ID,
		`"method":"POST","route":"/clients/:client_id/secret","status":200,"bytes":\d+,"duration":\d+,"request":"\S{36}","client":"` + first.ID,
		`"method":"GET","route":"/clients","status":200,"bytes":\d+,"duration":\d+,"request":"\S{36}","client":"`,
		`"method":"DELETE","route":"/clients/:client_id","status":204,"bytes":0,"duration":\d+,"request":"\S{36}","client":"` + first.ID,
		`"method":"DELETE","route":"/clients/:client_id","status":404,"bytes":\d+,"duration":\d+,"request":"\S{36}","client":"` + first.ID,
		`"method":"DELETE","route":"/clients/:client_id","status":404,"bytes":\d+,"duration":\d+,"request":"\S{36}","client":"…`,
	}
	if len(lines) != len(want) {
		t.Fatalf("the log has %d requests, want %d\n%s", len(lines), len(want), log)
	}
	for i, want := range want {
		if !regexp.MustCompile(`^{"time":"\S+","level":"INFO","msg":"request",` + want + `"}\n$`).MatchString(lines[i]) {
			t.Errorf("line %d: %swant %s", i, lines[i], want)
		}
	}
	for _, c := range []credentials{first, second} {
		hash, _ := hashOf(c.Secret).MarshalText()
		for _, secret := range []string{c.Secret, string(hash)} {
			if strings.Contains(log, secret) {
				t.Errorf("the log contains %s\n%s", secret, log)
			}
		}
	}
}
