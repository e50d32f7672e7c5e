package main

// How the tests run the service: as main does, over TCP, on a real file, in this
// process or in one of its own.

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

// What the tests here share with those of e2e.
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

// programEnv has the test binary be the program: main of the package, with the race
// detector and the counters of coverage that the tests have.
const programEnv = "ENERGY_CONTRACTS_TEST_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(programEnv) != "" {
		main()
		return
	}
	os.Exit(servicetest.Main(m, true))
}

// slow skips a test under -short, which is for an answer while one writes.
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

// uncounted returns a directory for the counters of coverage of a process that may not
// write to where those of the others are added up.
var uncounted = sync.OnceValues(func() (string, error) {
	path := filepath.Join(servicetest.BuildDir(), "uncounted")
	if err := os.Mkdir(path, 0o777); err != nil {
		return "", err
	}
	return path, os.Chmod(path, 0o777) // whatever the umask
})

// command is the program with arguments, behind a wrapper such as setpriv.
func command(t testing.TB, wrapper []string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	cmd := servicetest.Command(t, wrapper, path, args...)
	// A process with the race detector in it would sleep for a second before it ends.
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

// serve is the command "serve" on a free port.
func serve(t testing.TB, wrapper []string, args ...string) *exec.Cmd {
	t.Helper()
	return command(t, wrapper, append([]string{"serve", "--addr", "127.0.0.1:0"}, args...)...)
}

// startProcess runs "serve" on a free port and waits until it listens. The test
// ends it, or its cleanup kills it.
func startProcess(t testing.TB, wrapper []string, args ...string) *process {
	t.Helper()
	return servicetest.Start(t, serve(t, wrapper, args...))
}

// launch is startProcess for a server that may end without listening: then its URL is "".
func launch(t testing.TB, wrapper []string, args ...string) *process {
	t.Helper()
	return servicetest.Launch(t, serve(t, wrapper, args...))
}

// ran is what became of a command.
type ran struct {
	stdout, stderr string
	status         int
}

// run runs the program to its end.
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

// contractLines is an export.
const contractLines = "testdata/contracts.jsonl"

// ok runs a command on a database, wants it to succeed without complaint, and returns
// what it prints.
func ok(t testing.TB, db string, args ...string) (stdout string) {
	t.Helper()
	got := run(t, nil, append(args, "--db", db)...)
	if got.status != 0 || got.stderr != "" {
		t.Fatalf("%q: %+v", args, got)
	}
	return got.stdout
}

// refusedCommand runs a command on a database and wants it to exit 1 with one sentence.
func refusedCommand(t testing.TB, db, want string, args ...string) (stdout string) {
	t.Helper()
	got := run(t, nil, append(args, "--db", db)...)
	if got.status != 1 || got.stderr != "energy-contracts: "+want+"\n" {
		t.Errorf("%q: %+v\nwant %q", args, got, want)
	}
	return got.stdout
}

// absolute is a file of ours for a command, which runs elsewhere.
func absolute(t testing.TB, name string) string {
	t.Helper()
	path, err := filepath.Abs(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// wantMode is for files that are the owner's alone.
func wantMode(t testing.TB, path string) {
	t.Helper()
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%s: %v, %v; want mode 0600", path, info, err)
	}
}

// wantExport compares what is in a database with lines.
func wantExport(t testing.TB, db, want string) {
	t.Helper()
	if got := ok(t, db, "export"); got != want {
		t.Errorf("the export of %s is\n%s\nwant\n%s", db, head(got), head(want))
	}
}

// fails runs the program and returns what it says when it exits 1.
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

// sentence is stderr without serve's first line of the log.
func sentence(stderr string) string {
	if strings.HasPrefix(stderr, `{"time":`) {
		_, stderr, _ = strings.Cut(stderr, "\n")
	}
	return stderr
}

// head is enough of a text to see what it is.
func head(text string) string {
	const enough = 500
	if len(text) <= enough {
		return text
	}
	return fmt.Sprintf("%s… (%d bytes)", text[:enough], len(text))
}

// besideAndWithout runs a test of commands with a server up, and with none until the
// test asks where it is.
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

// halfRequest sends the start of a PUT, and returns its connection once the
// handler has asked for the body.
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

// nobody is the user and the group of asNobody.
const nobody = 65534

// asNobody is a command before a command, which takes root's rights from it. Who is not
// root has none.
func asNobody(t testing.TB) []string {
	t.Helper()
	if os.Getuid() != 0 {
		return nil
	}
	needTool(t, "setpriv")
	id := fmt.Sprint(nobody)
	return []string{"setpriv", "--reuid", id, "--regid", id, "--clear-groups"}
}

// wantFiles compares the names in a directory.
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

// editBolt writes to a database behind the store's back.
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

// tokenLifetime is the default of --token-lifetime.
const tokenLifetime = 10 * time.Hour

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

// compact is JSON as the service writes it.
func compact(t testing.TB, text string) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Compact(&b, []byte(text)); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

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

// author makes contracts of the demo user that are larger than a page of the file, and
// keeps what each must be.
type author struct {
	base, bearer string
	want         map[string]string // by id, the document
}

// newAuthor knows the demo user's first contract.
func newAuthor(t testing.TB, base string) *author {
	t.Helper()
	a := &author{base: base, bearer: token(t, base, "demo", "demo-secret"), want: map[string]string{}}
	a.want[demoContract] = a.send(t, 200, "GET", "/"+demoContract, nil, "")
	return a
}

// send asks for the contracts of the demo user, or for one of them, wants a status, and
// returns the content of the answer.
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

// largeContract is how many prices a contract of an author has: its document has some
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

// list is the whole list of the demo user's contracts.
func (a *author) list(t testing.TB) string {
	t.Helper()
	return a.send(t, 200, "GET", "", nil, "")
}

// check gets each contract that the author knows.
func (a *author) check(t testing.TB) {
	t.Helper()
	for id, want := range a.want {
		if got := a.send(t, 200, "GET", "/"+id, nil, ""); got != want {
			t.Errorf("GET %s: %s\nwant\n%s", id, head(got), head(want))
		}
	}
}
