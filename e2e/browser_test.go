package e2e

// The docs page in a browser.

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"

	"energy-contracts/internal/servicetest"
)

var browserProgram = servicetest.NestedProgram("browser")

// Headless Chromium uses the page as a person would.
func TestDocsPageInABrowser(t *testing.T) {
	long(t)
	t.Parallel() // most of it is to wait for Chromium
	needTool(t, "chromium")
	path := servicetest.NeedNested(t, browserProgram)
	shots := os.Getenv("SCREENSHOTS") // where to leave them for a person to look at
	if shots == "" {
		shots = t.TempDir()
	}
	p := startProcess(t, nil, "--demo")
	out := servicetest.Succeeds(t, exec.Command(path, "-url", p.URL, "-shots", shots))
	var saw struct {
		Page, Status, Content string
		Console, Failed       []string
		Hosts, Overflow       map[string]int
	}
	if err := json.Unmarshal([]byte(out), &saw); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if saw.Page != p.URL+docsPath {
		t.Errorf("/ leads to %s", saw.Page)
	}
	var shown, want any
	if err := errors.Join(json.Unmarshal([]byte(saw.Content), &shown), json.Unmarshal([]byte(readFile(t, seedResponse)), &want)); err != nil ||
		saw.Status != "200" || !reflect.DeepEqual(shown, want) {
		t.Errorf("the seed's PUT: %s, %v\n%s", saw.Status, err, saw.Content)
	}
	for _, message := range saw.Console {
		if !strings.HasPrefix(message, "debug: ") { // Chromium's advice on forms
			t.Errorf("in the console: %s", message)
		}
	}
	if len(saw.Hosts) != 1 || saw.Hosts[p.URL] == 0 || len(saw.Failed) > 0 {
		t.Errorf("the page asked %v; failed: %q", saw.Hosts, saw.Failed)
	}
	if len(saw.Overflow) < 5 {
		t.Errorf("looked at %v only", saw.Overflow)
	}
	for name, pixels := range saw.Overflow {
		if pixels > 0 {
			t.Errorf("%s is %d pixels wider than the window", name, pixels)
		}
	}
}
