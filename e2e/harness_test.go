// Package e2e has the tests that run the built program as a process and need nothing of its
// inside: its disk fails, its clients are hostile, its machine crashes, its clock jumps, many
// use it for long or at once, programs of others are its clients. Units, and what can be told
// within a process, are tested beside their files.
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

// What the tests here share with those beside the program.
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

// The paths and media types of the API, and the rest of what its clients know.
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

// long skips a test under -short, which leaves this package one that is quick.
func long(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("it takes long, or needs a program that does; run it without -short")
	}
}

// readInputs reads each file that the program is built from. The cache of test results knows
// of the files that the test process itself opens while its tests run, and not of those that
// a build reads: without this a change of the program would leave a result of before.
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
	_, err = os.ReadDir(servicetest.InModule(".")) // a new file may change it, too
	return err
})

// build builds the program, in a way of its own if there are arguments, and returns the path.
func build(name string, args ...string) (string, error) {
	path := filepath.Join(servicetest.BuildDir(), name)
	args = append(append([]string{"build"}, args...), "-o", path, ".")
	return path, errors.Join(readInputs(), servicetest.GoIn(servicetest.InModule("."), args...))
}

// buildWith builds the program with files of testdata beside its own, and with some of its
// own replaced: both are by name in the program's directory.
func buildWith(name string, files map[string]string) (string, error) {
	replace := map[string]string{}
	for is, by := range files {
		by, err := filepath.Abs(by)
		if err != nil {
			return "", err
		}
		if _, err := os.ReadFile(by); err != nil { // for the cache, as in readInputs
			return "", err
		}
		replace[servicetest.InModule(is)] = by
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

// program builds the program, once.
var program = sync.OnceValues(func() (string, error) { return build("energy-contracts") })

// command is the built program with arguments, behind a wrapper such as strace.
func command(t testing.TB, wrapper []string, args ...string) *exec.Cmd {
	t.Helper()
	path, err := program()
	if err != nil {
		t.Fatal(err)
	}
	return servicetest.Command(t, wrapper, path, args...)
}

// serve is the command "serve" on a free port.
func serve(t testing.TB, wrapper []string, args ...string) *exec.Cmd {
	t.Helper()
	return command(t, wrapper, append([]string{"serve", "--addr", "127.0.0.1:0"}, args...)...)
}

// startProcess runs "serve" on a free port and waits until it listens. The test ends it, or
// its cleanup kills it.
func startProcess(t testing.TB, wrapper []string, args ...string) *process {
	t.Helper()
	return servicetest.Start(t, serve(t, wrapper, args...))
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

// wantExport compares what is in a database with lines.
func wantExport(t testing.TB, db, want string) {
	t.Helper()
	if got := ok(t, db, "export"); got != want {
		t.Errorf("the export of %s is\n%s\nwant\n%s", db, head(got), head(want))
	}
}

// credentials is a client's id and secret.
type credentials struct{ ID, Secret string }

var credentialsLines = regexp.MustCompile(`^client_id:     (\S{36})\nclient_secret: (\S{43})\n`)

// credentialsOf runs a command on a database that prints credentials.
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

// contractKey is what a contract is known by.
type contractKey struct{ Org, User, Contract string }

// key is the key of a contract of the demo user.
func key(n int) contractKey {
	return contractKey{demoOrg, demoUser, fmt.Sprintf("%08x-0000-4000-8000-000000000000", n)}
}

// bytes is the key as the database has it.
func (k contractKey) bytes() []byte { return []byte(k.Org + "/" + k.User + "/" + k.Contract) }

// line is the line of an export with a document.
func (k contractKey) line(document string) string {
	return fmt.Sprintf(`{"org_id":%q,"user_id":%q,%s`+"\n", k.Org, k.User, document[1:])
}

// answerTimeout is for an answer that must come, but need not come fast: under
// strace, with a second between two attempts to mend, on a machine that others
// keep busy.
const answerTimeout = time.Minute

// answered is a whole answer, or the error that came in its place.
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

// head is enough of a body to see what it is.
func head(body string) string {
	const enough = 500
	if len(body) <= enough {
		return body
	}
	return fmt.Sprintf("%s… (%d bytes)", body[:enough], len(body))
}
