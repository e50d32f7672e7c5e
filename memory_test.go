package main

// The bound on the memory of requests, with clients that hold back the end of a body or read
// nothing of a response.

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// noMemory is the response to a request for which there is no memory.
var noMemory = failure{
	Status: 503, Header: http.Header{"Retry-After": {"1"}},
	Detail: "The requests in progress take all the memory that --body-memory allows; nothing was changed. Send the request again.",
}

// wantBodyRefused fails the test unless a response is f, before the end of the body.
func wantBodyRefused(t testing.TB, f failure, resp *http.Response, got string) {
	t.Helper()
	f.Want(t, resp, got)
	if !resp.Close {
		t.Error("the connection goes on with the rest of the body")
	}
}

// crowd is a service whose memory for requests is scarce.
type crowd struct {
	*service
	bearer string
	bound  int
}

// newCrowd starts a service with so many MiB of memory for requests.
func newCrowd(t testing.TB, mib int, args ...string) *crowd {
	t.Helper()
	bound := mib << 20
	s := start(t, append(args, "--demo", "--metrics-addr", "127.0.0.1:0", "--body-memory", strconv.Itoa(bound))...)
	return &crowd{service: s, bearer: token(t, s.url, "demo", "demo-secret"), bound: bound}
}

// held returns the memory that requests hold, as the metric has it.
func (c *crowd) held(t testing.TB) int {
	t.Helper()
	n, err := strconv.ParseFloat(metric(t, scrape(t, c.log.String()), "energy_contracts_request_memory_bytes"), 64)
	if err != nil {
		t.Fatal(err)
	}
	if int(n) > c.bound {
		t.Errorf("requests hold %v bytes, more than %d", n, c.bound)
	}
	return int(n)
}

// wantNoneHeld waits until all memory has been given back.
func (c *crowd) wantNoneHeld(t testing.TB) {
	t.Helper()
	waitUntil(t, 20*time.Second, "nothing is held", func() error {
		if n := c.held(t); n != 0 {
			return fmt.Errorf("%d bytes", n)
		}
		return nil
	})
}

// demoContractPath is the path of the first contract of the demo user.
var demoContractPath = contractsURL("", demoOrg, demoUser) + "/" + demoContract

// header returns the header of a request with the demo client's token.
func (c *crowd) header(method, path string, fields ...string) string {
	return method + " " + path + " HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + c.bearer + "\r\n" + strings.Join(append(fields, "", ""), "\r\n")
}

// dial opens a connection that takes few bytes of a response before it is read.
func (c *crowd) dial(t testing.TB) *net.TCPConn {
	t.Helper()
	return c.dialWith(t, 4<<10)
}

// dialWith opens a connection with a buffer for so many bytes of a response.
func (c *crowd) dialWith(t testing.TB, buffer int) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(c.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	tcp := conn.(*net.TCPConn)
	if err := tcp.SetReadBuffer(buffer); err != nil {
		t.Fatal(err)
	}
	return tcp
}

// status sends a request of the demo client for its first contract, and returns the status.
func (c *crowd) status(t testing.TB, method, body string) int {
	t.Helper()
	resp, _ := do(t, http.DefaultClient, method, c.url+demoContractPath, with(jsonBody, "Authorization", "Bearer "+c.bearer), body)
	return resp.StatusCode
}

// wantSmallOnesServed fails the test unless short requests are served.
func (c *crowd) wantSmallOnesServed(t *testing.T) {
	t.Helper()
	for _, tt := range []struct{ method, body string }{{"PUT", "{}"}, {"PUT", year(1000)}, {"GET", ""}, {"PATCH", `{"supplier":"a"}`}} {
		if status := c.status(t, tt.method, tt.body); status != 200 {
			t.Errorf("%s of %d bytes: %d", tt.method, len(tt.body), status)
		}
	}
	if again := token(t, c.url, "demo", "demo-secret"); again == "" {
		t.Error("no token")
	}
}

// padded returns JSON with spaces to a size.
func padded(text string, size int) string { return text + strings.Repeat(" ", size-len(text)) }

