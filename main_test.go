package main

// The command line as a person uses it.

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
)

func TestCommandLineRefusesWithASentence(t *testing.T) {
	db := filepath.Join(t.TempDir(), "x.db")
	for _, tt := range []struct {
		name string
		args []string
		want string
	}{
		{"nothing", nil, `expected one of "serve", "client"`},
		{"an unknown flag", []string{"serve", "--port", "80"}, "--help explains"},
		{"demo on all addresses", []string{"serve", "--demo", "--addr", ":0"}, "everyone knows its secrets; use a loopback address"},
		{"demo on another address", []string{"serve", "--demo", "--addr", "0.0.0.0:0"}, "everyone knows its secrets"},
		{"a body limit of nothing", []string{"serve", "--db", db, "--max-body", "0"}, "--max-body must be from 1 byte to 1 GiB"},
		{"tokens that never live", []string{"serve", "--db", db, "--token-lifetime", "0s"}, "--token-lifetime must be whole seconds, from 1s to 8760h"},
		{"tokens of a fraction of a second", []string{"serve", "--db", db, "--token-lifetime", "1500ms"}, "--token-lifetime must be whole seconds"},
		{"tokens for ever", []string{"serve", "--db", db, "--token-lifetime", "8761h"}, "--token-lifetime must be whole seconds"},
		{"a public URL with a query", []string{"serve", "--db", db, "--public-url", "https://energy.example/api?"}, "--public-url https://energy.example/api?: must be a URL such as https://energy.example or https://energy.example/energy, without query and fragment"},
		{"a public URL with a fragment", []string{"serve", "--db", db, "--public-url", "https://energy.example/api#a"}, "without query and fragment"},
		{"a public URL with a user", []string{"serve", "--db", db, "--public-url", "https://a@energy.example/api"}, "--public-url https://a@energy.example/api: must be a URL"},
		{"a public URL with two slashes", []string{"serve", "--db", db, "--public-url", "https://energy.example//"}, "must be a URL"},
		{"a public URL with dots", []string{"serve", "--db", db, "--public-url", "https://energy.example/a/%2e%2e/b"}, "must be a URL"},
		{"a public URL with a space", []string{"serve", "--db", db, "--public-url", "https://energy.example/a b"}, "must be a URL"},
		{"a public URL of another scheme", []string{"serve", "--db", db, "--public-url", "ftp://energy.example"}, "must be a URL"},
		{"an issuer without an audience", []string{"serve", "--db", db, "--issuer", "https://login.example"}, "--issuer and --audience must be used together"},
		{"an audience without an issuer", []string{"serve", "--db", db, "--audience", "energy"}, "--issuer and --audience must be used together"},
		{"an issuer that is no URL", []string{"serve", "--db", db, "--issuer", "login.example", "--audience", "energy"}, "--issuer login.example: must be the issuer's URL"},
		{"an issuer with a query", []string{"serve", "--db", db, "--issuer", "https://login.example/?a", "--audience", "energy"}, "without query and fragment"},
		{"no tokens at all", []string{"serve", "--db", db, "--no-built-in-tokens"}, "--no-built-in-tokens requires --issuer"},
		{"an origin with a path", []string{"serve", "--db", db, "--cors-origin", "https://app.example/"}, "--cors-origin https://app.example/: must be an origin such as"},
		{"an origin of files", []string{"serve", "--db", db, "--cors-origin", "null"}, "--cors-origin null: must be an origin"},
		{"an origin that is many", []string{"serve", "--db", db, "--cors-origin", "https://*.example"}, "--cors-origin https://*.example: must be one origin"},
		{"an origin with a port that browsers leave out", []string{"serve", "--db", db, "--cors-origin", "https://app.example:443"}, "--cors-origin https://app.example:443: must not have the port 443, since browsers leave it out"},
		{"a good origin and a bad one", []string{"serve", "--db", db, "--cors-origin", "https://app.example", "--cors-origin", "app"}, "--cors-origin app: must be an origin"},
		{"a demo without its tokens", []string{"serve", "--demo", "--no-built-in-tokens", "--issuer", "https://login.example", "--audience", "energy"}, "remove --no-built-in-tokens"},
		{"an organization that is none", []string{"client", "add", "--org", "x", "--db", db}, "--org must be a UUID of 36 characters, has 1"},
		{"no organization", []string{"client", "add", "--db", db}, "missing flags: --org"},
		{"an unknown scope", []string{"client", "add", "--org", demoOrg, "--scope", "admin", "--db", db}, "the scopes are read and write"},
		{"a directory that is not there", []string{"serve", "--db", filepath.Join(db, "y")}, "no such file or directory"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := fails(t, tt.args...); !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want %q in it", got, tt.want)
			}
		})
	}
	if exists(db) {
		t.Errorf("a refused command made %s", db)
	}
}

