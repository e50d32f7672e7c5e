package main

// The metrics, as Prometheus's own parser and linter read them.

import (
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

var promlintProgram = nestedProgram("promlint")

var metricsLine = regexp.MustCompile(`"?msg"?[=:]"serving metrics"[ ,]"?addr"?[=:]"?([0-9.:]+)`)

// scrape gets the metrics of a service from the address in its log.
func scrape(t testing.TB, log string) string {
	t.Helper()
	m := metricsLine.FindStringSubmatch(log)
	if m == nil {
		t.Fatalf("the log does not say where metrics are\n%s", log)
	}
	resp, text := do(t, http.DefaultClient, "GET", "http://"+m[1]+"/metrics", nil, "")
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/plain; version=0.0.4; charset=utf-8" {
		t.Fatalf("%s, %v\n%s", resp.Status, resp.Header, text)
	}
	known.WantNone(t, "metrics", text)
	return text
}

// metric returns the value of a series.
func metric(t testing.TB, text, series string) string {
	t.Helper()
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Errorf("there is no %s in\n%s", series, ours(text))
	return ""
}

// ours returns the lines of our own metrics.
func ours(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, metricPrefix) {
			b.WriteString(line)
		}
	}
	return b.String()
}

func wantMetrics(t testing.TB, text string, want map[string]string) {
	t.Helper()
	for series, value := range want {
		if got := metric(t, text, metricPrefix+series); got != value {
			t.Errorf("%s is %s, want %s", series, got, value)
		}
	}
}

func TestMetricsPassPrometheusLinter(t *testing.T) {
	slow(t)
	s := start(t, "--demo", "--metrics-addr", "127.0.0.1:0")
	for _, authorization := range []string{"Bearer wrong", "Bearer " + token(t, s.url, "demo", "demo-secret")} {
		do(t, http.DefaultClient, "GET", contractsURL(s.url, demoOrg, demoUser), http.Header{"Authorization": {authorization}}, "")
	}
	do(t, http.DefaultClient, "POST", s.url+"/oauth2/token/", nil, "")
	text := scrape(t, s.log.String())
	families := []string{
		"build_info",
		"commit_duration_seconds",
		"commit_failures_total",
		"commit_writes",
		"database_free_pages",
		"database_open_read_transactions",
		"database_size_bytes",
		"http_request_duration_seconds",
		"http_requests_total",
		"request_memory_bytes",
		"token_requests_refused_total",
		"tokens_issued_total",
		"tokens_refused_total",
		"write_queue_length",
		"write_queue_wait_seconds",
	}
	// The linter names each family with our prefix, since the library writes no help; it
	// must object to nothing else.
	var want strings.Builder
	for _, name := range families {
		fmt.Fprintf(&want, "%s no help text\n", metricPrefix+name)
	}
	fmt.Fprintf(&want, "%d families\n", len(families))
	cmd := exec.Command(needNested(t, promlintProgram), metricPrefix)
	cmd.Stdin = strings.NewReader(text)
	out, err := cmd.CombinedOutput()
	if err != nil || string(out) != want.String() {
		t.Errorf("%v\n%s\nwant\n%s\nof\n%s", err, out, want.String(), ours(text))
	}
}

func TestMetricsCountWhatHappened(t *testing.T) {
	s := start(t, "--demo", "--metrics-addr", "127.0.0.1:0")
	route := `route="/api/partners/v2.0/org/:org_id/users/:user_id/energy-contracts/:energy_contract_id"`
	before := scrape(t, s.log.String())
	c := client(s.url, "demo", "demo-secret")
	url := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
	for range 3 {
		do(t, c, "PUT", url, jsonBody, `{}`)
	}
	do(t, c, "PUT", url, jsonBody, `{`)
	do(t, c, "GET", url, nil, "")
	for _, why := range []string{"wrong", "wrong", "not a token"} {
		do(t, http.DefaultClient, "GET", url, http.Header{"Authorization": {"Bearer " + why}}, "")
	}
	form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
	do(t, http.DefaultClient, "POST", s.url+"/oauth2/token/", form, "grant_type=client_credentials&client_id=demo&client_secret=x")
	do(t, http.DefaultClient, "POST", s.url+"/oauth2/token/", form, "grant_type=password&client_id=demo&client_secret=demo-secret")
	for i := range 50 { // which must not make 50 series
		do(t, http.DefaultClient, fmt.Sprint("METHOD", i), s.url+fmt.Sprint("/path", i), nil, "")
	}
	text := scrape(t, s.log.String())
	wantMetrics(t, text, map[string]string{
		`http_requests_total{` + route + `,method="PUT",status="200"}`:               "3",
		`http_requests_total{` + route + `,method="PUT",status="400"}`:               "1",
		`http_requests_total{` + route + `,method="GET",status="200"}`:               "1",
		`http_requests_total{` + route + `,method="GET",status="401"}`:               "3",
		`http_requests_total{route="/oauth2/token/",method="POST",status="200"}`:     "1",
		`http_requests_total{route="none",method="any",status="404"}`:                "50",
		`http_request_duration_seconds_count{` + route + `,method="PUT"}`:            "4",
		`http_request_duration_seconds_bucket{` + route + `,method="PUT",le="+Inf"}`: "4",
		`tokens_issued_total`:                                          "1",
		`tokens_refused_total{reason="unknown or revoked"}`:            "2",
		`tokens_refused_total{reason="malformed"}`:                     "1",
		`token_requests_refused_total{error="invalid_client"}`:         "1",
		`token_requests_refused_total{error="unsupported_grant_type"}`: "1",
		`commit_failures_total`:                                        "0",
		`write_queue_length`:                                           "0",
		`database_open_read_transactions`:                              "0",
	})
	count := func(text, name string) int {
		n, _ := strconv.Atoi(metric(t, text, metricPrefix+name))
		return n
	}
	for _, name := range []string{"commit_writes_sum", "commit_writes_count", "commit_duration_seconds_count", "write_queue_wait_seconds_count"} {
		if got := count(text, name) - count(before, name); got != 4 { // the token, three contracts
			t.Errorf("%s grew by %d, want 4", name, got)
		}
	}
	if size := count(text, "database_size_bytes"); size < 4*pageSize || size%pageSize != 0 {
		t.Errorf("the file has %d bytes", size)
	}
}

