package e2e

// Clients that generators make from the served openapi.json, each as its documentation says and
// without options of its own.

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

const generators = "testdata/clients/generators"

// Each generated client compiles with TypeScript's strict checks, and gets, lists, creates,
// updates, patches and deletes contracts.
func TestClientsThatAreGenerated(t *testing.T) {
	long(t)
	t.Parallel() // most of it is to wait for others
	node := needNode(t, generators)
	for _, g := range []struct {
		name, script string
		args         []string
	}{
		{"openapi-ts", "@hey-api/openapi-ts/bin/run.js", []string{"--input", "openapi.json", "--output", "api"}},
		{"orval", "orval/dist/bin/orval.mjs", []string{"--input", "openapi.json", "--output", "api.ts"}},
		{"swagger-typescript-api", "swagger-typescript-api/dist/cli.mjs", []string{"generate", "--path", "openapi.json", "--output", ".", "--name", "api.ts"}},
		{"oazapfts", "oazapfts/dist/cli.js", []string{"openapi.json", "api.ts"}},
		{"openapi-zod-client", "openapi-zod-client/bin.js", []string{"openapi.json", "--output", "api.ts"}},
	} {
		t.Run(g.name, func(t *testing.T) {
			p := startProcess(t, nil, "--demo")
			dir := copied(t, generators, p.URL)
			if err := os.Rename(filepath.Join(dir, g.name+".ts"), filepath.Join(dir, "client.ts")); err != nil {
				t.Fatal(err)
			}
			succeeds(t, tool(t, node, generators, dir, g.script, g.args...))
			succeeds(t, tool(t, node, generators, dir, "tsc/bin/tsc"))
			cmd := exec.Command(node, "client.js", p.URL)
			cmd.Dir = dir
			if got := succeeds(t, cmd); got != "ok\n" {
				t.Error(got)
			}
		})
	}
}
