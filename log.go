package main

// The way of log lines to standard error, whose reader must not hold up the service.

import (
	"bytes"
	"io"
	"sync"
	"time"
)

const (
	// logBuffer is the number of bytes that may wait to be written, about 300 lines.
	logBuffer = 64 << 10
	// logPatience is how long a line waits for its place among them. A slow reader then loses
	// nothing, and one that hangs delays the service only once.
	logPatience = time.Second
	// logFlush is how long the end of the process waits for the last lines.
	logFlush = 5 * time.Second
)

// logWriter writes lines to w. After detach it is for a server: a line that cannot be written is
// lost, and nobody waits for it.
type logWriter struct {
	w       io.Writer
	wake    chan struct{} // has an element if there is work for deliver; nil before detach
	taken   chan struct{} // has an element if deliver took the lines
	written chan struct{} // closed when deliver has ended

	mu      sync.Mutex
	lines   []byte // that wait to be written
	hung    bool   // lines waited for logPatience since w last returned
	lost    int    // lines, since a line was last written
	closing bool
}

// detach makes Write return before the line is written. After lines were lost, report is called
// with their number as soon as lines can be written again.
func (l *logWriter) detach(report func(lost int)) {
	l.wake, l.taken, l.written = make(chan struct{}, 1), make(chan struct{}, 1), make(chan struct{})
	go l.deliver(report)
}

// Write writes a line, or makes it wait to be written.
func (l *logWriter) Write(line []byte) (int, error) {
	if l.wake == nil {
		return l.w.Write(line)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	full := func() bool { return len(l.lines) > 0 && len(l.lines)+len(line) > logBuffer }
	for full() && !l.hung {
		l.mu.Unlock()
		hung := false
		select {
		case <-l.taken:
		case <-time.After(logPatience):
			hung = true
		}
		l.mu.Lock()
		l.hung = hung
	}
	if full() {
		l.lost++
		return len(line), nil
	}
	l.lines = append(l.lines, line...)
	raise(l.wake)
	return len(line), nil
}

// raise puts an element into a channel that has room for one, unless it is there already.
func raise(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// deliver writes the lines until close.
func (l *logWriter) deliver(report func(lost int)) {
	defer close(l.written)
	var out []byte
	for range l.wake {
		l.mu.Lock()
		out, l.lines = l.lines, out[:0]
		closing := l.closing
		l.mu.Unlock()
		raise(l.taken)
		if len(out) > 0 {
			n, err := l.w.Write(out)
			l.mu.Lock()
			l.hung = false
			if err != nil {
				l.lost += bytes.Count(out[n:], []byte("\n"))
			} else if l.lost > 0 {
				go report(l.lost) // which writes a line
				l.lost = 0
			}
			l.mu.Unlock()
		}
		if closing {
			return
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
	raise(l.wake)
	select {
	case <-l.written:
	case <-time.After(logFlush):
	}
}
