package e2e

// The service below a path of a proxy: nginx with the configuration of docs/operating.md.

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

// proxyLocations matches the locations of nginx in docs/operating.md.
var proxyLocations = regexp.MustCompile(`(?m)^    location [^\n]+\{\n(?:     .*\n)+    \}\n`)

// startProxied starts a service with the demo data, and nginx in front of it. The URL of the
// service at nginx is proxy.
func startProxied(t testing.TB) (service *process, proxy string) {
	t.Helper()
	needTool(t, "nginx")
	host := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	proxy = "http://" + host + "/energy"
	service = startProcess(t, nil, "--demo", "--public-url", proxy)
	locations := proxyLocations.FindAllString(readFile(t, "../docs/operating.md"), -1)
	if len(locations) != 2 {
		t.Fatalf("docs/operating.md has %d locations, want 2", len(locations))
	}
	dir := t.TempDir()
	var temporary string
	for _, kind := range []string{"client_body", "proxy", "fastcgi", "uwsgi", "scgi"} {
		temporary += fmt.Sprintf("%s_temp_path %s/%[1]s;\n", kind, dir)
	}
	conf := filepath.Join(dir, "nginx.conf")
	writeTo(t, conf, fmt.Appendf(nil, "daemon off;\nmaster_process off;\npid %s/pid;\nerror_log stderr;\nevents {}\nhttp {\naccess_log off;\n%sserver {\nlisten %s;\n%s}\n}\n",
		dir, temporary, host, strings.ReplaceAll(strings.Join(locations, ""), "http://127.0.0.1:8080", service.URL)))
	cmd := exec.Command("nginx", "-e", "stderr", "-c", conf)
	said := &lockedBuffer{}
	cmd.Stderr = said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	waitUntil(t, time.Minute, "nginx serves", func() error {
		resp, err := http.Get(proxy + "/healthz")
		if err != nil {
			return fmt.Errorf("%w\n%s", err, said)
		}
		return resp.Body.Close()
	})
	return service, proxy
}

func TestReferencesHoldBehindAProxyThatRemovesAPath(t *testing.T) {
	long(t)
	service, proxy := startProxied(t)
	c := client(proxy, "demo", "demo-secret")
	contracts := contractsURL(proxy, demoOrg, demoUser)

	const id = "0b6e4a52-8c1d-4f7e-9a30-6d2f1c5b8e47"
	for _, tt := range []struct {
		method, url string
		status      int
	}{{"POST", contracts, 200}, {"PUT", contracts + "/" + id, 201}} {
		t.Run("the Location of "+tt.method, func(t *testing.T) {
			header := with(jsonBody, "If-None-Match", "*")
			if tt.method == "POST" {
				header = jsonBody
			}
			resp, made := do(t, c, tt.method, tt.url, header, `{"supplier":"`+tt.method+`"}`)
			location, err := resp.Location()
			if resp.StatusCode != tt.status || err != nil {
				t.Fatalf("%s, %v\n%s", resp.Status, err, made)
			}
			var contract struct{ ID string }
			if err := json.Unmarshal([]byte(made), &contract); err != nil || location.String() != contracts+"/"+contract.ID {
				t.Errorf("%s, %v, of\n%s", location, err, made)
			}
			if resp, got := do(t, c, "GET", location.String(), nil, ""); resp.StatusCode != 200 || got != made {
				t.Errorf("GET %s: %s\n%s\nwant\n%s", location, resp.Status, got, made)
			}
		})
	}
	t.Run("the Link of each part of a list", func(t *testing.T) {
		_, whole := do(t, client(service.URL, "demo", "demo-secret"), "GET", contractsURL(service.URL, demoOrg, demoUser), nil, "")
		var parts []string
		for at := contracts + "?limit=1"; at != ""; {
			resp, part := do(t, c, "GET", at, nil, "")
			if resp.StatusCode != 200 || !strings.HasPrefix(at, contracts+"?") {
				t.Fatalf("GET %s: %s\n%s", at, resp.Status, part)
			}
			parts = append(parts, strings.Trim(part, "[]"))
			at = servicetest.Next(t, resp)
		}
		if got := "[" + strings.Join(parts, ",") + "]"; len(parts) < 4 || got != whole { // two of the demo data, two of above
			t.Errorf("in %d parts\n%s\nwant\n%s", len(parts), got, whole)
		}
	})
	t.Run("the redirect to the page, and its files", func(t *testing.T) {
		needTool(t, "curl")
		got := succeeds(t, exec.Command("curl", "--silent", "--show-error", "--fail", "--location", "--write-out", "%{url_effective}", proxy)) // over /energy/
		page := readFile(t, "../docspage/page.html")
		if got != page+proxy+docsPath {
			t.Fatalf("%s\nwant\n%s", got, page+proxy+docsPath)
		}
		at, err := url.Parse(proxy + docsPath)
		if err != nil {
			t.Fatal(err)
		}
		files := regexp.MustCompile(`(?:src|href|url)[=:] ?"([^"]+)"`).FindAllStringSubmatch(page+readFile(t, "../docspage/page.js"), -1)
		for _, f := range files {
			file, err := at.Parse(f[1])
			if err != nil {
				t.Fatal(err)
			}
			path, below := strings.CutPrefix(file.String(), proxy)
			_, want := do(t, http.DefaultClient, "GET", service.URL+path, nil, "")
			if resp, got := do(t, http.DefaultClient, "GET", file.String(), nil, ""); !below || resp.StatusCode != 200 || got != want {
				t.Errorf("GET %s: %s\n%s", file, resp.Status, head(got))
			}
		}
		if len(files) != 7 { // two of them openapi.json
			t.Errorf("the page names %q", files)
		}
	})
	t.Run("the metadata, at both of their places", func(t *testing.T) {
		want := strings.ReplaceAll(`{"issuer":"URL","token_endpoint":"URL/oauth2/token/",`+
			`"token_endpoint_auth_methods_supported":["client_secret_basic","client_secret_post"],`+
			`"revocation_endpoint":"URL/oauth2/revoke_token/",`+
			`"revocation_endpoint_auth_methods_supported":["client_secret_basic","client_secret_post"],`+
			`"grant_types_supported":["client_credentials"],"response_types_supported":[],"scopes_supported":["read","write"]}`, "URL", proxy)
		for _, at := range []string{proxy + metadataPath, strings.Replace(proxy, "/energy", metadataPath+"/energy", 1)} {
			if resp, got := do(t, http.DefaultClient, "GET", at, nil, ""); resp.StatusCode != 200 || got != want {
				t.Errorf("GET %s: %s\n%s\nwant\n%s", at, resp.Status, got, want)
			}
		}
	})
	t.Run("Node's clients, whose openid-client finds the metadata", func(t *testing.T) {
		runNodeClient(t, needNode(t, nodeClient), service.URL, proxy)
	})
}
