package main

// How far a long command is, for a person at a terminal.

import (
	"os"
	"time"

	"github.com/schollz/progressbar/v3"
)

// progress is a bar on stderr, and nothing where that is no terminal.
type progress struct{ bar *progressbar.ProgressBar }

// progress begins a bar of so many of a unit; of bytes if unit is "". A total below 1
// is unknown.
func (a *app) progress(what string, total int64, unit string) progress {
	if total < 1 {
		total = -1
	}
	return progress{progressbar.NewOptions64(total,
		progressbar.OptionSetDescription(what),
		progressbar.OptionSetWriter(os.Stderr),
		progressbar.OptionSetVisibility(a.terminal),
		progressbar.OptionShowBytes(unit == ""),
		progressbar.OptionShowCount(),
		progressbar.OptionShowIts(),
		progressbar.OptionSetItsString(unit),
		progressbar.OptionThrottle(100*time.Millisecond),
		progressbar.OptionSetWidth(20),
		progressbar.OptionClearOnFinish(),
	)}
}

// add goes on by n. A bar that cannot be shown is no reason to stop.
func (p progress) add(n int64) { _ = p.bar.Add64(n) }

// Write counts what is written, for io.MultiWriter and the like.
func (p progress) Write(b []byte) (int, error) {
	p.add(int64(len(b)))
	return len(b), nil
}

// done takes the bar away.
func (p progress) done() { _ = p.bar.Finish() }

// interrupt takes the bar away until it goes on, so that a line can be printed.
func (p progress) interrupt() { _ = p.bar.Clear() }