func TestBodiesThatHoldBackTheirEndAreBounded(t *testing.T) {
	const clients, size = 120, 1 << 20
	c := newCrowd(t, 64, "--max-body", "33554432")
	body := padded(year(100), size)
	type held struct {
		conn *net.TCPConn
		sent string
		resp chan error // what is wrong with the response, or nil
	}
	var (
		mu      sync.Mutex
		refused int
		over    = map[int]bool{}
		all     []held
	)
	for i := range clients {
		sent := c.header("PUT", demoContractPath, "Content-Type: application/json", "Content-Length: "+strconv.Itoa(size)) + body[:size-1]
		h := held{c.dial(t), sent, make(chan error, 1)}
		all = append(all, h)
		go io.WriteString(h.conn, sent) // fails if it is refused before its end
		go func() {
			resp, got, err := described().Read(t, h.conn, sent)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				t.Errorf("no response: %v", err)
			case resp.StatusCode == 503:
				wantBodyRefused(t, noMemory, resp, got)
				refused++
				over[i] = true
			case resp.StatusCode != 200:
				err = errors.New(resp.Status)
			}
			h.resp <- err
		}()
	}
	each := madeOfBody * (size + 512)
	waitUntil(t, 20*time.Second, "each is refused or has sent all but its end", func() error {
		mu.Lock()
		defer mu.Unlock()
		if n, is := (clients-refused)*each, c.held(t); n != is {
			return fmt.Errorf("%d are refused, and the others hold %d bytes, want %d", refused, is, n)
		}
		return nil
	})
	most := c.bound / 8 * 7 / each
	if served := clients - refused; served < 1 || served > most {
		t.Errorf("%d are served, want from 1 to %d", served, most)
	}
	c.wantSmallOnesServed(t)
	large := padded(year(100), 16<<20)
	if status := c.status(t, "PUT", large); status != 503 {
		t.Errorf("a body of 16 MiB meanwhile: %d", status)
	}
	for i, h := range all {
		mu.Lock()
		isOver := over[i]
		mu.Unlock()
		if !isOver {
			if _, err := io.WriteString(h.conn, " "); err != nil {
				t.Error(err)
			}
		}
		if err := <-h.resp; err != nil {
			t.Error(err)
		}
		h.conn.Close()
	}
	c.wantNoneHeld(t)
	if status := c.status(t, "PUT", large); status != 200 {
		t.Errorf("a body of 16 MiB afterwards: %d", status)
	}
	c.wantNoneHeld(t)
}

// What clients declare and do not send takes nothing from others.
func TestDeclaredBodiesHoldNothing(t *testing.T) {
	c := newCrowd(t, 16)
	for range 50 {
		sent := c.header("PUT", demoContractPath, "Content-Type: application/json", "Content-Length: 4194304", "Expect: 100-continue")
		conn := c.dial(t)
		if _, err := io.WriteString(conn, sent); err != nil {
			t.Fatal(err)
		}
		const asked = "HTTP/1.1 100 Continue\r\n\r\n"
		got := make([]byte, len(asked))
		if _, err := io.ReadFull(conn, got); err != nil || string(got) != asked {
			t.Fatalf("%q, %v", got, err)
		}
	}
	if n := c.held(t); n != 0 {
		t.Errorf("they hold %d bytes", n)
	}
	if status := c.status(t, "PUT", padded("{}", 2<<20)); status != 200 {
		t.Errorf("a body of 2 MiB: %d", status)
	}
}

func TestBodyLargerThanTheMemoryIsTakenAlone(t *testing.T) {
	c := newCrowd(t, 16, "--max-body", "33554432")
	body := padded(year(100), 20<<20)
	sent := c.header("PUT", demoContractPath, "Content-Type: application/json", "Content-Length: "+strconv.Itoa(len(body))) + body[:len(body)-1]
	conn := c.dial(t)
	if _, err := io.WriteString(conn, sent); err != nil {
		t.Fatal(err)
	}
	all := c.bound / 8 * 7
	waitUntil(t, 20*time.Second, "it holds what large content may", func() error {
		if n := c.held(t); n != all {
			return fmt.Errorf("%d bytes, want %d", n, all)
		}
		return nil
	})
	for _, other := range []string{body, padded("{}", 200<<10)} {
		resp, got := do(t, http.DefaultClient, "PUT", c.url+demoContractPath, with(jsonBody, "Authorization", "Bearer "+c.bearer), other)
		wantBodyRefused(t, noMemory, resp, got)
	}
	c.wantSmallOnesServed(t)
	if _, err := io.WriteString(conn, " "); err != nil {
		t.Fatal(err)
	}
	if resp, got, err := described().Read(t, conn, sent+" "); err != nil || resp.StatusCode != 200 {
		t.Errorf("%v, %v\n%s", resp, err, head(got))
	}
	c.wantNoneHeld(t)
}

