package main

// Tests of the pace and the end of an import, in fake time: the control socket is a pipe in the
// process of the test.

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// importer sends imports to the control endpoints of a store.
type importer struct {
	store   *Store
	client  *controlClient
	stop    func() // tells the server to stop
	stopped func() time.Duration
}

// newImporter returns an importer on a new store. It must be called in a bubble.
func newImporter(t *testing.T) *importer {
	t.Helper()
	i := &importer{}
	i.store, _ = openStore(t, newPath(t))
	ctx, cancel := context.WithCancel(t.Context())
	i.stop = cancel
	l := &pipeListener{conns: make(chan net.Conn), closed: make(chan struct{})}
	server := &http.Server{Handler: newControl(ctx, i.store, time.Now, slog.New(slog.DiscardHandler), defaultMaxBody)}
	go server.Serve(l)
	t.Cleanup(func() { cancel(); finishRequests(server) })
	i.stopped = func() time.Duration {
		began := time.Now()
		finishRequests(server)
		return time.Since(began)
	}
	i.client = newControlClient(l.dial, func() error { return nil })
	return i
}

// start starts an import of what feed writes, and returns its events. hang waits for the end of
// the test.
func (i *importer) start(t *testing.T, feed func(w io.Writer, hang func())) io.ReadCloser {
	t.Helper()
	out, in := io.Pipe()
	fed := make(chan struct{})
	go func() {
		feed(in, func() { <-t.Context().Done() })
		in.Close()
		close(fed)
	}()
	t.Cleanup(func() { <-fed })
	content, _, err := i.client.send(t.Context(), http.MethodPost, "/contracts", out)
	if err != nil {
		t.Fatal(err)
	}
	return content
}

// end reads the events of an import until the last one, which it returns, and calls each with the
// others.
func end(t *testing.T, events io.ReadCloser, each func(importEvent)) importEvent {
	t.Helper()
	defer events.Close()
	decoder := jsontext.NewDecoder(events)
	for {
		var e importEvent
		if err := json.UnmarshalDecode(decoder, &e); err != nil {
			t.Fatal(err)
		}
		if e.Problem != "" || e.End != nil {
			return e
		}
		each(e)
	}
}

// wantImported fails the test unless an import of one contract succeeds and the store then has n.
func (i *importer) wantImported(t *testing.T, n int) {
	t.Helper()
	e := end(t, i.start(t, func(w io.Writer, hang func()) { fmt.Fprintf(w, "{%s}\n", lineIDs(0)) }), func(importEvent) {})
	if e.End == nil || e.End.Imported != 1 {
		t.Errorf("the next import ends with %+v", e)
	}
	stored := 0
	if _, _, err := i.store.Scan(Selection{}, Key{}, func(Key, []byte) { stored++ }); err != nil || stored != n {
		t.Errorf("the store has %d contracts, %v; want %d", stored, err, n)
	}
}

func TestInputOfAnImportMustMakeProgress(t *testing.T) {
	const refused = "the input brought less than 64 KiB in 30 seconds, so nothing was imported; write it to a file and import the file"
	// A contract with spaces, so that its line has a piece.
	piece := func(i int) string {
		line := fmt.Sprintf("{%s}", lineIDs(i))
		return line + strings.Repeat(" ", pieceSize-len(line)-1) + "\n"
	}
	write := func(w io.Writer, text string) { _, _ = io.WriteString(w, text) }
	for name, tt := range map[string]struct {
		feed    func(w io.Writer, hang func())
		took    time.Duration
		problem string
		stored  int // if there is no problem
	}{
		"nothing arrives":      {func(_ io.Writer, hang func()) { hang() }, pieceTimeout, refused, 0},
		"half a line arrives":  {func(w io.Writer, hang func()) { write(w, `{"org`); hang() }, pieceTimeout, refused, 0},
		"a whole line arrives": {func(w io.Writer, hang func()) { write(w, piece(1)[1:]); hang() }, pieceTimeout, refused, 0},
		"it stops after two pieces": {func(w io.Writer, hang func()) {
			write(w, piece(1))
			time.Sleep(time.Second)
			write(w, piece(2))
			hang()
		}, time.Second + pieceTimeout, refused, 0},
		"a byte a second arrives": {func(w io.Writer, hang func()) {
			for range 60 {
				write(w, " ")
				time.Sleep(time.Second)
			}
			hang()
		}, pieceTimeout, refused, 0},
		"each piece is late by a second": {func(w io.Writer, hang func()) {
			for i := range 10 {
				time.Sleep(pieceTimeout + time.Second)
				write(w, piece(i))
			}
		}, pieceTimeout, refused, 0},
		"each piece is in time": {func(w io.Writer, hang func()) {
			for i := range 10 {
				time.Sleep(pieceTimeout - time.Second)
				write(w, piece(i))
			}
		}, 10 * (pieceTimeout - time.Second), "", 10},
		"less than a piece is in time": {func(w io.Writer, hang func()) {
			write(w, fmt.Sprintf("{%s}\n", lineIDs(1)))
			time.Sleep(pieceTimeout - time.Second)
		}, pieceTimeout - time.Second, "", 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				i := newImporter(t)
				began := time.Now()
				e := end(t, i.start(t, tt.feed), func(importEvent) {})
				took := time.Since(began).Truncate(time.Second)
				if tt.problem != "" {
					if e.Problem != tt.problem || took != tt.took {
						t.Errorf("it ends with %+v after %v, want %q after %v", e, took, tt.problem, tt.took)
					}
					i.wantImported(t, 1)
					return
				}
				if e.End == nil || e.End.Imported != tt.stored || took != tt.took {
					t.Errorf("it ends with %+v after %v, want %d contracts after %v", e, took, tt.stored, tt.took)
				}
			})
		})
	}
}

