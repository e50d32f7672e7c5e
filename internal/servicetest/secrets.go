package main

// No token, secret or Authorization value stands where it does not belong. Whatever a
// test runs is looked at when it ends: logs, what commands complain of, answers,
// metrics, database files.

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// secretSize is the size of a secret of ours, in characters of base64url. Longer ones are
// known by their last so many.
const secretSize = 43

// secrets are those that tests have seen or sent.
type secrets struct {
	mu    sync.RWMutex
	long  map[string]struct{}
	short []string // of the demo clients
}

var known = &secrets{long: map[string]struct{}{}, short: []string{"demo-secret"}}

func (s *secrets) Add(secret string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(secret) >= secretSize && secret[len(secret)-1] != secret[len(secret)-2]: // else it is a test's, of zeros
		s.long[secret[len(secret)-secretSize:]] = struct{}{}
	case strings.HasSuffix(secret, "-secret") && !slices.Contains(s.short, secret):
		s.short = append(s.short, secret)
	}
}

// in returns the secrets that a text has.
func (s *secrets) In(text string) (found []string) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, secret := range s.short {
		if strings.Contains(text, secret) {
			found = append(found, secret)
		}
	}
	for i := secretSize - 1; i < len(text); { // where one may end
		run := 0
		for run < secretSize && isBase64[text[i-run]] {
			run++
		}
		if run < secretSize {
			i += secretSize - run
			continue
		}
		if _, ok := s.long[text[i+1-secretSize:i+1]]; ok {
			found = append(found, text[i+1-secretSize:i+1])
		}
		i++
	}
	return found
}

// isBase64 is for the characters of both alphabets.
var isBase64 = func() (is [256]bool) {
	for _, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+/=") {
		is[c] = true
	}
	return is
}()

// exchanged learns the secrets of an exchange, and returns those that are in its answer if
// that is an error.
func (s *secrets) exchanged(r *http.Request, resp *http.Response, content []byte) []string {
	for _, value := range r.Header["Authorization"] {
		_, credentials, _ := strings.Cut(value, " ")
		s.Add(credentials)
		if decoded, err := base64.StdEncoding.DecodeString(credentials); err == nil {
			_, secret, _ := strings.Cut(string(decoded), ":")
			s.Add(secret)
		}
	}
	var granted struct {
		AccessToken string `json:"access_token"`
	}
	if json.Unmarshal(content, &granted) == nil {
		s.Add(granted.AccessToken)
	}
	if resp.StatusCode < 400 {
		return nil
	}
	var answer strings.Builder
	_ = resp.Header.Write(&answer) // to memory
	return append(s.In(answer.String()), s.In(string(content))...)
}

// wantNone fails if a text of some kind has a secret.
func (s *secrets) WantNone(t testing.TB, what, text string) {
	t.Helper()
	if found := s.In(text); len(found) > 0 {
		t.Errorf("%s has the secrets %q", what, found)
	}
}

// wantNoneIn is wantNone for a file.
func (s *secrets) WantNoneIn(t testing.TB, path string) {
	t.Helper()
	if file, err := os.ReadFile(path); err == nil { // else there is none, or the test took its rights
		s.WantNone(t, path, string(file))
	}
}

// databaseOf is the file that a command line names, or "".
func databaseOf(args []string) string {
	if i := slices.Index(args, "--db"); i >= 0 && i+1 < len(args) {
		return args[i+1]
	}
	return ""
}

func TestSecretIsFoundWhereverItStands(t *testing.T) {
	secret := newSecret()
	s := &secrets{long: map[string]struct{}{}}
	s.Add("header.claims." + secret)
	s.Add("a-secret")
	for text, want := range map[string]int{
		"": 0, secret: 1, "token=" + secret + "&": 1, "x" + secret + "y" + secret: 2, secret[1:]: 0,
		"\x00\x01" + secret + "\xff": 1, "my a-secret": 1, strings.ToUpper(secret): 0,
	} {
		if got := s.In(text); len(got) != want {
			t.Errorf("in %q: %q, want %d", text, got, want)
		}
	}
}

// A profile would show what is in memory; so would the stacks that end a process.
func TestNoProfileIsServedAndStacksHaveNoSecrets(t *testing.T) {
	p := startProcess(t, nil, "--demo", "--metrics-addr", "127.0.0.1:0", "--db", shortPath(t))
	bearer := token(t, p.URL, "demo", "demo-secret")
	metrics := "http://" + metricsLine.FindStringSubmatch(p.Stderr.String())[1]
	for _, base := range []string{p.URL, metrics} {
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/vars"} {
			if resp, got := do(t, http.DefaultClient, "GET", base+path, nil, ""); resp.StatusCode != 404 {
				t.Errorf("GET %s: %s\n%.300s", base+path, resp.Status, got)
			}
		}
	}
	conn, _ := halfRequest(t, p.URL, bearer) // is in flight
	defer conn.Close()
	if err := p.Cmd.Process.Signal(syscall.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Ended:
	case <-time.After(20 * time.Second):
		t.Fatal("still running after SIGQUIT")
	}
	if !strings.Contains(p.Stderr.String(), "goroutine ") {
		t.Errorf("no stacks\n%s", p.Stderr)
	}
	known.WantNone(t, "the stacks", p.Stderr.String())
}
