package servicetest

// The search for secrets: no token, secret or Authorization value may appear where it does not
// belong. When a test ends, its logs, the errors of commands, responses, metrics and database
// files are searched.

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
)

// secretSize is the size of a secret of the service, in characters of base64url. A longer
// secret is recognized by its last secretSize characters.
const secretSize = 43

// Secrets is a set of secrets that tests have seen or sent.
type Secrets struct {
	mu    sync.RWMutex
	long  map[string]struct{}
	short []string // of the demo clients
}

// Known is the set that all tests of a package add to.
var Known = &Secrets{long: map[string]struct{}{}, short: []string{"demo-secret"}}

// Add adds a secret to the set.
func (s *Secrets) Add(secret string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case len(secret) >= secretSize && secret[len(secret)-1] != secret[len(secret)-2]: // else it is a test's, of zeros
		s.long[secret[len(secret)-secretSize:]] = struct{}{}
	case strings.HasSuffix(secret, "-secret") && !slices.Contains(s.short, secret):
		s.short = append(s.short, secret)
	}
}

// in returns the secrets of the set that a text has.
func (s *Secrets) in(text string) (found []string) {
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

// isBase64 reports whether a byte is a character of either alphabet of base64.
var isBase64 = func() (is [256]bool) {
	for _, c := range []byte("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_+/=") {
		is[c] = true
	}
	return is
}()

// exchanged adds the secrets of a request and its response to the set. It returns those that
// an error response contains.
func (s *Secrets) exchanged(r *http.Request, resp *http.Response, content []byte) []string {
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
	return append(s.in(answer.String()), s.in(string(content))...)
}

// WantNone fails the test if a text has a secret of the set.
func (s *Secrets) WantNone(t testing.TB, what, text string) {
	t.Helper()
	if found := s.in(text); len(found) > 0 {
		t.Errorf("%s has the secrets %q", what, found)
	}
}

// WantNoneIn is like WantNone, for the content of a file.
func (s *Secrets) WantNoneIn(t testing.TB, path string) {
	t.Helper()
	if file, err := os.ReadFile(path); err == nil { // else there is none, or the test took its rights
		s.WantNone(t, path, string(file))
	}
}

// DatabaseOf returns the file that a command line names by --db, or "".
func DatabaseOf(args []string) string {
	if i := slices.Index(args, "--db"); i >= 0 && i+1 < len(args) {
		return args[i+1]
	}
	return ""
}
