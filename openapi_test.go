package main

// openapi.json has the routes, and its examples are those of testdata.

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestEachRouteIsDescribedAndEachOperationIsARoute(t *testing.T) {
	a, err := newAPI(nil, time.Now, slog.New(slog.DiscardHandler), apiSettings{builtInTokens: true})
	if err != nil {
		t.Fatal(err)
	}
	routes := map[string]bool{}
	for _, r := range a.routes {
		path := regexp.MustCompile(`:(\w+)`).ReplaceAllString(r.pattern, "{$1}")
		if strings.HasPrefix(path, "/oauth2/") {
			path = strings.TrimSuffix(path, "/")
		}
		routes[r.method+" "+path] = true
		routes["OPTIONS "+path] = true // the router's own
	}
	for _, name := range undescribed {
		_, path, _ := strings.Cut(name, " ")
		delete(routes, name)
		delete(routes, "OPTIONS "+path)
	}
	operations := map[string]bool{}
	for path, item := range described().Doc.Paths.Map() {
		for method := range item.Operations() {
			operations[method+" "+path] = true
		}
	}
	if !maps.Equal(routes, operations) {
		t.Errorf("routes\n%q\noperations\n%q", slices.Sorted(maps.Keys(routes)), slices.Sorted(maps.Keys(operations)))
	}
}

// The methods that a path is described with are those that its Allow has.
func TestAllowIsWhatIsDescribed(t *testing.T) {
	s := start(t, "--demo")
	for path, item := range described().Doc.Paths.Map() {
		resp, _ := do(t, http.DefaultClient, "OPTIONS", s.url+demoNames.Replace(path), nil, "")
		want := strings.Join(slices.Sorted(maps.Keys(item.Operations())), ", ")
		if got := resp.Header.Get("Allow"); resp.StatusCode != 204 || got != want {
			t.Errorf("OPTIONS %s: %s, Allow: %q, want %q", path, resp.Status, got, want)
		}
	}
}

// testdataBodies are the contents of requests and answers in testdata, as patterns:
// {name} in a story stands for what is another at each run.
func testdataBodies(t testing.TB) (bodies []*regexp.Regexp) {
	t.Helper()
	add := func(text string) {
		var value any
		if json.Unmarshal([]byte(text), &value) != nil {
			return // a form, or malformed on purpose
		}
		pattern := regexp.QuoteMeta(canonical(t, value))
		pattern = regexp.MustCompile(`\\\{[a-z]+( [0-9]+)?\\\}`).ReplaceAllString(pattern, `[0-9A-Za-z_-]+`)
		bodies = append(bodies, regexp.MustCompile("^"+pattern+"$"))
	}
	add(readFile(t, "testdata/seed.request.json"))
	add(readFile(t, "testdata/seed.answer.json"))
	demo, err := readDemo()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range demo.Contracts {
		add(string(c.Contract))
	}
	for _, file := range storyFiles(t) {
		for _, f := range readStory(t, file).Files {
			_, body, _ := strings.Cut(string(f.Data), "\n\n")
			add(body)
		}
	}
	return bodies
}

// canonical is the one text of a JSON value.
func canonical(t testing.TB, value any) string {
	t.Helper()
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(value); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(b.String())
}

// examples are the values of all examples of contents in a document, but for those
// that a reference stands for.
func examples(node any) (values []any) {
	switch node := node.(type) {
	case []any:
		for _, n := range node {
			values = append(values, examples(n)...)
		}
	case map[string]any:
		if _, ok := node["schema"]; ok && node["in"] == nil { // a media type
			if e, ok := node["example"]; ok {
				values = append(values, e)
			}
		}
		if named, ok := node["examples"].(map[string]any); ok { // its, or those of the components
			for _, e := range named {
				if value, ok := e.(map[string]any)["value"]; ok {
					values = append(values, value)
				}
			}
		}
		for _, n := range node {
			values = append(values, examples(n)...)
		}
	}
	return values
}

func TestExamplesAreThoseOfTestdata(t *testing.T) {
	var doc any
	if err := json.Unmarshal([]byte(readFile(t, "openapi.json")), &doc); err != nil {
		t.Fatal(err)
	}
	bodies, found := testdataBodies(t), examples(doc)
	if len(found) < 20 {
		t.Errorf("%d examples found", len(found))
	}
	for _, e := range found {
		text := canonical(t, e)
		if !slices.ContainsFunc(bodies, func(body *regexp.Regexp) bool { return body.MatchString(text) }) {
			t.Errorf("an example of openapi.json is nowhere in testdata:\n%s", text)
		}
	}
}