// A client that reads slowly makes the service hold the document for it.
func TestDocumentsThatNobodyReadsAreBounded(t *testing.T) {
	const clients = 60
	c := newCrowd(t, 16)
	if status := c.status(t, "PUT", year(18_000)); status != 200 { // about 1 MB
		t.Fatal(status)
	}
	small := strings.Replace(demoContract, "3c90c3cc", "00000000", 1)
	for _, path := range []string{demoContractPath, contractsURL("", demoOrg, demoUser)} {
		t.Run(path, func(t *testing.T) {
			served := 0
			var all []*net.TCPConn
			for range clients {
				sent := c.header("GET", path, "Connection: close")
				conn := c.dial(t)
				all = append(all, conn)
				if _, err := io.WriteString(conn, sent); err != nil {
					t.Fatal(err)
				}
				status := make([]byte, len("HTTP/1.1 200"))
				if _, err := io.ReadFull(conn, status); err != nil {
					t.Fatal(err)
				}
				if string(status) == "HTTP/1.1 200" {
					served++
					continue
				}
				resp, got, err := described().Read(t, io.MultiReader(strings.NewReader(string(status)), conn), sent)
				if err != nil {
					t.Fatal(err)
				}
				noMemory.Want(t, resp, got)
			}
			if served < 5 || served > 15 {
				t.Errorf("%d are served", served)
			}
			if n := c.held(t); n < c.bound/2 {
				t.Errorf("they hold %d bytes", n)
			}
			if status := c.status(t, "GET", ""); status != 503 {
				t.Errorf("another large one: %d", status)
			}
			// Each is short, but its buffer from the pool may be long.
			for _, method := range []string{"PUT", "GET", "PATCH", "DELETE"} {
				header := with(jsonBody, "Authorization", "Bearer "+c.bearer)
				if method == "PUT" {
					header.Set("If-None-Match", "*")
				}
				resp, got := do(t, http.DefaultClient, method, c.url+contractsURL("", demoOrg, demoUser)+"/"+small, header, "{}")
				if resp.StatusCode >= 300 {
					t.Errorf("%s of a small one: %s\n%s", method, resp.Status, got)
				}
			}
			for _, conn := range all {
				conn.Close()
			}
			c.wantNoneHeld(t)
			if status := c.status(t, "GET", ""); status != 200 {
				t.Errorf("a large one afterwards: %d", status)
			}
		})
	}
}

// The parts of a long list differ in length. A part for which there is no memory cannot be refused
// any more, so the list is broken off, and the log says why.
func TestListIsBrokenOffWhereThereIsNoMemoryForItsNextPart(t *testing.T) {
	c := newCrowd(t, 16)
	const user = "00000000-0000-4000-8000-000000000001"
	list := contractsURL("", demoOrg, user)
	for _, prices := range []int{18_000, 54_000} { // about 1 MB and 3 MB
		if resp, got := do(t, http.DefaultClient, "POST", c.url+list, with(jsonBody, "Authorization", "Bearer "+c.bearer), year(prices)); resp.StatusCode != 200 {
			t.Fatalf("%s\n%s", resp.Status, head(got))
		}
	}
	slow := c.dialWith(t, 128<<10)
	if _, err := io.WriteString(slow, c.header("GET", list)); err != nil {
		t.Fatal(err)
	}
	status := make([]byte, len("HTTP/1.1 200"))
	if _, err := io.ReadFull(slow, status); err != nil || string(status) != "HTTP/1.1 200" {
		t.Fatalf("%q, %v", status, err)
	}
	const size = 2_500_000
	conn, before := c.dial(t), c.held(t)
	if _, err := io.WriteString(conn, c.header("PUT", demoContractPath, "Content-Type: application/json", fmt.Sprint("Content-Length: ", size))+strings.Repeat(" ", size-1)); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a body is held", func() bool { return c.held(t) == before+madeOfBody*(size+512) })
	resp, err := http.ReadResponse(bufio.NewReader(io.MultiReader(strings.NewReader("HTTP/1.1 200"), slow)), nil)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, resp.Body); err == nil || n < 900_000 || n > 1_100_000 {
		t.Errorf("%d bytes, %v", n, err)
	}
	conn.Close()
	c.wantNoneHeld(t)
	want := `route=` + contractsPath + ` status=200 `
	for line := range strings.Lines(c.log.String()) {
		if strings.Contains(line, "level=ERROR") && (!strings.Contains(line, want) || !strings.Contains(line, errNoMemory.Error())) {
			t.Errorf("the log has\n%s", line)
		}
	}
	if n := strings.Count(c.log.String(), "level=ERROR"); n != 1 {
		t.Errorf("%d errors\n%s", n, c.log)
	}
	if resp, got := do(t, http.DefaultClient, "GET", c.url+list, http.Header{"Authorization": {"Bearer " + c.bearer}}, ""); resp.StatusCode != 200 || strings.Count(got, `"id"`) != 2 {
		t.Errorf("afterwards: %s, %d bytes", resp.Status, len(got))
	}
}

