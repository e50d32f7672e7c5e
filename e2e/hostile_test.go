//go:build linux

package e2e

// Thousands of slow, broken and hostile clients beside some healthy ones. They write to their
// connections directly, since no library would send these bytes.

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

// The limits of the service that stop attackers.
const (
	readHeaderTimeout = 5 * time.Second
	readTimeout       = 30 * time.Second
	pieceTimeout      = 30 * time.Second // for the next piece of an answer to be taken
)

// besieged is a service under attack, in a process of its own.
type besieged struct {
	loaded
	p *process
	l *ledger
}

// ampleMemory is a wrapper of a service that refuses no request for the memory that others hold.
var ampleMemory = []string{"env", "ENERGY_CONTRACTS_BODY_MEMORY=4294967296"}

func besiege(t testing.TB, wrapper ...string) *besieged {
	t.Helper()
	p := startProcess(t, wrapper, "--demo", "--db", newPath(t), "--metrics-addr", "127.0.0.1:0")
	return &besieged{watched(p), p, newLedger(t, p.URL, demoContract)}
}

// watched returns a process that serves its metrics.
func watched(p *process) loaded {
	_, addr, _ := strings.Cut(p.URL, "://")
	return loaded{addr: addr, pid: p.Cmd.Process.Pid, metrics: "http://" + metricsLine.FindStringSubmatch(p.Stderr.String())[1] + "/metrics"}
}

// ends stops the process and fails the test unless it stops in order.
func (v *besieged) ends(t testing.TB) {
	t.Helper()
	if err := v.p.Terminate(t); err != nil || strings.Contains(v.p.Stderr.String(), "panic") {
		t.Errorf("after SIGTERM: %v\n%s", err, head(v.p.Stderr.String()))
	}
}

// The large contracts belong to a user of their own. A document has 100 KB, and the list has
// several pages.
const (
	largeUser   = "7a1d3c58-2b4e-4f60-9c81-e5d2a7b60f13"
	largeInList = 20
)

func largePath(i int) string {
	return contractsURL("", demoOrg, largeUser) + "/" + key(i).Contract
}

func (v *besieged) makeLarge(t testing.TB) {
	t.Helper()
	header := v.l.with(http.Header{"Content-Type": {"application/json"}, "If-None-Match": {"*"}})
	for i := range largeInList {
		if resp, got := do(t, v.l.client, "PUT", v.l.base+largePath(i), header, year(largeContract)); resp.StatusCode != http.StatusCreated {
			t.Fatalf("%s\n%s", resp.Status, head(got))
		}
	}
}

// demoPath is the path of the contract under attack.
var demoPath = contractsURL("", demoOrg, demoUser) + "/" + demoContract

// header returns a request with the demo client's token, up to its content.
func (v *besieged) header(method, path, fields string) string {
	text, _ := message{method: method, path: path, header: "Authorization: " + v.l.auth + "\r\n" + fields}.bytes()
	return string(text)
}

// peer is the connection of a client.
type peer struct {
	*net.TCPConn
	began time.Time // before the service could know of it
}

// each opens n connections at once, runs a client on each, and reports the first client that
// fails.
func (v *besieged) each(n int, client func(i int, c peer) error) error {
	return v.eachBy(net.Dialer{}, n, client)
}

func (v *besieged) eachBy(d net.Dialer, n int, client func(i int, c peer) error) error {
	d.Timeout = answerTimeout
	var all sync.WaitGroup
	errs := make([]error, n)
	for i := range n {
		began := time.Now()
		c, err := d.Dial("tcp", v.addr)
		if err == nil {
			err = c.SetDeadline(time.Now().Add(3 * answerTimeout))
		}
		if err != nil {
			errs[i] = err
			continue
		}
		all.Go(func() {
			defer c.Close()
			errs[i] = client(i, peer{c.(*net.TCPConn), began})
		})
	}
	all.Wait()
	errs = slices.DeleteFunc(errs, func(err error) bool { return err == nil })
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("%d of %d, of which one: %w", len(errs), n, errs[0])
}

// narrow dials connections with a small receive buffer, so that an unread response soon
// blocks.
var narrow = net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
	var errs [3]error
	errs[0] = c.Control(func(fd uintptr) {
		errs[1] = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, 536)
		errs[2] = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 4<<10)
	})
	return errors.Join(errs[:]...)
}}

// answers returns the statuses of all responses until the service closes the connection.
func answers(r io.Reader) (statuses []int, err error) {
	for b := bufio.NewReader(r); ; {
		if _, err := b.Peek(1); err != nil {
			if err == io.EOF {
				return statuses, nil
			}
			return statuses, err
		}
		resp, err := http.ReadResponse(b, nil)
		if err != nil {
			return statuses, err
		}
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			return statuses, fmt.Errorf("content of %s: %w", resp.Status, err)
		}
		statuses = append(statuses, resp.StatusCode)
	}
}

