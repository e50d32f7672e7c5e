package e2e

// These tests crash the process or its machine repeatedly during writes to the same file. After
// each crash, acknowledged writes must be present, writes in flight must be present in full or
// absent, and refused or deleted contracts and anything else must be absent.

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"

	"github.com/google/uuid"
)

func TestAcknowledgedWritesSurviveAKill(t *testing.T) {
	long(t)
	t.Parallel()
	survives(t, shortPath(t), servicetest.Amount(25, 500), func(_ testing.TB, kill func()) { kill() })
}

// crashWriters is the number of concurrent writers.
const crashWriters = 64

// crasher repeatedly writes to a database until a crash.
type crasher struct {
	db      string
	demo    []string // lines of the export of the demo data, which no writer changes
	writers []*crashWriter
	random  *rand.Rand
	// startTook is the duration of the last start that was not interrupted.
	startTook time.Duration
	// crash calls kill, which ends the process immediately. It may make the disk fail first.
	crash func(t testing.TB, kill func())
}

// survives crashes a process many times, and fails the test if a crash loses or changes data
// that it must not.
func survives(t *testing.T, db string, crashes int, crash func(t testing.TB, kill func())) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	p := startProcess(t, nil, "--demo", "--db", db)
	bearer := token(t, p.URL, "demo", "demo-secret") // good after each restart
	if err := p.Terminate(t); err != nil {
		t.Fatalf("after SIGTERM: %v\n%s", err, p.Stderr)
	}
	c := &crasher{db: db, crash: crash, random: rand.New(rand.NewPCG(seed, 0))}
	c.demo = slices.Collect(strings.Lines(ok(t, db, "export")))
	for i := range crashWriters {
		c.writers = append(c.writers, newCrashWriter(bearer, i, rand.New(rand.NewPCG(seed, uint64(i+1)))))
	}
	for n := range crashes {
		if !t.Run(fmt.Sprint(n), c.cycle) {
			return
		}
	}
	c.compare(t, startProcess(t, nil, "--db", db))
	var sum outcomes
	for _, w := range c.writers {
		sum.acknowledged += w.acknowledged
		sum.refused += w.refused
		sum.committed += w.committed
		sum.lost += w.lost
	}
	t.Logf("writes: %+v", sum)
	if sum.acknowledged == 0 || sum.committed+sum.lost == 0 {
		t.Error("no crash happened during a write, so the test proves nothing")
	}
}

// cycle compares the contracts after the last crash, writes, and crashes again.
func (c *crasher) cycle(t *testing.T) {
	began := time.Now()
	p := startProcess(t, nil, "--db", c.db)
	c.startTook = time.Since(began)
	c.compare(t, p)
	var crashing atomic.Bool
	var all sync.WaitGroup
	errs := make([]error, len(c.writers))
	for i, w := range c.writers {
		all.Go(func() { errs[i] = w.write(&crashing) })
	}
	time.Sleep(time.Duration(50+c.random.IntN(250)) * time.Millisecond)
	crashing.Store(true)
	c.crash(t, func() {
		_ = syscall.Kill(-p.Cmd.Process.Pid, syscall.SIGKILL)
		<-p.Ended
	})
	all.Wait()
	if state := p.Cmd.ProcessState.String(); state != "signal: killed" {
		errs = append(errs, fmt.Errorf("the process ended before it was killed: %s", state))
	}
	if err := errors.Join(errs...); err != nil {
		log := slices.DeleteFunc(strings.Split(p.Stderr.String(), "\n"), func(line string) bool { return strings.Contains(line, `"level":"INFO"`) })
		t.Fatalf("%v\nits log:\n%s", err, strings.Join(log, "\n"))
	}
	c.checkFile(t)
	if c.random.IntN(4) == 0 {
		c.crashAtTheStart(t)
	}
}

// crashAtTheStart crashes a process while it starts and may change the file.
func (c *crasher) crashAtTheStart(t testing.TB) {
	t.Helper()
	cmd := command(t, nil, "serve", "--addr", "127.0.0.1:0", "--db", c.db)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	t.Cleanup(kill)
	time.Sleep(time.Duration(c.random.Int64N(int64(c.startTook))))
	c.crash(t, kill)
	if cmd.ProcessState.ExitCode() > 1 { // a start exits with 1 if the disk fails
		t.Fatalf("a start ended with %v\n%s", cmd.ProcessState, &stderr)
	}
	c.checkFile(t)
}

// checkFile checks the file that the crash left.
func (c *crasher) checkFile(t testing.TB) {
	t.Helper()
	if got := ok(t, c.db, "check"); !strings.Contains(got, " is sound: ") {
		t.Fatal(got)
	}
	checkFileSound(t, c.db)
}

