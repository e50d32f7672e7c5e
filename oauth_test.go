package main

// The built-in authorization server, as far as the stories do not cover it: other hosts,
// other settings, and an OAuth library.

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/oauth2/clientcredentials"
)

func TestMetadataNamesThePublicURLOrTheOriginOfTheRequest(t *testing.T) {
	const public = "https://energy.example/energy"
	own := start(t, "--demo")
	configured, slash := start(t, "--demo", "--public-url", public), start(t, "--demo", "--public-url", public+"/")
	origin := start(t, "--demo", "--public-url", "https://energy.example:8443/")
	for _, tt := range []struct {
		name   string
		s      *service
		host   string
		origin string // expected in the metadata; "" if the response is a 400
	}{
		{"its address", own, "", own.url},
		{"a name", own, "energy.test", "http://energy.test"},
		{"a name and a port", own, "energy.test:81", "http://energy.test:81"},
		{"an IPv6 address", own, "[::1]:8080", "http://[::1]:8080"},
		{"a host with a path", own, "energy.test/evil", ""},
		{"a host with a user", own, "user@energy.test", ""},
		{"a host with a query", own, "energy.test?x", ""},
		{"a port only", own, ":81", ""},
		{"the public URL for any Host", configured, "energy.test", public},
		{"the public URL even for an invalid Host", configured, "energy.test/evil", public},
		{"the public URL without the slash at its end", slash, "", public},
		{"a public URL that is an origin", origin, "", "https://energy.example:8443"},
	} {
		for _, method := range []string{"GET", "HEAD"} {
			t.Run(method+" "+tt.name, func(t *testing.T) {
				resp, got := do(t, http.DefaultClient, method, tt.s.url+"/.well-known/oauth-authorization-server", http.Header{"Host": {tt.host}}, "")
				if tt.origin == "" {
					if method == "HEAD" {
						if resp.StatusCode != 400 {
							t.Errorf("got %s", resp.Status)
						}
						return
					}
					if p := wantProblem(t, resp, got, 400); p.Errors[0].Parameter != "Host" {
						t.Errorf("errors: %+v", p.Errors)
					}
					return
				}
				want := strings.ReplaceAll(`{"issuer":"ORIGIN","token_endpoint":"ORIGIN/oauth2/token/",`+
					`"token_endpoint_auth_methods_supported":["client_secret_basic","client_secret_post"],`+
					`"revocation_endpoint":"ORIGIN/oauth2/revoke_token/",`+
					`"revocation_endpoint_auth_methods_supported":["client_secret_basic","client_secret_post"],`+
					`"grant_types_supported":["client_credentials"],"response_types_supported":[],"scopes_supported":["read","write"]}`, "ORIGIN", tt.origin)
				length := fmt.Sprint(len(want))
				if method == "HEAD" {
					want = ""
				}
				if resp.StatusCode != 200 || got != want || resp.Header.Get("Content-Type") != "application/json" || resp.Header.Get("Content-Length") != length {
					t.Errorf("got %s\n%v\n%s\nwant\n%s", resp.Status, resp.Header, got, want)
				}
			})
		}
	}
}

// A client finds everything from the origin alone.
func TestMetadataLeadToATokenAndItsRevocation(t *testing.T) {
	s := start(t, "--demo")
	_, got := do(t, http.DefaultClient, "GET", s.url+"/.well-known/oauth-authorization-server", nil, "")
	var found struct {
		Token  string `json:"token_endpoint"`
		Revoke string `json:"revocation_endpoint"`
	}
	if err := json.Unmarshal([]byte(got), &found); err != nil {
		t.Fatal(err)
	}
	c := clientcredentials.Config{ClientID: "demo", ClientSecret: "demo-secret", TokenURL: found.Token}
	text, err := c.Token(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	header := http.Header{"Authorization": {"Bearer " + text.AccessToken}}
	for _, want := range []int{200, 401} {
		if resp, got := do(t, http.DefaultClient, "GET", contractsURL(s.url, demoOrg, demoUser), header, ""); resp.StatusCode != want {
			t.Errorf("%s, want %d\n%s", resp.Status, want, got)
		}
		form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
		if resp, got := do(t, http.DefaultClient, "POST", found.Revoke, form, "client_id=demo&client_secret=demo-secret&token="+text.AccessToken); resp.StatusCode != 200 || got != "" || resp.Header.Get("Content-Type") != "" {
			t.Errorf("revoke: %s\n%v\n%s", resp.Status, resp.Header, got)
		}
	}
}

func TestTokensLastForTheirLifetimeAndOverARestart(t *testing.T) {
	for _, tt := range []struct {
		flag     string
		lifetime time.Duration
	}{{"", 10 * time.Hour}, {"1s", time.Second}, {"90m", 90 * time.Minute}, {"8760h", 365 * 24 * time.Hour}} {
		t.Run("for "+tt.lifetime.String(), func(t *testing.T) {
			args := []string{"--demo"}
			if tt.flag != "" {
				args = append(args, "--token-lifetime", tt.flag)
			}
			s := start(t, args...)
			form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}, "Authorization": {"Basic ZGVtbzpkZW1vLXNlY3JldA=="}}
			at := time.Now()
			s.clock.stop(at)
			_, got := do(t, http.DefaultClient, "POST", s.url+"/oauth2/token/", form, "grant_type=client_credentials")
			var granted struct {
				Token   string `json:"access_token"`
				Expires int64  `json:"expires_in"`
			}
			if err := json.Unmarshal([]byte(got), &granted); err != nil || granted.Expires != int64(tt.lifetime/time.Second) {
				t.Fatalf("%v\n%s", err, got)
			}
			header := http.Header{"Authorization": {"Bearer " + granted.Token}}
			for range 2 {
				s.clock.move(tt.lifetime - time.Nanosecond)
				if resp, got := do(t, http.DefaultClient, "GET", contractsURL(s.url, demoOrg, demoUser), header, ""); resp.StatusCode != 200 {
					t.Errorf("just before the token expires: %s\n%s", resp.Status, got)
				}
				s.clock.move(time.Nanosecond)
				resp, got := do(t, http.DefaultClient, "GET", contractsURL(s.url, demoOrg, demoUser), header, "")
				if p := wantProblem(t, resp, got, 401); p.Detail != "The token is expired; POST /oauth2/token/ issues another." {
					t.Errorf("when the token expires: %s", p.Detail)
				}
				s.clock.move(-tt.lifetime)
				s.stop()
				s = startOn(t, s.db, args...)
				s.clock.stop(at)
			}
		})
	}
}