// wantAnswers returns an error unless exactly these responses come before the end of the
// connection. If the client was still sending, the end is a reset.
func wantAnswers(r io.Reader, want ...int) error {
	got, err := answers(r)
	switch {
	case !slices.Equal(got, want) && (err == nil || errors.Is(err, syscall.ECONNRESET)):
		return fmt.Errorf("answered %v, want %v: %w", got, want, cmp.Or(err, io.EOF))
	case err != nil && !errors.Is(err, syscall.ECONNRESET):
		return fmt.Errorf("answered %v, want %v and the end: %w", got, want, err)
	}
	return nil
}

// orReset ignores a reset of the connection: bytes that the client sends after the service
// closed it cause a reset, which may destroy the response.
func orReset(err error) error {
	if errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return err
}

// wantContinue returns an error unless the service asks for the content.
func wantContinue(r io.Reader) error {
	resp, err := http.ReadResponse(bufio.NewReader(r), nil)
	if err != nil || resp.StatusCode != http.StatusContinue {
		return fmt.Errorf("%v, %v, want 100", resp, err)
	}
	return nil
}

// send writes a text. The service may respond without reading all of it.
func send(w io.Writer, text string) error {
	_, err := io.WriteString(w, text)
	if errors.Is(err, syscall.EPIPE) {
		return nil
	}
	return orReset(err)
}

// attack is one kind of hostile client, with connections of its own.
type attack struct {
	name string
	does func(v *besieged) error
}

var attacks = []attack{
	{"a header a byte a second", func(v *besieged) error {
		return v.each(1000, func(i int, c peer) error {
			err := aByteASecond(c, v.header("GET", "/", ""), readHeaderTimeout, http.StatusBadRequest)
			if errors.Is(err, io.EOF) { // no answer; half a line is read as one, and has
				return nil
			}
			return err
		})
	}},
	{"content a byte a second", func(v *besieged) error {
		long := strings.Repeat(" ", 1000)
		return v.each(1000, func(i int, c peer) error {
			start, content := v.header("PUT", demoPath, jsonType+"Content-Length: 1000\r\n"), long
			switch i % 3 {
			case 1:
				start, content = v.header("PUT", demoPath, jsonType+"Transfer-Encoding: chunked\r\n"), strings.Repeat("1\r\n \r\n", 200)
			case 2: // before anybody knows who it is
				start = "POST " + tokenPath + " HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
			}
			if err := send(c, start); err != nil {
				return err
			}
			return aByteASecond(c, content, readTimeout, http.StatusRequestTimeout)
		})
	}},
	{"an answer that is read slowly", func(v *besieged) error {
		return v.eachBy(narrow, 20, func(_ int, c peer) error {
			if err := send(c, v.header("GET", contractsURL("", demoOrg, largeUser), "Connection: close\r\n")); err != nil {
				return err
			}
			return wantAnswers(slow{c.TCPConn}, http.StatusOK)
		})
	}},
	{"closed for writing after a request", func(v *besieged) error {
		return v.each(300, func(i int, c peer) error {
			text := v.header("GET", demoPath, "")
			if i%2 == 0 {
				text = v.header("PATCH", largePath(i%largeInList), "Content-Type: "+mergePatchType+"\r\nContent-Length: 2\r\n") + "{}"
			}
			if err := errors.Join(send(c, text), c.CloseWrite()); err != nil {
				return err
			}
			return wantAnswers(c, http.StatusOK)
		})
	}},
	{"closed for writing in a header", func(v *besieged) error {
		return v.each(300, func(i int, c peer) error {
			text := strings.TrimSuffix(v.header("DELETE", demoPath, ""), "\r\n")
			if i%2 != 0 {
				text = text[:1+i%len("DELETE / HTTP/1")]
			}
			if err := errors.Join(send(c, text), c.CloseWrite()); err != nil {
				return err
			}
			return wantAnswers(c, http.StatusBadRequest)
		})
	}},
	{"closed for writing in the content", func(v *besieged) error {
		return v.each(300, func(i int, c peer) error {
			text := v.header("PUT", demoPath, jsonType+"Content-Length: 3\r\n") + "{}"
			if i%2 == 0 {
				text = v.header("PUT", demoPath, jsonType+"Transfer-Encoding: chunked\r\n") + "2\r\n{}\r\n"
			}
			if err := errors.Join(send(c, text), c.CloseWrite()); err != nil {
				return err
			}
			return wantAnswers(c, http.StatusBadRequest)
		})
	}},
	{"reset in the content", func(v *besieged) error {
		return v.each(500, func(i int, c peer) error {
			return errors.Join(send(c, v.header("PUT", demoPath, jsonType+"Content-Length: 3\r\n")+"{}"), c.SetLinger(0))
		})
	}},
	{"Expect", func(v *besieged) error {
		return v.each(60, func(i int, c peer) error {
			const expect = "Expect: 100-continue\r\n"
			put := v.header("PATCH", largePath(i%largeInList), "Content-Type: "+mergePatchType+"\r\nConnection: close\r\nContent-Length: 2\r\n"+expect)
			switch i % 6 {
			case 0: // the content comes when it is asked for
				return errors.Join(send(c, put), wantContinue(c), send(c, "{}"), wantAnswers(c, http.StatusOK))
			case 1: // it comes before
				return errors.Join(send(c, put+"{}"), wantAnswers(c, http.StatusContinue, http.StatusOK))
			case 2: // it never comes
				return errors.Join(send(c, put), wantAnswers(c, http.StatusContinue, http.StatusRequestTimeout))
			case 3: // it is not wanted of this client
				return errors.Join(send(c, "PUT "+demoPath+" HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"+expect+"\r\n"), wantAnswers(c, http.StatusUnauthorized))
			case 4: // it is too much
				return errors.Join(send(c, v.header("PUT", demoPath, jsonType+"Content-Length: 4194305\r\n"+expect)), wantAnswers(c, http.StatusRequestEntityTooLarge))
			default:
				return errors.Join(send(c, v.header("PUT", demoPath, jsonType+"Content-Length: 2\r\nExpect: 200-ok\r\n")), wantAnswers(c, http.StatusExpectationFailed))
			}
		})
	}},
	{"chunks without an end", func(v *besieged) error {
		return v.each(16, func(i int, c peer) error {
			chunk := "10000\r\n" + strings.Repeat(" ", 64<<10) + "\r\n"
			return floods(c, v.header("PUT", demoPath, jsonType+"Transfer-Encoding: chunked\r\n"), chunk, http.StatusRequestEntityTooLarge)
		})
	}},
	{"headers without an end", func(v *besieged) error {
		return v.each(200, func(i int, c peer) error {
			start, more := "GET /healthz HTTP/1.1\r\nHost: x\r\n", "X-A: b\r\n"
			switch i % 4 {
			case 1: // one field
				start, more = start+"X-A: ", "a"
			case 2: // one path
				start, more = "GET /", "a"
			case 3: // one field, folded
				start, more = start+"X-A: b\r\n", " b\r\n"
			}
			return floods(c, start, strings.Repeat(more, 1000), http.StatusRequestHeaderFieldsTooLarge)
		})
	}},
	{"connects and closes", func(v *besieged) error {
		const rounds = 200
		return v.each(10_000/rounds, func(i int, c peer) error {
			for range rounds - 1 {
				c, err := net.DialTimeout("tcp", v.addr, answerTimeout)
				if err != nil {
					return err
				}
				if i%2 == 0 {
					err = c.(*net.TCPConn).SetLinger(0)
				}
				if err := errors.Join(err, c.Close()); err != nil {
					return err
				}
			}
			return nil
		})
	}},
}

