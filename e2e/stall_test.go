//go:build linux

package e2e

// A disk that hangs: strace delays system calls of the running process until it is detached.
// Reads go on, a write is answered or broken off within its limit, and /readyz says 503.

import (
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

const (
	// hung is a delay that no test waits for.
	hung = ":delay_enter=1000s"
	// readyLimit is the time in which /readyz must answer, and writeLimit the time in which a
	// write must be answered or broken off, each with a second for a machine under load.
	readyLimit = 5*time.Second + time.Second
	writeLimit = 30*time.Second + time.Second
)

// wantHung fails the test unless /readyz says 503 in time, again and again, and reads go on.
func (l *ledger) wantHung(t testing.TB) {
	t.Helper()
	prompt := &http.Client{Timeout: readyLimit}
	waitUntil(t, readyLimit, "the server is not ready", func() error { // at once, unless it has just told so
		if resp, _ := do(t, prompt, "GET", l.base+"/readyz", nil, ""); resp.StatusCode != http.StatusServiceUnavailable {
			return errors.New(resp.Status)
		}
		return nil
	})
	for range 3 {
		began := time.Now()
		resp, body := do(t, prompt, "GET", l.base+"/readyz", nil, "")
		wantUnavailable(t, resp, body)
		if took := time.Since(began); took > readyLimit {
			t.Errorf("/readyz took %v", took)
		}
		l.wantPromptReads(t)
	}
}

// wantPromptReads fails the test unless reads of all contracts are right, and prompt.
func (l *ledger) wantPromptReads(t testing.TB) {
	t.Helper()
	began := time.Now()
	l.check(t)
	l.list(t)
	if took := time.Since(began); took > 2*time.Second {
		t.Errorf("reads took %v while the disk hangs", took)
	}
}

// wantRefused fails the test unless a write is answered with 503 within its limit.
func (l *ledger) wantRefused(t testing.TB) {
	t.Helper()
	began := time.Now()
	if status := l.put(t, demoContract, 1); status != http.StatusServiceUnavailable || time.Since(began) > writeLimit {
		t.Errorf("PUT: %d after %v", status, time.Since(began))
	}
}

func TestDiskThatHangs(t *testing.T) {
	long(t)
	needTool(t, "strace")
	t.Parallel()
	v := besiege(t)
	l := v.l
	l.growFile(t)

	t.Log("an idle server")
	tracer := attach(t, v.p, "fdatasync,fsync"+hung)
	l.wantHung(t)
	l.wantRefused(t)
	v.scrape(t)
	tracer.detach()
	l.wantWorking(t)

	t.Log("a write, and many large ones behind it")
	tracer = attach(t, v.p, "fdatasync,fsync"+hung)
	doc := l.document(1)
	marker := l.marker()
	first := make(chan answered, 1)
	var took time.Duration
	began := time.Now()
	go func() {
		a := l.send("PUT", demoContract, doc)
		took = time.Since(began)
		first <- a
	}()
	waitUntil(t, answerTimeout, "the commit hangs", func() error {
		if value(t, v.scrape(t), "energy_contracts_write_queue_length") != 0 {
			return errors.New("the write waits")
		}
		if tr, err := os.ReadFile(tracer.out); err != nil || !strings.Contains(string(tr), "pwrite64") {
			return fmt.Errorf("it has not written: %v", err)
		}
		return nil
	})
	const waves, each = 4, 12
	large := year(70_000)
	for range waves {
		var all sync.WaitGroup
		for i := range each {
			all.Go(func() {
				began := time.Now()
				a := l.send("PUT", key(i).Contract, large, "If-None-Match", "*")
				if a.status != http.StatusServiceUnavailable || time.Since(began) > writeLimit {
					t.Errorf("a PUT of %d bytes: %v after %v", len(large), a, time.Since(began))
				}
			})
		}
		all.Wait()
	}
	v.wantLittleLive(t, waves*each*len(large)/2, large)
	if a := <-first; a.err == nil || took > writeLimit {
		t.Errorf("the PUT whose commit hangs: %v after %v, want a connection that is broken off", a, took)
	}
	l.want[demoContract] = l.send("GET", demoContract, "").body // the old or the new document
	l.wantHung(t)
	tracer.detach()
	l.wantWorking(t)
	if got := l.send("GET", demoContract, ""); !strings.Contains(got.body, marker) {
		t.Errorf("the PUT whose commit hung is not there when the disk works: %v", got)
	}
	l.want[demoContract] = l.send("GET", demoContract, "").body
	l.ids = append(l.ids, key(0).Contract) // which must not be there
	l.check(t)

	t.Log("a stop")
	tracer = attach(t, v.p, "fdatasync,fsync"+hung)
	l.wantHung(t)
	if err := v.p.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, 15*time.Second, "the server has given up", func() error {
		if !strings.Contains(v.p.Stderr.String(), "the disk does not answer, so the last commit was not waited for") {
			return errors.New("not yet")
		}
		return nil
	})
	tracer.detach() // a thread at a system call keeps the process
	select {
	case err := <-v.p.Ended:
		if err != nil {
			t.Errorf("after SIGTERM: %v\n%s", err, v.p.Stderr)
		}
	case <-time.After(answerTimeout):
		t.Errorf("the process has not ended\n%s", v.p.Stderr)
	}
}

