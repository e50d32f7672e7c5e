//go:build linux

package e2e

// Content that arrives slowly. That of an honest client on a slow line is taken, and what this
// leaves to an attacker is bounded.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"strconv"
	"strings"
	"sync"
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
	together(t, len(slowLines), func(i int) error {
		c, began := pair.Client(strings.HasPrefix(slowLines[i].name, "HTTP/2")), time.Now()
		trusting := context.WithValue(t.Context(), oauth2.HTTPClient, c)
		granted, err := (&clientcredentials.Config{ClientID: "demo", ClientSecret: "demo-secret", TokenURL: p.URL + tokenPath}).Token(trusting)
		if err == nil {
			err = slowLines[i].does(c, p.URL, granted.AccessToken)
		}
		if took := time.Since(began); err != nil || took < readTimeout {
			return fmt.Errorf("%s, in %v: %w", slowLines[i].name, took, err)
		}
		return nil
	})
}

const (
	// slowClients is the number of clients that have a token and stop in the middle of their
	// content, after slowSent bytes.
	slowClients, slowSent = 200, 1 << 20
	// slowMemory is the most memory, in MB, that each of them may cost: a buffer of at most
	// twice what it has sent, and as much again for the smaller buffers before it, until they
	// are collected. Measured were 2.9 MB.
	slowMemory = 4 * slowSent / 1e6
)

// A client that stops sending costs one goroutine, one connection and memory in proportion to
// what it has sent, until pieceTimeout after its last piece.
func TestContentThatStopsCostsBoundedMemoryForBoundedTime(t *testing.T) {
	long(t)
	t.Parallel() // most of it is to wait
	v := besiege(t)
	before, beforeMB := v.inHand(t), v.memory(t, "RssAnon")
	start := v.header("PUT", demoPath, jsonType+"Content-Length: "+strconv.Itoa(largestBody)+"\r\n")
	content := strings.Repeat(" ", slowSent)
	var sent sync.WaitGroup
	sent.Add(slowClients)
	go func() {
		sent.Wait()
		time.Sleep(time.Second) // for the last of it to be read
		during, mb := v.inHand(t), v.memory(t, "RssAnon")-beforeMB
		t.Logf("%d clients, each with %d bytes sent: %d goroutines and %.1f MB each", slowClients, slowSent, (during.goroutines-before.goroutines)/slowClients, mb/slowClients)
		if n := during.goroutines - before.goroutines; n > slowClients+10 {
			t.Errorf("%d goroutines for %d clients", n, slowClients)
		}
		if mb > slowClients*slowMemory {
			t.Errorf("%.0f MB for %d clients, more than %.1f MB each", mb, slowClients, float64(slowMemory))
		}
	}()
	err := v.each(slowClients, func(_ int, c peer) error {
		c.began = time.Now()
		err := errors.Join(send(c, start), send(c, content))
		sent.Done()
		if err != nil {
			return err
		}
		return aByteASecond(c, content, pieceTimeout, http.StatusRequestTimeout)
	})
	if err != nil {
		t.Error(err)
	}
	v.wantInHand(t, before)
	v.ends(t)
}
