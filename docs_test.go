package main

// The description and the page: as files, for a linter, and in a browser.

import (
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"testing"
)

func TestFilesOfTheDocsAreThoseOfTheBinary(t *testing.T) {
	s := start(t)
	for _, tt := range []struct {
		path, contentType string
		from              string // a file of this project
		begins            string // or else, what it begins with
	}{
		{openAPIPath, "application/json", "openapi.json", ""},
		{docsPath, "text/html; charset=utf-8", "docspage/page.html", ""},
		{docsPath + "/page.js", "text/javascript; charset=utf-8", "docspage/page.js", ""},
		{docsPath + "/page.css", "text/css; charset=utf-8", "docspage/page.css", ""},
		{docsPath + "/swagger-ui-bundle.js", "text/javascript; charset=utf-8", "", "/*! For license information please see"},
		{docsPath + "/swagger-ui.css", "text/css; charset=utf-8", "", ".swagger-ui{"},
		{docsPath + "/favicon.png", "image/png", "", "\x89PNG\r\n"},
	} {
		t.Run(tt.path, func(t *testing.T) {
			resp, got := do(t, http.DefaultClient, "GET", s.url+tt.path, nil, "") // which unpacks gzip
			if tt.from != "" {
				tt.begins = readFile(t, tt.from)
			}
			if is := resp.Header.Get("Content-Type"); resp.StatusCode != 200 || is != tt.contentType || !strings.HasPrefix(got, tt.begins) ||
				tt.from != "" && len(got) != len(tt.begins) {
				t.Fatalf("%s, %s\n%.200s", resp.Status, is, got)
			}
			tag := resp.Header.Get("ETag")
			head, _ := do(t, http.DefaultClient, "HEAD", s.url+tt.path, nil, "")
			if head.StatusCode != 200 || head.Header.Get("ETag") != tag || head.Header.Get("Content-Type") != tt.contentType {
				t.Errorf("HEAD: %s\n%v", head.Status, head.Header)
			}
			again, got := do(t, http.DefaultClient, "GET", s.url+tt.path, http.Header{"If-None-Match": {tag}}, "")
			if again.StatusCode != 304 || again.Header.Get("ETag") != tag || got != "" {
				t.Errorf("If-None-Match: %s\n%v\n%.200s", again.Status, again.Header, got)
			}
		})
	}
}

var browserProgram = nestedProgram("browser")

// What a person does on the page, in headless Chromium.
func TestDocsPageInABrowser(t *testing.T) {
	t.Parallel() // most of it is to wait for Chromium
	needTool(t, "chromium")
	path := needNested(t, browserProgram)
	shots := os.Getenv("SCREENSHOTS") // where to leave them for a person to look at
	if shots == "" {
		shots = t.TempDir()
	}
	s := start(t, "--demo")
	out := succeeds(t, exec.Command(path, "-url", s.url, "-shots", shots))
	var saw struct {
		Page, Status, Content string
		Console, Failed       []string
		Hosts, Overflow       map[string]int
	}
	if err := json.Unmarshal([]byte(out), &saw); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if saw.Page != s.url+docsPath {
		t.Errorf("/ leads to %s", saw.Page)
	}
	var shown, want any
	if err := errors.Join(json.Unmarshal([]byte(saw.Content), &shown), json.Unmarshal([]byte(readFile(t, "testdata/seed.response.json")), &want)); err != nil ||
		saw.Status != "200" || !reflect.DeepEqual(shown, want) {
		t.Errorf("the seed's PUT: %s, %v\n%s", saw.Status, err, saw.Content)
	}
	for _, message := range saw.Console {
		if !strings.HasPrefix(message, "debug: ") { // Chromium's advice on forms
			t.Errorf("in the console: %s", message)
		}
	}
	if len(saw.Hosts) != 1 || saw.Hosts[s.url] == 0 || len(saw.Failed) > 0 {
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
