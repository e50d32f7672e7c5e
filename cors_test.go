package main

import (
	"fmt"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// crossOrigin returns the fields of a response that a browser checks for a page of another
// origin.
func crossOrigin(h http.Header) http.Header {
	found := http.Header{}
	for name, values := range h {
		if strings.HasPrefix(name, "Access-Control-") || name == "Vary" {
			found[name] = values
		}
	}
	return found
}

func TestCORSIsForTheOriginsThatAreNamed(t *testing.T) {
	const page, another = "https://app.example", "http://localhost:3000"
	exposed := []string{"Accept-Patch, Allow, Etag, Link, Location, Retry-After, Www-Authenticate, X-Request-Id"}
	preflightVary := []string{"Origin, Access-Control-Request-Method, Access-Control-Request-Headers"}
	named := []string{"--cors-origin", page, "--cors-origin", another}
	contract := contractsURL("", demoOrg, demoUser) + "/" + demoContract
	for _, tt := range []struct {
		name            string
		args            []string
		method, path    string
		origin          string
		asks, askFields string // of a preflight
		status          int
		want            http.Header
		reason          string // of a refused preflight, in the log at level debug
	}{
		{name: "none is named", method: "GET", path: contract, origin: page, status: 200},
		{name: "none is named, a preflight", method: "OPTIONS", path: contract, origin: page, asks: "PUT", status: 204,
			reason: `preflight refused: there is no --cors-origin, so pages of other origins, such as "https://app.example", may not use the API`},
		{name: "one that is named", args: named, method: "GET", path: contract, origin: page, status: 200, want: http.Header{
			"Access-Control-Allow-Origin": {page}, "Access-Control-Expose-Headers": exposed, "Vary": {"Origin"},
		}},
		{name: "another that is named", args: named, method: "GET", path: contract, origin: another, status: 200, want: http.Header{
			"Access-Control-Allow-Origin": {another}, "Access-Control-Expose-Headers": exposed, "Vary": {"Origin"},
		}},
		{name: "an error", args: named, method: "GET", path: contract + "0", origin: page, status: 422, want: http.Header{
			"Access-Control-Allow-Origin": {page}, "Access-Control-Expose-Headers": exposed, "Vary": {"Origin"},
		}},
		{name: "a token", args: named, method: "POST", path: "/oauth2/token/", origin: page, status: 401, want: http.Header{
			"Access-Control-Allow-Origin": {page}, "Access-Control-Expose-Headers": exposed, "Vary": {"Origin"},
		}},
		{name: "the metadata", args: named, method: "GET", path: metadataPath, origin: page, status: 200, want: http.Header{
			"Access-Control-Allow-Origin": {page}, "Access-Control-Expose-Headers": exposed, "Vary": {"Origin"},
		}},
		{name: "no origin", args: named, method: "GET", path: contract, status: 200, want: http.Header{"Vary": {"Origin"}}},
		{name: "one that is not named", args: named, method: "GET", path: contract, origin: "https://evil.example", status: 200, want: http.Header{"Vary": {"Origin"}}},
		{name: "one that begins as one that is named", args: named, method: "GET", path: contract, origin: page + ".evil.example", status: 200, want: http.Header{"Vary": {"Origin"}}},
		{name: "another port", args: named, method: "GET", path: contract, origin: page + ":8443", status: 200, want: http.Header{"Vary": {"Origin"}}},
		{name: "another scheme", args: named, method: "GET", path: contract, origin: "http://app.example", status: 200, want: http.Header{"Vary": {"Origin"}}},
		{name: "a file", args: named, method: "GET", path: contract, origin: "null", status: 200, want: http.Header{"Vary": {"Origin"}}},
		{name: "a preflight", args: named, method: "OPTIONS", path: contract, origin: page, asks: "PUT", askFields: "authorization,content-type,if-match", status: 204, want: http.Header{
			"Access-Control-Allow-Origin": {page}, "Access-Control-Allow-Methods": {"PUT"}, "Access-Control-Allow-Headers": {"authorization,content-type,if-match"},
			"Access-Control-Max-Age": {"7200"}, "Vary": preflightVary,
		}},
		{name: "a preflight for a token", args: named, method: "OPTIONS", path: "/oauth2/token/", origin: another, asks: "POST", askFields: "authorization", status: 204, want: http.Header{
			"Access-Control-Allow-Origin": {another}, "Access-Control-Allow-Methods": {"POST"}, "Access-Control-Allow-Headers": {"authorization"},
			"Access-Control-Max-Age": {"7200"}, "Vary": preflightVary,
		}},
		{name: "a preflight of a path that is not there", args: named, method: "OPTIONS", path: "/nothing", origin: page, asks: "GET", status: 204, want: http.Header{
			"Access-Control-Allow-Origin": {page}, "Access-Control-Allow-Methods": {"GET"}, "Access-Control-Max-Age": {"7200"}, "Vary": preflightVary,
		}},
		{name: "a preflight of an origin that is not named", args: named, method: "OPTIONS", path: contract, origin: "https://evil.example", asks: "PUT", status: 204, want: http.Header{"Vary": preflightVary},
			reason: `preflight refused: no --cors-origin is "https://evil.example"`},
		{name: "a preflight for fields of a script that measures the page", args: named, method: "OPTIONS", path: contract, origin: page, asks: "PUT", askFields: "authorization,baggage,content-type,sentry-trace", status: 204, want: http.Header{
			"Access-Control-Allow-Origin": {page}, "Access-Control-Allow-Methods": {"PUT"}, "Access-Control-Allow-Headers": {"authorization,baggage,content-type,sentry-trace"},
			"Access-Control-Max-Age": {"7200"}, "Vary": preflightVary,
		}},
		{name: "a preflight for a method of no use here", args: named, method: "OPTIONS", path: contract, origin: page, asks: "LINK", status: 204, want: http.Header{"Vary": preflightVary},
			reason: `preflight refused: the API has no method "LINK" (methods are case-sensitive)`},
		{name: "an app's", args: []string{"--cors-origin", "capacitor://localhost"}, method: "GET", path: contract, origin: "capacitor://localhost", status: 200, want: http.Header{
			"Access-Control-Allow-Origin": {"capacitor://localhost"}, "Access-Control-Expose-Headers": exposed, "Vary": {"Origin"},
		}},
		{name: "all, which are told apart by nothing", args: []string{"--cors-origin", "*"}, method: "GET", path: contract, origin: page, status: 200, want: http.Header{
			"Access-Control-Allow-Origin": {"*"}, "Access-Control-Expose-Headers": exposed, "Vary": {"Origin"},
		}},
		{name: "all, a preflight", args: []string{"--cors-origin", "*"}, method: "OPTIONS", path: contract, origin: page, asks: "DELETE", askFields: "authorization", status: 204, want: http.Header{
			"Access-Control-Allow-Origin": {"*"}, "Access-Control-Allow-Methods": {"DELETE"}, "Access-Control-Allow-Headers": {"authorization"},
			"Access-Control-Max-Age": {"7200"}, "Vary": preflightVary,
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := start(t, append([]string{"--demo", "--log-level", "debug"}, tt.args...)...)
			h := http.Header{}
			for name, value := range map[string]string{
				"Origin": tt.origin, "Access-Control-Request-Method": tt.asks, "Access-Control-Request-Headers": tt.askFields,
			} {
				if value != "" {
					h.Set(name, value)
				}
			}
			c := http.DefaultClient
			if tt.method == "GET" {
				c = client(s.url, "demo", "demo-secret")
			}
			resp, got := do(t, c, tt.method, s.url+tt.path, h, "")
			if is := crossOrigin(resp.Header); resp.StatusCode != tt.status || !maps.EqualFunc(is, tt.want, slices.Equal) {
				t.Errorf("got %s\n%v\n%s\nwant %d\n%v", resp.Status, is, got, tt.status, tt.want)
			}
			if reason := fmt.Sprintf(" reason=%q\n", tt.reason); tt.method == "OPTIONS" && strings.Contains(s.log.String(), reason) != (tt.reason != "") {
				t.Errorf("want the reason %q in the log\n%s", tt.reason, s.log)
			}
			if tt.method == "OPTIONS" && (got != "" || strings.Count(s.log.String(), `method=OPTIONS route="" status=204`) != 1) {
				t.Errorf("%q; the log\n%s", got, s.log)
			}
		})
	}
}

// FuzzOrigin checks that an accepted public URL followed by a path is a URL of the same origin and
// with both paths, that each origin is a public URL, and that an accepted CORS origin has the form
// that browsers send.
func FuzzOrigin(f *testing.F) {
	ofApp := regexp.MustCompile(`^[a-z][a-z0-9+.-]*://[^/?#@*\\ ]+$`)
	f.Add("capacitor://localhost")
	f.Fuzz(func(t *testing.T, text string) {
		public := checkPublicURL(text) == nil
		if public {
			alone, _ := url.Parse(text)
			base := strings.TrimSuffix(text, "/")
			with, err := url.Parse(base + tokenPath)
			if err != nil || !strings.HasPrefix(text, with.Scheme+"://"+with.Host) || with.Host != alone.Host ||
				with.JoinPath().Path != strings.TrimSuffix(alone.Path, "/")+tokenPath || with.User != nil || with.RawQuery != "" || with.Fragment != "" {
				t.Fatalf("with a path it is %+v, %v", with, err)
			}
		}
		u, err := parseOrigin(text)
		if err != nil {
			if text != "*" && checkCORSOrigin(text) == nil && !ofApp.MatchString(text) {
				t.Fatal("no origin, but pages of it may use the API")
			}
			return
		}
		if !public || u.Path != "" {
			t.Fatalf("an origin, but no public URL, or one with the path %q", u.Path)
		}
		if err := checkCORSOrigin(text); err == nil && (strings.Contains(text, "*") || strings.HasSuffix(text, map[string]string{"http": ":80", "https": ":443"}[u.Scheme])) {
			t.Fatal("pages of it may use the API, but no browser sends it")
		}
	})
}