// aByteASecond sends one byte a second until a response comes or the connection is closed.
// That must happen when the limit is over, and not before.
func aByteASecond(c peer, text string, limit time.Duration, want int) error {
	for i := range len(text) {
		if err := errors.Join(send(c, text[i:i+1]), c.SetReadDeadline(time.Now().Add(time.Second))); err != nil {
			return err
		}
		var first [1]byte
		n, err := c.Read(first[:])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		took := time.Since(c.began)
		if took < limit || took > limit+answerTimeout {
			return fmt.Errorf("ended after %v, want %v", took, limit)
		}
		err = c.SetReadDeadline(time.Now().Add(answerTimeout))
		return errors.Join(err, orReset(wantAnswers(io.MultiReader(bytes.NewReader(first[:n]), c), want)))
	}
	return fmt.Errorf("took a byte a second for %v", time.Since(c.began))
}

// slow reads a connection slowly, but never pauses for pieceTimeout.
type slow struct{ *net.TCPConn }

func (s slow) Read(b []byte) (int, error) {
	time.Sleep(pieceTimeout / 600)
	return s.TCPConn.Read(b)
}

// floods sends start, and then more again and again until a response comes.
func floods(c peer, start, more string, want int) error {
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(c, start)
		for err == nil {
			_, err = io.WriteString(c, more)
		}
		sent <- err
	}()
	err := orReset(wantAnswers(c, want))
	c.Close()
	<-sent
	return err
}

// deaf is a client that never reads its response.
type deaf struct {
	*net.TCPConn
	asks string
}

