package e2e

// The docs page in a browser, and a web page of a partner that uses the API.

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

var browserProgram = servicetest.NestedProgram("browser")

// Headless Chromium uses the page as a person would.
func TestDocsPageInABrowser(t *testing.T) {
	long(t)
	needTool(t, "chromium")
	path := servicetest.NeedNested(t, browserProgram)
	t.Run("directly", func(t *testing.T) {
		t.Parallel() // most of it is to wait for Chromium

		shots := os.Getenv("SCREENSHOTS") // where to leave them for a person to look at
		if shots == "" {
			shots = t.TempDir()
		}
		visitDocs(t, path, startProcess(t, nil, "--demo").URL, shots)
	})
	t.Run("behind a proxy", func(t *testing.T) {
		t.Parallel()
		visitDocs(t, path, behindProxy(t, startProcess(t, nil, "--demo").URL), t.TempDir())
	})
}

// behindProxy returns the URL of a service behind a proxy that strips a prefix of the path and
// does not tell the service its own host.
func behindProxy(t testing.TB, service string) string {
	t.Helper()
	const prefix = "/behind"
	to, err := url.Parse(service)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewServer(http.StripPrefix(prefix, &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(to) // and the Host
			if r.In.Header.Get("If-Match") != "" {
				t.Errorf("the page sends the example of If-Match: %s", r.In.Header["If-Match"])
			}
		},
	}))
	t.Cleanup(proxy.Close)
	return proxy.URL + prefix
}

// visitDocs runs the browser on the page of a service, and leaves its screenshots in shots.
func visitDocs(t *testing.T, browser, service, shots string) {
	t.Helper()
	out := servicetest.Succeeds(t, exec.Command(browser, "-url", service, "-shots", shots))
	var saw struct {
		Page, Status, Content string
		Console, Failed       []string
		Hosts, Overflow       map[string]int
	}
	if err := json.Unmarshal([]byte(out), &saw); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if saw.Page != service+docsPath {
		t.Errorf("/ leads to %s", saw.Page)
	}
	var shown, want any
	if err := errors.Join(json.Unmarshal([]byte(saw.Content), &shown), json.Unmarshal([]byte(readFile(t, seedResponse)), &want)); err != nil ||
		saw.Status != "200" || !reflect.DeepEqual(shown, want) {
		t.Errorf("the seed's PUT: %s, %v\n%s", saw.Status, err, saw.Content)
	}
	for _, message := range saw.Console {
		if !strings.HasPrefix(message, "debug: ") { // Chromium's advice on forms
			t.Errorf("in the console: %s", message)
		}
	}
	if len(saw.Hosts) != 1 || saw.Hosts[strings.TrimSuffix(service, "/behind")] == 0 || len(saw.Failed) > 0 {
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

// The page is of another origin than the service, and a script of a third party adds fields to
// its requests. The browser asks the service whether the page may send them.
func TestWebPageOfAPartnerUsesTheAPI(t *testing.T) {
	long(t)
	t.Parallel() // most of it is to wait for Chromium
	needTool(t, "chromium")
	results := make(chan string, 1)
	page := http.NewServeMux()
	page.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		http.ServeFile(w, r, "testdata/clients/web/page.html")
	})
	page.HandleFunc("POST /result", func(w http.ResponseWriter, r *http.Request) {
		result, err := io.ReadAll(r.Body)
		if err != nil {
			result = []byte(err.Error())
		}
		results <- string(result)
	})
	partner := httptest.NewServer(page)
	defer partner.Close()
	contract := contractsURL("", demoOrg, demoUser) + "/" + demoContract
	for _, tt := range []struct{ name, origin, want, log string }{
		{"whose origin is named", partner.URL, `{"status":200,"supplier":"Of the page"}`, ""},
		{"whose origin is not named", "https://app.example", `{"error":"TypeError: Failed to fetch"}`,
			`"path":"/oauth2/token/","reason":"preflight refused: no --cors-origin is \"` + partner.URL + `\""`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := startProcess(t, nil, "--demo", "--log-level", "debug", "--cors-origin", tt.origin)
			profile := t.TempDir()
			chromium := exec.Command("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-component-update",
				"--user-data-dir="+profile, "--remote-debugging-port=0",
				partner.URL+"/?"+url.Values{"service": {p.URL}, "contract": {contract}}.Encode())
			if err := chromium.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				_ = chromium.Process.Signal(syscall.SIGTERM) // it removes its files from the directory first
				_ = chromium.Wait()
				// Its other processes end later, and write until then.
				waitUntil(t, 20*time.Second, "the profile can be removed", func() error { return os.RemoveAll(profile) })
			}()
			select {
			case got := <-results:
				if got != tt.want {
					t.Errorf("got %s, want %s", got, tt.want)
				}
			case <-time.After(time.Minute):
				t.Errorf("the page reports nothing\n%s", p.Stderr)
			}
			waitFor(t, "the log has "+tt.log, func() bool { return strings.Contains(p.Stderr.String(), tt.log) })
		})
	}
}
