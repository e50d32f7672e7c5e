package main

// The writer of the log, with readers that are slow, hang or fail.

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// numbered returns n log lines of 100 bytes.
func numbered(n int) (lines []string) {
	for i := range n {
		lines = append(lines, fmt.Sprintf("%099d\n", i))
	}
	return lines
}

// A reader that is slower than the service, or takes nothing at all, delays no request.
func TestLogDoesNotWaitForItsReader(t *testing.T) {
	t.Parallel()
	r, w := io.Pipe()
	l, reported := &logWriter{w: w}, make(chan int, 1)
	l.detach(func(lost int) { reported <- lost })
	lines := numbered(20 * logBuffer / 100)
	for _, line := range lines {
		start := time.Now()
		if n, err := fmt.Fprint(l, line); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
		if took := time.Since(start); took > time.Second { // it takes microseconds on an idle machine
			t.Fatalf("a line took %v", took)
		}
	}
	var got bytes.Buffer
	read := make(chan struct{})
	go func() { _, _ = io.Copy(&got, r); close(read) }()
	lost := <-reported
	fmt.Fprint(l, "the last line\n")
	l.close()
	w.Close()
	<-read
	// Which lines are lost depends on when the writer took the first ones.
	kept := strings.SplitAfter(strings.TrimSuffix(got.String(), "the last line\n"), "\n")
	kept = kept[:len(kept)-1]
	for i, next := 0, 0; i < len(kept); i++ {
		at := slices.Index(lines[next:], kept[i])
		if at < 0 {
			t.Fatalf("%q is not one of the lines after %q", kept[i], lines[max(0, next-1)])
		}
		next += at + 1
	}
	if len(kept)+lost != len(lines) || lost < len(lines)/2 || !strings.HasSuffix(got.String(), "the last line\n") {
		t.Errorf("%d of %d lines are lost, %d were read\n%.1000s", lost, len(lines), len(kept), got.String())
	}
}

func TestLogLosesNothingThatFitsIntoItsBuffer(t *testing.T) {
	t.Parallel()
	r, w := io.Pipe()
	l := &logWriter{w: w}
	l.detach(func(lost int) { t.Errorf("%d lines are lost", lost) })
	lines := numbered(logBuffer / 100)
	for _, line := range lines {
		fmt.Fprint(l, line)
	}
	var got bytes.Buffer
	read := make(chan struct{})
	go func() { _, _ = io.Copy(&got, r); close(read) }()
	l.close()
	w.Close()
	<-read
	if got.String() != strings.Join(lines, "") {
		t.Errorf("read %d bytes of %d lines", got.Len(), len(lines))
	}
}

// fullDisk is a file on a disk that has room for some more bytes.
type fullDisk struct {
	lockedBuffer
	room chan int // the new room, for the next write
	has  int
}

func (d *fullDisk) Write(b []byte) (int, error) {
	select {
	case d.has = <-d.room:
	default:
	}
	n := min(len(b), d.has)
	d.has -= n
	if _, err := d.lockedBuffer.Write(b[:n]); err != nil {
		return 0, err
	}
	if n < len(b) {
		return n, syscall.ENOSPC
	}
	return n, nil
}

func TestLogCountsLinesThatFailAndEndsATornLine(t *testing.T) {
	full := &fullDisk{room: make(chan int, 1), has: 3}
	l, reported := &logWriter{w: full}, make(chan int, 1)
	l.detach(func(lost int) {
		reported <- lost
		fmt.Fprintf(l, "%d were lost\n", lost)
	})
	for range 10 {
		fmt.Fprint(l, "lost\n")
	}
	waitFor(t, "the lines have failed", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.lost == 10
	})
	full.room <- 1000
	fmt.Fprint(l, "kept\n")
	l.close()
	if lost := <-reported; lost != 10 {
		t.Errorf("%d lines are lost, want 10", lost)
	}
	if got, want := full.String(), "los\nkept\n10 were lost\n"; got != want {
		t.Errorf("wrote %q, want %q", got, want)
	}
}

// A process whose log is not read must end nevertheless.
func TestLogIsClosedAlthoughItsReaderHangs(t *testing.T) {
	t.Parallel()
	_, w := io.Pipe()
	l := &logWriter{w: w}
	l.detach(nil)
	fmt.Fprint(l, "a line\n")
	start := time.Now()
	l.close()
	if took := time.Since(start); took < logFlush {
		t.Errorf("took %v", took)
	}
}