// neverRead starts n clients that never read.
func (v *besieged) neverRead(t testing.TB, n int, asks ...string) (all []deaf) {
	t.Helper()
	for i := range n {
		c, err := narrow.Dial("tcp", v.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		d := deaf{c.(*net.TCPConn), asks[i%len(asks)]}
		if err := errors.Join(c.SetWriteDeadline(time.Now().Add(answerTimeout)), send(c, d.asks)); err != nil {
			t.Fatal(err)
		}
		all = append(all, d)
	}
	return all
}

// wantHalf fails the test unless the service stopped writing before the end of the response.
func (d deaf) wantHalf(t testing.TB) {
	t.Helper()
	if err := d.SetDeadline(time.Now().Add(answerTimeout)); err != nil {
		t.Fatal(err)
	}
	if got, err := answers(d); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%.40s… answered %v, %v, to a client that did not read; want a part of it", d.asks, got, err)
	}
}

// inHand is the number of open descriptors and of goroutines of a process.
type inHand struct{ descriptors, goroutines int }

func (s loaded) descriptors(t testing.TB) int {
	t.Helper()
	open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", s.pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(open)
}

func (v *besieged) goroutines(t testing.TB) int {
	t.Helper()
	return int(value(t, v.scrape(t), "go_goroutines"))
}

func (v *besieged) inHand(t testing.TB) inHand {
	t.Helper()
	v.l.client.CloseIdleConnections()
	goroutines := v.goroutines(t) // first, as it leaves its connection open
	return inHand{v.descriptors(t), goroutines}
}

// wantInHand waits until the process has no more descriptors and goroutines than before.
func (v *besieged) wantInHand(t testing.TB, before inHand) {
	t.Helper()
	v.l.client.CloseIdleConnections()
	waitUntil(t, 3*answerTimeout, "no descriptor is left behind", func() error {
		if now := v.descriptors(t); now > before.descriptors {
			return fmt.Errorf("%d, before %d", now, before.descriptors)
		}
		return nil
	})
	waitUntil(t, answerTimeout, "no goroutine is left behind", func() error {
		if now := v.goroutines(t); now > before.goroutines {
			return fmt.Errorf("%d, before %d", now, before.goroutines)
		}
		return nil
	})
}

// healthyTimeout is the limit for a response to a healthy client on a busy machine.
const healthyTimeout = 20 * time.Second

// healthy starts clients that put, get and list contracts of their own until stop is called.
// It fails the test if one of them got a wrong response.
func (v *besieged) healthy(t testing.TB) (stop func()) {
	t.Helper()
	const clients = 4
	errs, over := make([]error, clients), make(chan struct{})
	var all sync.WaitGroup
	for i := range clients {
		id := key(i).Contract
		v.l.send("PUT", id, "{}", "If-None-Match", "*") // or it is there from the round before
		l := newLedger(t, v.l.base, id)
		l.client.Timeout = healthyTimeout
		all.Go(func() {
			defer l.client.CloseIdleConnections()
			rounds := 0
			for errs[i] == nil {
				select {
				case <-over:
					if rounds < 10 {
						errs[i] = fmt.Errorf("only %d rounds", rounds)
					}
					return
				case <-time.After(50 * time.Millisecond): // they are not the load
				}
				errs[i] = l.round(id)
				rounds++
			}
		})
	}
	return func() {
		t.Helper()
		close(over)
		all.Wait()
		if err := errors.Join(errs...); err != nil {
			t.Errorf("a healthy client: %v", err)
		}
	}
}

// round writes a contract and reads it, alone and in the list.
func (l *ledger) round(id string) error {
	doc := l.document(1)
	put := l.send("PUT", id, doc)
	if put.err != nil || put.status != http.StatusOK || !strings.Contains(put.body, l.marker()) {
		return fmt.Errorf("PUT of %s: %v", l.marker(), put)
	}
	if got := l.send("GET", id, ""); got.err != nil || got.status != http.StatusOK || got.body != put.body {
		return fmt.Errorf("GET: %v, want %s", got, put.body)
	}
	if got := l.ask("GET", l.collection(), ""); got.err != nil || got.status != http.StatusOK || !strings.Contains(got.body, put.body) {
		return fmt.Errorf("list: %v, want in it %s", got, put.body)
	}
	return nil
}

