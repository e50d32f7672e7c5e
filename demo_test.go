package main

// The demo data: it comes once, and its published secrets end for good.

import (
	"log/slog"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"

	"go.etcd.io/bbolt"
)

// lastColumn matches the last column of a table.
var lastColumn = regexp.MustCompile(`(?m) +\S+$`)

func TestDemoDataComesOnlyIntoAFileThatNeverHadIt(t *testing.T) {
	const had = `"level":"INFO","msg":"the file has had the demo data before, so it is left as it is; name another file with --db to get the demo data anew","db":"`
	const gone = `"level":"INFO","msg":"the client of the demo was rotated or removed, so --demo prints no commands","client":"demo"`
	contract := contractsURL("", demoOrg, demoUser) + "/" + demoContract
	withoutMark := func(t *testing.T, db string) {
		editBolt(t, db, func(tx *bbolt.Tx) error { return remove(tx, bucketMeta, []byte(demoKey)) })
	}
	withoutContracts := func(t *testing.T, db string) {
		editBolt(t, db, func(tx *bbolt.Tx) error {
			if err := tx.DeleteBucket(bucketContracts); err != nil {
				return err
			}
			_, err := tx.CreateBucket(bucketContracts)
			return err
		})
	}
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, url, db string) // beside the server
		after  func(t *testing.T, db string)      // without a server, or nil
		prints bool                               // the commands of --demo work
	}{
		{"and was changed", func(t *testing.T, url, _ string) {
			if resp, got := do(t, client(url, "demo", "demo-secret"), "PUT", url+contract, jsonBody, `{"supplier":"Changed AB"}`); resp.StatusCode != 200 {
				t.Fatalf("%s\n%s", resp.Status, got)
			}
		}, nil, true},
		{"and lost a contract", func(t *testing.T, url, _ string) {
			if resp, got := do(t, client(url, "demo", "demo-secret"), "DELETE", url+contract, nil, ""); resp.StatusCode != 204 {
				t.Fatalf("%s\n%s", resp.Status, got)
			}
		}, nil, true},
		{"and lost its first client", func(t *testing.T, _, db string) { clientCommand(t, db, "remove", "demo") }, nil, false},
		{"and lost its other client", func(t *testing.T, _, db string) { clientCommand(t, db, "remove", "demo-other") }, nil, true},
		{"and has another secret", func(t *testing.T, _, db string) { clientCommand(t, db, "rotate", "demo") }, nil, false},
		{"and lost its clients, of version 0.1.0", func(t *testing.T, _, db string) {
			clientCommand(t, db, "remove", "demo")
			clientCommand(t, db, "remove", "demo-other")
		}, withoutMark, false},
		{"and lost all but a client, of version 0.1.0", func(t *testing.T, _, db string) { clientCommand(t, db, "remove", "demo") }, func(t *testing.T, db string) {
			withoutMark(t, db)
			withoutContracts(t, db)
		}, false},
		{"and lost all of it", func(t *testing.T, _, db string) {
			clientCommand(t, db, "remove", "demo")
			clientCommand(t, db, "remove", "demo-other")
		}, withoutContracts, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			db := shortPath(t)
			p := startProcess(t, nil, "--demo", "--db", db)
			if strings.Contains(p.Stderr.String(), had) {
				t.Errorf("a new file\n%s", p.Stderr)
			}
			tt.change(t, p.URL, db)
			if err := p.Terminate(t); err != nil {
				t.Fatal(err)
			}
			if tt.after != nil {
				tt.after(t, db)
			}
			list := func() string { return lastColumn.ReplaceAllString(clientCommand(t, db, "list"), "") }
			contracts, clients := ok(t, db, "export"), list()
			for range 2 { // the first start marks a file of version 0.1.0
				p = startProcess(t, nil, "--demo", "--db", db)
				wantExport(t, db, contracts)
				if got := list(); got != clients {
					t.Errorf("clients\n%swere\n%s", got, clients)
				}
				wantSecret(t, p.URL, credentials{"demo", "demo-secret"}, tt.prints)
				log := p.Stderr.String()
				if !strings.Contains(log, had+db+`"`) || strings.Contains(log, gone) == tt.prints {
					t.Errorf("the log is\n%s", log)
				}
				if err := p.Terminate(t); err != nil { // what it prints is printed by then
					t.Fatal(err)
				}
				if printed := p.Stdout.String(); (printed != "") != tt.prints {
					t.Errorf("it printed %q", printed)
				}
				ok(t, db, "check")
			}
		})
	}
}

