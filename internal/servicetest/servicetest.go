// Package servicetest has the helpers that the tests beside the program and those in e2e both
// need: the check of every response against openapi.json, the search for secrets, and the
// start of a server in a process of its own.
package servicetest

import (
	"bufio"
	"bytes"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// buildDir is the directory in which programs are built.
var buildDir string

// BuildDir returns a directory for programs that the tests of a package build once. Other
// users may enter it, since some tests run the program as another user.
func BuildDir() string { return buildDir }

// Main runs the tests of a package, compares all their requests to a service with
// openapi.json, and returns the exit code. If whole is true, a run of all tests must see
// everything that is described.
func Main(m *testing.M, whole bool) int {
	flag.Parse()
	dir, err := os.MkdirTemp("", "energy-contracts-test-")
	if err == nil {
		defer os.RemoveAll(dir)
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	buildDir = dir
	http.DefaultTransport = Validated{http.DefaultTransport.(*http.Transport)}
	return Described().verdict(m.Run(), whole)
}

// module returns the directory of go.mod, which is the directory of the test or above it.
var module = sync.OnceValue(func() string {
	dir, err := os.Getwd()
	for err == nil {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir
		}
		if dir == filepath.Dir(dir) {
			err = errors.New("there is no go.mod")
		}
		dir = filepath.Dir(dir)
	}
	panic(err)
})

// InModule returns the path of a file of this module.
func InModule(name string) string { return filepath.Join(module(), name) }

// ReadFile returns the content of a file.
func ReadFile(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// WriteFile writes a file. Only its owner may access a new file.
func WriteFile(t testing.TB, name string, content []byte) {
	t.Helper()
	if err := os.WriteFile(name, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// NewFile writes content to a new file and returns its path.
func NewFile(t testing.TB, content []byte) string {
	t.Helper()
	path := NewPath(t)
	WriteFile(t, path, content)
	return path
}

// NewPath returns the path of a database file that does not exist yet.
func NewPath(t testing.TB) string { return filepath.Join(t.TempDir(), "test.db") }

// ShortPath is like NewPath, but short enough for the control socket beside the database. The
// path of a socket is limited, and t.TempDir contains the name of the test.
func ShortPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ec-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "c.db")
}

// CheckFileSound runs bbolt's consistency check on a database file.
func CheckFileSound(t testing.TB, path string) {
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

// WaitUntil calls ask until it returns no error. It fails the test if there still is one when
// the time is over.
func WaitUntil(t testing.TB, limit time.Duration, what string, ask func() error) {
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

// WaitFor calls done until it returns true. It fails the test after some seconds.
func WaitFor(t testing.TB, what string, done func() bool) {
	t.Helper()
	WaitUntil(t, 20*time.Second, what, func() error {
		if !done() {
			return errors.New("not yet")
		}
		return nil
	})
}

// LongEnv is the variable that selects the long form of the tests of faults and attackers,
// which takes hours.
const LongEnv = "LONG"

// Amount returns long if LongEnv is set, else usual.
func Amount[N any](usual, long N) N {
	if os.Getenv(LongEnv) != "" {
		return long
	}
	return usual
}

// NeedTool skips a test if a program is not in the path. With CI=true it fails the test.
func NeedTool(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		Lacking(t, "%s is not installed; .ci/run says which package has it, and installs it", name)
	}
}

// Lacking skips a test that cannot run on this machine. With CI=true it fails the test.
func Lacking(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

// errNoModules is the error of a nested program whose modules cannot be downloaded.
type errNoModules struct{ error }

// NestedProgram returns a function that builds a program with a module of its own below
// testdata, once, and returns its path.
func NestedProgram(name string) func() (string, error) {
	return sync.OnceValues(func() (path string, err error) {
		path, dir := filepath.Join(buildDir, name), filepath.Join("testdata", name)
		if err := GoIn(dir, "mod", "download"); err != nil {
			return "", errNoModules{err}
		}
		return path, GoIn(dir, "build", "-o", path, ".")
	})
}

// NeedNested returns the path of a nested program. It skips a test if the modules of the
// program cannot be downloaded. With CI=true it fails the test.
func NeedNested(t testing.TB, program func() (string, error)) (path string) {
	t.Helper()
	path, err := program()
	if errors.As(err, new(errNoModules)) {
		Lacking(t, "the modules of a program to test with cannot be had: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// GoIn runs the go command in a directory.
func GoIn(dir string, args ...string) error {
	cmd := exec.Command("go", args...)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s in %s: %w\n%s", strings.Join(args, " "), dir, err, out)
	}
	return nil
}

// Succeeds runs a command and returns its standard output. It fails the test if the command
// fails.
func Succeeds(t testing.TB, cmd *exec.Cmd) string {
	t.Helper()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v\n%s%s", cmd.Args, err, out, &stderr)
	}
	return string(out)
}

// Export returns the lines of contracts as a whole export has them: between two more lines.
func Export(lines string) string {
	return `{"export":"begin"}` + "\n" + lines + `{"export":"end"}` + "\n"
}

// ManyLines writes an export of n contracts, of about size bytes each, and returns its path. The contracts belong to the demo user.
func ManyLines(t testing.TB, n, size int) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "many.jsonl")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := bufio.NewWriter(f)
	begin, end, _ := strings.Cut(Export("\n"), "\n\n")
	fmt.Fprintln(w, begin)
	prices := strings.TrimSuffix(strings.Split(Year(size/55), `"energy_prices":`)[1], "}")
	for i := range n {
		fmt.Fprintf(w, `{"org_id":%q,"user_id":%q,"energy_contract_type":"spot_hourly","energy_prices":%s,"id":"%08x-0000-4000-8000-000000000000","building":null,"meter_id":"%d","supplier":null,"currency_energy_price":"EUR","energy_price_includes_external_components":null}`+"\n",
			DemoOrg, DemoUser, prices, i, i)
	}
	fmt.Fprint(w, end)
	if err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	return path
}

// BreakFile overwrites a part of a file, which may be served meanwhile.
func BreakFile(t testing.TB, path string, at int, with []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(with, int64(at)); err != nil {
		t.Fatal(err)
	}
}
