package servicetest

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/oauth2/clientcredentials"
)

// The demo data that tests and clients may rely on.
const (
	DemoOrg      = "5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11"
	DemoOtherOrg = "c2a7e5d4-3b1f-4e8a-8f60-7d9b5a1c3e22"
	DemoUser     = "016b78a7-0c7c-4241-a277-015c3ad3cb90"
	DemoContract = "3c90c3cc-0d44-4b50-8888-8dd25736052a"
)

// JSONBody is the header of a request whose content is JSON.
var JSONBody = http.Header{"Content-Type": {"application/json"}}

// ContractsURL returns the URL of the contracts of a user.
func ContractsURL(base, org, user string) string {
	return base + "/api/partners/v2.0/org/" + org + "/users/" + user + "/energy-contracts"
}

// Client returns an HTTP client of an organization. The library golang.org/x/oauth2 gets its
// tokens.
func Client(url, id, secret string, scopes ...string) *http.Client {
	c := clientcredentials.Config{ClientID: id, ClientSecret: secret, TokenURL: url + "/oauth2/token/", Scopes: scopes}
	return c.Client(context.Background())
}

// Token gets an access token for a client.
func Token(t testing.TB, url, id, secret string, scopes ...string) string {
	t.Helper()
	c := clientcredentials.Config{ClientID: id, ClientSecret: secret, TokenURL: url + "/oauth2/token/", Scopes: scopes}
	got, err := c.Token(context.Background())
	if err != nil {
		t.Fatalf("token for %s: %v", id, err)
	}
	return got.AccessToken
}

// Do sends a request and reads the whole response.
func Do(t testing.TB, c *http.Client, method, url string, header http.Header, body string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if header != nil {
		req.Header = header.Clone()
		req.Host = header.Get("Host") // which Go takes from nowhere else
	}
	resp, content, err := AnswerOf(c, req)
	if err != nil {
		t.Fatalf("%s %s: %v", method, url, err)
	}
	return resp, content
}

// AnswerOf sends a request and reads the whole response, which is nil if none came.
func AnswerOf(c *http.Client, req *http.Request) (*http.Response, string, error) {
	resp, err := c.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		err = fmt.Errorf("read answer: %w", err)
	}
	return resp, string(b), err
}

var nextLink = regexp.MustCompile(`^<(.+)>; rel="next"$`)

// Next returns the URL of the next part of a list, or "" if a response is the last part.
func Next(t testing.TB, resp *http.Response) string {
	t.Helper()
	link := nextLink.FindStringSubmatch(resp.Header.Get("Link"))
	if link == nil {
		return ""
	}
	next, err := resp.Request.URL.Parse(link[1])
	if err != nil {
		t.Fatal(err)
	}
	return next.String()
}

// With returns a header in which a field has another value.
func With(h http.Header, name, value string) http.Header {
	h = h.Clone()
	h.Set(name, value)
	return h
}

// Year returns the content of a request to store a contract with n hourly prices.
func Year(n int) string {
	var b strings.Builder
	b.WriteString(`{"energy_contract_type":"spot_hourly","currency_energy_price":"EUR","energy_prices":[`)
	at := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range n {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"price":%.4f,"timestamp":%q}`, float64(i%400)/1000-0.05, at.Add(time.Duration(i)*time.Hour).Format(time.RFC3339))
	}
	b.WriteString("]}")
	return b.String()
}

// Problem is a problem document as a client reads it.
type Problem struct {
	Type, Title, Detail, Instance string
	Status                        int
	Errors                        []struct{ Pointer, Parameter, Detail string }
}

// WantProblem fails the test unless a response is a problem document with a status.
func WantProblem(t testing.TB, resp *http.Response, body string, status int) Problem {
	t.Helper()
	var p Problem
	d := json.NewDecoder(strings.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&p); err != nil {
		t.Fatalf("status %s: not a problem document: %v\n%s", resp.Status, err, body)
	}
	if resp.StatusCode != status || p.Status != status || p.Type != "about:blank" || p.Title != http.StatusText(status) ||
		p.Detail == "" || p.Instance != resp.Header.Get("X-Request-ID") || resp.Header.Get("Content-Type") != "application/problem+json" {
		t.Fatalf("got %s, want a problem document of status %d\n%v\n%s", resp.Status, status, resp.Header, body)
	}
	return p
}

// WantUnavailable fails the test unless a response is a problem document with status 503 and
// has Retry-After.
func WantUnavailable(t testing.TB, resp *http.Response, body string) {
	t.Helper()
	WantProblem(t, resp, body, http.StatusServiceUnavailable)
	if got := resp.Header.Get("Retry-After"); got != "1" {
		t.Errorf("503 with Retry-After %q, want 1\n%s", got, body)
	}
}