func TestHealthyClientsKeepTheirAnswersAmongHostileOnes(t *testing.T) {
	long(t)
	t.Parallel()
	v := besiege(t, ampleMemory...)
	v.makeLarge(t)
	long := []string{v.header("GET", contractsURL("", demoOrg, largeUser), "")}
	for i := range 9 { // a page of a list is 256 KB
		long = append(long, v.header("GET", largePath(i), ""))
	}
	for round := range servicetest.Amount(1, 20) {
		before := v.inHand(t)
		stop := v.healthy(t)
		longAnswers := v.neverRead(t, 2000, long...)
		small := v.neverRead(t, 200, strings.Repeat(v.header("GET", demoPath, ""), 200))
		together(t, len(attacks), func(i int) error {
			if err := attacks[i].does(v); err != nil {
				return fmt.Errorf("%s: %w", attacks[i].name, err)
			}
			return nil
		})
		stop()
		for _, d := range small {
			if round%2 == 0 { // else it is for writeTimeout to end them
				d.Close()
			}
		}
		v.wantInHand(t, before) // all that nobody reads is given up
		for i, d := range longAnswers {
			if i < 20 {
				d.wantHalf(t)
			}
			d.Close()
		}
		v.l.check(t)
	}
	v.ends(t)
}

const (
	// bodiesAtOnce is the number of bodies of largestBody bytes that arrive at once.
	bodiesAtOnce, largestBody = 120, 4 << 20
	// bodiesMemory is the most memory, in MB, that the process may use for them: what the default of
	// --body-memory allows, which the garbage collector lets grow to three times as much.
	bodiesMemory = 3 * 256 << 20 / 1e6
)

// The test is not parallel: without a processor, its requests would be slow and be refused for
// that.
func TestLargestBodiesAtOnceTakeBoundedMemory(t *testing.T) {
	long(t)
	v := besiege(t)
	prices := year(largestBody / 60)
	// The forms that are completed take most.
	short := regexp.MustCompile(`T(..:00):00Z"`).ReplaceAllString(prices, ` $1+01"`)
	for _, tt := range []struct{ method, path, fields, prices string }{
		{"PUT", demoPath, "", prices},
		{"POST", contractsURL("", demoOrg, largeUser), "Idempotency-Key: %d\r\n", short},
		{"PATCH", demoPath, "", prices},
	} {
		t.Run(tt.method, func(t *testing.T) {
			body := tt.prices + strings.Repeat(" ", largestBody-len(tt.prices))
			for range servicetest.Amount(1, 50) {
				v.holdBack(t, body, func(i int) string {
					fields := tt.fields
					if fields != "" {
						fields = fmt.Sprintf(fields, i)
					}
					return v.header(tt.method, tt.path, fields+jsonType+"Connection: close\r\nContent-Length: "+strconv.Itoa(len(body))+"\r\n")
				})
			}
			most := v.memory(t, "VmHWM")
			t.Logf("%d bodies of %d bytes at once took %.0f MB", bodiesAtOnce, len(body), most)
			if most > bodiesMemory {
				t.Errorf("more than %.0f MB", bodiesMemory)
			}
		})
	}
	v.ends(t)
}

// holdBack sends bodiesAtOnce requests without the last byte of their bodies. It fails the test
// unless each is refused at once, or served when its last byte comes, and unless short requests are
// served meanwhile.
func (v *besieged) holdBack(t *testing.T, body string, header func(i int) string) {
	t.Helper()
	var refused atomic.Int64
	var all sync.WaitGroup
	errs := make([]error, bodiesAtOnce)
	release := make(chan struct{})
	for i := range bodiesAtOnce {
		all.Go(func() {
			c, err := net.DialTimeout("tcp", v.addr, answerTimeout)
			if err != nil {
				errs[i] = err
				return
			}
			defer c.Close()
			go func() {
				send(c, header(i)+body[:len(body)-1]) // which a refusal breaks off
				<-release
				send(c, body[len(body)-1:])
			}()
			got, err := answers(c)
			switch {
			case slices.Equal(got, []int{http.StatusServiceUnavailable}):
				refused.Add(1)
			case !slices.Equal(got, []int{http.StatusOK}):
				errs[i] = fmt.Errorf("answered %v, %w", got, cmp.Or(err, io.EOF))
			}
		})
	}
	each := 5 * (len(body) + 512)
	waitUntil(t, 2*answerTimeout, "each is refused or has sent all but its end", func() error {
		is, n := int(value(t, v.scrape(t), "energy_contracts_request_memory_bytes")), bodiesAtOnce-int(refused.Load())
		if is != n*each {
			return fmt.Errorf("%d are not refused, and hold %d bytes, want %d", n, is, n*each)
		}
		return nil
	})
	t.Logf("%d are refused; the process has %.0f MB", refused.Load(), v.memory(t, "VmRSS"))
	if n := bodiesAtOnce - refused.Load(); n < 1 {
		t.Error("all are refused")
	}
	if err := v.l.round(demoOtherContract); err != nil {
		t.Error(err)
	}
	close(release)
	all.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
}

