package main

// Stories: files in testdata/stories with requests and the whole responses to them, in
// sequence on one server with the demo data. "go test -run Story -update" writes the responses
// again; read the difference before you commit it.

import (
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/tools/txtar"
)

var update = flag.Bool("update", false, "write the answers of testdata/stories anew")

// storyFiles returns the names of all stories.
func storyFiles(t testing.TB) []string {
	t.Helper()
	files, err := filepath.Glob("testdata/stories/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no stories: %v", err)
	}
	return files
}

// readStory reads a story.
func readStory(t testing.TB, file string) *txtar.Archive {
	t.Helper()
	story, err := txtar.ParseFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return story
}

func TestStory(t *testing.T) {
	for _, file := range storyFiles(t) {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			t.Parallel()
			tell(t, file)
		})
	}
}

func tell(t *testing.T, file string) {
	story := readStory(t, file)
	s := start(t, "--demo")
	names := &names{values: map[string]string{
		"contracts": contractsURL("", demoOrg, demoUser),
		"contract":  contractsURL("", demoOrg, demoUser) + "/" + demoContract,
		"token":     token(t, s.url, "demo", "demo-secret"),
		"reader":    token(t, s.url, "demo", "demo-secret", "read"),
		"writer":    token(t, s.url, "demo", "demo-secret", "write"),
		"other":     token(t, s.url, "demo-other", "demo-other-secret"),
	}}
	var told []txtar.File
	for _, f := range story.Files {
		switch _, kind, _ := strings.Cut(f.Name, " "); kind {
		case "clock":
			d, err := time.ParseDuration(strings.TrimSpace(string(f.Data)))
			if err != nil {
				t.Fatal(err)
			}
			s.clock.move(d)
			told = append(told, f)
		case "request":
			answer := names.hide(roundTrip(t, s.url, f.Name, names.show(string(f.Data))))
			told = append(told, f, txtar.File{Name: strings.Replace(f.Name, "request", "response", 1), Data: []byte(answer)})
		}
	}
	s.stop()
	got := txtar.Format(&txtar.Archive{Comment: story.Comment, Files: told})
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want := map[string]string{}
	for _, f := range story.Files {
		want[f.Name] = string(f.Data)
	}
	for _, f := range told {
		if want[f.Name] != string(f.Data) {
			t.Errorf("%s: %s:\ngot\n%s\nwant\n%s", file, f.Name, f.Data, want[f.Name])
		}
	}
	if len(told) != len(story.Files) {
		t.Errorf("%s: has %d parts, %d were told", file, len(story.Files), len(told))
	}
}

// roundTrip sends a request in the form of a story and returns the response in the same form.
func roundTrip(t *testing.T, base, name, text string) string {
	head, body, _ := strings.Cut(text, "\n\n")
	lines := strings.Split(strings.TrimSuffix(head, "\n"), "\n")
	method, path, _ := strings.Cut(lines[0], " ")
	req, err := http.NewRequest(method, base, strings.NewReader(strings.TrimSuffix(body, "\n")))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if req.URL, err = url.Parse(base + path); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	for _, line := range lines[1:] {
		field, value, ok := strings.Cut(line, ": ")
		if !ok {
			t.Fatalf("%s: not a header field: %q", name, line)
		}
		req.Header.Add(field, value)
	}
	c := &http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	resp, err := c.Do(req)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatalf("%s: read answer: %v", name, err)
	}
	delete(resp.Header, "Date")
	var b strings.Builder
	fmt.Fprintln(&b, resp.Status)
	for _, field := range slices.Sorted(maps.Keys(resp.Header)) {
		for _, value := range resp.Header[field] {
			fmt.Fprintf(&b, "%s: %s\n", field, value)
		}
	}
	if len(content) > 0 {
		fmt.Fprintf(&b, "\n%s\n", content)
	}
	return b.String()
}

// names are the names that stand in a story for values that differ in each run.
type names struct {
	values     map[string]string // by name
	ids, etags int
}

// show replaces each {name} by its value.
func (n *names) show(text string) string {
	for name, value := range n.values {
		text = strings.ReplaceAll(text, "{"+name+"}", value)
	}
	return text
}

var (
	requestID   = regexp.MustCompile(`(?m)^X-Request-Id: (\S+)$`)
	madeID      = regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}`)
	entityTagRE = regexp.MustCompile(`"[0-9a-f]{32}"`)
	secret      = regexp.MustCompile(`"[A-Za-z0-9_-]{43}"`)
)

// hide replaces each value that differs between runs by a {name}. The same value has the same
// name throughout a story.
func (n *names) hide(text string) string {
	if m := requestID.FindStringSubmatch(text); m != nil {
		text = strings.ReplaceAll(text, m[1], "{request}")
	}
	text = madeID.ReplaceAllStringFunc(text, func(id string) string { return n.name(id, "id", &n.ids) })
	text = entityTagRE.ReplaceAllStringFunc(text, func(tag string) string { return n.name(tag, "etag", &n.etags) })
	return secret.ReplaceAllString(text, `"{secret}"`)
}

func (n *names) name(value, kind string, count *int) string {
	for name, v := range n.values {
		if v == value {
			return "{" + name + "}"
		}
	}
	*count++
	name := fmt.Sprintf("%s %d", kind, *count)
	n.values[name] = value
	return "{" + name + "}"
}

func TestStoryNamesAreOneForOneValue(t *testing.T) {
	n := &names{values: map[string]string{}}
	got := n.hide(`"0123456789abcdef0123456789abcdef" "0123456789abcdef0123456789abcdee" "0123456789abcdef0123456789abcdef"`)
	if want := `{etag 1} {etag 2} {etag 1}`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