func TestHelpExplainsEachFlagAndItsVariable(t *testing.T) {
	out, err := command(t, nil, "serve", "--help").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"--addr", "$ENERGY_CONTRACTS_ADDR", "--db", "$ENERGY_CONTRACTS_DB",
		"--demo", "$ENERGY_CONTRACTS_DEMO", "--max-body", "$ENERGY_CONTRACTS_MAX_BODY",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("--help does not say %s\n%s", want, out)
		}
	}
}

func TestFlagsAreVariablesToo(t *testing.T) {
	t.Setenv("ENERGY_CONTRACTS_DEMO", "true")
	t.Setenv("ENERGY_CONTRACTS_MAX_BODY", "10")
	t.Setenv("ENERGY_CONTRACTS_CORS_ORIGIN", "https://app.example,http://localhost:3000")
	db := filepath.Join(t.TempDir(), "env.db")
	t.Setenv("ENERGY_CONTRACTS_DB", db)
	p := startProcess(t, nil)
	resp, got := do(t, client(p.URL, "demo", "demo-secret"), "PUT", contractsURL(p.URL, demoOrg, demoUser)+"/"+demoContract, jsonBody, `{"supplier":"a"}`)
	wantProblem(t, resp, got, 413)
	for _, origin := range []string{"https://app.example", "http://localhost:3000"} {
		resp, _ := do(t, http.DefaultClient, "GET", p.URL+"/healthz", http.Header{"Origin": {origin}}, "")
		if got := resp.Header.Get("Access-Control-Allow-Origin"); got != origin {
			t.Errorf("Access-Control-Allow-Origin: %q, want %s", got, origin)
		}
	}
	if !exists(db) {
		t.Errorf("%s is not there", db)
	}
}

func TestFirstStartSaysHowToAddAClient(t *testing.T) {
	db := filepath.Join(t.TempDir(), "new.db")
	p := startProcess(t, nil, "--db", db)
	want := `"command":"energy-contracts client add --org ORGANIZATION_UUID --db \"` + db + `\""`
	if !strings.Contains(p.Stderr.String(), want) {
		t.Errorf("the log does not say %s\n%s", want, p.Stderr)
	}
}