// Requests whose end a proxy and the service could see at different places. The bytes after
// each are the deletion of a contract, which must not be carried out.
func TestOneRequestIsNeverTwo(t *testing.T) {
	long(t)
	t.Parallel()
	v := besiege(t)
	del := v.header("DELETE", demoPath, "")
	chunked := func(content string) string { return fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(content), content) }
	length := func(n int) string { return fmt.Sprintf("Content-Length: %d\r\n", n) }
	const te = "Transfer-Encoding: chunked\r\n"
	refused, unsupported := []int{400}, []int{501}
	for _, tt := range []struct {
		name    string
		fields  string
		content string // with what follows
		want    []int
	}{
		{"two lengths", length(2) + length(2+len(del)), "{}" + del, refused},
		{"two lengths, the longer first", length(2+len(del)) + length(2), "{}" + del, refused},
		{"two lengths in one field", "Content-Length: 2, 40\r\n", "{}" + del, refused},
		{"a length twice in one field", "Content-Length: 2, 2\r\n", "{}" + del, refused},
		{"a length with a sign", "Content-Length: +2\r\n", "{}" + del, refused},
		{"a length below nothing", "Content-Length: -2\r\n", "{}" + del, refused},
		{"a length in hexadecimal", "Content-Length: 0x2\r\n", "{}" + del, refused},
		{"a length with a space in it", "Content-Length: 2 2\r\n", "{}" + del, refused},
		{"a length with NUL", "Content-Length: 2\x00\r\n", "{}" + del, refused},
		{"no length", "Content-Length:\r\n", "{}" + del, refused},
		{"a length beyond 64 bits", "Content-Length: 18446744073709551618\r\n", "{}" + del, refused},
		{"a length on a folded line", length(2) + " 2\r\n", "{}" + del, refused},
		{"a space before the colon of a length", "Content-Length : 2\r\n", "{}" + del, refused},
		{"a space before the colon of an encoding", length(2) + "Transfer-Encoding : chunked\r\n", "{}" + del, refused},
		{"a vertical tab before an encoding", length(2) + "Transfer-Encoding: \vchunked\r\n", "{}" + del, refused},
		{"an encoding behind a bare CR", length(2) + "X-A: b\r" + te, "{}" + del, refused},
		{"NUL in a field", length(2) + "X-A: \x00\r\n", "{}" + del, refused},
		{"NUL in a name", length(2) + "X-\x00: b\r\n", "{}" + del, refused},
		{"a field without a colon", length(2) + "X-A\r\n", "{}" + del, refused},
		{"a field without a name", length(2) + ": b\r\n", "{}" + del, refused},
		{"two hosts", length(2) + "Host: y\r\n", "{}" + del, refused},
		{"chunked, and then identity", "Transfer-Encoding: chunked, identity\r\n", chunked("{}") + del, unsupported},
		{"identity, and a length", length(2) + "Transfer-Encoding: identity\r\n", "{}" + del, unsupported},
		{"an encoding that is none, and a length", length(2) + "Transfer-Encoding: xchunked\r\n", "{}" + del, unsupported},
		{"an encoding in quotes, and a length", length(2) + "Transfer-Encoding: \"chunked\"\r\n", "{}" + del, unsupported},
		{"compressed chunks", "Transfer-Encoding: gzip, chunked\r\n", chunked("{}") + del, unsupported},
		{"chunked twice", te + te, chunked("{}") + del, unsupported},
		{"chunked and identity", te + "Transfer-Encoding: identity\r\n", chunked("{}") + del, unsupported},
		{"a chunk's size with junk", te, "2x\r\n{}\r\n0\r\n\r\n" + del, refused},
		{"a chunk's size with 0x", te, "0x2\r\n{}\r\n0\r\n\r\n" + del, refused},
		{"a chunk's size with a sign", te, "+2\r\n{}\r\n0\r\n\r\n" + del, refused},
		{"a chunk below nothing", te, "-2\r\n{}\r\n0\r\n\r\n" + del, refused},
		{"a chunk's size beyond 64 bits", te, "10000000000000002\r\n{}\r\n0\r\n\r\n" + del, refused},
		{"a chunk's size that is all there is", te, "ffffffffffffffff\r\n{}\r\n0\r\n\r\n" + del, refused}, // it ends early
		{"a chunk without a size", te, "\r\n{}\r\n0\r\n\r\n" + del, refused},
		{"a chunk's size and a bare LF", te, "2\n{}\r\n0\r\n\r\n" + del, refused},
		{"a chunk's extension and a bare LF", te, "2;a\n{}\r\n0\r\n\r\n" + del, refused},
		{"a chunk and a bare LF", te, "2\r\n{}\n0\r\n\r\n" + del, refused},
		{"a chunk longer than its size", te, "1\r\n{}\r\n0\r\n\r\n" + del, refused},
		{"the last chunk and bare LF", te, "2\r\n{}\r\n0\n\n" + del, refused},

		// Accepted as one request, after which the connection is closed (RFC 9112 §6.1).
		{"a length of all, and chunked", length(len(chunked("{}"))+len(del)) + te, chunked("{}") + del, []int{200}},
		{"chunked, and a length of less", te + length(4), chunked("{}") + del, []int{200}},
		{"chunked on a folded line", "Transfer-Encoding:\r\n chunked\r\n", chunked("{}") + del, []int{200}},
		{"chunked in other letters", "tRANSFER-eNCODING: CHUNKED\r\n", chunked("{}") + del, []int{200}},
		{"a request in a chunk", te, chunked(del) + del, refused},
		{"a request in a trailer", te, "2\r\n{}\r\n0\r\nX-A: b\r\n\r\n" + del, []int{200}},

		// Accepted as one request. The next request is accepted too, since it is not smuggled.
		{"a length twice", length(len(del)) + length(len(del)), del, []int{400, 200}},
		{"a length after spaces", "Content-Length:  \t " + strconv.Itoa(len(del)) + " \t\r\n", del, []int{400, 200}},
		{"a length with zeros", "Content-Length: 00" + strconv.Itoa(len(del)) + "\r\n", del, []int{400, 200}},
		{"an encoding that a fold hides", "X-A: b\r\n " + te + length(len(del)), del, []int{400, 200}},
		{"fields that end in a bare LF", "X-A: b\n" + length(len(del)), del, []int{400, 200}},
		{"a length that Connection names", length(len(del)) + "Connection: Content-Length\r\n", del, []int{400, 200}},
		{"an upgrade to HTTP/2", length(len(del)) + "Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n", del, []int{400, 200}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			text := v.header("PUT", demoPath, jsonType+tt.fields) + tt.content
			if len(tt.want) == 2 {
				text += "GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
			}
			v.wantOne(t, text, tt.want...)
		})
	}
	for _, tt := range []struct {
		name, text string
		want       []int
	}{
		{"HTTP/1.0, chunked and a length", strings.Replace(v.header("PUT", demoPath, jsonType+"Connection: keep-alive\r\n"+te+length(2)), "HTTP/1.1", "HTTP/1.0", 1) + "{}" + del, []int{200}},
		{"HTTP/1.0, chunked", strings.Replace(v.header("PUT", demoPath, jsonType+"Connection: keep-alive\r\n"+te), "HTTP/1.1", "HTTP/1.0", 1) + chunked("{}") + del, refused},
		{"HTTP/0.9", "GET /healthz\r\n" + del, refused},
		{"HTTP/2 without TLS", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + del, []int{405}},
		{"an unknown version", strings.Replace(v.header("PUT", demoPath, jsonType+length(2)), "HTTP/1.1", "HTTP/3.0", 1) + "{}" + del, []int{505}},
		{"no host", "GET /healthz HTTP/1.1\r\n\r\n" + del, refused},
		{"an encoding on a folded first field", "GET /healthz HTTP/1.1\r\n " + te + "Host: x\r\n\r\n" + del, refused},
		{"a request in the content of a GET", v.header("GET", "/healthz", length(len(del))+"Connection: close\r\n") + del, []int{200}},
		{"a request in the content of one without a token", "PUT " + demoPath + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + length(len(del)) + "\r\n" + del, []int{401}},
		{"a request in the content of one to nowhere", "PUT /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + length(len(del)) + "\r\n" + del, []int{404}},
	} {
		t.Run(tt.name, func(t *testing.T) { v.wantOne(t, tt.text, tt.want...) })
	}
	v.ends(t)
}

