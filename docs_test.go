package main

// The OpenAPI description and the files of its page.

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func TestFilesOfTheDocsAreThoseOfTheBinary(t *testing.T) {
	s := start(t)
	for _, tt := range []struct {
		path, contentType string
		from              string // a file of this project
		begins            string // or else, what it begins with
	}{
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

// The description is the file, but for the two URLs of the service.
func TestDescriptionNamesTheOriginOfTheRequest(t *testing.T) {
	const public = "https://energy.example"
	own, configured := start(t), start(t, "--public-url", public)
	file := readFile(t, "openapi.json")
	tags := map[string]string{} // by origin
	for _, tt := range []struct{ at, host, origin string }{
		{own.url, "", own.url},
		{own.url, "energy.test:81", "http://energy.test:81"},
		{own.url, "[::1]:8080", "http://[::1]:8080"},
		{configured.url, "energy.test", public},
	} {
		t.Run(tt.origin, func(t *testing.T) {
			want := strings.NewReplacer(
				`"servers": [{"url": "http://127.0.0.1:8080"`, `"servers": [{"url": "`+tt.origin+`"`,
				`"tokenUrl": "http://127.0.0.1:8080/oauth2/token/"`, `"tokenUrl": "`+tt.origin+`/oauth2/token/"`).Replace(file)
			host := http.Header{"Host": {tt.host}}
			resp, got := do(t, http.DefaultClient, "GET", tt.at+openAPIPath, host, "")
			tag := resp.Header.Get("ETag")
			if resp.StatusCode != 200 || got != want || resp.Header.Get("Content-Type") != "application/json" {
				t.Fatalf("%s\n%v\n%s", resp.Status, resp.Header, got)
			}
			head, got := do(t, http.DefaultClient, "HEAD", tt.at+openAPIPath, host, "")
			if head.StatusCode != 200 || head.Header.Get("ETag") != tag || head.Header.Get("Content-Length") != fmt.Sprint(len(want)) || got != "" {
				t.Errorf("HEAD: %s\n%v\n%s", head.Status, head.Header, got)
			}
			for origin, other := range tags {
				again, got := do(t, http.DefaultClient, "GET", tt.at+openAPIPath, with(host, "If-None-Match", other), "")
				if again.StatusCode != 200 || got != want {
					t.Errorf("the ETag of %s: %s\n%v", origin, again.Status, again.Header)
				}
			}
			again, got := do(t, http.DefaultClient, "GET", tt.at+openAPIPath, with(host, "If-None-Match", tag), "")
			if again.StatusCode != 304 || again.Header.Get("ETag") != tag || got != "" {
				t.Errorf("If-None-Match: %s\n%v\n%s", again.Status, again.Header, got)
			}
			tags[tt.origin] = tag
		})
	}
	every(t, own.url, "", func(o *operation) bool { return o.Path == openAPIPath && o.Method != "OPTIONS" }, func(_ *operation, h http.Header) {
		h.Set("Host", "energy.test/evil")
	}, func(*operation) failure { return invalidHost })
}

// invalidHost is the response to a request whose URLs would have no valid host.
var invalidHost = failure{
	Status: 400, Detail: "The request cannot be parsed; see errors.",
	Errors: `,"errors":[{"parameter":"Host","detail":"must be a host name or address, with an optional port"}]`,
}

// In HTTP/2, net/http accepts bytes in :authority that it refuses in the Host field.
func TestDescriptionAndMetadataRefuseAnAuthorityThatIsNotText(t *testing.T) {
	a, err := newAPI(nil, time.Now, slog.New(slog.DiscardHandler), apiSettings{builtInTokens: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{openAPIPath, metadataPath} {
		r := httptest.NewRequest("GET", path, nil)
		r.Host = "energy\xff.test"
		w := httptest.NewRecorder()
		a.ServeHTTP(w, r)
		resp := w.Result()
		resp.Request = r
		invalidHost.Want(t, resp, w.Body.String())
	}
}
