//go:build linux

package e2e

// Content that arrives slowly. That of an honest client on a slow line is taken, and what this
// leaves to an attacker is bounded.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"

	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"
)

// pieceSize is how much content a client must send, or take, within pieceTimeout.
const pieceSize = 64 << 10

// slowLines are clients whose requests take longer than readTimeout.
var slowLines = []struct {
	name string
	does func(c *http.Client, service, bearer string) error
}{
	// Kept at 50 kB a second, a year of quarter hours.
	{"curl on a slow line", func(_ *http.Client, service, bearer string) error {
		curl := exec.Command("curl", "--silent", "--show-error", "--fail-with-body", "--insecure", "--limit-rate", "50k",
			"--request", "PUT", "--header", "Content-Type: application/json", "--data-binary", "@-",
			"--header", "Authorization: Bearer "+bearer, contractsURL(service, demoOrg, demoUser)+"/"+demoOtherContract)
		curl.Stdin = strings.NewReader(year(35_040))
		got, err := curl.CombinedOutput()
		if n := strings.Count(string(got), `{"price":`); err != nil || n != 35_040 {
			return fmt.Errorf("%d prices are stored, %w: %.300s", n, err, got)
		}
		return nil
	}},
	// At the slowest pace that is allowed, a request may take longer than the two minutes that a
	// response may take.
	{"HTTP/1.1 at the slowest pace", slowestPut("HTTP/1.1")},
	{"HTTP/2 at the slowest pace", slowestPut("HTTP/2.0")},
}

// slowestPut returns a client that sends seven pieces, each in three quarters of pieceTimeout.
func slowestPut(proto string) func(*http.Client, string, string) error {
	return func(c *http.Client, service, bearer string) error {
		content := `{"supplier":"Slow"` + strings.Repeat(" ", 7*pieceSize) + "}"
		req, err := http.NewRequest("PUT", contractsURL(service, demoOrg, demoUser)+"/"+demoContract, &dripping{content, pieceTimeout * 3 / 4})
		if err != nil {
			return err
		}
		req.Header = http.Header{"Content-Type": {"application/json"}, "Authorization": {"Bearer " + bearer}}
		resp, err := c.Do(req)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		got, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(got), `"supplier":"Slow"`) || resp.Proto != proto {
			return fmt.Errorf("%s %s, %w: %s", resp.Proto, resp.Status, err, got)
		}
		return nil
	}
}

// dripping is content of which a piece arrives in the time of a pause.
type dripping struct {
	content string
	pause   time.Duration
}

func (d *dripping) Read(b []byte) (int, error) {
	if d.content == "" {
		return 0, io.EOF
	}
	n := copy(b[:min(len(b), 4<<10)], d.content)
	time.Sleep(d.pause * time.Duration(n) / pieceSize)
	d.content = d.content[n:]
	return n, nil
}

func TestSlowContentIsTaken(t *testing.T) {
	long(t)
	t.Parallel() // all of it is to wait
	needTool(t, "curl")
	pair := servicetest.NewKeyPair(t, 1)
	p := startCertified(t, pair)
	bearer := tokenBy(t, pair.Client(false), p.URL)
	together(t, len(slowLines), func(i int) error {
		began := time.Now()
		err := slowLines[i].does(pair.Client(strings.HasPrefix(slowLines[i].name, "HTTP/2")), p.URL, bearer)
		if took := time.Since(began); err != nil || took < readTimeout {
			return fmt.Errorf("%s, in %v: %w", slowLines[i].name, took, err)
		}
		return nil
	})
}

// slowAtFirst is a connection that is read at 30 kB a second until a time, and then as fast as may
// be.
type slowAtFirst struct {
	net.Conn
	until time.Time
}

func (s slowAtFirst) Read(b []byte) (int, error) {
	if time.Now().Before(s.until) {
		time.Sleep(100 * time.Millisecond)
		b = b[:min(len(b), 3000)]
	}
	return s.Conn.Read(b)
}

