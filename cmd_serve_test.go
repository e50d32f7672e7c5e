package main

// The serve command without the API: TLS, notices for systemd, logs and the version.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"

	"github.com/alecthomas/kong"
	"github.com/creack/pty"
	"go.etcd.io/bbolt"
)

// certified is a service with --tls-cert and --tls-key.
type certified struct {
	*process
	certFile, keyFile string
}

func startCertified(t testing.TB, pair servicetest.KeyPair) *certified {
	t.Helper()
	s := &certified{}
	s.certFile, s.keyFile = pair.Files(t)
	s.process = startProcess(t, nil, "--demo", "--tls-cert", s.certFile, "--tls-key", s.keyFile)
	return s
}

func TestTLSServesHTTP2AndHTTP1(t *testing.T) {
	pair := servicetest.NewKeyPair(t, 1)
	s := startCertified(t, pair)
	if !strings.HasPrefix(s.URL, "https://") {
		t.Fatalf("the log says %s", s.URL)
	}
	for _, tt := range []struct {
		http2 bool
		proto string
	}{{true, "HTTP/2.0"}, {false, "HTTP/1.1"}} {
		c := pair.Client(tt.http2)
		form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
		resp, got := do(t, c, "POST", s.URL+"/oauth2/token/", form, "grant_type=client_credentials&client_id=demo&client_secret=demo-secret")
		var granted struct {
			AccessToken string `json:"access_token"`
		}
		if err := json.Unmarshal([]byte(got), &granted); err != nil || resp.Proto != tt.proto {
			t.Fatalf("%s %s, %v\n%s", resp.Proto, resp.Status, err, got)
		}
		url := contractsURL(s.URL, demoOrg, demoUser) + "/" + demoContract
		bearer := with(jsonBody, "Authorization", "Bearer "+granted.AccessToken)
		resp, put := do(t, c, "PUT", url, bearer, `{"supplier":"`+tt.proto+`"}`)
		if resp.StatusCode != 200 || resp.Proto != tt.proto {
			t.Errorf("PUT: %s %s\n%s", resp.Proto, resp.Status, put)
		}
		resp, got = do(t, c, "GET", url, bearer, "")
		if resp.StatusCode != 200 || got != put || resp.Proto != tt.proto {
			t.Errorf("GET: %s %s\n%s\nwant\n%s", resp.Proto, resp.Status, got, put)
		}
		// A long response, in pieces.
		resp, put = do(t, c, "PUT", url, bearer, year(8760))
		if resp.StatusCode != 200 {
			t.Errorf("PUT: %s\n%.300s", resp.Status, put)
		}
		if resp, got = do(t, c, "GET", contractsURL(s.URL, demoOrg, demoUser), bearer, ""); !strings.Contains(got, put) {
			t.Errorf("GET: %s, %d bytes", resp.Status, len(got))
		}
		resp, got = do(t, c, "GET", s.URL+"/.well-known/oauth-authorization-server", nil, "")
		if !strings.Contains(got, `"issuer":"`+s.URL+`"`) {
			t.Errorf("%s\n%s", resp.Status, got)
		}
	}
	if !strings.Contains(s.Stdout.String(), "--url "+s.URL+"/api/") {
		t.Errorf("--demo prints\n%s", s.Stdout)
	}
}

