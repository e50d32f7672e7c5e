package e2e

// Programs that make a client of openapi.json. What they make must work as it is.

import (
	"os/exec"
	"path/filepath"
	"testing"

	"energy-contracts/internal/servicetest"
)

func TestImportersMakeClientsThatWork(t *testing.T) {
	long(t)
	t.Run("ogen", func(t *testing.T) {
		t.Parallel()
		p := startProcess(t, nil, "--demo")
		dir := copied(t, "testdata/clients/ogen", p.URL)
		if err := servicetest.GoIn(dir, "mod", "download"); err != nil {
			lacking(t, "its modules cannot be had: %v", err)
		}
		for _, args := range [][]string{
			{"tool", "ogen", "--package", "api", "--target", "api", "openapi.json"},
			{"mod", "tidy", "-diff"}, {"build", "-o", "client", "."},
		} {
			if err := servicetest.GoIn(dir, args...); err != nil {
				t.Fatal(err)
			}
		}
		if got := succeeds(t, exec.Command(filepath.Join(dir, "client"), p.URL)); got != "ok\n" {
			t.Error(got)
		}
	})
	t.Run("Postman", func(t *testing.T) {
		t.Parallel()
		const postman = "testdata/clients/postman"
		node := needNode(t, postman)
		p := startProcess(t, nil, "--demo")
		cmd := exec.Command(node, "import.js", p.URL)
		cmd.Dir = copied(t, postman, p.URL)
		if got := succeeds(t, cmd); got != "ok\n" {
			t.Error(got)
		}
	})
}