// The time in which the import waits for the disk, or for the reader of its events, is not the
// client's.
func TestInputOfAnImportMayWaitForTheReaderOfItsEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		i := newImporter(t)
		// A step of the import takes a small part of a piece, since most lines have faults to report.
		const lines = 3 * pieceSize / len("{}\n")
		began := time.Now()
		e := end(t, i.start(t, func(w io.Writer, _ func()) {
			_, _ = io.WriteString(w, strings.Repeat("{}\n", lines))
		}), func(e importEvent) {
			if e.Read > 0 {
				time.Sleep(pieceTimeout * 3 / 4)
			}
		})
		if e.End == nil || e.End.Bad != lines {
			t.Errorf("it ends with %+v", e)
		}
		if took := time.Since(began); took < 10*3*pieceTimeout {
			t.Errorf("it took %v, too little to tell", took)
		}
	})
}

// The faults of a step are in memory together.
func TestFaultsOfAnImportAreSentInPieces(t *testing.T) {
	i := newImporter(t)
	const lines = 500
	faults, most := 0, 0
	e := end(t, i.start(t, func(w io.Writer, _ func()) {
		for range lines {
			fmt.Fprintf(w, "{\"energy_prices\":[%s1]}\n", strings.Repeat("1,", 2*maxFaults))
		}
	}), func(e importEvent) {
		faults += len(e.Faults)
		if e.Read > 0 { // the end of a step
			most, faults = max(most, faults), 0
		}
	})
	if e.End == nil || e.End.Bad != lines || most == 0 || most > importContracts+maxFaults {
		t.Errorf("%d faults in a step, and at the end %+v", most, e)
	}
}

func TestImportEndsWithTheServer(t *testing.T) {
	const lines = 10_000
	for name, tt := range map[string]struct {
		more func(w io.Writer, hang func()) // the input after the first lines
		each func(importEvent)
	}{
		"while its input stalls": {func(_ io.Writer, hang func()) { hang() }, func(importEvent) {}},
		"while its input arrives": {func(w io.Writer, _ func()) {
			for n, err := lines, error(nil); err == nil; n++ {
				_, err = fmt.Fprintf(w, "{%s}\n", lineIDs(n))
				time.Sleep(time.Millisecond)
			}
		}, func(importEvent) {}},
		"while it waits for the reader of its events": {func(_ io.Writer, hang func()) { hang() }, func(importEvent) { time.Sleep(time.Second) }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				i := newImporter(t)
				events := i.start(t, func(w io.Writer, hang func()) {
					for n := range lines {
						fmt.Fprintf(w, "{%s}\n", lineIDs(n))
					}
					tt.more(w, hang)
				})
				time.AfterFunc(time.Second/2, i.stop)
				began := time.Now()
				e := end(t, events, tt.each)
				if want := "the server is stopping, so nothing was imported; import again when it has started"; e.Problem != want {
					t.Errorf("it ends with %+v, want %q", e, want)
				}
				if took := time.Since(began) + i.stopped(); took > shutdownTimeout/2 {
					t.Errorf("the stop took %v", took)
				}
				stored := 0
				if _, _, err := i.store.Scan(Selection{}, Key{}, func(Key, []byte) { stored++ }); err != nil || stored != 0 {
					t.Errorf("the store has %d contracts, %v", stored, err)
				}
			})
		})
	}
	t.Run("unless it is committed", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			i := newImporter(t)
			e := end(t, i.start(t, func(w io.Writer, hang func()) {
				for n := range lines {
					fmt.Fprintf(w, "{%s}\n", lineIDs(n))
				}
			}), func(e importEvent) {
				if e.Stored > 0 {
					i.stop()
				}
			})
			if e.End == nil || e.End.Imported != lines {
				t.Errorf("it ends with %+v", e)
			}
		})
	})
}