// The system's own buffer for a connection has megabytes, and a third of them takes such a reader
// longer than pieceTimeout.
func TestSlowReaderGetsAllOfALongResponse(t *testing.T) {
	long(t)
	t.Parallel() // most of it is to wait
	v := besiege(t)
	list, contracts := contractsURL("", demoOrg, largeUser), 6
	for range contracts {
		if resp, got := do(t, v.l.client, "POST", v.l.base+list, v.l.with(jsonBody), year(35_040)); resp.StatusCode != http.StatusOK {
			t.Fatalf("%s\n%s", resp.Status, head(got))
		}
	}
	dialer := net.Dialer{Control: func(_, _ string, c syscall.RawConn) (err error) {
		return errors.Join(c.Control(func(fd uintptr) { err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 128<<10) }), err)
	}}
	c, err := dialer.Dial("tcp", v.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := send(c, v.header("GET", list, "")); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(slowAtFirst{c, time.Now().Add(pieceTimeout * 3 / 2)}), nil)
	if err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(resp.Body)
	if n := strings.Count(string(got), `"id":`); err != nil || resp.StatusCode != http.StatusOK || n != contracts {
		t.Errorf("%s, %v, %d contracts in %d bytes", resp.Status, err, n, len(got))
	}
	v.ends(t)
}

const (
	// slowClients is the number of clients that have a token and stop in the middle of their
	// content, after slowSent bytes.
	slowClients, slowSent = 200, 1 << 20
	// slowStreams is the number of requests at once that a connection of HTTP/2 may have.
	slowStreams = 100
	// slowMemory is the most memory, in MB, that each of them may cost: a buffer of at most
	// twice what it has sent, and as much again for the smaller buffers before it, until they
	// are collected. Measured were 2.9 MB.
	slowMemory = 4 * slowSent / 1e6
)

// wantSlow runs n clients that each send slowSent bytes, count that in sent, and then stop. It
// fails the test unless each costs no more than a goroutine and slowMemory meanwhile, and nothing
// is left of them.
func (v *besieged) wantSlow(t testing.TB, n int, run func(sent *atomic.Int64) error) {
	t.Helper()
	before, beforeMB := v.inHand(t), v.memory(t, "RssAnon")
	var sent atomic.Int64
	ended := make(chan error)
	go func() { ended <- run(&sent) }()
	waitUntil(t, 3*answerTimeout, "all have sent", func() error {
		if is := sent.Load(); is < int64(n) {
			return fmt.Errorf("%d of %d", is, n)
		}
		return nil
	})
	time.Sleep(time.Second) // for the last of it to be read
	goroutines, mb := v.inHand(t).goroutines-before.goroutines, v.memory(t, "RssAnon")-beforeMB
	t.Logf("%d clients, each with %d bytes sent, cost %d goroutines and %.0f MB", n, slowSent, goroutines, mb)
	if goroutines > n+10 {
		t.Errorf("%d goroutines for %d clients", goroutines, n)
	}
	if most := float64(n) * slowMemory; mb > most {
		t.Errorf("%.0f MB for %d clients, more than %.0f", mb, n, most)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	v.wantInHand(t, before)
	v.ends(t)
}

// A client that stops sending is refused pieceTimeout after its last piece.
func TestContentThatStopsCostsBoundedMemoryForBoundedTime(t *testing.T) {
	long(t)
	t.Parallel() // most of it is to wait
	v := besiege(t, ampleMemory...)
	start := v.header("PUT", demoPath, jsonType+"Content-Length: "+strconv.Itoa(largestBody)+"\r\n")
	content := strings.Repeat(" ", slowSent)
	v.wantSlow(t, slowClients, func(sent *atomic.Int64) error {
		return v.each(slowClients, func(_ int, c peer) error {
			c.began = time.Now()
			if err := errors.Join(send(c, start), send(c, content)); err != nil {
				return err
			}
			sent.Add(1)
			return aByteASecond(c, content, pieceTimeout, http.StatusRequestTimeout)
		})
	})
}

// With HTTP/2, slowStreams requests share a connection.
func TestContentThatStopsInHTTP2CostsBoundedMemoryForBoundedTime(t *testing.T) {
	long(t)
	t.Parallel() // most of it is to wait
	pair := servicetest.NewKeyPair(t, 1)
	cert, key := pair.Files(t)
	p := startProcess(t, ampleMemory, "--demo", "--metrics-addr", "127.0.0.1:0", "--tls-cert", cert, "--tls-key", key)
	v := &besieged{watched(p), p, &ledger{client: http.DefaultClient}}
	c := pair.Client(true)
	bearer := tokenBy(t, c, p.URL)
	c.CloseIdleConnections()
	v.wantSlow(t, slowStreams, func(sent *atomic.Int64) error {
		defer c.CloseIdleConnections()
		errs := make([]error, slowStreams)
		var all sync.WaitGroup
		for i := range slowStreams {
			all.Go(func() { errs[i] = stopInHTTP2(c, p.URL, bearer, sent) })
		}
		all.Wait()
		return errors.Join(errs...)
	})
}

// stopInHTTP2 sends slowSent bytes of the content of a request, and waits for the refusal.
func stopInHTTP2(c *http.Client, service, bearer string, sent *atomic.Int64) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel() // ends the content
	content, more := io.Pipe()
	context.AfterFunc(ctx, func() { content.Close() })
	go func() {
		if _, err := io.WriteString(more, strings.Repeat(" ", slowSent)); err == nil {
			sent.Add(1)
		}
	}()
	req, err := http.NewRequestWithContext(ctx, "PUT", contractsURL(service, demoOrg, demoUser)+"/"+demoContract, content)
	if err != nil {
		return err
	}
	req.Header = http.Header{"Content-Type": {"application/json"}, "Authorization": {"Bearer " + bearer}}
	began := time.Now()
	resp, err := c.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if took := time.Since(began); resp.StatusCode != http.StatusRequestTimeout || resp.ProtoMajor != 2 || took < pieceTimeout || took > pieceTimeout+answerTimeout {
		return fmt.Errorf("%s %s after %v", resp.Proto, resp.Status, took)
	}
	return nil
}

