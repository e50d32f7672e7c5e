package main

// Metrics for Prometheus (--metrics-addr). Their names follow
// https://prometheus.io/docs/practices/naming/; docs/operating.md describes each.

import (
	"bytes"
	"fmt"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/VictoriaMetrics/metrics"
)

// metricPrefix is the prefix of the names of the service's own metrics. Those of the Go
// runtime and the process, which the library adds, have other prefixes.
const metricPrefix = "energy_contracts_"

// The upper bounds of the histogram buckets: durationBounds in seconds, and writesBounds in
// writes per commit, up to the most that one commit has (see leastWrite).
var (
	durationBounds = []float64{.0001, .00025, .0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10}
	writesBounds   = metrics.ExponentialBuckets(1, 2, 11)
)

// storeMetrics holds the metrics of the store.
type storeMetrics struct {
	set      *metrics.Set
	writes   *metrics.PrometheusHistogram // writes per commit
	duration *metrics.PrometheusHistogram // of a commit and its syncs, in seconds
	wait     *metrics.PrometheusHistogram // of a write until its commit begins, in seconds
	failures *metrics.Counter             // failed commits
}

// apiMetrics holds the metrics of the API.
type apiMetrics struct {
	set    *metrics.Set
	issued *metrics.Counter // access tokens issued

	// series caches the series of each kind of request. The library finds a series by its
	// name with all labels; to build that name for each request would allocate memory.
	mu     sync.RWMutex
	series map[seriesKey]series // guarded by mu
}

// seriesKey holds the labels of a request as the router and the handler know them.
type seriesKey struct {
	route, method string
	status        int // 0 if the connection was closed before a response was sent
}

// series are the metrics of the requests with one seriesKey. Requests that differ only in
// their status share duration, to keep the number of series small.
type series struct {
	requests *metrics.Counter
	duration *metrics.PrometheusHistogram
}

// newAPIMetrics returns metrics with two gauges: build_info, which is always 1 and has the version
// of the program in its labels, and the memory that requests hold, in bytes.
func newAPIMetrics(held func() int64) *apiMetrics {
	set := metrics.NewSet()
	build := readBuild()
	set.NewGauge(fmt.Sprintf(metricPrefix+"build_info{version=%q,commit=%q,goversion=%q}", build.Version, build.Commit, build.Go),
		func() float64 { return 1 })
	set.NewGauge(metricPrefix+"request_memory_bytes", func() float64 { return float64(held()) })
	return &apiMetrics{set: set, issued: set.NewCounter(metricPrefix + "tokens_issued_total"), series: make(map[seriesKey]series)}
}

// request counts a request; took is the time from its header to the end of its response.
// route is the pattern that the path matched, or "" if it matched none. status is 0 if the
// connection was closed before a response was sent.
func (m *apiMetrics) request(route, method string, status int, took time.Duration) {
	// Requests without a route share their labels. Their methods can be any text, so a client
	// could otherwise create any number of series, which are never removed.
	if route == "" {
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

// newSeries returns the series of key, and creates them unless another request has done so
// since.
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

// tokenRefused counts a request whose access token was refused. reason is a badToken.
func (m *apiMetrics) tokenRefused(reason string) {
	m.set.GetOrCreateCounter(fmt.Sprintf(metricPrefix+"tokens_refused_total{reason=%q}", reason)).Inc()
}

// tokenRequestRefused counts a request to the token endpoint that got no token. code is the
// error code of the response (RFC 6749 §5.2).
func (m *apiMetrics) tokenRequestRefused(code string) {
	m.set.GetOrCreateCounter(fmt.Sprintf(metricPrefix+"token_requests_refused_total{error=%q}", code)).Inc()
}

// metricsHandler serves all metrics at /metrics, in the text format of Prometheus. The library
// has no texts for its HELP lines and leaves them empty; docs/operating.md describes the
// metrics instead.
func metricsHandler(api *apiMetrics, store *storeMetrics) http.Handler {
	// The TYPE lines, which tell Prometheus counters from gauges and histograms.
	metrics.ExposeMetadata(true)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		var text bytes.Buffer
		api.set.WritePrometheus(&text)
		store.set.WritePrometheus(&text)
		metrics.WriteProcessMetrics(&text)
		w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
		w.Header().Set("Content-Length", strconv.Itoa(text.Len()))
		_, _ = w.Write(text.Bytes()) // fails only if the client has closed the connection
	})
	return mux
}