func TestTLSCertificateIsReadAgainWhenItChanges(t *testing.T) {
	first, second := servicetest.NewKeyPair(t, 1), servicetest.NewKeyPair(t, 2)
	s := startCertified(t, first)
	wantTrust := func(when string, good, bad servicetest.KeyPair) {
		t.Helper()
		if resp, got := do(t, good.Client(false), "GET", s.URL+"/healthz", nil, ""); resp.StatusCode != 200 {
			t.Errorf("%s: %s\n%s", when, resp.Status, got)
		}
		if resp, err := bad.Client(false).Get(s.URL + "/healthz"); err == nil {
			resp.Body.Close()
			t.Errorf("%s: the other certificate is served", when)
		}
	}
	wantTrust("at first", first, second)
	writeTo(t, s.certFile, second.Cert)
	wantTrust("between the two files", first, second)
	writeTo(t, s.keyFile, second.Key)
	wantTrust("after both", second, first)
	for _, name := range []string{s.certFile, s.keyFile} { // as certbot and Kubernetes do
		if err := os.Rename(name, name+".old"); err != nil {
			t.Fatal(err)
		}
	}
	wantTrust("without files", second, first)
	writeTo(t, s.certFile+".new", first.Cert)
	writeTo(t, s.keyFile+".new", first.Key)
	for _, name := range []string{s.certFile, s.keyFile} {
		if err := os.Symlink(name+".new", name); err != nil {
			t.Fatal(err)
		}
	}
	wantTrust("by links", first, second)
	writeTo(t, s.certFile, []byte("broken"))
	wantTrust("broken", first, second)
	log := s.Stderr.String()
	for what, n := range map[string]int{
		`"level":"WARN","msg":"the TLS certificate or its key changed and cannot be used`: 3,
		`"level":"INFO","msg":"the TLS certificate changed","expires":"`:                  2,
	} {
		if got := strings.Count(log, what); got != n {
			t.Errorf("the log says %d times %s, want %d\n%s", got, what, n, log)
		}
	}
}

func TestTLSFilesThatAreWrongAreRefusedAtTheStart(t *testing.T) {
	cert, key := servicetest.NewKeyPair(t, 1).Files(t)
	_, otherKey := servicetest.NewKeyPair(t, 2).Files(t)
	for _, tt := range []struct {
		name, want string
		args       []string
	}{
		{"no key", "--tls-cert and --tls-key must be used together", []string{"--tls-cert", cert}},
		{"no certificate", "--tls-cert and --tls-key must be used together", []string{"--tls-key", key}},
		{"another key", "--tls-cert and --tls-key: tls: private key does not match public key; name a certificate and its key, in PEM files that this account may read\n", []string{"--tls-cert", cert, "--tls-key", otherKey}},
		{"a file that is not there", "--tls-cert and --tls-key: open " + cert + "x: no such file or directory; name a certificate and its key, in PEM files that this account may read\n", []string{"--tls-cert", cert + "x", "--tls-key", key}},
		{"a key for a certificate", "--tls-cert and --tls-key: tls: failed to find", []string{"--tls-cert", key, "--tls-key", key}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			db := newPath(t)
			if got := sentence(fails(t, append([]string{"serve", "--db", db, "--addr", "127.0.0.1:0"}, tt.args...)...)); !strings.Contains(got, tt.want) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
			if exists(db) {
				t.Error("there is a database all the same")
			}
		})
	}
}

func TestListeningBeyondLoopbackWithoutTLSIsAWarning(t *testing.T) {
	cert, key := servicetest.NewKeyPair(t, 1).Files(t)
	for _, tt := range []struct {
		name string
		args []string
		warn bool
	}{
		{"all addresses", []string{"--addr", "0.0.0.0:0"}, true},
		{"loopback", []string{"--addr", "127.0.0.1:0"}, false},
		{"IPv6's loopback", []string{"--addr", "[::1]:0"}, false},
		{"all addresses with TLS", []string{"--addr", "0.0.0.0:0", "--tls-cert", cert, "--tls-key", key}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := startProcess(t, nil, append([]string{"--db", newPath(t)}, tt.args...)...)
			if got := strings.Contains(p.Stderr.String(), `"level":"WARN","msg":"tokens and secrets travel unencrypted`); got != tt.warn {
				t.Errorf("warned: %v\n%s", got, p.Stderr)
			}
		})
	}
}