func TestDemo(t *testing.T) {
	t.Run("keeps its file in a directory that goes with it", func(t *testing.T) {
		tmp := t.TempDir()
		t.Setenv("TMPDIR", tmp)
		p := startProcess(t, nil, "--demo")
		if files, _ := filepath.Glob(tmp + "/*/*"); len(files) != 1 {
			t.Errorf("files: %v", files)
		}
		if err := p.Terminate(t); err != nil {
			t.Errorf("SIGTERM: %v", err)
		}
		if files, _ := filepath.Glob(tmp + "/*"); len(files) != 0 {
			t.Errorf("left behind: %v", files)
		}
	})
	t.Run("says what to do without a directory for temporary files", func(t *testing.T) {
		none := filepath.Join(t.TempDir(), "none")
		t.Setenv("TMPDIR", none)
		want := "energy-contracts: create a directory for the demo database: stat " + none + ": no such file or directory; name a file with --db, or a directory for temporary files with the variable TMPDIR\n"
		if got := sentence(fails(t, "serve", "--demo", "--addr", "127.0.0.1:0")); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
	t.Run("loads its data into a file once", func(t *testing.T) {
		db := filepath.Join(t.TempDir(), "demo.db")
		for round := range 2 {
			s := startOn(t, db, "--demo")
			url := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
			method, want := "DELETE", 204
			if round == 1 {
				method, want = "GET", 404
			}
			if resp, got := do(t, client(s.url, "demo", "demo-secret"), method, url, nil, ""); resp.StatusCode != want {
				t.Errorf("%s in round %d: %s\n%s", method, round, resp.Status, got)
			}
			s.stop()
		}
	})
	t.Run("and its secrets are refused on other addresses later", func(t *testing.T) {
		db := filepath.Join(t.TempDir(), "demo.db")
		startOn(t, db, "--demo").stop()
		if got := fails(t, "serve", "--db", db, "--addr", "0.0.0.0:0"); !strings.Contains(got, "has the clients of --demo, whose secrets everyone knows") {
			t.Errorf("got %q", got)
		}
	})
}

func TestDemoCommandsWorkAsPasted(t *testing.T) {
	needTool(t, "curl")
	p := startProcess(t, nil, "--demo")
	waitFor(t, "the commands are printed", func() bool { return strings.HasSuffix(p.Stdout.String(), "'\n\n") })
	blocks := strings.SplitAfter(p.Stdout.String(), "\n\n")
	var script string
	for _, b := range blocks { // without the sentences between them
		if strings.HasPrefix(b, "TOKEN=") || strings.HasPrefix(b, "curl ") {
			script += b
		}
	}
	cmd := exec.Command("sh", "-eu")
	cmd.Stdin = strings.NewReader(script)
	out, err := cmd.CombinedOutput()
	want := `{"energy_contract_type":"spot_hourly","energy_prices":[{"price":0.2134,"timestamp":"2026-11-23T17:00:00+01:00"},{"price":0.1875,"timestamp":"2026-11-23T18:00:00+01:00"}],"id":"3c90c3cc-0d44-4b50-8888-8dd25736052a","building":"8d6f2f4a-51c6-4a0b-9d3e-6b1f0c7a2e94","meter_id":"735999102100010234","supplier":"Nordlys Energi AB","currency_energy_price":"EUR","energy_price_includes_external_components":true}`
	if err != nil || !strings.HasSuffix(string(out), want) {
		t.Errorf("%v\n%s\nwant\n%s\nof\n%s", err, out, want, script)
	}
}

func TestSignal(t *testing.T) {
	for _, sig := range []os.Signal{syscall.SIGTERM, os.Interrupt} {
		t.Run(fmt.Sprint(sig, " finishes the request in flight"), func(t *testing.T) {
			db := filepath.Join(t.TempDir(), "test.db")
			p := startProcess(t, nil, "--demo", "--db", db)
			conn, sent := halfRequest(t, p.URL, token(t, p.URL, "demo", "demo-secret"))
			if err := p.Cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			waitFor(t, "the log says that it stops", func() bool { return strings.Contains(p.Stderr.String(), "stopping") })
			const rest = `{"supplier":"last to go"}`
			fmt.Fprint(conn, rest)
			resp, got, err := described().Read(t, conn, sent+rest)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != 200 || !strings.Contains(got, "last to go") {
				t.Errorf("%s\n%s", resp.Status, got)
			}
			if err := <-p.Ended; err != nil {
				t.Errorf("%v\n%s", err, p.Stderr)
			}
			again := startOn(t, db, "--demo")
			_, kept := do(t, client(again.url, "demo", "demo-secret"), "GET", contractsURL(again.url, demoOrg, demoUser)+"/"+demoContract, nil, "")
			if kept != got {
				t.Errorf("answered %s\nkept %s", got, kept)
			}
		})
	}
	t.Run("the second one ends it at once", func(t *testing.T) {
		p := startProcess(t, nil, "--demo")
		halfRequest(t, p.URL, token(t, p.URL, "demo", "demo-secret"))
		if err := p.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		waitFor(t, "the log says that it stops", func() bool { return strings.Contains(p.Stderr.String(), "stopping") })
		// Otherwise it would take the whole shutdownTimeout and exit with status 0.
		if err := p.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		<-p.Ended
		if status := p.Cmd.ProcessState.Sys().(syscall.WaitStatus); !status.Signaled() || status.Signal() != syscall.SIGTERM {
			t.Errorf("ended with %v\n%s", p.Cmd.ProcessState, p.Stderr)
		}
	})
}

// A route that is not registered with handle would be missing in the list of routes, and so in
// their tests.
func TestEachRouteIsRegisteredByHandle(t *testing.T) {
	registered := regexp.MustCompile(`router\.(Handle|Handler|HandlerFunc|ServeFiles|GET|HEAD|OPTIONS|POST|PUT|PATCH|DELETE)\(`)
	if found := registered.FindAllString(readFile(t, "router.go"), -1); len(found) != 1 {
		t.Errorf("router.go registers routes by %q, want it once, in handle", found)
	}
}
