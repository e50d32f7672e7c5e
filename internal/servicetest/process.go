package servicetest

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Process is a server in a process of its own.
type Process struct {
	URL    string // "" if it has ended without listening
	Cmd    *exec.Cmd
	Stdout *LockedBuffer
	Stderr *LockedBuffer
	Ended  chan error // gets the error that Wait returns
}

// Command returns a command that runs a program in a directory of its own, behind a wrapper
// such as strace.
func Command(t testing.TB, wrapper []string, program string, args ...string) *exec.Cmd {
	t.Helper()
	line := append(append(wrapper[:len(wrapper):len(wrapper)], program), args...)
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Dir = t.TempDir()
	cmd.Env = os.Environ()
	if os.Getenv("TMPDIR") == "" { // a killed --demo leaves its directory there
		cmd.Env = append(cmd.Env, "TMPDIR="+t.TempDir())
	}
	return cmd
}

var listeningLine = regexp.MustCompile(`"msg":"listening","addr":"([^"]+)","scheme":"([^"]+)"`)

// Launch starts a server and waits until it listens or has exited. The requests to it are
// compared with openapi.json. The cleanup of the test kills the server and its wrapper if they
// still run.
func Launch(t testing.TB, cmd *exec.Cmd) *Process {
	t.Helper()
	p := &Process{Cmd: cmd, Stdout: &LockedBuffer{}, Stderr: &LockedBuffer{}, Ended: make(chan error, 1)}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // so that a wrapper's child is killed too
	cmd.Stdout = p.Stdout
	pipe, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("%v: %v", cmd.Args, err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		Known.WantNone(t, "the log", p.Stderr.String())
		Known.WantNoneIn(t, DatabaseOf(cmd.Args))
		if log := p.Stderr.String(); strings.Contains(log, "WARNING: DATA RACE") {
			t.Errorf("the race detector says\n%s", log)
		}
	})
	listening := make(chan string, 1)
	go func() {
		lines := bufio.NewScanner(pipe)
		lines.Buffer(nil, 1<<20) // the stack of a panic is one line
		for lines.Scan() {
			fmt.Fprintln(p.Stderr, lines.Text())
			if m := listeningLine.FindStringSubmatch(lines.Text()); m != nil {
				listening <- m[2] + "://" + m[1]
			}
		}
		close(listening)
		p.Ended <- cmd.Wait()
	}()
	select {
	case p.URL = <-listening:
		if p.URL != "" {
			Described().Serves(t, p.URL)
		}
	case <-time.After(30 * time.Second):
		t.Fatalf("%v neither listens nor ends\n%s", cmd.Args, p.Stderr)
	}
	return p
}

// Start is like Launch, for a server that must listen.
func Start(t testing.TB, cmd *exec.Cmd) *Process {
	t.Helper()
	p := Launch(t, cmd)
	if p.URL == "" {
		t.Fatalf("%v ended at once: %v\n%s", cmd.Args, <-p.Ended, p.Stderr)
	}
	return p
}

// Terminate sends SIGTERM and returns the error with which the process exited.
func (p *Process) Terminate(t testing.TB) error {
	t.Helper()
	if err := p.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-p.Ended:
		return err
	case <-time.After(30 * time.Second):
		t.Fatalf("still running 30 s after SIGTERM\n%s", p.Stderr)
		return nil
	}
}

// Kill kills the process and its wrapper, as a crash does.
func (p *Process) Kill(t testing.TB) {
	t.Helper()
	if err := syscall.Kill(-p.Cmd.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Ended
}

// LockedBuffer is a bytes.Buffer that may be read while it is written.
type LockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write appends to the buffer.
func (b *LockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

// String returns everything that was written so far.
func (b *LockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