// wantOne sends a text. It fails the test unless these responses come and the contract whose
// deletion is in the text still exists.
func (v *besieged) wantOne(t *testing.T, text string, want ...int) {
	t.Helper()
	v.l.send("PUT", demoContract, "{}", "If-None-Match", "*") // where a test before has failed
	err := v.each(1, func(_ int, c peer) error {
		return errors.Join(send(c, text), c.CloseWrite(), wantAnswers(c, want...))
	})
	if err != nil {
		t.Errorf("%v\n%q", err, text)
	}
	if got := v.l.send("GET", demoContract, ""); got.err != nil || got.status != http.StatusOK {
		t.Fatalf("what is in a request was done: %v\n%q", got, text)
	}
}

func TestServiceOutOfDescriptorsGoesOnWhenThereAreSome(t *testing.T) {
	long(t)
	t.Parallel()
	const limit = 100
	v := besiege(t, "sh", "-c", fmt.Sprintf(`ulimit -n %d && exec "$0" "$@"`, limit))
	before := v.inHand(t)
	var idle []net.Conn
	defer func() {
		for _, c := range idle {
			c.Close()
		}
	}()
	for range 3 * limit {
		c, err := net.DialTimeout("tcp", v.addr, answerTimeout)
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, c)
	}
	waitFor(t, "the service has no descriptor left", func() bool {
		return strings.Contains(v.p.Stderr.String(), "too many open files; retrying in")
	})
	for range 20 { // a client that is connected notices nothing
		if err := v.l.round(demoContract); err != nil {
			t.Fatal(err)
		}
	}
	for _, c := range idle {
		c.Close()
	}
	v.l.client.CloseIdleConnections()
	if err := v.l.round(demoContract); err != nil {
		t.Error(err)
	}
	v.wantInHand(t, before)
	v.ends(t)
}