// FuzzOAuthRequest checks that a request is read as an independent parser reads it, and that an
// accepted one is parsed to the same parameters when it is encoded again, as a form and as JSON.
func FuzzOAuthRequest(f *testing.F) {
	heads, bodies := storyRequests(f)
	for i, head := range heads {
		if strings.Contains(head, " /oauth2/") {
			f.Add([]byte(bodies[i]))
		}
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		req, err := parseOAuthRequest(body)
		sent, good := oauthParameters(body)
		if good != (err == nil) {
			t.Fatalf("error %v, want the body accepted: %t", err, good)
		}
		if err != nil {
			var bad *oauthError
			if !errors.As(err, &bad) || bad.status != 400 || bad.Code != "invalid_request" || req != (oauthRequest{}) {
				t.Fatalf("error %v with the request %+v", err, req)
			}
			return
		}
		values, members := url.Values{}, map[string]string{}
		for name, value := range map[string]string{
			"client_id": req.ClientID, "client_secret": req.ClientSecret, "grant_type": req.GrantType, "scope": req.Scope, "token": req.Token,
		} {
			if is := sent[name]; value != is {
				t.Fatalf("%s is %q, want %q", name, value, is)
			}
			if !utf8.ValidString(value) { // JSON cannot encode other strings
				return
			}
			if value != "" {
				values.Set(name, value)
				members[name] = value
			}
		}
		inJSON, err := json.Marshal(members)
		if err != nil {
			t.Fatal(err)
		}
		for _, body := range []string{values.Encode(), string(inJSON)} {
			if again, err := parseOAuthRequest([]byte(body)); err != nil || again != req {
				t.Fatalf("%s is %+v, %v, want %+v", body, again, err, req)
			}
		}
	})
}

// oauthParameters is an independent parser of a form or of JSON.
func oauthParameters(body []byte) (sent map[string]string, good bool) {
	sent = map[string]string{}
	body = bytes.TrimPrefix(body, []byte{0xEF, 0xBB, 0xBF})
	if len(body) >= 2 && (string(body[:2]) == "\xFF\xFE" || string(body[:2]) == "\xFE\xFF" || (body[0] == 0) != (body[1] == 0)) {
		return nil, false // UTF-16
	}
	if !strings.HasPrefix(strings.TrimLeft(string(body), " \t\r\n"), "{") {
		values, err := url.ParseQuery(strings.TrimRight(string(body), "\r\n"))
		for _, name := range []string{"client_id", "client_secret", "grant_type", "scope", "token"} {
			for _, v := range values[name] {
				if v != "" && sent[name] != "" && v != sent[name] {
					return nil, false
				}
				sent[name] = cmp.Or(v, sent[name])
			}
		}
		return sent, err == nil
	}
	if !utf8.Valid(body) || !json.Valid(body) || surrogate.Match(surrogatePairs.ReplaceAll(body, []byte(" "))) {
		return nil, false
	}
	d := json.NewDecoder(bytes.NewReader(body))
	if begin, err := d.Token(); err != nil || begin != json.Delim('{') {
		return nil, false
	}
	for d.More() {
		name, err := d.Token()
		var value any
		if err != nil || d.Decode(&value) != nil {
			return nil, false
		}
		if !slices.Contains([]string{"client_id", "client_secret", "grant_type", "scope", "token"}, name.(string)) {
			continue
		}
		if value == nil {
			continue
		}
		v, ok := value.(string)
		if is := sent[name.(string)]; !ok || v != "" && is != "" && v != is {
			return nil, false
		}
		sent[name.(string)] = cmp.Or(v, sent[name.(string)])
	}
	return sent, true
}

// FuzzScopes checks that accepted scopes have one text form and mean the same in a JWT.
func FuzzScopes(f *testing.F) {
	for _, scopes := range []string{"read", "write", "write read", " read  read ", "read\twrite", "read,write", "READ", "admin", ""} {
		f.Add(scopes)
	}
	form := regexp.MustCompile(`^ *(read|write)( +(read|write))* *$`)
	f.Fuzz(func(t *testing.T, text string) {
		var s Scopes
		err := s.UnmarshalText([]byte(text))
		if want := (Scopes{strings.Contains(text, "read"), strings.Contains(text, "write")}); form.MatchString(text) {
			if err != nil || s != want || scopesOf(jwt.MapClaims{"scope": text}) != want {
				t.Fatalf("%+v, %v, in a JWT %+v, want %+v", s, err, scopesOf(jwt.MapClaims{"scope": text}), want)
			}
			var again Scopes
			if err := again.UnmarshalText([]byte(s.String())); err != nil || again != s {
				t.Fatalf("%+v is written %q, which is %+v, %v", s, s, again, err)
			}
		} else if err == nil || s != (Scopes{}) {
			t.Fatalf("accepted as %+v", s)
		}
	})
}
