package e2e

// The process or the machine is gone in the middle of writes, again and again on one
// file. What was acknowledged is there, what was not is there wholly or not at all,
// what was refused or deleted is not there, nor is anything else.

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

func TestWhatIsAcknowledgedOutlivesAKill(t *testing.T) {
	long(t)
	t.Parallel()
	outlives(t, shortPath(t), servicetest.Amount(25, 500), func(_ testing.TB, kill func()) { kill() })
}

// crashWriters write at once.
const crashWriters = 64

// crasher writes to a database until there is a crash, again and again.
type crasher struct {
	db      string
	demo    []string // the demo data as lines of an export: nobody writes to it
	writers []*crashWriter
	random  *rand.Rand
	// startTook is how long the last start took that was not cut short.
	startTook time.Duration
	// crash calls kill, which ends the process at once. The disk may fail before.
	crash func(t testing.TB, kill func())
}

// outlives fails unless all is as it must be after each of so many crashes.
func outlives(t *testing.T, db string, crashes int, crash func(t testing.TB, kill func())) {
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
		sum.stood += w.stood
		sum.gone += w.gone
	}
	t.Logf("writes: %+v", sum)
	if sum.acknowledged == 0 || sum.stood+sum.gone == 0 {
		t.Error("no crash was in the midst of writes, so they prove nothing")
	}
}

// cycle looks at what the last crash left, and has the next one.
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
	if is := p.Cmd.ProcessState.String(); is != "signal: killed" {
		errs = append(errs, fmt.Errorf("the process ended before it was killed: %s", is))
	}
	if err := errors.Join(errs...); err != nil {
		log := slices.DeleteFunc(strings.Split(p.Stderr.String(), "\n"), func(line string) bool { return strings.Contains(line, `"level":"INFO"`) })
		t.Fatalf("%v\nits log:\n%s", err, strings.Join(log, "\n"))
	}
	c.examine(t)
	if c.random.IntN(4) == 0 {
		c.crashAtTheStart(t)
	}
}

// crashAtTheStart has a crash in the midst of what a start does to the file.
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
	if cmd.ProcessState.ExitCode() > 1 { // 1 is that of a start whose disk fails
		t.Fatalf("a start ended with %v\n%s", cmd.ProcessState, &stderr)
	}
	c.examine(t)
}

// examine looks at the file as the crash left it.
func (c *crasher) examine(t testing.TB) {
	t.Helper()
	if got := ok(t, c.db, "check"); !strings.Contains(got, " is sound: ") {
		t.Fatal(got)
	}
	checkFileSound(t, c.db)
}

// compare asks a process for each contract, and for all that there are.
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
		t.Fatalf("the export is not of the %d contracts that must be there; in it is also\n%s", len(want), head(strings.Join(got, "")))
	}
}