func TestDemoDataComesIntoAFileOfOthers(t *testing.T) {
	db := shortPath(t)
	ok(t, db, "import", servicetest.ManyLines(t, 3, 0))
	before := ok(t, db, "export")
	c := addClient(t, db)
	s := startOn(t, db, "--demo")
	wantSecret(t, s.url, c, true)
	wantSecret(t, s.url, credentials{"demo", "demo-secret"}, true)
	after := ok(t, db, "export")
	for line := range strings.Lines(before) {
		if !strings.Contains(after, line) {
			t.Errorf("the export lacks\n%s", line)
		}
	}
	if !strings.Contains(after, demoContract) {
		t.Errorf("the export has no demo data\n%s", after)
	}
}

// Anybody can get a token while a secret is published, and one for a year.
func TestRotationOfAPublishedSecretEndsItsTokens(t *testing.T) {
	db := shortPath(t)
	s := startOn(t, db, "--demo", "--token-lifetime", "8760h")
	published := credentials{"demo", "demo-secret"}
	text := token(t, s.url, published.ID, published.Secret)
	other := token(t, s.url, "demo-other", "demo-other-secret")
	wantTokenStatus(t, s.url, text, 200)
	printed := clientCommand(t, db, "rotate", "demo", "--grace", "8760h")
	m := regexp.MustCompile(`^client_id:     demo\nclient_secret: (\S{43})\n\nThe secret is not shown again\. The client had a secret of the demo data, which everyone knows, so the old secret and all of its tokens are refused from now on\.\n$`).FindStringSubmatch(printed)
	if m == nil {
		t.Fatalf("client rotate printed\n%s", printed)
	}
	known.Add(m[1])
	c := credentials{"demo", m[1]}
	check := func(url string) {
		t.Helper()
		wantTokenStatus(t, url, text, 401)
		wantSecret(t, url, published, false)
		wantTokenStatus(t, url, token(t, url, c.ID, c.Secret), 200)
	}
	check(s.url)
	resp, got := do(t, http.DefaultClient, "GET", contractsURL(s.url, demoOtherOrg, demoUser), http.Header{"Authorization": {"Bearer " + other}}, "")
	if resp.StatusCode != 200 {
		t.Errorf("another client's token: %s\n%s", resp.Status, got)
	}
	// From then on the client is like any other.
	kept := token(t, s.url, c.ID, c.Secret)
	if printed := clientCommand(t, db, "rotate", "demo", "--grace", "1h"); !strings.Contains(printed, " The old secret is valid until ") {
		t.Errorf("client rotate printed\n%s", printed)
	}
	wantTokenStatus(t, s.url, kept, 200)
	wantSecret(t, s.url, c, true)
	clientCommand(t, db, "remove", "demo-other")
	s.stop()
	public := startOn(t, db, "--addr", "0.0.0.0:0")
	check(strings.Replace(public.url, "[::]", "127.0.0.1", 1))
	wantTokenStatus(t, strings.Replace(public.url, "[::]", "127.0.0.1", 1), kept, 200)
}

// Version 0.1.0 let a published secret and its tokens live on after a rotation.
func TestNextRotationEndsTheTokensThatVersion010Left(t *testing.T) {
	db := shortPath(t)
	s := startOn(t, db, "--demo")
	text := token(t, s.url, "demo", "demo-secret")
	s.stop()
	store, err := Open(db, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	second := credentials{"demo", newSecret()}
	known.Add(second.Secret)
	if _, err := store.RotateClient("demo", hashOf(second.Secret), time.Now().Add(time.Hour), nil); err != nil {
		t.Fatal(err)
	}
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	s = startOn(t, db)
	s.clock.move(2 * time.Hour) // beyond the grace
	wantTokenStatus(t, s.url, text, 200)
	printed := clientCommand(t, db, "rotate", "demo")
	if !strings.Contains(printed, "all of its tokens are refused from now on.\n") {
		t.Errorf("client rotate printed\n%s", printed)
	}
	wantTokenStatus(t, s.url, text, 401)
	wantSecret(t, s.url, second, false)
}
