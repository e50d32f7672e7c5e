package main

// How the tests run the service: as main does, over TCP, on a real file, in this
// process or in one of its own.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.etcd.io/bbolt"
	"golang.org/x/oauth2/clientcredentials"
)

// The demo data that the tests rely on, as clients may.
const (
	demoOrg      = "5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11"
	demoOtherOrg = "c2a7e5d4-3b1f-4e8a-8f60-7d9b5a1c3e22"
	demoUser     = "016b78a7-0c7c-4241-a277-015c3ad3cb90"
	demoContract = "3c90c3cc-0d44-4b50-8888-8dd25736052a"
)

// tokenLifetime is the default of --token-lifetime.
const tokenLifetime = 10 * time.Hour

func contractsURL(base, org, user string) string {
	return base + "/api/partners/v2.0/org/" + org + "/users/" + user + "/energy-contracts"
}

// service is the service, running in this process.
type service struct {
	url   string
	db    string
	clock *clock
	log   *lockedBuffer
	stop  func() // ends it as SIGTERM does, and waits
}

// start runs "serve" on a new file.
func start(t testing.TB, args ...string) *service {
	t.Helper()
	return startOn(t, filepath.Join(t.TempDir(), "test.db"), args...)
}

// startOn runs "serve" on a free port until the test ends. Then the file must be
// sound.
func startOn(t testing.TB, db string, args ...string) *service {
	t.Helper()
	s := &service{db: db, clock: &clock{}, log: &lockedBuffer{}}
	ctx, cancel := context.WithCancel(context.Background())
	addr, ended := make(chan net.Addr, 1), make(chan error, 1)
	a := &app{
		stdout:    io.Discard,
		log:       slog.New(slog.NewTextHandler(s.log, nil)),
		logLevel:  new(slog.LevelVar),
		now:       s.clock.now,
		listening: func(a net.Addr) { addr <- a },
	}
	go func() { ended <- a.run(ctx, append([]string{"serve", "--addr", "127.0.0.1:0", "--db", s.db}, args...)) }()
	select {
	case a := <-addr:
		s.url = "http://" + a.String()
		described().Serves(t, s.url)
	case err := <-ended:
		t.Fatalf("serve ended at once: %v", err)
	}
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
		checkFileSound(t, s.db)
		known.WantNone(t, "the log", s.log.String())
		known.WantNoneIn(t, s.db)
	})
	t.Cleanup(s.stop)
	return s
}

// checkFileSound runs bbolt's consistency check.
func checkFileSound(t testing.TB, path string) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second, ReadOnly: true, PreLoadFreelist: true})
	if err != nil {
		t.Errorf("open %s: %v", path, err)
		return
	}
	defer db.Close()
	_ = db.View(func(tx *bbolt.Tx) error {
		for err := range tx.Check() {
			t.Errorf("check %s: %v", path, err)
		}
		return nil
	})
}

// client is a client of an organization, with tokens got by a library that is
// not ours.
func client(url, id, secret string, scopes ...string) *http.Client {
	c := clientcredentials.Config{ClientID: id, ClientSecret: secret, TokenURL: url + "/oauth2/token/", Scopes: scopes}
	return c.Client(context.Background())
}

// token gets an access token for a client.
func token(t testing.TB, url, id, secret string, scopes ...string) string {
	t.Helper()
	c := clientcredentials.Config{ClientID: id, ClientSecret: secret, TokenURL: url + "/oauth2/token/", Scopes: scopes}
	got, err := c.Token(context.Background())
	if err != nil {
		t.Fatalf("token for %s: %v", id, err)
	}
	return got.AccessToken
}

// do sends a request and reads the whole answer.
func do(t testing.TB, c *http.Client, method, url string, header http.Header, body string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if header != nil {
		req.Header = header.Clone()
		req.Host = header.Get("Host") // which Go takes from nowhere else
	}
	resp, content, err := answerOf(c, req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	return resp, content
}

// answerOf reads the whole answer to a request. The response is nil if none came.
func answerOf(c *http.Client, req *http.Request) (*http.Response, string, error) {
	resp, err := c.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		err = fmt.Errorf("read answer: %w", err)
	}
	return resp, string(b), err
}

// compact is JSON as the service writes it.
func compact(t testing.TB, text string) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Compact(&b, []byte(text)); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

var jsonBody = http.Header{"Content-Type": {"application/json"}}

// clock is the time, moved by a test.
type clock struct {
	mu      sync.Mutex
	moved   time.Duration
	stopped time.Time // zero: it goes on
}

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.stopped.IsZero() {
		return c.stopped.Add(c.moved)
	}
	return time.Now().Add(c.moved)
}

// stop has the clock stand still.
func (c *clock) stop(at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stopped = at
}

func (c *clock) move(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.moved += d
}

// lockedBuffer is a bytes.Buffer that is read while it is written.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// program builds the program, once.
var program = sync.OnceValues(func() (string, error) {
	path := filepath.Join(buildDir, "energy-contracts")
	out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("go build: %w\n%s", err, out)
	}
	return path, nil
})

var buildDir string

