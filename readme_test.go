package main

import (
	"debug/elf"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
)

// blocks returns the fenced code blocks of the README in a language.
func blocks(t testing.TB, language string) (found []string) {
	t.Helper()
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(readFile(t, "README.md"), -1) {
		found = append(found, m[1])
	}
	return found
}

func TestREADMECommandsGetTheResponseItShows(t *testing.T) {
	printed := demoCommands("http://127.0.0.1:8080")
	var script string
	for _, b := range blocks(t, "sh") {
		if strings.HasPrefix(b, "TOKEN=") || strings.HasPrefix(b, "curl ") {
			script += b
			if !strings.Contains(printed, b) {
				t.Errorf("--demo does not print what the README shows\n%s", b)
			}
		}
	}
	want := compact(t, blocks(t, "json")[0])
	needTool(t, "curl")
	s := start(t, "--demo")
	cmd := exec.Command("sh", "-eu", "-c", strings.ReplaceAll(script, "http://127.0.0.1:8080", s.url))
	out, err := cmd.Output()
	if err != nil || string(out) != want {
		t.Errorf("%v\ngot\n%s\nwant\n%s", err, out, want)
	}
}

func TestUnitIsRightAndHardened(t *testing.T) {
	needTool(t, "systemd-analyze")
	unit := readFile(t, "examples/energy-contracts.service")
	m := regexp.MustCompile(`(?m)^ExecStart=(/\S+/energy-contracts) (.*)$`).FindStringSubmatch(unit)
	if m == nil {
		t.Fatalf("no ExecStart in\n%s", unit)
	}
	k, err := kong.New(&cli{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.Parse(strings.Fields(m[2])); err != nil {
		t.Errorf("%s: %v", m[0], err)
	}
	program, err := program()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "energy-contracts.service")
	if err := os.WriteFile(file, []byte(strings.Replace(unit, m[1], program, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"verify", "--man=no", file}, {"security", "--offline=true", "--threshold=20", file}} { // 2.0 of 10
		if out, err := exec.Command("systemd-analyze", args...).CombinedOutput(); err != nil || args[0] == "verify" && len(out) > 0 {
			t.Errorf("systemd-analyze %s: %v\n%s", args[0], err, out)
		}
	}
}

func TestEachFlagIsDocumentedWithItsVariable(t *testing.T) {
	operating := readFile(t, "docs/operating.md")
	k, err := kong.New(&cli{}, kong.DefaultEnvars("ENERGY_CONTRACTS"))
	if err != nil {
		t.Fatal(err)
	}
	var flags int
	for _, command := range k.Model.Leaves(true) {
		for _, f := range command.Flags {
			flags++
			name := strings.TrimPrefix(command.Path(), "energy-contracts ") + " --" + f.Name
			variable := "–"
			if len(f.Envs) > 0 {
				variable = "`" + strings.Join(f.Envs, "") + "`"
			}
			row := regexp.MustCompile("(?m)^\\|.*`" + name + "`.*\\| " + variable + " \\|")
			if !row.MatchString(operating) {
				t.Errorf("docs/operating.md has no row for %s and %v", name, f.Envs)
			}
		}
	}
	if want := reflect.TypeFor[serveCmd]().NumField(); flags <= want {
		t.Errorf("looked at %d flags, and serve alone has %d", flags, want)
	}
}

// seriesForm matches the name of a series of ours, without the suffixes of a histogram.
var seriesForm = regexp.MustCompile(`(?m)^(` + metricPrefix + `[a-z_]+?)(?:_bucket|_sum|_count)?[{ ]`)

func TestEachMetricIsInTheTableOfMetrics(t *testing.T) {
	s := start(t, "--demo", "--metrics-addr", "127.0.0.1:0")
	// A metric with labels is there from the first event that it counts.
	do(t, http.DefaultClient, "GET", contractsURL(s.url, demoOrg, demoUser), http.Header{"Authorization": {"Bearer wrong"}}, "")
	do(t, http.DefaultClient, "POST", s.url+"/oauth2/token/", nil, "")
	table := regexp.MustCompile("(?m)^\\| `(" + metricPrefix + "[a-z_]+)` \\| [^|]+ \\|$")
	documented := firstGroups(table, readFile(t, "docs/operating.md"))
	served := firstGroups(seriesForm, scrape(t, s.log.String()))
	slices.Sort(documented)
	slices.Sort(served)
	if served = slices.Compact(served); !slices.Equal(documented, served) {
		t.Errorf("the table in docs/operating.md has\n%s\nand the server\n%s", strings.Join(documented, "\n"), strings.Join(served, "\n"))
	}
}

// firstGroups returns the first group of each match of form in text.
func firstGroups(form *regexp.Regexp, text string) (found []string) {
	for _, m := range form.FindAllStringSubmatch(text, -1) {
		found = append(found, m[1])
	}
	return found
}

func TestEachCommandIsInTheREADME(t *testing.T) {
	readme := readFile(t, "README.md")
	k, err := kong.New(&cli{})
	if err != nil {
		t.Fatal(err)
	}
	for _, command := range k.Model.Leaves(true) {
		name := strings.TrimPrefix(command.Path(), "energy-contracts ")
		if !regexp.MustCompile("(?m)^\\|.*`" + name + "[` ]").MatchString(readme) {
			t.Errorf("the README has no row for %s", name)
		}
	}
}

func TestEachPathOfTheAPIIsInTheREADME(t *testing.T) {
	var description struct {
		Paths map[string]any `json:"paths"`
	}
	if err := json.Unmarshal([]byte(readFile(t, "openapi.json")), &description); err != nil {
		t.Fatal(err)
	}
	readme := readFile(t, "README.md")
	for path := range description.Paths {
		short := "…" + path[max(0, strings.Index(path, "/energy-contracts")):]
		row := regexp.MustCompile("(?m)^\\|[^|]*`(" + regexp.QuoteMeta(path) + "|" + regexp.QuoteMeta(short) + ")/?`")
		if !row.MatchString(readme) {
			t.Errorf("the README has no row for %s", path)
		}
	}
	if len(description.Paths) == 0 {
		t.Error("no path found in openapi.json")
	}
}

func TestEachDependencyHasItsReason(t *testing.T) {
	contributing := readFile(t, "CONTRIBUTING.md")
	direct := regexp.MustCompile(`(?m)^\t(\S+) v\S+$`).FindAllStringSubmatch(readFile(t, "go.mod"), -1)
	if len(direct) == 0 {
		t.Error("no dependency found in go.mod")
	}
	for _, m := range direct {
		if !regexp.MustCompile(`(?m)^\|.*\b` + regexp.QuoteMeta(m[1]) + `[ ,]`).MatchString(contributing) {
			t.Errorf("CONTRIBUTING.md does not say why %s", m[1])
		}
	}
}

// documents returns the names of all documents.
func documents(t testing.TB) []string {
	t.Helper()
	found, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	return append(found, "README.md", "CONTRIBUTING.md", "CHANGELOG.md")
}

func TestCommandsInTheDocumentsParse(t *testing.T) {
	commandForm := regexp.MustCompile(`(?m)^(?:    |\./)energy-contracts (.*)$`)
	found := 0
	for _, document := range documents(t) {
		for _, m := range commandForm.FindAllStringSubmatch(readFile(t, document), -1) {
			found++
			k, err := kong.New(&cli{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := k.Parse(strings.Fields(m[1])); err != nil {
				t.Errorf("%s: energy-contracts %s: %v", document, m[1], err)
			}
		}
	}
	if found == 0 {
		t.Error("no command found")
	}
}

func TestFlagsAndVariablesInTheDocumentsExist(t *testing.T) {
	k, err := kong.New(&cli{}, kong.DefaultEnvars("ENERGY_CONTRACTS"))
	if err != nil {
		t.Fatal(err)
	}
	exists := map[string]bool{}
	for _, f := range k.Model.Flags { // of the program itself
		exists["`--"+f.Name] = true
	}
	for _, command := range k.Model.Leaves(true) {
		for _, f := range command.Flags {
			exists["`--"+f.Name] = true
			exists["`"+strings.TrimPrefix(command.Path(), "energy-contracts ")+" --"+f.Name] = true
			for _, variable := range f.Envs {
				exists[variable] = true
			}
		}
	}
	nameForm := regexp.MustCompile("`(?:[a-z ]+ )?--[a-z-]+|ENERGY_CONTRACTS_[A-Z_]+")
	for _, document := range documents(t) {
		for _, name := range nameForm.FindAllString(readFile(t, document), -1) {
			if !exists[name] {
				t.Errorf("%s has %s, which is no flag and no variable", document, name)
			}
		}
	}
}

func TestDocumentedBuildIsStatic(t *testing.T) {
	if testing.Short() {
		t.Skip("builds the program again")
	}
	if runtime.GOOS != "linux" {
		t.Skip("on other systems every program may use the C library")
	}
	build := regexp.MustCompile(`(?m)^.*\bgo build$`).FindString(strings.Join(blocks(t, "sh"), ""))
	if build == "" {
		t.Fatal("the README does not say how to build the program")
	}
	binary := filepath.Join(t.TempDir(), "energy-contracts")
	if out, err := exec.Command("sh", "-c", build+" -o "+binary).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", build, err, out)
	}
	file, err := elf.Open(binary)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	libraries, err := file.ImportedLibraries()
	if err != nil || len(libraries) > 0 {
		t.Errorf("%s: the binary needs %v, %v", build, libraries, err)
	}
	for _, p := range file.Progs {
		if p.Type == elf.PT_INTERP {
			t.Errorf("%s: the binary needs a dynamic linker", build)
		}
	}
}

func TestREADMEIsShort(t *testing.T) {
	const limit = 11_000 // bytes that a person reads to the end
	if n := len(readFile(t, "README.md")); n >= limit {
		t.Errorf("README.md has %d bytes, and must have fewer than %d; the rest belongs into docs", n, limit)
	}
}

var (
	linkForm    = regexp.MustCompile(`\]\(([^):#]*)(#[^)]*)?\)`)
	headingForm = regexp.MustCompile(`(?m)^#+ (.*)$`)
	notInAnchor = regexp.MustCompile(`[^a-z0-9 _-]`)
)

func TestLinksBetweenDocumentsLeadSomewhere(t *testing.T) {
	links := 0
	for _, document := range documents(t) {
		for _, m := range linkForm.FindAllStringSubmatch(readFile(t, document), -1) {
			links++
			target := filepath.Join(filepath.Dir(document), m[1])
			if m[1] == "" {
				target = document
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: %s: %v", document, m[0], err)
				continue
			}
			if m[2] == "" {
				continue
			}
			var anchors []string
			for _, h := range headingForm.FindAllStringSubmatch(readFile(t, target), -1) {
				anchors = append(anchors, "#"+strings.ReplaceAll(notInAnchor.ReplaceAllString(strings.ToLower(h[1]), ""), " ", "-"))
			}
			if !slices.Contains(anchors, m[2]) {
				t.Errorf("%s: %s: %s has the headings %q", document, m[0], target, anchors)
			}
		}
	}
	if links == 0 {
		t.Error("no link found")
	}
}
