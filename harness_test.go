package main

// The harness: it runs the service as main does, over TCP and on a real file, in the
// process of the test or in a process of its own.

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"

	"go.etcd.io/bbolt"
)

// Names that these tests share with those of e2e.
const (
	demoOrg      = servicetest.DemoOrg
	demoOtherOrg = servicetest.DemoOtherOrg
	demoUser     = servicetest.DemoUser
	demoContract = servicetest.DemoContract
)

type (
	process      = servicetest.Process
	lockedBuffer = servicetest.LockedBuffer
	validated    = servicetest.Validated
	operation    = servicetest.Operation
	failure      = servicetest.Failure
)

var (
	described       = servicetest.Described
	known           = servicetest.Known
	contractsURL    = servicetest.ContractsURL
	client          = servicetest.Client
	token           = servicetest.Token
	do              = servicetest.Do
	jsonBody        = servicetest.JSONBody
	with            = servicetest.With
	year            = servicetest.Year
	wantProblem     = servicetest.WantProblem
	wantUnavailable = servicetest.WantUnavailable
	operations      = servicetest.Operations
	export          = servicetest.Export
	readFile        = servicetest.ReadFile
	writeTo         = servicetest.WriteFile
	writeFile       = servicetest.NewFile
	newPath         = servicetest.NewPath
	shortPath       = servicetest.ShortPath
	checkFileSound  = servicetest.CheckFileSound
	waitUntil       = servicetest.WaitUntil
	waitFor         = servicetest.WaitFor
	needTool        = servicetest.NeedTool
	needNested      = servicetest.NeedNested
	nestedProgram   = servicetest.NestedProgram
)

// programEnv is the environment variable that makes the test binary run main. So a child
// process has the race detector and the coverage counters of the tests.
const programEnv = "ENERGY_CONTRACTS_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(programEnv) != "" {
		main()
		return
	}
	os.Exit(servicetest.Main(m, true))
}

// slow skips a test under -short.
func slow(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("it takes long, or needs a program that is built for it; run it without -short")
	}
}

// program returns the path of the test binary, in a directory that other users may enter.
var program = sync.OnceValues(func() (string, error) {
	binary, err := os.Executable()
	if err != nil {
		return "", err
	}
	path := filepath.Join(servicetest.BuildDir(), "energy-contracts")
	if os.Link(binary, path) == nil {
		return path, nil
	}
	content, err := os.ReadFile(binary) // it is on another file system
	if err != nil {
		return "", err
	}
	return path, os.WriteFile(path, content, 0o755)
})

// uncounted returns a directory for the coverage counters of a process that may not write
// to the directory where the counters of the other processes are added up.
var uncounted = sync.OnceValues(func() (string, error) {
	path := filepath.Join(servicetest.BuildDir(), "uncounted")
	if err := os.Mkdir(path, 0o777); err != nil {
		return "", err
	}
	return path, os.Chmod(path, 0o777) // whatever the umask
})

// command returns a command that runs the program with args, behind a wrapper such as
// setpriv.
func command(t testing.TB, wrapper []string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	cmd := servicetest.Command(t, wrapper, path, args...)
	// By default the race detector sleeps for a second before the process exits.
	cmd.Env = append(cmd.Env, programEnv+"=1", "GORACE=atexit_sleep_ms=10 "+os.Getenv("GORACE"))
	if testing.CoverMode() != "" {
		dir := flag.Lookup("test.gocoverdir").Value.String()
		if dir == "" || len(wrapper) > 0 {
			if dir, err = uncounted(); err != nil {
				t.Fatal(err)
			}
		}
		cmd.Env = append(cmd.Env, "GOCOVERDIR="+dir)
	}
	return cmd
}

// serve returns a command that runs serve on a free port.
func serve(t testing.TB, wrapper []string, args ...string) *exec.Cmd {
	t.Helper()
	return command(t, wrapper, append([]string{"serve", "--addr", "127.0.0.1:0"}, args...)...)
}

// startProcess runs serve on a free port and waits until it listens. The cleanup of the
// test kills it if it still runs.
func startProcess(t testing.TB, wrapper []string, args ...string) *process {
	t.Helper()
	return servicetest.Start(t, serve(t, wrapper, args...))
}

// launch is like startProcess, but the server may exit without listening. Then its URL is "".
func launch(t testing.TB, wrapper []string, args ...string) *process {
	t.Helper()
	return servicetest.Launch(t, serve(t, wrapper, args...))
}

