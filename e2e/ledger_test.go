//go:build linux

package e2e

// ledger is a client that writes contracts and keeps the expected content of each.

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// largeContract is the number of prices of a document of about 100 KB, which does not fit into a
// new database file.
const largeContract = 2000

// ledger writes distinct documents to contracts of the demo user. For each contract it keeps the
// expected document, which is that of the last write that was not refused.
type ledger struct {
	base    string
	client  *http.Client
	auth    string
	ids     []string          // of all contracts, including those whose writes were all refused
	want    map[string]string // expected document by id; a contract without one must not exist
	written int               // number of documents so far
}

// newLedger returns a ledger that starts with the current documents of some contracts.
func newLedger(t testing.TB, base string, ids ...string) *ledger {
	t.Helper()
	l := &ledger{
		base:   base,
		client: patientClient(t),
		auth:   "Bearer " + token(t, base, "demo", "demo-secret"),
		ids:    ids,
		want:   map[string]string{},
	}
	for _, id := range ids {
		a := l.send("GET", id, "")
		if a.err != nil || a.status != http.StatusOK {
			t.Fatalf("GET %s: %v", l.url(id), a)
		}
		l.want[id] = a.body
	}
	return l
}

// patientClient returns a client with its own connections, which waits twice answerTimeout.
func patientClient(t testing.TB) *http.Client {
	c := &http.Client{Timeout: 2 * answerTimeout, Transport: validated{Transport: &http.Transport{}}}
	t.Cleanup(c.CloseIdleConnections)
	return c
}

func (l *ledger) collection() string   { return contractsURL(l.base, demoOrg, demoUser) }
func (l *ledger) url(id string) string { return l.collection() + "/" + id }

// with returns a copy of a request header with the token added.
func (l *ledger) with(h http.Header) http.Header {
	if h = h.Clone(); h == nil {
		h = http.Header{}
	}
	h.Set("Authorization", l.auth)
	return h
}

// document returns a new document, different from all before, with a number of prices.
func (l *ledger) document(prices int) string {
	l.written++
	var b strings.Builder
	fmt.Fprintf(&b, `{"currency_energy_price":"EUR",%s,"energy_prices":[`, l.marker())
	at := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	for i := range prices {
		if i > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"price":%d.25,"timestamp":%q}`, i%400, at.Add(time.Duration(i)*time.Hour).Format(time.RFC3339))
	}
	b.WriteString("]}")
	return b.String()
}

// marker returns the member that distinguishes the last document from the others.
func (l *ledger) marker() string { return fmt.Sprintf(`"supplier":"write %d"`, l.written) }

// send sends a request for a contract. The fields are names and values of the header.
func (l *ledger) send(method, id, body string, fields ...string) answered {
	return l.ask(method, l.url(id), body, fields...)
}

// ask sends a request with the token. Unlike do it may be called on any goroutine.
func (l *ledger) ask(method, url, body string, fields ...string) answered {
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return answered{err: err}
	}
	req.Header = l.with(nil)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(fields); i += 2 {
		req.Header.Set(fields[i], fields[i+1])
	}
	resp, content, err := answerOf(l.client, req)
	if resp == nil {
		return answered{err: err}
	}
	return answered{resp.StatusCode, resp.Header, content, err}
}

// put replaces a contract and returns the status: 200 or 503.
func (l *ledger) put(t testing.TB, id string, prices int) int {
	t.Helper()
	doc := l.document(prices)
	return l.record(t, id, l.marker(), l.send("PUT", id, doc))
}

// growFile makes the file large enough for the writes that follow, so that the first sync of a
// commit is that of its pages and not that of a larger file.
func (l *ledger) growFile(t testing.TB) {
	t.Helper()
	if status := l.put(t, demoContract, largeContract); status != http.StatusOK {
		t.Fatalf("PUT %s on a sound disk: %d", l.url(demoContract), status)
	}
}

// create creates a contract under an id and returns the status: 201 or 503.
func (l *ledger) create(t testing.TB, id string, prices int) int {
	t.Helper()
	doc := l.document(prices)
	l.ids = append(l.ids, id)
	return l.record(t, id, l.marker(), l.send("PUT", id, doc, "If-None-Match", "*"))
}

// record checks the response to the write of a document with a marker, updates the expected
// document, and returns the status.
func (l *ledger) record(t testing.TB, id, marker string, a answered) int {
	t.Helper()
	success := http.StatusOK
	if _, exists := l.want[id]; !exists {
		success = http.StatusCreated
	}
	switch {
	case a.err != nil:
		t.Fatalf("PUT %s of %s: no response: %v", l.url(id), marker, a.err)
	case a.status == success && strings.Contains(a.body, marker):
		l.want[id] = a.body
	case a.status == http.StatusServiceUnavailable:
		wantUnavailable(t, &http.Response{Status: "503", StatusCode: a.status, Header: a.header}, a.body)
	default:
		t.Fatalf("PUT %s of %s: got %v\nwant %d with the document, or 503", l.url(id), marker, a, success)
	}
	return a.status
}

// check gets every contract and compares it with the expected document.
func (l *ledger) check(t testing.TB) {
	t.Helper()
	for _, id := range l.ids {
		a := l.send("GET", id, "")
		want, exists := l.want[id]
		switch {
		case a.err != nil:
			t.Fatalf("GET %s: %v", l.url(id), a.err)
		case !exists && a.status != http.StatusNotFound:
			t.Fatalf("a contract exists although its write was refused: GET %s: %v", l.url(id), a)
		case exists && (a.status != http.StatusOK || a.body != want):
			t.Fatalf("after %d writes, GET %s: %v\nwant 200\n%s", l.written, l.url(id), a, head(want))
		}
	}
}

// readTime returns the median duration of a GET.
func (l *ledger) readTime(t testing.TB) time.Duration {
	t.Helper()
	times := make([]time.Duration, 300)
	for i := range times {
		began := time.Now()
		if a := l.send("GET", demoContract, ""); a.err != nil || a.status != http.StatusOK || a.body != l.want[demoContract] {
			t.Fatalf("GET %s: %v", l.url(demoContract), a)
		}
		times[i] = time.Since(began)
	}
	return median(times)
}

// list returns the whole list of the demo user's contracts.
func (l *ledger) list(t testing.TB) string {
	t.Helper()
	resp, body := do(t, l.client, "GET", l.collection(), l.with(nil), "")
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s\n%s", l.collection(), resp.Status, head(body))
	}
	return body
}

// checkAfterRestart ends the process, checks the file, and checks all contracts again with a new
// process.
func (l *ledger) checkAfterRestart(t testing.TB, p *process, db string) {
	t.Helper()
	list := l.list(t)
	if err := p.Terminate(t); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, p.Stderr)
	}
	checkFileSound(t, db)
	again := startProcess(t, nil, "--demo", "--db", db)
	l.base = again.URL
	l.check(t)
	if now := l.list(t); now != list {
		t.Errorf("the list after the restart is\n%s\nand was\n%s", head(now), head(list))
	}
	if err := again.Terminate(t); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, again.Stderr)
	}
	checkFileSound(t, db)
}
