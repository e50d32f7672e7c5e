//go:build linux

package e2e

// strace makes system calls of a process fail, to simulate disk faults, and traces them.

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// straceCommand returns a strace command line that injects faults and writes its trace to the
// file out. It traces the store's writes to its file; nothing else in the process makes these
// calls.
func straceCommand(out string, faults ...string) []string {
	return straceOf("pwrite64,fdatasync,fsync,ftruncate", []string{"-s", "0"}, out, faults...)
}

// straceOf is straceCommand for other system calls, with options that control their format.
func straceOf(calls string, options []string, out string, faults ...string) []string {
	args := append([]string{"strace", "-f", "-e", "signal=none", "-e", "trace=" + calls, "-o", out}, options...)
	for _, f := range faults {
		args = append(args, "-e", "inject="+f)
	}
	return args
}

// tracer is a strace that is attached to a process.
type tracer struct {
	out    string // path of the trace
	detach func() // ends the faults
}

var attachedLine = regexp.MustCompile(`(?m)^strace: Process \d+ attached`)

// attach makes system calls of a running process fail until detach is called.
func attach(t testing.TB, p *process, faults ...string) *tracer {
	t.Helper()
	return attachAs(t, p, straceCommand, faults...)
}

// attachAs is attach with another command line for strace.
func attachAs(t testing.TB, p *process, command func(out string, faults ...string) []string, faults ...string) *tracer {
	t.Helper()
	tr := &tracer{out: filepath.Join(t.TempDir(), "trace")}
	line := append(command(tr.out, faults...), "-p", strconv.Itoa(p.Cmd.Process.Pid))
	cmd := exec.Command(line[0], line[1:]...)
	stderr := &lockedBuffer{}
	cmd.Stderr = stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	tr.detach = sync.OnceFunc(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		select {
		case <-ended:
		case <-time.After(10 * time.Second): // it waits for the end of a process that waits for the end of its delay
			_ = cmd.Process.Kill()
			<-ended
		}
	})
	t.Cleanup(tr.detach)
	waitUntil(t, answerTimeout, "strace is attached", func() error {
		if strings.Contains(stderr.String(), "Operation not permitted") {
			if os.Getenv("CI") == "true" {
				t.Fatalf("in CI strace must be allowed to attach to a process:\n%s", stderr)
			}
			t.Skipf("strace may not attach to a process here; run the tests as root, or set the sysctl kernel.yama.ptrace_scope to 0:\n%s", stderr)
		}
		if !attachedLine.MatchString(stderr.String()) {
			return fmt.Errorf("%q", stderr)
		}
		return nil
	})
	return tr
}

// trace returns the calls so far.
func (tr *tracer) trace(t testing.TB) trace {
	t.Helper()
	return readTrace(t, tr.out)
}

// call is one system call of a trace.
type call struct {
	name     string
	file     string // path of the descriptor, if strace has the option -y
	data     string // content of a write, up to the limit of strace's -s
	size     int64  // bytes of a write, or the new size of the file for a ftruncate
	offset   int64  // of a pwrite64
	failed   bool
	injected bool
	began    int // number of calls in the trace that had ended when this one began
}

// meta reports whether the call writes one of the two meta pages.
func (c call) meta() bool {
	page := int64(os.Getpagesize())
	return c.name == "pwrite64" && c.size == page && (c.offset == 0 || c.offset == page)
}

// trace is a list of system calls in the order in which they ended. Commits make them one after
// another, whatever thread they run on.
type trace []call

// callLine matches a call whose string argument was cut out.
var callLine = regexp.MustCompile(`^(\w+)\((.*)\)\s+= (-?\d+)(.*)$`)

// readTrace parses the output of strace.
func readTrace(t testing.TB, path string) (tr trace) {
	t.Helper()
	type start struct {
		text  string
		began int
	}
	started := map[string]start{} // by thread, a call that has not ended
	for line := range strings.Lines(readFile(t, path)) {
		thread, text, _ := strings.Cut(strings.TrimSpace(line), " ")
		text = strings.TrimSpace(text)
		s := start{text, len(tr)}
		if begin, ok := strings.CutSuffix(text, "<unfinished ...>"); ok {
			s.text = strings.TrimSpace(begin)
			started[thread] = s
			continue
		}
		if _, end, ok := strings.Cut(text, " resumed>"); ok {
			s = started[thread]
			s.text += end
		}
		c, err := parseCall(s.text)
		if err != nil {
			t.Fatalf("%s: %s: %v", path, head(s.text), err)
		}
		if c.began = s.began; c.name != "" {
			tr = append(tr, c)
		}
	}
	return tr
}

// parseCall parses a complete call. For any other line, such as the end of a thread or a line
// that strace has not finished, it returns a call without a name.
func parseCall(text string) (c call, err error) {
	before, rest, _ := strings.Cut(text, `"`)
	data, after, _ := strings.Cut(rest, `"`)
	m := callLine.FindStringSubmatch(before + after)
	if m == nil {
		return c, nil
	}
	c = call{name: m[1], failed: m[3] == "-1", injected: strings.Contains(m[4], "(INJECTED)")}
	args := strings.Split(m[2], ", ")
	_, file, _ := strings.Cut(args[0], "<")
	var errs [4]error
	c.file, errs[0] = unescaped(strings.TrimSuffix(file, ">"))
	c.data, errs[1] = unescaped(data)
	switch last := len(args) - 1; c.name {
	case "pwrite64":
		c.size, errs[2] = strconv.ParseInt(args[last-1], 10, 64)
		c.offset, errs[3] = strconv.ParseInt(args[last], 10, 64)
	case "ftruncate":
		c.size, errs[2] = strconv.ParseInt(args[last], 10, 64)
	}
	return c, errors.Join(errs[:]...)
}

// unescaped returns the string that strace's -xx prints as hexadecimal escapes.
func unescaped(text string) (string, error) {
	if !strings.HasPrefix(text, `\x`) {
		return text, nil
	}
	b, err := hex.DecodeString(strings.ReplaceAll(text, `\x`, ""))
	return string(b), err
}

// count returns the number of calls for which match is true.
func (tr trace) count(match func(call) bool) (n int) {
	for _, c := range tr {
		if match(c) {
			n++
		}
	}
	return n
}

// injected returns the number of faults.
func (tr trace) injected() int { return tr.count(func(c call) bool { return c.injected }) }

// secondSyncs returns the number of commits whose second sync failed, the one right after the
// meta page. Reopening writes meta pages too, but syncs them with fsync.
func (tr trace) secondSyncs() (n int) {
	for i, c := range tr {
		if i > 0 && c.injected && c.name == "fdatasync" && tr[i-1].meta() && !tr[i-1].failed {
			n++
		}
	}
	return n
}

// checkReopening fails the test if, after a fault, anything else was written to the file before
// both meta pages were written and synced again.
func (tr trace) checkReopening(t testing.TB) {
	t.Helper()
	var metas []int64 // written since the fault
	broken := false
	for i, c := range tr {
		switch {
		case c.failed:
			broken, metas = true, nil
		case !broken:
		case c.meta():
			if !slices.Contains(metas, c.offset) {
				metas = append(metas, c.offset)
			}
		case c.name == "fsync" && len(metas) == 2:
			broken = false
		default:
			t.Fatalf("after a fault, %+v came before the meta pages were written and synced again:\n%+v", c, tr[max(0, i-10):i+1])
		}
	}
}
