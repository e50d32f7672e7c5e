package e2e

// The version that the Go toolchain records in the program.

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"
)

func TestVersionIsWhatTheToolchainWroteIntoTheBinary(t *testing.T) {
	long(t)
	t.Parallel()
	commit, err := exec.Command("git", "rev-parse", "HEAD").Output()
	if err != nil {
		t.Skipf("this is no clone of a repository: %v", err)
	}
	path, err := build("with-version", "-buildvcs=true")
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(path, "version").Output()
	want := fmt.Sprintf(`^energy-contracts (v\S+), commit %s, %s\n$`, strings.TrimSpace(string(commit)), regexp.QuoteMeta(runtime.Version()))
	m := regexp.MustCompile(want).FindSubmatch(out)
	if err != nil || m == nil {
		t.Fatalf("%v, %q, want %s", err, out, want)
	}
	// The version as other tools read it.
	module, err := exec.Command("go", "version", "-m", path).Output()
	if err != nil || !strings.Contains(string(module), "\tmod\tenergy-contracts\t"+string(m[1])) {
		t.Errorf("%v, %s, want version %s", err, module, m[1])
	}
	// The first log line of serve and a new database file have the same version.
	db := newPath(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "serve", "--db", db, "--addr", "127.0.0.1:0")
	stderr := &lockedBuffer{}
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "it listens", func() bool { return strings.Contains(stderr.String(), `"msg":"listening"`) })
	cancel()
	_ = cmd.Wait()
	first, _, _ := strings.Cut(stderr.String(), "\n")
	if want := fmt.Sprintf(`"level":"INFO","msg":"starting","version":%q,"commit":%q,"go":%q}`, m[1], strings.TrimSpace(string(commit)), runtime.Version()); !strings.HasSuffix(first, want) {
		t.Errorf("the log begins with %s\nwant %s", first, want)
	}
	if !strings.Contains(readFile(t, db), "program"+string(m[1])) {
		t.Error("the file does not say which program made it")
	}
}
