package main

// Metrics for Prometheus (--metrics-addr). The names follow
// https://prometheus.io/docs/practices/naming/.

import (
	"bytes"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// metricPrefix begins the name of each of our metrics.
const metricPrefix = "energy_contracts_"

// metricHelp says what each of our metrics is: the library writes no help.
var metricHelp = map[string]string{
	"build_info":                      "Which program this is; the value is always 1.",
	"http_requests_total":             "Requests by route pattern, method and status; the status of a connection that broke off is aborted.",
	"http_request_duration_seconds":   "Time from the header of a request to the end of its answer, by route pattern and method.",
	"tokens_issued_total":             "Access tokens that the token endpoint issued.",
	"token_requests_refused_total":    "Requests to the token endpoint that got no token, by error code.",
	"tokens_refused_total":            "Requests whose access token was refused, by what the token was.",
	"commit_writes":                   "Writes that shared a commit.",
	"commit_duration_seconds":         "Time that a commit took, with its syncs.",
	"commit_failures_total":           "Commits that failed.",
	"write_queue_length":              "Writes that wait for a commit to begin.",
	"write_queue_wait_seconds":        "Time that a write waited for its commit to begin.",
	"database_size_bytes":             "Size of the database file.",
	"database_free_pages":             "Pages of the database file with nothing in them, which compact removes.",
	"database_open_read_transactions": "Read transactions that are open.",
}

// The upper bounds of the buckets: seconds, and writes up to queueLength.
var (
	durationBounds = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	writesBounds   = metrics.ExponentialBuckets(1, 2, 11)
)

// storeMetrics is what the store counts.
type storeMetrics struct {
	set      *metrics.Set
	writes   *metrics.PrometheusHistogram
	duration *metrics.PrometheusHistogram
	wait     *metrics.PrometheusHistogram
	failures *metrics.Counter
}

// apiMetrics is what the API counts.
type apiMetrics struct {
	set    *metrics.Set
	issued *metrics.Counter

	mu     sync.RWMutex
	series map[seriesKey]series // so that a request puts no name together
}

type seriesKey struct {
	route, method string
	status        int
}

type series struct {
	requests *metrics.Counter
	duration *metrics.PrometheusHistogram
}

func newAPIMetrics() *apiMetrics {
	set := metrics.NewSet()
	this := readBuild()
	set.NewGauge(fmt.Sprintf(metricPrefix+"build_info{version=%q,commit=%q,goversion=%q}", this.Version, this.Commit, this.Go),
		func() float64 { return 1 })
	return &apiMetrics{set: set, issued: set.NewCounter(metricPrefix + "tokens_issued_total"), series: make(map[seriesKey]series)}
}

// request counts a request. Its route is "" where none matched; its status is 0 where
// none was sent.
func (m *apiMetrics) request(route, method string, status int, took time.Duration) {
	if route == "" { // then a client chooses the method, and could make any number of series
		route, method = "none", "any"
	}
	key := seriesKey{route, method, status}
	m.mu.RLock()
	s, ok := m.series[key]
	m.mu.RUnlock()
	if !ok {
		s = m.newSeries(key)
	}
	s.requests.Inc()
	s.duration.Update(took.Seconds())
}

func (m *apiMetrics) newSeries(key seriesKey) series {
	status := "aborted"
	if key.status != 0 {
		status = strconv.Itoa(key.status)
	}
	labels := fmt.Sprintf("route=%q,method=%q", key.route, key.method)
	s := series{
		requests: m.set.GetOrCreateCounter(metricPrefix + "http_requests_total{" + labels + fmt.Sprintf(",status=%q}", status)),
		duration: m.set.GetOrCreatePrometheusHistogramExt(metricPrefix+"http_request_duration_seconds{"+labels+"}", durationBounds),
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.series[key] = s
	return s
}

// tokenRefused counts a request with a token that is not good.
func (m *apiMetrics) tokenRefused(reason string) {
	m.set.GetOrCreateCounter(fmt.Sprintf(metricPrefix+"tokens_refused_total{reason=%q}", reason)).Inc()
}

// tokenRequestRefused counts a request for a token that got none.
func (m *apiMetrics) tokenRequestRefused(code string) {
	m.set.GetOrCreateCounter(fmt.Sprintf(metricPrefix+"token_requests_refused_total{error=%q}", code)).Inc()
}

// metricsHandler serves all that is counted under /metrics, in Prometheus's text format.
func metricsHandler(api *apiMetrics, store *storeMetrics) http.Handler {
	metrics.ExposeMetadata(true)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		var text bytes.Buffer
		api.set.WritePrometheus(&text)
		store.set.WritePrometheus(&text)
		metrics.WriteProcessMetrics(&text)
		var helped strings.Builder
		for line := range strings.Lines(text.String()) {
			if name, ok := strings.CutPrefix(line, "# HELP "); ok {
				name = strings.TrimSpace(name)
				help := metricHelp[strings.TrimPrefix(name, metricPrefix)]
				if help == "" {
					continue
				}
				line = "# HELP " + name + " " + help + "\n"
			}
			helped.WriteString(line)
		}
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		w.Header().Set("Content-Length", strconv.Itoa(helped.Len()))
		_, _ = w.Write([]byte(helped.String())) // who left needs no answer
	})
	return mux
}