// ran is the result of a command.
type ran struct {
	stdout, stderr string
	status         int
}

// run runs the program until it exits.
func run(t testing.TB, wrapper []string, args ...string) ran {
	t.Helper()
	cmd := command(t, wrapper, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	known.WantNone(t, "stderr", stderr.String())
	return ran{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// contractLines is the name of a file with an export of four contracts.
const contractLines = "testdata/contracts.jsonl"

// ok runs a command on a database and returns its output. It fails the test unless the
// command succeeds and prints nothing on standard error.
func ok(t testing.TB, db string, args ...string) (stdout string) {
	t.Helper()
	got := run(t, nil, append(args, "--db", db)...)
	if got.status != 0 || got.stderr != "" {
		t.Fatalf("%q: %+v", args, got)
	}
	return got.stdout
}

// refusedCommand runs a command on a database. It fails the test unless the command exits
// with status 1 and prints one sentence.
func refusedCommand(t testing.TB, db, want string, args ...string) (stdout string) {
	t.Helper()
	got := run(t, nil, append(args, "--db", db)...)
	if got.status != 1 || got.stderr != "energy-contracts: "+want+"\n" {
		t.Errorf("%q: %+v\nwant %q", args, got, want)
	}
	return got.stdout
}

// absolute returns the absolute path of a file, for a command in another directory.
func absolute(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// wantMode fails the test unless only the owner may read and write the file.
func wantMode(t testing.TB, path string) {
	t.Helper()
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%s: %v, %v; want mode 0600", path, info, err)
	}
}

// wantExport fails the test unless the export of a database is want.
func wantExport(t testing.TB, db, want string) {
	t.Helper()
	if got := ok(t, db, "export"); got != want {
		t.Errorf("the export of %s is\n%s\nwant\n%s", db, head(got), head(want))
	}
}

// fails runs the program, which must exit with status 1, and returns its message.
func fails(t testing.TB, args ...string) string {
	t.Helper()
	cmd := command(t, nil, args...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	err := cmd.Run()
	if err == nil || cmd.ProcessState.ExitCode() != 1 || strings.Contains(stderr.String(), "goroutine ") {
		t.Fatalf("%v: %v, want exit status 1\n%s", args, err, &stderr)
	}
	return stderr.String()
}

// sentence returns stderr without the first log line of serve.
func sentence(stderr string) string {
	if strings.HasPrefix(stderr, `{"time":`) {
		_, stderr, _ = strings.Cut(stderr, "\n")
	}
	return stderr
}

// head returns the beginning of a text, for a message.
func head(text string) string {
	const enough = 500
	if len(text) <= enough {
		return text
	}
	return fmt.Sprintf("%s… (%d bytes)", text[:enough], len(text))
}

// besideAndWithout runs a test of commands twice: with a running server, and without one
// until the test asks for the server's URL.
func besideAndWithout(t *testing.T, test func(t *testing.T, db string, served func() string)) {
	t.Helper()
	t.Run("beside a server", func(t *testing.T) {
		db := shortPath(t)
		p := startProcess(t, nil, "--db", db)
		test(t, db, func() string { return p.URL })
	})
	t.Run("without a server", func(t *testing.T) {
		db := shortPath(t)
		test(t, db, func() string { return startProcess(t, nil, "--db", db).URL })
	})
}

// halfRequest sends the start of a PUT and returns its connection once the handler has
// asked for the body.
func halfRequest(t testing.TB, url, token string) (conn *net.TCPConn, sent string) {
	t.Helper()
	dialed, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { dialed.Close() })
	sent = fmt.Sprintf("PUT %s/%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 25\r\nExpect: 100-continue\r\n\r\n",
		contractsURL("", demoOrg, demoUser), demoContract, token)
	if _, err := io.WriteString(dialed, sent); err != nil {
		t.Fatal(err)
	}
	const want = "HTTP/1.1 100 Continue\r\n\r\n"
	got := make([]byte, len(want))
	if _, err := io.ReadFull(dialed, got); err != nil || string(got) != want {
		t.Fatalf("got %q, %v", got, err)
	}
	return dialed.(*net.TCPConn), sent
}

// nobody is the id of the user and of the group in asNobody.
const nobody = 65534

// asNobody returns a wrapper that drops the rights of root, or none if the test is not run
// by root.
func asNobody(t testing.TB) []string {
	t.Helper()
	if os.Getuid() != 0 {
		return nil
	}
	needTool(t, "setpriv")
	id := fmt.Sprint(nobody)
	return []string{"setpriv", "--reuid", id, "--regid", id, "--clear-groups"}
}

// startPiped starts a command whose standard input is a pipe. It is killed at the end of the test.
func startPiped(t testing.TB, args ...string) (cmd *exec.Cmd, stdin io.WriteCloser, stderr *bytes.Buffer) {
	t.Helper()
	cmd, stderr = command(t, nil, args...), new(bytes.Buffer)
	cmd.Stderr = stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd, stdin, stderr
}

// wantFiles fails the test unless a directory has exactly these names.
func wantFiles(t testing.TB, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s has %q, want %q", dir, got, want)
	}
}

// editBolt changes a database with bbolt alone, without the store.
func editBolt(t testing.TB, path string, edit func(*bbolt.Tx) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	if err := db.Update(edit); err != nil {
		t.Fatal(err)
	}
}

// tokenLifetime is the default value of --token-lifetime.
const tokenLifetime = 10 * time.Hour

// service is the service in the process of the test.
type service struct {
	url   string
	db    string
	clock *clock
	log   *lockedBuffer
	stop  func() // ends it as SIGTERM does, and waits
}

// start runs serve on a new file.
func start(t testing.TB, args ...string) *service {
	t.Helper()
	return startOn(t, filepath.Join(t.TempDir(), "test.db"), args...)
}

// startOn runs serve on a free port until the test ends. Then it fails the test unless the
// file is sound.
func startOn(t testing.TB, db string, args ...string) *service {
	t.Helper()
	s := &service{db: db, clock: &clock{}, log: &lockedBuffer{}}
	ctx, cancel := context.WithCancel(context.Background())
	addr, ended := make(chan net.Addr, 1), make(chan error, 1)
	level := new(slog.LevelVar)
	a := &app{
		stdout:    io.Discard,
		log:       slog.New(slog.NewTextHandler(s.log, &slog.HandlerOptions{Level: level})),
		logLevel:  level,
		now:       s.clock.now,
		detach:    func() {},
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

// compact returns JSON in the form that the service writes.
func compact(t testing.TB, text string) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Compact(&b, []byte(text)); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// clock is the clock of a service, which a test can move and stop.
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

// stop makes the clock stand still.
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

// author writes contracts of the demo user that are larger than a page of the file, and
// keeps the expected document of each.
type author struct {
	base, bearer string
	want         map[string]string // by id, the document
}

// newAuthor returns an author that knows the first contract of the demo user.
func newAuthor(t testing.TB, base string) *author {
	t.Helper()
	a := &author{base: base, bearer: token(t, base, "demo", "demo-secret"), want: map[string]string{}}
	a.want[demoContract] = a.send(t, 200, "GET", "/"+demoContract, nil, "")
	return a
}

// send requests the contracts of the demo user, or one of them, and returns the body of the
// response. It fails the test unless the response has the status.
func (a *author) send(t testing.TB, status int, method, path string, header http.Header, body string) string {
	t.Helper()
	if header == nil {
		header = http.Header{}
	}
	resp, got := do(t, http.DefaultClient, method, contractsURL(a.base, demoOrg, demoUser)+path, with(header, "Authorization", "Bearer "+a.bearer), body)
	if resp.StatusCode != status {
		t.Fatalf("%s %s: %s, want %d\n%s", method, path, resp.Status, status, head(got))
	}
	return got
}

// largeContract is the number of prices in a contract of an author. Its document has about
// 100 KB.
const largeContract = 2000

func (a *author) create(t testing.TB, id ID) {
	t.Helper()
	a.want[string(id)] = a.send(t, 201, "PUT", "/"+string(id), with(jsonBody, "If-None-Match", "*"), year(largeContract))
}

func (a *author) remove(t testing.TB, id ID) {
	t.Helper()
	a.send(t, 204, "DELETE", "/"+string(id), nil, "")
	delete(a.want, string(id))
}

// list returns the list of all contracts of the demo user.
func (a *author) list(t testing.TB) string {
	t.Helper()
	return a.send(t, 200, "GET", "", nil, "")
}

// check fails the test unless each contract has its expected document.
func (a *author) check(t testing.TB) {
	t.Helper()
	for id, want := range a.want {
		if got := a.send(t, 200, "GET", "/"+id, nil, ""); got != want {
			t.Errorf("GET %s: %s\nwant\n%s", id, head(got), head(want))
		}
	}
}
