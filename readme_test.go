package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/alecthomas/kong"
)

// blocks are the fenced blocks of the README in a language.
func blocks(t testing.TB, language string) (found []string) {
	t.Helper()
	for _, m := range regexp.MustCompile("(?ms)^```"+language+"\n(.*?)^```$").FindAllStringSubmatch(readFile(t, "README.md"), -1) {
		found = append(found, m[1])
	}
	return found
}

func TestREADMECommandsGetTheAnswerItShows(t *testing.T) {
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

func TestREADMEUnitIsRightAndHardened(t *testing.T) {
	needTool(t, "systemd-analyze")
	unit := blocks(t, "ini")[0]
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

func TestREADMENamesEachFlagFileAndDependency(t *testing.T) {
	readme := readFile(t, "README.md")
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
			if !row.MatchString(readme) {
				t.Errorf("the README has no row for %s and %v", name, f.Envs)
			}
		}
	}
	if want := reflect.TypeFor[serveCmd]().NumField(); flags <= want {
		t.Errorf("looked at %d flags, and serve alone has %d", flags, want)
	}
	direct := regexp.MustCompile(`(?m)^\t(\S+) v\S+$`).FindAllStringSubmatch(readFile(t, "go.mod"), -1)
	if len(direct) == 0 {
		t.Error("no dependency found in go.mod")
	}
	for _, m := range direct {
		if !regexp.MustCompile(`(?m)^\|.*\b` + regexp.QuoteMeta(m[1]) + `[ ,]`).MatchString(readme) {
			t.Errorf("the README does not say why %s", m[1])
		}
	}
}
