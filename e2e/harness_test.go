// Package e2e contains the tests that run the built program as a separate process and do not
// use its internals: disk faults, hostile clients, crashes, clock jumps, long and concurrent
// load, and client programs written by others. Unit tests, and tests that can run inside one
// process, are beside the files that they test.
package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"sync"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

// These names are shared with the tests of package main.
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
	answerOf        = servicetest.AnswerOf
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
	lacking         = servicetest.Lacking
	succeeds        = servicetest.Succeeds
)

// The paths, media types and other constants of the API that a client knows.
const (
	contractsPath  = "/api/partners/v2.0/org/:org_id/users/:user_id/energy-contracts"
	contractPath   = contractsPath + "/:energy_contract_id"
	tokenPath      = "/oauth2/token"
	revocationPath = "/oauth2/revoke_token"
	metadataPath   = "/.well-known/oauth-authorization-server"
	openAPIPath    = "/api/partners/v2.0/openapi.json"
	docsPath       = "/api/partners/v2.0/docs"
	mergePatchType = "application/merge-patch+json"
	retryAfter     = "1"
	// demoOtherContract is the second contract of the demo user.
	demoOtherContract = "8e2f6a31-94c7-4f08-b1de-5a70c3d9e412"
)

func TestMain(m *testing.M) {
	if serve := bareServers[os.Getenv(bareEnv)]; serve != nil {
		if err := serve(os.Args[1]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(servicetest.Main(m, false))
}

// long skips the test under -short, so that only quick tests of this package are left.
func long(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("the test takes long, or needs a program that does; run it without -short")
	}
}

// readInputs reads each file that the program is built from. The go command's cache of test
// results tracks the files that the test process itself opens, but not those that a build
// reads: without readInputs, a cached result would be reused after a change to the program.
var readInputs = sync.OnceValue(func() error {
	cmd := exec.Command("go", "list", "-json=GoFiles,EmbedFiles", ".")
	cmd.Dir = servicetest.InModule(".")
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go list: %w", err)
	}
	var listed struct{ GoFiles, EmbedFiles []string }
	if err := json.Unmarshal(out, &listed); err != nil {
		return err
	}
	for _, name := range append(append(listed.GoFiles, listed.EmbedFiles...), "go.mod", "go.sum") {
		if _, err := os.ReadFile(servicetest.InModule(name)); err != nil {
			return err
		}
	}
	_, err = os.ReadDir(servicetest.InModule(".")) // a new file may change the program, too
	return err
})

// build builds the program as name, with extra arguments for go build, and returns its path.
func build(name string, args ...string) (string, error) {
	path := filepath.Join(servicetest.BuildDir(), name)
	args = append(append([]string{"build"}, args...), "-o", path, ".")
	return path, errors.Join(readInputs(), servicetest.GoIn(servicetest.InModule("."), args...))
}

// buildWith builds the program with some files added or replaced. The keys of files are file
// names in the program's directory, the values are the files to use, such as those in testdata.
func buildWith(name string, files map[string]string) (string, error) {
	replace := map[string]string{}
	for name, replacement := range files {
		replacement, err := filepath.Abs(replacement)
		if err != nil {
			return "", err
		}
		if _, err := os.ReadFile(replacement); err != nil { // for the cache, as in readInputs
			return "", err
		}
		replace[servicetest.InModule(name)] = replacement
	}
	overlay := filepath.Join(servicetest.BuildDir(), name+".json")
	text, err := json.Marshal(map[string]any{"Replace": replace})
	if err == nil {
		err = os.WriteFile(overlay, text, 0o600)
	}
	if err != nil {
		return "", err
	}
	return build(name, "-overlay", overlay)
}

// program builds the program on its first call, and returns its path.
var program = sync.OnceValues(func() (string, error) { return build("energy-contracts") })

// command returns a command that runs the built program with arguments, under a wrapper such
// as strace if there is one.
func command(t testing.TB, wrapper []string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	return servicetest.Command(t, wrapper, path, args...)
}

// serve returns the command "serve" on a free port.
func serve(t testing.TB, wrapper []string, args ...string) *exec.Cmd {
	t.Helper()
	return command(t, wrapper, append([]string{"serve", "--addr", "127.0.0.1:0"}, args...)...)
}

// startProcess runs "serve" on a free port and waits until it listens. The process is killed
// in the cleanup unless the test has ended it.
func startProcess(t testing.TB, wrapper []string, args ...string) *process {
	t.Helper()
	return servicetest.Start(t, serve(t, wrapper, args...))
}

// result is the output and exit status of a command.
type result struct {
	stdout, stderr string
	status         int
}

// run runs the program, waits until it exits, and returns its result.
func run(t testing.TB, wrapper []string, args ...string) result {
	t.Helper()
	cmd := command(t, wrapper, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		t.Fatal(err)
	}
	known.WantNone(t, "stderr", stderr.String())
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

// ok runs a command on a database and returns its output. The test fails unless the command
// succeeds and prints nothing to stderr.
func ok(t testing.TB, db string, args ...string) (stdout string) {
	t.Helper()
	got := run(t, nil, append(args, "--db", db)...)
	if got.status != 0 || got.stderr != "" {
		t.Fatalf("%q: %+v", args, got)
	}
	return got.stdout
}

// wantExport fails the test unless the export of a database is want.
func wantExport(t testing.TB, db, want string) {
	t.Helper()
	if got := ok(t, db, "export"); got != want {
		t.Errorf("the export of %s is\n%s\nwant\n%s", db, head(got), head(want))
	}
}

// credentials are a client's id and secret.
type credentials struct{ ID, Secret string }

var credentialsLines = regexp.MustCompile(`^client_id:     (\S{36})\nclient_secret: (\S{43})\n`)

// credentialsOf runs a command that prints credentials, and returns them.
func credentialsOf(t testing.TB, db string, args ...string) credentials {
	t.Helper()
	out := ok(t, db, args...)
	m := credentialsLines.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("%q printed\n%s", args, out)
	}
	known.Add(m[2])
	return credentials{m[1], m[2]}
}

func addClient(t testing.TB, db string) credentials {
	t.Helper()
	return credentialsOf(t, db, "client", "add", "--org", demoOrg)
}

// contractKey identifies a contract.
type contractKey struct{ Org, User, Contract string }

// key returns the key of the n-th contract of the demo user.
func key(n int) contractKey {
	return contractKey{demoOrg, demoUser, fmt.Sprintf("%08x-0000-4000-8000-000000000000", n)}
}

// bytes returns the key as it is stored in the database.
func (k contractKey) bytes() []byte { return []byte(k.Org + "/" + k.User + "/" + k.Contract) }

// line returns the line of an export for a document.
func (k contractKey) line(document string) string {
	return fmt.Sprintf(`{"org_id":%q,"user_id":%q,%s`+"\n", k.Org, k.User, document[1:])
}

// answerTimeout is the limit for a response that must come but may be slow: under strace,
// with a second between two attempts to reopen the store, on a machine under load.
const answerTimeout = time.Minute

// answered is a complete response, or the error that occurred instead.
type answered struct {
	status int
	header http.Header
	body   string
	err    error
}

func (a answered) String() string {
	if a.err != nil {
		return a.err.Error()
	}
	return fmt.Sprintf("%d %v\n%s", a.status, a.header, head(a.body))
}

// head returns the first bytes of a body, enough to recognize it in a message.
func head(body string) string {
	const enough = 500
	if len(body) <= enough {
		return body
	}
	return fmt.Sprintf("%s… (%d bytes)", body[:enough], len(body))
}