func TestAddressThatCannotBeUsedIsRefusedWithASentence(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	const use = "; use HOST:PORT with a host of this machine, such as 127.0.0.1:8080 or [::1]:8080"
	const help = "; --help explains the commands and flags"
	for _, tt := range []struct{ name, addr, want string }{
		{"no port", "127.0.0.1", "address 127.0.0.1: missing port in address" + use + help},
		{"no host", "8080", "address 8080: missing port in address" + use + help},
		{"a URL", "http://127.0.0.1:8080", "address http://127.0.0.1:8080: too many colons in address" + use + help},
		{"IPv6 without brackets", "::1:8080", "address ::1:8080: too many colons in address" + use + help},
		{"a port that is too large", "127.0.0.1:99999", "address 99999: invalid port" + use},
		{"an unknown port", "127.0.0.1:none", "lookup tcp/none: unknown port" + use},
		{"another machine's", "192.0.2.1:0", "listen tcp 192.0.2.1:0: bind: cannot assign requested address" + use},
		{"one in use", taken.Addr().String(), "listen tcp " + taken.Addr().String() + ": bind: address already in use; stop the process that listens there, or name another address"},
		{"root's", "127.0.0.1:80", "listen tcp 127.0.0.1:80: bind: permission denied; name a port from 1024 on, since lower ones need root"},
	} {
		for _, flag := range []string{"--addr", "--metrics-addr"} {
			t.Run(tt.name+" as "+flag, func(t *testing.T) {
				dir := filepath.Dir(shortPath(t))
				var wrapper []string
				if tt.name == "root's" {
					wrapper = asNobody(t)
					if err := os.Chmod(dir, 0o777); err != nil {
						t.Fatal(err)
					}
				}
				got := run(t, wrapper, "serve", "--addr", "127.0.0.1:0", "--db", filepath.Join(dir, "c.db"), flag, tt.addr)
				want := "energy-contracts: " + flag + ": " + tt.want + "\n"
				// Kong adds the command, and net.Listen what it does.
				said := strings.SplitAfter(strings.NewReplacer("energy-contracts: serve: ", "energy-contracts: ", "listen tcp: ", "").Replace(got.stderr), "\n")
				if got.status != 1 || said[len(said)-2] != want {
					t.Errorf("%+v\nwant %q", got, want)
				}
			})
		}
	}
	if got, want := fails(t, "serve", "--addr", ""), "energy-contracts: serve: --addr: missing port in address"+use+help+"\n"; got != want {
		t.Errorf("no address: %q, want %q", got, want)
	}
}