// wantLittleLive fails the test unless the memory in use, without garbage, is less than most, in
// bytes. It sends a large document with a fault until the garbage is collected.
func (v *besieged) wantLittleLive(t testing.TB, most int, large string) {
	t.Helper()
	const percent = 200 // of the garbage collector, see docs/operating.md
	live := func() int { return int(value(t, v.scrape(t), "go_memstats_next_gc_bytes")) / (1 + percent/100) }
	collections := func() float64 { return value(t, v.scrape(t), "go_gc_duration_seconds_count") }
	begun := collections()
	waitUntil(t, answerTimeout, "the garbage is collected", func() error {
		if a := v.l.send("PUT", demoContract, large[1:]); a.status != http.StatusBadRequest {
			t.Fatalf("PUT of what is no JSON: %v", a)
		}
		if n := collections() - begun; n < 3 {
			return fmt.Errorf("%v collections", n)
		}
		return nil
	})
	t.Logf("%d bytes are in use", live())
	if n := live(); n > most {
		t.Errorf("%d bytes are in use, more than %d", n, most)
	}
}

// wantWorking waits until the server is ready, and then fails the test unless a write succeeds.
func (l *ledger) wantWorking(t testing.TB) {
	t.Helper()
	waitUntil(t, answerTimeout, "the server is ready again", func() error {
		if resp, body := do(t, l.client, "GET", l.base+"/readyz", nil, ""); resp.StatusCode != http.StatusOK {
			return fmt.Errorf("GET /readyz: %s\n%s", resp.Status, body)
		}
		return nil
	})
	if status := l.create(t, fmt.Sprintf("00000000-0000-4000-8000-%012d", l.written), 1); status != http.StatusCreated {
		t.Errorf("PUT when the disk works again: %d", status)
	}
}

// The sync of a reopening hangs, too, after a commit that failed.
func TestDiskThatHangsAfterItFailed(t *testing.T) {
	long(t)
	needTool(t, "strace")
	t.Parallel()
	db := filepath.Join(t.TempDir(), "test.db")
	p := startProcess(t, nil, "--demo", "--db", db)
	l := newLedger(t, p.URL, demoContract, demoOtherContract)
	l.growFile(t)
	tracer := attach(t, p, "fdatasync:error=EIO", "fsync"+hung)
	l.wantRefused(t)
	l.wantHung(t)
	tracer.detach()
	l.wantWorking(t)
	l.check(t)
	l.checkAfterRestart(t, p, db)
}

// The look at a large file after the start takes as long as the disk reads it. A commit that
// fails meanwhile must not wait for the end of it, nor must any read or write.
func TestFailedCommitWhileALargeFileIsLookedAt(t *testing.T) {
	long(t)
	needTool(t, "strace")
	t.Parallel()
	db := filepath.Join(t.TempDir(), "test.db")
	first := startProcess(t, nil, "--demo", "--db", db)
	l := newLedger(t, first.URL, demoContract)
	ok(t, db, "import", servicetest.ManyLines(t, 60_000, 700)) // more than is checked before the start
	if err := first.Terminate(t); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "trace")
	// Each read of a branch page takes a while, and there are hundreds. The first syncs of each
	// thread fail.
	p := startProcess(t, straceOf("pread64,fdatasync", []string{"-y", "-s", "0"}, out, "pread64:delay_enter=50ms", "fdatasync:error=EIO:when=1"), "--db", db)
	l.base = p.URL
	l.ids = nil // the list is long
	reads := func() int { return strings.Count(readFile(t, out), "pread64(") }
	refused, made := 0, 0
	waitUntil(t, answerTimeout, "a commit has failed, and another was made", func() error {
		if status := l.put(t, demoContract, 1); status == http.StatusOK {
			made++
		} else {
			refused++
		}
		began := time.Now()
		if a := l.send("GET", demoContract, ""); a.err != nil || a.status != http.StatusOK || a.body != l.want[demoContract] {
			t.Fatalf("GET: %v", a)
		}
		if took := time.Since(began); took > 3*time.Second {
			t.Fatalf("a read took %v", took)
		}
		if refused == 0 || made == 0 {
			return fmt.Errorf("%d were refused, %d made", refused, made)
		}
		return nil
	})
	before := reads()
	waitUntil(t, answerTimeout, "the look goes on", func() error {
		if n := reads(); n < before+100 {
			return fmt.Errorf("%d reads, then %d", before, n)
		}
		return nil
	})
}

// A file that is replaced while a write is in doubt has nothing to do with the write.
func TestWriteInDoubtWhoseFileIsReplaced(t *testing.T) {
	long(t)
	needTool(t, "strace")
	t.Parallel()
	other := filepath.Join(t.TempDir(), "other.db")
	addClient(t, other)
	for range 30 {
		ok(t, other, "client", "add", "--org", demoOtherOrg) // so that it has more transactions
	}
	content := readFile(t, other)
	u := leaveInDoubt(t)
	moved := u.db + ".moved"
	if err := errors.Join(os.Rename(u.db, moved), os.Rename(other, u.db)); err != nil {
		t.Fatal(err)
	}
	u.tracer.detach()
	select {
	case a := <-u.response:
		if a.err == nil {
			t.Errorf("a write in doubt whose file is elsewhere was answered: %v", a)
		}
	case <-time.After(writeLimit):
		t.Error("a write in doubt was not broken off")
	}
	if status := u.l.put(t, demoOtherContract, 1); status != http.StatusServiceUnavailable {
		t.Errorf("PUT: %d", status)
	}
	u.checkEither(t)
	if readFile(t, u.db) != content {
		t.Error("the file that replaced the database has changed")
	}
	if err := os.Rename(moved, u.db); err != nil {
		t.Fatal(err)
	}
	u.l.wantWorking(t)
	u.checkEither(t)
	u.l.want[demoContract] = u.l.send("GET", demoContract, "").body
	u.l.checkAfterRestart(t, u.p, u.db)
}