func TestMetricsCostARequestNoMemory(t *testing.T) {
	m := newAPIMetrics(func() int64 { return 0 })
	count := func() { m.request(contractPath, "GET", 200, 42) }
	count()
	if n := testing.AllocsPerRun(1000, count); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// A commit is held until writes wait, since on one processor none would wait.
func TestMetricsShowThatWritesShareACommit(t *testing.T) {
	store, _ := openStore(t, newPath(t))
	if err := loadDemo(store, time.Now()); err != nil {
		t.Fatal(err)
	}
	a, err := newAPI(store, time.Now, slog.New(slog.DiscardHandler), apiSettings{maxBody: 1000, builtInTokens: true, tokenLifetime: tokenLifetime})
	if err != nil {
		t.Fatal(err)
	}
	service, metrics := httptest.NewServer(a), httptest.NewServer(metricsHandler(a.metrics, store.metrics))
	defer service.Close()
	defer metrics.Close()
	described().Serves(t, service.URL)
	bearer := with(jsonBody, "Authorization", "Bearer "+token(t, service.URL, "demo", "demo-secret"))
	scraped := func(series string) int {
		t.Helper()
		_, text := do(t, http.DefaultClient, "GET", metrics.URL+"/metrics", nil, "")
		n, _ := strconv.Atoi(metric(t, text, metricPrefix+series))
		return n
	}
	const clients, each = 16, 20
	release := hold(t, store)
	var writers sync.WaitGroup
	for range clients {
		writers.Go(func() {
			for range each {
				if resp, got := do(t, http.DefaultClient, "POST", contractsURL(service.URL, demoOrg, demoUser), bearer, `{}`); resp.StatusCode != 200 {
					t.Errorf("%s\n%s", resp.Status, got)
				}
			}
		})
	}
	waitFor(t, "all wait", func() bool { return scraped("write_queue_length") == clients })
	release()
	writers.Wait()
	writes, commits := scraped("commit_writes_sum"), scraped("commit_writes_count")
	if writes < clients*each || commits > writes-(clients-1) {
		t.Errorf("%d writes in %d commits", writes, commits)
	}
}

// bbolt does not count free pages until the first commit.
func TestMetricsKnowFreePagesFromTheStart(t *testing.T) {
	db := newPath(t)
	s := startOn(t, db, "--demo")
	l := newAuthor(t, s.url)
	for i := range 10 {
		l.create(t, key(i).Contract)
	}
	for i := range 10 {
		l.remove(t, key(i).Contract)
	}
	s.stop()
	again := startOn(t, db, "--metrics-addr", "127.0.0.1:0")
	free, _ := strconv.Atoi(metric(t, scrape(t, again.log.String()), metricPrefix+"database_free_pages"))
	if free < 10*largeContract*40/pageSize {
		t.Errorf("%d free pages", free)
	}
}

func TestMetricsAreServedNowhereElse(t *testing.T) {
	s := start(t, "--demo", "--metrics-addr", "127.0.0.1:0")
	if resp, got := do(t, http.DefaultClient, "GET", s.url+"/metrics", nil, ""); resp.StatusCode != 404 {
		t.Errorf("%s\n%s", resp.Status, got)
	}
	at := "http://" + metricsLine.FindStringSubmatch(s.log.String())[1]
	for _, path := range []string{"/", "/healthz", contractsURL("", demoOrg, demoUser)} {
		if resp, got := do(t, http.DefaultClient, "GET", at+path, nil, ""); resp.StatusCode != 404 {
			t.Errorf("%s: %s\n%s", path, resp.Status, got)
		}
	}
	s.stop()
	if resp, err := http.Get(at + "/metrics"); err == nil {
		got, _ := io.ReadAll(resp.Body)
		t.Errorf("after the end: %s\n%s", resp.Status, got)
	}
}