// A pipe into an import that stops must not keep others out for ever.
func TestImportWhosePipeStopsMakesRoomForAnother(t *testing.T) {
	long(t)
	t.Parallel() // most of it is to wait
	file, empty := servicetest.ManyLines(t, 5000, 500), writeFile(t, nil)
	for _, up := range []bool{true, false} {
		t.Run(fmt.Sprintf("server %v", up), func(t *testing.T) {
			t.Parallel()
			db := shortPath(t)
			if up {
				startProcess(t, nil, "--db", db)
			}
			cmd := command(t, nil, "import", "-", "--db", db)
			stderr := &lockedBuffer{}
			cmd.Stderr = stderr
			stdin, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			whole := readFile(t, file)
			if _, err := io.WriteString(stdin, whole[:len(whole)-1]); err != nil { // more than the buffers on the way hold
				t.Fatal(err)
			}
			began := time.Now()
			if got := run(t, nil, "import", empty, "--db", db); got.status != 1 {
				t.Errorf("another import meanwhile: %+v", got)
			}
			_ = cmd.Wait()
			const want = "energy-contracts: the input brought less than 64 KiB in 30 seconds, so nothing was imported; write it to a file and import the file\n"
			if took := time.Since(began); cmd.ProcessState.ExitCode() != 1 || stderr.String() != want || took < pieceTimeout-time.Second || took > pieceTimeout+answerTimeout {
				t.Errorf("%v after %v\n%s", cmd.ProcessState, took, stderr)
			}
			wantExport(t, db, export(""))
			ok(t, db, "import", file)
			wantExport(t, db, readFile(t, file))
		})
	}
}

// tokenBy gets a token for the demo client by way of c.
func tokenBy(t testing.TB, c *http.Client, service string) string {
	t.Helper()
	trusting := context.WithValue(t.Context(), oauth2.HTTPClient, c)
	granted, err := (&clientcredentials.Config{ClientID: "demo", ClientSecret: "demo-secret", TokenURL: service + tokenPath}).Token(trusting)
	if err != nil {
		t.Fatal(err)
	}
	return granted.AccessToken
}