// Frames of HTTP/2 (RFC 9113 §6).
const (
	frameHeaders, frameReset, frameSettings = 1, 3, 4
	endOfStreamAndHeaders                   = 0x5
)

// frame returns the bytes of a frame.
func frame(kind, flags byte, stream int, payload string) string {
	b := []byte{0, byte(len(payload) >> 8), byte(len(payload)), kind, flags}
	return string(binary.BigEndian.AppendUint32(b, uint32(stream))) + payload
}

// getFrame returns a HEADERS frame with a whole GET request.
func getFrame(stream int, path string) string {
	const method, scheme, pathIs, authorityIs = "\x82", "\x87", "\x04", "\x01" // RFC 7541, appendix A
	return frame(frameHeaders, endOfStreamAndHeaders, stream,
		method+scheme+pathIs+string(rune(len(path)))+path+authorityIs+"\x01x")
}

// certified is a service with --tls-cert and --tls-key.
type certified struct{ *process }

func startCertified(t testing.TB, pair servicetest.KeyPair) *certified {
	t.Helper()
	cert, key := pair.Files(t)
	return &certified{startProcess(t, nil, "--demo", "--tls-cert", cert, "--tls-key", key)}
}

// dialHTTP2 opens a connection whose streams have a window of this many bytes.
func dialHTTP2(t *testing.T, s *certified, window uint32) net.Conn {
	t.Helper()
	c, err := tls.Dial("tcp", strings.TrimPrefix(s.URL, "https://"), &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(2 * answerTimeout)); err != nil {
		t.Fatal(err)
	}
	const initialWindowSize = "\x00\x04"
	settings := string(binary.BigEndian.AppendUint32([]byte(initialWindowSize), window))
	if err := send(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"+frame(frameSettings, 0, 0, settings)); err != nil {
		t.Fatal(err)
	}
	return c
}

func TestHTTP2StreamsThatNobodyReadsAreReset(t *testing.T) {
	long(t)
	t.Parallel()
	s := startCertified(t, servicetest.NewKeyPair(t, 1))
	c := dialHTTP2(t, s, 0)
	const streams = 100
	began := time.Now()
	for i := range streams {
		if err := send(c, getFrame(2*i+1, "/api/partners/v2.0/docs/swagger-ui-bundle.js")); err != nil {
			t.Fatal(err)
		}
	}
	for reset, r := 0, bufio.NewReader(c); reset < streams; {
		var header [9]byte
		if _, err := io.ReadFull(r, header[:]); err != nil {
			t.Fatalf("%d of %d streams were reset: %v", reset, streams, err)
		}
		if _, err := r.Discard(int(header[0])<<16 | int(header[1])<<8 | int(header[2])); err != nil {
			t.Fatal(err)
		}
		if header[3] == frameReset {
			reset++
			if took := time.Since(began); took < pieceTimeout-time.Second {
				t.Fatalf("reset after %v", took)
			}
		}
	}
}

func TestHTTP2StreamsThatAreResetAtOnceLeaveNothing(t *testing.T) {
	long(t)
	t.Parallel()
	pair := servicetest.NewKeyPair(t, 1)
	s := startCertified(t, pair)
	well, process := pair.Client(true), loaded{pid: s.Cmd.Process.Pid}
	before := process.descriptors(t)
	for range servicetest.Amount(1, 20) {
		c := dialHTTP2(t, s, 1<<16)
		go io.Copy(io.Discard, c)
		for i := range 20_000 {
			stream := 2*i + 1
			if _, err := io.WriteString(c, getFrame(stream, "/healthz")+frame(frameReset, 0, stream, "\x00\x00\x00\x08")); err != nil {
				break // it is hung up on
			}
		}
		if resp, got := do(t, well, "GET", s.URL+"/healthz", nil, ""); resp.StatusCode != http.StatusOK {
			t.Errorf("%s\n%s", resp.Status, got)
		}
		c.Close()
	}
	well.CloseIdleConnections()
	waitFor(t, "no descriptor is left behind", func() bool { return process.descriptors(t) <= before })
	if err := s.Terminate(t); err != nil || strings.Contains(s.Stderr.String(), "panic") {
		t.Errorf("after SIGTERM: %v\n%s", err, head(s.Stderr.String()))
	}
}