// crashContract is what a contract says. Its documents differ in all that a write writes.
type crashContract struct {
	id     string
	write  int // the last one, which is in the members; 0: there is no contract
	priced int // the write that its prices are of
	prices int // how many
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

// document is how the contract is answered, or "".
func (k *crashContract) document() string {
	if k.write == 0 {
		return ""
	}
	return fmt.Sprintf(`{"energy_contract_type":null,"energy_prices":%s,"id":%q,"building":null,"meter_id":"%d","supplier":"write %d","currency_energy_price":"EUR","energy_price_includes_external_components":null}`,
		k.pricesText(), k.id, k.write, k.write)
}

// once has a POST make the contract only once.
func (k *crashContract) once() []string {
	return []string{"Idempotency-Key", fmt.Sprintf("write %d", k.write)}
}

// content is how the contract is sent.
func (k *crashContract) content() string {
	return fmt.Sprintf(`{"energy_prices":%s,"meter_id":"%d","supplier":"write %d","currency_energy_price":"EUR"}`, k.pricesText(), k.write, k.write)
}

// outcomes counts what became of writes.
type outcomes struct {
	acknowledged, refused int
	stood, gone           int // in flight when there was a crash
}

// crashWriter is a client on a connection of its own, to contracts that no other writes.
type crashWriter struct {
	user      string
	bearer    string
	random    *rand.Rand
	conn      net.Conn
	answers   *bufio.Reader
	contracts [8]crashContract
	last      int // its last write
	// posted is what the last POST made that was not refused, if it has a write.
	posted crashContract
	// flight is what contracts[at] becomes by the write in flight; nil: there is none.
	// Its id is "" if the service makes it.
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

// write writes until the crash, and leaves the write of which no answer tells what
// became of it in flight.
func (w *crashWriter) write(crashing *atomic.Bool) error {
	for {
		method, body, fields, done := w.next()
		a := w.send(method, w.flight.id, body, fields...)
		switch {
		case a.status == done: // acknowledged, even if the rest of the answer is cut off
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
			return fmt.Errorf("%s of write %d before the crash: %v\nwant %d", method, w.last, a, done)
		case a.status == http.StatusServiceUnavailable && a.header.Get("Retry-After") == retryAfter:
			w.flight = nil
			w.refused++
		case a.status == 0, a.status == http.StatusInternalServerError: // a page that is not in memory can be read no more
			return nil
		default:
			return fmt.Errorf("%s of write %d in the crash: %v\nwant %d, 503, 500 or nothing", method, w.last, a, done)
		}
	}
}

// next decides on a write, and returns how it is sent and answered.
func (w *crashWriter) next() (method, body string, fields []string, done int) {
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

// send sends a request for a contract, or with the id "" for all, and reads the answer.
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

// compare settles whether the write in flight stands, and wants all contracts to be
// what they then are. The last POST is sent again, with its key.
func (w *crashWriter) compare() error {
	there, err := w.list()
	if err != nil {
		return err
	}
	unanswered := w.flight
	if f := unanswered; f != nil {
		if f.id == "" {
			f.id = w.unknown(there)
			w.posted = *f
		}
		if there[f.id] == f.document() {
			w.contracts[w.at] = *f
			w.stood++
		} else {
			w.gone++
		}
		w.flight = nil
	}
	for _, k := range w.contracts {
		a, doc := w.send(http.MethodGet, k.id, ""), k.document()
		status, got := http.StatusOK, a.body
		if doc == "" {
			status, got = http.StatusNotFound, "" // it is a problem document
		}
		if a.err != nil || a.status != status || got != doc || there[k.id] != doc {
			return fmt.Errorf("after the crash, GET %s: %v\nin the list it is\n%s\nwant %d\n%s\nthe write in flight was %+v",
				k.id, a, head(there[k.id]), status, head(doc), unanswered)
		}
		delete(there, k.id)
	}
	for id, doc := range there {
		return fmt.Errorf("after the crash, contract %s is there, which was deleted or never made; the write in flight was %+v\n%s", id, unanswered, head(doc))
	}
	return w.postAgain()
}

// list is the documents of all contracts, by id.
func (w *crashWriter) list() (map[string]string, error) {
	a := w.send(http.MethodGet, "", "")
	var docs []json.RawMessage
	if err := json.Unmarshal([]byte(a.body), &docs); a.err != nil || a.status != http.StatusOK || err != nil {
		return nil, fmt.Errorf("list: %v, %v", a, err)
	}
	there := map[string]string{}
	for _, doc := range docs {
		var named struct{ ID string }
		if err := json.Unmarshal(doc, &named); err != nil {
			return nil, err
		}
		there[named.ID] = string(doc)
	}
	return there, nil
}

// unknown is an id that is there and of no contract, or "".
func (w *crashWriter) unknown(there map[string]string) string {
	for id := range there {
		if !slices.ContainsFunc(w.contracts[:], func(k crashContract) bool { return k.id == id }) {
			return id
		}
	}
	return ""
}

// postAgain sends the last POST again. If it made a contract it has the same answer
// and makes none, and else it makes one now.
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
		return fmt.Errorf("the same POST after the crash, made only then: %v: %v\nwant 200 with %s and\n%s", made, a, k.id, head(k.document()))
	}
	return nil
}
