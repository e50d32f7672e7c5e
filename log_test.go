package main

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync/atomic"
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

func TestLogLosesNothingToASlowReader(t *testing.T) {
	t.Parallel()
	r, w := io.Pipe()
	l := &logWriter{w: w}
	l.detach(func(lost int) { t.Errorf("%d lines are lost", lost) })
	lines := numbered(20 * logBuffer / 100)
	go func() {
		for _, line := range lines {
			fmt.Fprint(l, line)
		}
		l.close()
		w.Close()
	}()
	var got bytes.Buffer
	for {
		time.Sleep(logPatience / 100)
		if _, err := io.CopyN(&got, r, logBuffer/4); err != nil {
			break
		}
	}
	if got.String() != strings.Join(lines, "") {
		t.Errorf("read %d bytes of %d lines", got.Len(), len(lines))
	}
}

func TestLogWaitsForAHangingReaderOnlyOnce(t *testing.T) {
	t.Parallel()
	r, w := io.Pipe()
	l, reported := &logWriter{w: w}, make(chan int, 1)
	l.detach(func(lost int) { reported <- lost })
	lines := numbered(20 * logBuffer / 100)
	start := time.Now()
	for _, line := range lines {
		if n, err := fmt.Fprint(l, line); n != len(line) || err != nil {
			t.Fatal(n, err)
		}
	}
	if took := time.Since(start); took < logPatience || took > 20*logPatience {
		t.Errorf("took %v", took)
	}
	var got bytes.Buffer
	read := make(chan struct{})
	go func() { _, _ = io.Copy(&got, r); close(read) }()
	lost := <-reported
	fmt.Fprint(l, "the last line\n")
	l.close()
	w.Close()
	<-read
	want := strings.Join(lines[:len(lines)-lost], "") + "the last line\n"
	if got.String() != want || lost < len(lines)/2 {
		t.Errorf("%d of %d lines are lost; read\n%.1000s", lost, len(lines), got.String())
	}
}

// fullDisk is a file on a disk that is full until free is set.
type fullDisk struct {
	lockedBuffer
	free atomic.Bool
}

func (d *fullDisk) Write(b []byte) (int, error) {
	if !d.free.Load() {
		return 0, syscall.ENOSPC
	}
	return d.lockedBuffer.Write(b)
}

func TestLogCountsLinesThatFail(t *testing.T) {
	full := &fullDisk{}
	l, reported := &logWriter{w: full}, make(chan int, 1)
	l.detach(func(lost int) { reported <- lost })
	for range 10 {
		fmt.Fprint(l, "lost\n")
	}
	waitFor(t, "the lines have failed", func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.lost == 10
	})
	full.free.Store(true)
	fmt.Fprint(l, "kept\n")
	if lost := <-reported; lost != 10 {
		t.Errorf("%d lines are lost, want 10", lost)
	}
	l.close()
	if got := full.String(); got != "kept\n" {
		t.Errorf("wrote %q", got)
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
