package main

// The files of the OpenAPI description and its page.

import (
	"net/http"
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