// compare compares each contract in a process, and the export, with the expected ones.
func (c *crasher) compare(t testing.TB, p *process) {
	t.Helper()
	for _, w := range c.writers {
		conn, err := net.Dial("tcp", strings.TrimPrefix(p.URL, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		if err := conn.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
			t.Fatal(err)
		}
		w.conn, w.answers = conn, bufio.NewReader(conn)
	}
	together(t, len(c.writers), func(i int) error { return c.writers[i].compare() })
	want := slices.Clone(c.demo)
	for _, w := range c.writers {
		for _, k := range w.contracts {
			if doc := k.document(); doc != "" {
				want = append(want, contractKey{demoOrg, w.user, k.id}.line(doc))
			}
		}
	}
	slices.Sort(want)
	got := slices.Sorted(strings.Lines(ok(t, c.db, "export")))
	if !slices.Equal(got, want) {
		got = slices.DeleteFunc(got, func(line string) bool { return slices.Contains(want, line) })
		t.Fatalf("the export does not have exactly the %d expected contracts; the others in it are\n%s", len(want), head(strings.Join(got, "")))
	}
}

// crashContract is the content of a contract. Each write changes every member that it sets.
type crashContract struct {
	id     string
	write  int // number of the last write, which is in the members; 0 if the contract does not exist
	priced int // number of the write that set the prices
	prices int // number of prices
}

func (k *crashContract) pricesText() string {
	at := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	var b []byte
	for i := range k.prices {
		b = fmt.Appendf(b, `,{"price":%d,"timestamp":"`, k.priced)
		b = append(at.Add(time.Duration(i)*time.Hour).AppendFormat(b, time.RFC3339), `"}`...)
	}
	return "[" + strings.TrimPrefix(string(b), ",") + "]"
}

// document returns the expected document in a response, or "" if the contract does not exist.
func (k *crashContract) document() string {
	if k.write == 0 {
		return ""
	}
	return fmt.Sprintf(`{"energy_contract_type":null,"energy_prices":%s,"id":%q,"building":null,"meter_id":"%d","supplier":"write %d","currency_energy_price":"EUR","energy_price_includes_external_components":null}`,
		k.pricesText(), k.id, k.write, k.write)
}

// once returns the header that makes a repeated POST idempotent.
func (k *crashContract) once() []string {
	return []string{"Idempotency-Key", fmt.Sprintf("write %d", k.write)}
}

// content returns the document to send in a request.
func (k *crashContract) content() string {
	return fmt.Sprintf(`{"energy_prices":%s,"meter_id":"%d","supplier":"write %d","currency_energy_price":"EUR"}`, k.pricesText(), k.write, k.write)
}

// outcomes counts writes by their outcome.
type outcomes struct {
	acknowledged, refused int
	committed, lost       int // in flight during a crash
}

// crashWriter is a client with its own connection and its own contracts.
type crashWriter struct {
	user      string
	bearer    string
	random    *rand.Rand
	conn      net.Conn
	answers   *bufio.Reader
	contracts [8]crashContract
	last      int // number of its last write
	// posted is the contract of the last POST that was not refused; none if posted.write is 0.
	posted crashContract
	// flight is the content of contracts[at] after the write in flight, or nil if there is none.
	// Its id is "" for a POST, for which the service chooses the id.
	flight *crashContract
	at     int
	outcomes
}

func newCrashWriter(bearer string, n int, random *rand.Rand) *crashWriter {
	w := &crashWriter{user: uuid.NewString(), bearer: bearer, random: random, last: n}
	for i := range w.contracts {
		w.contracts[i].id = uuid.NewString()
	}
	return w
}

// write writes until the crash. A write without a conclusive response stays in flight.
func (w *crashWriter) write(crashing *atomic.Bool) error {
	for {
		method, body, fields, success := w.next()
		a := w.send(method, w.flight.id, body, fields...)
		switch {
		case a.status == success: // acknowledged, even if the rest of the response is cut off
			if method == http.MethodPost {
				w.flight.id = path.Base(a.header.Get("Location"))
				w.posted = *w.flight
			}
			if want := w.flight.document(); a.err == nil && a.body != want {
				return fmt.Errorf("%s: %v\nwant\n%s", method, a, head(want))
			}
			w.contracts[w.at], w.flight = *w.flight, nil
			w.acknowledged++
		case !crashing.Load():
			return fmt.Errorf("%s of write %d before the crash: %v\nwant %d", method, w.last, a, success)
		case a.status == http.StatusServiceUnavailable && a.header.Get("Retry-After") == retryAfter:
			w.flight = nil
			w.refused++
		case a.status == 0, a.status == http.StatusInternalServerError: // a page that is not in memory cannot be read any more
			return nil
		default:
			return fmt.Errorf("%s of write %d in the crash: %v\nwant %d, 503, 500 or no response", method, w.last, a, success)
		}
	}
}

// next chooses the next write, and returns its request and the status of success.
func (w *crashWriter) next() (method, body string, fields []string, success int) {
	w.last += crashWriters
	w.at = w.random.IntN(len(w.contracts))
	k := w.contracts[w.at]
	exists := k.write > 0
	k.write = w.last
	w.flight = &k
	switch n := w.random.IntN(10); {
	case exists && n < 2:
		k.write = 0
		return http.MethodDelete, "", nil, http.StatusNoContent
	case exists && n < 4:
		return http.MethodPatch, fmt.Sprintf(`{"meter_id":"%d","supplier":"write %d"}`, k.write, k.write),
			[]string{"Content-Type", mergePatchType}, http.StatusOK
	}
	k.priced, k.prices = k.write, w.random.IntN(5)
	if w.random.IntN(10) == 0 {
		k.prices = w.random.IntN(500) // up to 25 KB
	}
	switch {
	case exists:
		return http.MethodPut, k.content(), nil, http.StatusOK
	case w.random.IntN(2) == 0:
		return http.MethodPut, k.content(), []string{"If-None-Match", "*"}, http.StatusCreated
	default:
		k.id = ""
		return http.MethodPost, k.content(), k.once(), http.StatusOK
	}
}

// send sends a request for a contract, or for the collection if id is "", and reads the response.
func (w *crashWriter) send(method, id, body string, fields ...string) answered {
	url := contractsURL("http://localhost", demoOrg, w.user)
	if id != "" {
		url += "/" + id
	}
	req, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return answered{err: err}
	}
	req.Header.Set("Authorization", "Bearer "+w.bearer)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(fields); i += 2 {
		req.Header.Set(fields[i], fields[i+1])
	}
	if err := req.Write(w.conn); err != nil {
		return answered{err: err}
	}
	resp, err := http.ReadResponse(w.answers, req)
	if err != nil {
		return answered{err: err}
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	return answered{resp.StatusCode, resp.Header, string(content), err}
}

// compare finds out whether the write in flight was committed, and compares all contracts with
// their expected documents. It also repeats the last POST with its idempotency key.
func (w *crashWriter) compare() error {
	found, err := w.list()
	if err != nil {
		return err
	}
	unanswered := w.flight
	if f := unanswered; f != nil {
		if f.id == "" {
			f.id = w.unknown(found)
			w.posted = *f
		}
		if found[f.id] == f.document() {
			w.contracts[w.at] = *f
			w.committed++
		} else {
			w.lost++
		}
		w.flight = nil
	}
	for _, k := range w.contracts {
		a, doc := w.send(http.MethodGet, k.id, ""), k.document()
		status, got := http.StatusOK, a.body
		if doc == "" {
			status, got = http.StatusNotFound, "" // the body is a problem document
		}
		if a.err != nil || a.status != status || got != doc || found[k.id] != doc {
			return fmt.Errorf("after the crash, GET %s: %v\nin the list it is\n%s\nwant %d\n%s\nthe write in flight was %+v",
				k.id, a, head(found[k.id]), status, head(doc), unanswered)
		}
		delete(found, k.id)
	}
	for id, doc := range found {
		return fmt.Errorf("after the crash, contract %s exists, which was deleted or never created; the write in flight was %+v\n%s", id, unanswered, head(doc))
	}
	return w.postAgain()
}

// list returns the documents of all contracts by id.
func (w *crashWriter) list() (map[string]string, error) {
	a := w.send(http.MethodGet, "", "")
	var docs []json.RawMessage
	if err := json.Unmarshal([]byte(a.body), &docs); a.err != nil || a.status != http.StatusOK || err != nil {
		return nil, fmt.Errorf("list: %v, %v", a, err)
	}
	found := map[string]string{}
	for _, doc := range docs {
		var named struct{ ID string }
		if err := json.Unmarshal(doc, &named); err != nil {
			return nil, err
		}
		found[named.ID] = string(doc)
	}
	return found, nil
}

// unknown returns an id that was found and belongs to none of the writer's contracts, or "".
func (w *crashWriter) unknown(found map[string]string) string {
	for id := range found {
		if !slices.ContainsFunc(w.contracts[:], func(k crashContract) bool { return k.id == id }) {
			return id
		}
	}
	return ""
}

// postAgain repeats the last POST. If that created a contract, the response must be the same and
// no contract is created; otherwise it creates one now.
func (w *crashWriter) postAgain() error {
	k := &w.posted
	if k.write == 0 {
		return nil
	}
	a := w.send(http.MethodPost, "", k.content(), k.once()...)
	id := path.Base(a.header.Get("Location"))
	made := k.id == ""
	if made {
		k.id = id
		w.contracts[w.at] = *k
	}
	if a.err != nil || a.status != http.StatusOK || id != k.id || a.body != k.document() {
		return fmt.Errorf("repeated POST after the crash (contract created only now: %v): %v\nwant 200 with %s and\n%s", made, a, k.id, head(k.document()))
	}
	return nil
}