// A PATCH takes memory for the old document too, which may be much longer than the patch.
func TestPatchOfALongDocumentTakesItsMemory(t *testing.T) {
	c := newCrowd(t, 16)
	if status := c.status(t, "PUT", year(36_000)); status != 200 { // about 1.9 MB, of which five times fit alone
		t.Fatal(status)
	}
	sent := c.header("PUT", demoContractPath, "Content-Type: application/json", "Content-Length: 1500000") + strings.Repeat(" ", 1_499_999)
	conn := c.dial(t)
	if _, err := io.WriteString(conn, sent); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a body is held", func() bool { return c.held(t) == madeOfBody*(1_500_000+512) })
	_, before := do(t, http.DefaultClient, "GET", c.url+demoContractPath, http.Header{"Authorization": {"Bearer " + c.bearer}}, "")
	resp, got := do(t, http.DefaultClient, "PATCH", c.url+demoContractPath, with(jsonBody, "Authorization", "Bearer "+c.bearer), `{"supplier":"a"}`)
	noMemory.Want(t, resp, got)
	if _, after := do(t, http.DefaultClient, "GET", c.url+demoContractPath, http.Header{"Authorization": {"Bearer " + c.bearer}}, ""); after != before {
		t.Error("the contract was changed")
	}
	conn.Close()
	c.wantNoneHeld(t)
	if status := c.status(t, "PATCH", `{"supplier":"a"}`); status != 200 {
		t.Errorf("afterwards: %d", status)
	}
	c.wantNoneHeld(t)
}

// Who has no token yet cannot take the memory of those who have one.
func TestTokenRequestsTakeLittleOfTheMemory(t *testing.T) {
	const clients, size = 40, 60 << 10
	c := newCrowd(t, 16)
	sent := "POST /oauth2/token HTTP/1.1\r\nHost: x\r\nContent-Length: " + strconv.Itoa(size) + "\r\n\r\n" + strings.Repeat("a", size-1)
	each := madeOfBody * (size + 512)
	most := c.bound / 8 / each
	refused := make(chan struct{}, clients)
	var all []*net.TCPConn
	for range clients {
		conn := c.dial(t)
		all = append(all, conn)
		if _, err := io.WriteString(conn, sent); err != nil {
			t.Fatal(err)
		}
		go func() {
			resp, got, err := described().Read(t, conn, sent)
			if err != nil {
				return // it was closed
			}
			f := noMemory
			f.Code = "temporarily_unavailable"
			wantBodyRefused(t, f, resp, got)
			refused <- struct{}{}
		}()
	}
	waitUntil(t, 20*time.Second, "each is refused or has sent all but its end", func() error {
		if n, is := (clients-len(refused))*each, c.held(t); n != is {
			return fmt.Errorf("%d are refused, and the others hold %d bytes, want %d", len(refused), is, n)
		}
		return nil
	})
	if n := clients - len(refused); n < 1 || n > most {
		t.Errorf("%d are served, want from 1 to %d", n, most)
	}
	c.wantSmallOnesServed(t)
	if status := c.status(t, "PUT", padded("{}", 2<<20)); status != 200 {
		t.Errorf("a body of 2 MiB: %d", status)
	}
	for _, conn := range all {
		conn.Close()
	}
	c.wantNoneHeld(t)
}

