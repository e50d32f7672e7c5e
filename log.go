package main

// How log lines get to standard error without holding up the service.

import (
	"bytes"
	"io"
	"sync"
	"time"
)

const (
	// logBuffer is the number of bytes that may wait to be written, about 4,000 lines.
	logBuffer = 1 << 20
	// logFlush is how long the end of the process waits for the last lines.
	logFlush = 5 * time.Second
)

// logWriter writes lines to w. After detach it is for a server: Write never waits for w, and a
// line that cannot be written is lost.
type logWriter struct {
	w    io.Writer
	wake chan struct{} // has an element if there is work for deliver; nil before detach
	done chan struct{} // closed when deliver has ended

	mu      sync.Mutex
	lines   []byte // that wait to be written
	lost    int    // lines that were lost and not reported yet
	closing bool
}

// detach makes Write return before the line is written. After lines were lost, report is called
// with their number as soon as lines can be written again; it may write a line about them.
func (l *logWriter) detach(report func(lost int)) {
	l.wake, l.done = make(chan struct{}, 1), make(chan struct{})
	go l.deliver(report)
}

// Write writes a line, or makes it wait to be written.
func (l *logWriter) Write(line []byte) (int, error) {
	if l.wake == nil {
		return l.w.Write(line)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.lines) > 0 && len(l.lines)+len(line) > logBuffer {
		l.lost++
		return len(line), nil
	}
	l.lines = append(l.lines, line...)
	l.wakeUp()
	return len(line), nil
}

// wakeUp makes deliver look for work.
func (l *logWriter) wakeUp() {
	select {
	case l.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// deliver writes the lines until close.
func (l *logWriter) deliver(report func(lost int)) {
	defer close(l.done)
	var (
		out  []byte
		torn bool // the last line was written without its end
		lost int  // lines to report
	)
	for range l.wake {
		for {
			l.mu.Lock()
			out, l.lines = l.lines, out[:0]
			closing := l.closing
			l.mu.Unlock()
			switch {
			case lost > 0: // now there is room for one more line
				report(lost)
				lost = 0
			case len(out) == 0 && closing:
				return
			}
			if len(out) == 0 {
				break
			}
			if torn {
				_, err := io.WriteString(l.w, "\n")
				torn = err != nil
			}
			n, err := l.w.Write(out)
			l.mu.Lock()
			if err != nil {
				torn = torn || n > 0 && out[n-1] != '\n'
				l.lost += bytes.Count(out[n:], []byte("\n"))
			} else {
				lost, l.lost = l.lost, 0
			}
			l.mu.Unlock()
		}
	}
}

// close waits until all lines are written, for at most logFlush.
func (l *logWriter) close() {
	if l.wake == nil {
		return
	}
	l.mu.Lock()
	l.closing = true
	l.mu.Unlock()
	l.wakeUp()
	select {
	case <-l.done:
	case <-time.After(logFlush):
	}
}