// supervised returns the notices for systemd, in order.
func supervised(t testing.TB) <-chan string {
	t.Helper()
	path := filepath.Join(filepath.Dir(shortPath(t)), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	told := make(chan string, 10)
	go func() {
		b := make([]byte, 1<<10)
		for {
			n, err := conn.Read(b)
			if err != nil {
				return
			}
			told <- string(b[:n])
		}
	}()
	return told
}

func wantTold(t testing.TB, told <-chan string, want string) {
	t.Helper()
	select {
	case got := <-told:
		if got != want {
			t.Errorf("systemd is told %q, want %q", got, want)
		}
	case <-time.After(20 * time.Second):
		t.Fatalf("systemd is not told %q", want)
	}
}

func TestSystemdIsToldOfStartAndStop(t *testing.T) {
	told := supervised(t)
	p := startProcess(t, nil, "--demo")
	wantTold(t, told, "READY=1")
	if resp, got := do(t, http.DefaultClient, "GET", p.URL+"/healthz", nil, ""); resp.StatusCode != 200 {
		t.Errorf("%s\n%s", resp.Status, got)
	}
	conn, _ := halfRequest(t, p.URL, token(t, p.URL, "demo", "demo-secret"))
	if err := p.Cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	wantTold(t, told, "STOPPING=1") // while a request is in flight
	fmt.Fprint(conn, `{"supplier":"last to go"}`)
	if err := <-p.Ended; err != nil {
		t.Errorf("%v\n%s", err, p.Stderr)
	}
	t.Run("not by a start that fails", func(t *testing.T) {
		fails(t, "serve", "--db", t.TempDir(), "--addr", "127.0.0.1:0")
		select {
		case got := <-told:
			t.Errorf("told %q", got)
		default:
		}
	})
}

// onTerminal runs the program with a terminal as its standard error until enough reports true
// for the output there, or the program exits.
func onTerminal(t testing.TB, enough func(seen string) bool, args ...string) (seen string, stdout string) {
	t.Helper()
	cmd := command(t, nil, args...)
	terminal, tty, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	if err := pty.Setsize(terminal, &pty.Winsize{Rows: 24, Cols: 120}); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, tty
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	tty.Close()
	shown := &lockedBuffer{}
	copied := make(chan struct{})
	go func() { _, _ = io.Copy(shown, terminal); close(copied) }()
	if enough != nil {
		waitFor(t, "enough is on the terminal", func() bool { return enough(shown.String()) })
		_ = cmd.Process.Signal(os.Interrupt)
	}
	err = cmd.Wait()
	<-copied
	if err != nil {
		t.Fatalf("%v\n%s%s", err, &out, shown)
	}
	return shown.String(), out.String()
}

func TestLogsAreTextOnATerminalAndJSONElsewhere(t *testing.T) {
	seen, _ := onTerminal(t, func(s string) bool { return strings.Contains(s, "msg=listening") }, "serve", "--addr", "127.0.0.1:0", "--demo", "--db", shortPath(t))
	for line := range strings.Lines(seen) {
		if !regexp.MustCompile(`^time=\S+ level=INFO msg=\S+.*\r\n$`).MatchString(line) {
			t.Errorf("on a terminal: %q", line)
		}
	}
	p := startProcess(t, nil, "--demo")
	for line := range strings.Lines(p.Stderr.String()) {
		var entry map[string]any
		if err := json.Unmarshal([]byte(line), &entry); err != nil || entry["msg"] == "" || entry["level"] == "" || entry["time"] == "" {
			t.Errorf("in a pipe: %q, %v", line, err)
		}
	}
}

func TestLogLevel(t *testing.T) {
	for _, tt := range []struct {
		level         string
		info, warning bool
	}{{"debug", true, true}, {"info", true, true}, {"warn", false, true}, {"error", false, false}} {
		t.Run(tt.level, func(t *testing.T) {
			cmd := command(t, nil, "serve", "--addr", "127.0.0.1:0", "--db", newPath(t), "--log-level", tt.level)
			stderr := &lockedBuffer{}
			cmd.Stderr = stderr
			told := supervised(t)
			cmd.Env = append(cmd.Environ(), "NOTIFY_SOCKET="+os.Getenv("NOTIFY_SOCKET"))
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			wantTold(t, told, "READY=1")
			_ = cmd.Process.Signal(os.Interrupt)
			if err := cmd.Wait(); err != nil {
				t.Fatalf("%v\n%s", err, stderr)
			}
			log := stderr.String()
			if got := strings.Contains(log, `"msg":"listening"`); got != tt.info {
				t.Errorf("says that it listens: %v\n%s", got, log)
			}
			if got := strings.Contains(log, `"msg":"there is no client yet`); got != tt.warning {
				t.Errorf("warns: %v\n%s", got, log)
			}
		})
	}
	if got := fails(t, "serve", "--log-level", "loud"); !strings.Contains(got, `--log-level must be one of "debug","info","warn","error"`) {
		t.Errorf("got %q", got)
	}
}

func TestProgressIsForTerminalsOnly(t *testing.T) {
	slow(t)
	t.Parallel()
	file := servicetest.ManyLines(t, 20_000, 500)
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		for _, tt := range []struct {
			args []string
			want []string
		}{
			{[]string{"import", file}, []string{"reading", "storing", "contracts"}},
			{[]string{"export", file + ".out"}, []string{"copying"}},
			{[]string{"backup", file + ".db"}, []string{"copying", "checking"}},
			{[]string{"check"}, []string{"checking"}},
		} {
			seen, stdout := onTerminal(t, nil, append(tt.args, "--db", db)...)
			for _, want := range tt.want {
				if !strings.Contains(seen, want) {
					t.Errorf("%q shows %q, want %s", tt.args, seen, want)
				}
			}
			if last := seen[strings.LastIndex(strings.TrimRight(seen, "\r"), "\r")+1:]; strings.TrimSpace(last) != "" {
				t.Errorf("%q leaves %q on the terminal", tt.args, last)
			}
			if strings.Contains(stdout, "\r") || strings.Contains(stdout, "%") {
				t.Errorf("%q prints %q", tt.args, stdout)
			}
			ok(t, db, tt.args...) // says nothing in a pipe
		}
	})
}

// Lines and a progress bar would disturb each other.
func TestExportToATerminalHasNoProgress(t *testing.T) {
	db := shortPath(t)
	ok(t, db, "import", absolute(t, contractLines))
	cmd := command(t, nil, "export", "--db", db)
	terminal, err := pty.Start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	seen, _ := io.ReadAll(terminal) // ends with an error when the program does
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if got := strings.ReplaceAll(string(seen), "\r\n", "\n"); got != readFile(t, contractLines) {
		t.Errorf("the terminal shows %q", got)
	}
}