func TestMemoryIsGivenBackHoweverARequestEnds(t *testing.T) {
	c := newCrowd(t, 16, "--max-body", "2000000")
	long := func(text string) string { return padded(text, 1<<20) }
	chunked := func(body string) string { return fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(body), body) }
	for _, tt := range []struct {
		name, method, fields, body string
		ends                       bool // the client closes the connection
		status                     int  // 0: there is no response
	}{
		{name: "stored", method: "PUT", fields: "Content-Length: 1048576", body: long("{}"), status: 200},
		{name: "in chunks", method: "PUT", fields: "Transfer-Encoding: chunked", body: chunked(long("{}")), status: 200},
		{name: "malformed", method: "PUT", fields: "Content-Length: 1048576", body: long("{"), status: 400},
		{name: "against the rules", method: "PUT", fields: "Content-Length: 1048576", body: long(`{"supplier":1}`), status: 422},
		{name: "a precondition that is false", method: "PUT", fields: "If-Match: \"a\"\r\nContent-Length: 1048576", body: long("{}"), status: 412},
		{name: "too long", method: "PUT", fields: "Transfer-Encoding: chunked", body: chunked(strings.Repeat(" ", 2_000_001)), status: 413},
		{name: "a patch", method: "PATCH", fields: "Content-Length: 1048576", body: long("{}"), status: 200},
		{name: "left in the body", method: "PUT", fields: "Content-Length: 1048576", body: strings.Repeat(" ", 1<<20-1), ends: true},
		{name: "broken off in the body", method: "PUT", fields: "Transfer-Encoding: chunked", body: "fffff\r\n" + strings.Repeat(" ", 1<<19), ends: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sent := c.header(tt.method, demoContractPath, "Content-Type: application/json", tt.fields) + tt.body
			conn := c.dial(t)
			if _, err := io.WriteString(conn, sent); err != nil {
				t.Fatal(err)
			}
			if tt.ends {
				waitFor(t, "it is held", func() bool { return c.held(t) > 0 })
				conn.Close()
			} else if resp, got, err := described().Read(t, conn, sent[:len(sent)-len(tt.body)]+"{}"); err != nil || resp.StatusCode != tt.status {
				t.Errorf("%v, %v\n%s", resp, err, head(got))
			}
			c.wantNoneHeld(t)
		})
	}
}

func TestMemoryIsGivenBackAfterAPanic(t *testing.T) {
	store, err := Open(filepath.Join(t.TempDir(), "test.db"), time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	a, err := newAPI(store, time.Now, slog.New(slog.DiscardHandler), apiSettings{maxBody: 4 << 20, bodyMemory: 16 << 20})
	if err != nil {
		t.Fatal(err)
	}
	for path, value := range map[string]any{"/panic": "a", "/abort": http.ErrAbortHandler} {
		a.public(http.MethodPost, path, func(x *exchange) (response, error) {
			x.client = "a"
			if _, err := x.body(4 << 20); err != nil {
				return response{}, err
			}
			if a.memory.inUse() == 0 {
				t.Error("the body holds nothing")
			}
			panic(value)
		})
	}
	server := httptest.NewServer(a)
	defer server.Close()
	for range 5 { // of which two fit at once
		if resp, got := do(t, http.DefaultClient, "POST", server.URL+"/panic", nil, padded("{}", 1<<20)); resp.StatusCode != 500 {
			t.Errorf("%s\n%s", resp.Status, got)
		}
		if resp, err := http.Post(server.URL+"/abort", jsonType, strings.NewReader(padded("{}", 1<<20))); err == nil {
			t.Errorf("%s", resp.Status)
		}
		waitFor(t, "nothing is held", func() bool { return a.memory.inUse() == 0 })
	}
}

// Many clients send all of a body before they read the response.
func TestClientThatReadsNothingBeforeItHasSentItsBodySeesTheRefusal(t *testing.T) {
	const size = 4 << 20
	c := newCrowd(t, 16, "--max-body", "33554432")
	holds := c.dial(t)
	if _, err := io.WriteString(holds, c.header("PUT", demoContractPath, "Content-Type: application/json", "Content-Length: "+strconv.Itoa(size))+padded("{}", size-1)); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, 20*time.Second, "it holds memory", func() error {
		if n := c.held(t); n < c.bound/2 {
			return fmt.Errorf("%d bytes", n)
		}
		return nil
	})
	for _, length := range []string{"Content-Length: " + strconv.Itoa(size), "Transfer-Encoding: chunked"} {
		body := padded("{}", size)
		if strings.HasPrefix(length, "Transfer") {
			body = fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", size, body)
		}
		conn := c.dial(t)
		sent := c.header("PUT", demoContractPath, "Content-Type: application/json", length)
		if _, err := io.WriteString(conn, sent+body); err != nil {
			t.Errorf("%s: the body was not taken: %v", length, err)
		}
		resp, got, err := described().Read(t, conn, sent+body)
		if err != nil {
			t.Fatal(err)
		}
		wantBodyRefused(t, noMemory, resp, got)
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
			t.Errorf("%s: the connection goes on: %v", length, err)
		}
	}
}