func TestMain(m *testing.M) {
	if serve := bareServers[os.Getenv(bareEnv)]; serve != nil {
		if err := serve(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	dir, err := os.MkdirTemp("", "energy-contracts-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	buildDir = dir
	if err := os.Chmod(dir, 0o755); err != nil { // for tests that run the program as another user
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	http.DefaultTransport = validated{http.DefaultTransport.(*http.Transport)}
	flag.Parse()
	code := described().Verdict(m.Run())
	os.RemoveAll(dir)
	os.Exit(code)
}

// nestedProgram builds a program that has a module of its own under testdata, once.
func nestedProgram(name string) func() (string, error) {
	return sync.OnceValues(func() (path string, err error) {
		path, dir := filepath.Join(buildDir, name), filepath.Join("testdata", name)
		if err := goIn(dir, "mod", "download"); err != nil {
			return "", errNoModules{err}
		}
		return path, goIn(dir, "build", "-o", path, ".")
	})
}

// goIn runs the go command in a directory.
func goIn(dir string, args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s in %s: %w\n%s", strings.Join(args, " "), dir, err, out)
	}
	return nil
}

// succeeds runs a command and returns what it prints.
func succeeds(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s%s", cmd.Args, err, out, &stderr)
	}
	return string(out)
}

// errNoModules: the modules of a nested program cannot be downloaded.
type errNoModules struct{ error }

// needNested skips a test whose nested program cannot be had; where CI=true it fails.
func needNested(t testing.TB, program func() (string, error)) (path string) {
	t.Helper()
	path, err := program()
	if errors.As(err, new(errNoModules)) {
		lacking(t, "the modules of a program to test with cannot be had: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// process is the service in a process of its own.
type process struct {
	URL    string
	Cmd    *exec.Cmd
	Stdout *lockedBuffer
	Stderr *lockedBuffer
	Ended  chan error // gets what Wait returns
}

// command is the built program with arguments, behind a wrapper such as strace.
func command(t testing.TB, wrapper []string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	line := append(append(wrapper[:len(wrapper):len(wrapper)], path), args...)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Dir = t.TempDir()
	if os.Getenv("TMPDIR") == "" { // what --demo leaves when it is killed
		cmd.Env = append(os.Environ(), "TMPDIR="+t.TempDir())
	}
	return cmd
}

var listeningLine = regexp.MustCompile(`"msg":"listening","addr":"([^"]+)","scheme":"([^"]+)"`)

// startProcess runs "serve" on a free port and waits until it listens. The test
// ends it, or its cleanup kills it.
func startProcess(t testing.TB, wrapper []string, args ...string) *process {
	t.Helper()
	p := launch(t, wrapper, args...)
	if p.URL == "" {
		t.Fatalf("%v ended at once: %v\n%s", p.Cmd.Args, <-p.Ended, p.Stderr)
	}
	return p
}

// launch runs "serve" until it listens, or has ended without: then url is "".
func launch(t testing.TB, wrapper []string, args ...string) *process {
	t.Helper()
	p := &process{
		Cmd:    command(t, wrapper, append([]string{"serve", "--addr", "127.0.0.1:0"}, args...)...),
		Stdout: &lockedBuffer{}, Stderr: &lockedBuffer{}, Ended: make(chan error, 1),
	}
	p.Cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that a wrapper's child is killed too
	p.Cmd.Stdout = p.Stdout
	pipe, err := p.Cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Cmd.Start(); err != nil {
		t.Fatalf("%v: %v", p.Cmd.Args, err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-p.Cmd.Process.Pid, syscall.SIGKILL)
		known.WantNone(t, "the log", p.Stderr.String())
		known.WantNoneIn(t, databaseOf(args))
	})
	listening := make(chan string, 1)
	go func() {
		lines := bufio.NewScanner(pipe)
		lines.Buffer(nil, 1<<20) // the stack of a panic is one line
		for lines.Scan() {
			fmt.Fprintln(p.Stderr, lines.Text())
			if m := listeningLine.FindStringSubmatch(lines.Text()); m != nil {
				listening <- m[2] + "://" + m[1]
			}
		}
		close(listening)
		p.Ended <- p.Cmd.Wait()
	}()
	select {
	case p.URL = <-listening:
		if p.URL != "" {
			described().Serves(t, p.URL)
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("%v neither listens nor ends\n%s", p.Cmd.Args, p.Stderr)
	}
	return p
}

// terminate sends SIGTERM and returns what the process ended with.
func (p *process) Terminate(t testing.TB) error {
	t.Helper()
	if err := p.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-p.Ended:
		return err
	case <-time.After(30 * time.Second):
		t.Fatalf("still running 30 s after SIGTERM\n%s", p.Stderr)
		return nil
	}
}

// waitUntil asks again and again until there is no error.
func waitUntil(t testing.TB, limit time.Duration, what string, ask func() error) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		err := ask()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v it is not so that %s: %v", limit, what, err)
		}
	}
}

// waitFor waits until something is so that nothing tells of.
func waitFor(t testing.TB, what string, done func() bool) {
	t.Helper()
	waitUntil(t, 20*time.Second, what, func() error {
		if !done() {
			return errors.New("not yet")
		}
		return nil
	})
}

// longEnv is the variable that has the tests of faults and attackers take as long as
// they can be of use.
const longEnv = "LONG"

// shortOr is how much a test does: of the two the long form where longEnv is set.
func shortOr[N any](short, long N) N {
	if os.Getenv(longEnv) != "" {
		return long
	}
	return short
}

// needTool skips a test without the tool; where CI=true it fails.
func needTool(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		lacking(t, "%s is not installed; .ci/run says which package has it, and installs it", name)
	}
}

// lacking skips a test for want of something; where CI=true it fails.
func lacking(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}