// A command without a server has no flag for what it holds to.
func TestDefaultOfMaxBodyIsThatOfCommandsWithoutAServer(t *testing.T) {
	k, err := kong.New(&cli{})
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := k.Parse([]string{"serve"})
	if err != nil {
		t.Fatal(err)
	}
	if got := parsed.Selected().Target.Interface().(serveCmd).MaxBody; got != defaultMaxBody {
		t.Errorf("the default of --max-body is %d, defaultMaxBody is %d", got, defaultMaxBody)
	}
}

func TestCompactShowsProgress(t *testing.T) {
	db := shortPath(t)
	ok(t, db, "import", servicetest.ManyLines(t, 5000, 500))
	seen, stdout := onTerminal(t, nil, "compact", "--db", db)
	if !strings.Contains(seen, "checking") || !strings.Contains(seen, "rewriting") || strings.Count(stdout, "\n") != 1 {
		t.Errorf("shows %q, prints %q", seen, stdout)
	}
}

func TestVersionBesideAServerAndWithoutOne(t *testing.T) {
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		got := run(t, nil, "version")
		if got.status != 0 || got.stderr != "" || !regexp.MustCompile(`^energy-contracts \S+, commit \S+, go\S+\n$`).MatchString(got.stdout) {
			t.Errorf("%+v", got)
		}
		if flag := run(t, nil, "--version"); flag != got {
			t.Errorf("--version: %+v\nversion: %+v", flag, got)
		}
	})
}

func TestFileOfANewerProgramSaysWhichReadsIt(t *testing.T) {
	db := newPath(t)
	s, err := Open(db, time.Now, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	editBolt(t, db, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketMeta)
		if err := b.Put([]byte(programKey), []byte("v9.8.7")); err != nil {
			return err
		}
		return b.Put([]byte(formatKey), []byte("energy-contracts/3"))
	})
	// The built program may have a version although the test binary has none.
	version, _, _ := strings.Cut(strings.TrimPrefix(run(t, nil, "version").stdout, "energy-contracts "), ",")
	want := fmt.Sprintf("database %s: has format version 3, and this program (%s) reads version 2 and earlier; use energy-contracts \"v9.8.7\" or a later one", db, version)
	for _, args := range [][]string{{"serve", "--addr", "127.0.0.1:0"}, {"client", "list"}, {"backup", "x"}, {"check"}, {"compact"}, {"export"}, {"import", absolute(t, contractLines)}} {
		got := run(t, nil, append(args, "--db", db)...)
		if said := sentence(got.stderr); got.status != 1 || !strings.HasPrefix(said, "energy-contracts: "+want) {
			t.Errorf("%q: %+v\nwant %s", args, got, want)
		}
	}
}

// A profile would show the content of memory, and so would the stacks of a process that
// crashes.
func TestNoProfileIsServedAndStacksHaveNoSecrets(t *testing.T) {
	p := startProcess(t, nil, "--demo", "--metrics-addr", "127.0.0.1:0", "--db", shortPath(t))
	bearer := token(t, p.URL, "demo", "demo-secret")
	metrics := "http://" + metricsLine.FindStringSubmatch(p.Stderr.String())[1]
	for _, base := range []string{p.URL, metrics} {
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/vars"} {
			if resp, got := do(t, http.DefaultClient, "GET", base+path, nil, ""); resp.StatusCode != 404 {
				t.Errorf("GET %s: %s\n%.300s", base+path, resp.Status, got)
			}
		}
	}
	conn, _ := halfRequest(t, p.URL, bearer) // is in flight
	defer conn.Close()
	if err := p.Cmd.Process.Signal(syscall.SIGABRT); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Ended:
	case <-time.After(20 * time.Second):
		t.Fatal("still running after SIGABRT")
	}
	if !strings.Contains(p.Stderr.String(), "goroutine ") {
		t.Errorf("no stacks\n%s", p.Stderr)
	}
	known.WantNone(t, "the stacks", p.Stderr.String())
}
