//go:build linux

package e2e

// The store when the disk fails, over HTTP: strace makes system calls of the
// running process fail, and a small file system runs full. What is asserted are
// the promises to a client: never refused and there, never answered and gone,
// reads go on, and no restart is needed.
//
// What the kernel drops in a power cut is beyond strace. In its place the order
// of the system calls is checked: after a fault nothing is written before both
// meta pages are synced again.

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

// faultKind is one way in which the disk fails, tried at several positions.
// strace counts a system call for each thread on its own, and the committer may
// move between threads, so a position means no fixed place in a commit. The
// traces tell what was hit.
type faultKind struct {
	name   string
	faults []string // as strace's inject= takes them, with %s for the position
	at     []string // as strace's when= takes it
	grow   bool     // large documents, so that the file must grow
}

var faultKinds = []faultKind{
	{"sync of a commit with EIO", []string{"fdatasync:error=EIO:when=%s"}, positions("1", "2", "3", "4", "1..2", "1..10", "2+2", "2+3"), false},
	{"sync of a commit with ENOSPC", []string{"fdatasync:error=ENOSPC:when=%s"}, positions("1", "2", "1..10"), false},
	{"write with EIO", []string{"pwrite64:error=EIO:when=%s"}, positions("1", "2", "3", "4", "5", "6", "1..10", "2+7"), false},
	{"write with ENOSPC", []string{"pwrite64:error=ENOSPC:when=%s"}, positions("1", "2", "3", "4", "5", "6", "1..10", "3+7"), false},
	{"sync of a growing file with EIO", []string{"fsync:error=EIO:when=%s"}, positions("1", "1..2"), true},
	{"growth with EIO", []string{"ftruncate:error=EIO:when=%s"}, positions("1", "1..10"), true},
	{"growth with ENOSPC", []string{"ftruncate:error=ENOSPC:when=%s"}, positions("1"), true},
	{"sync of a commit and of the remedy with EIO", []string{"fdatasync:error=EIO:when=%s", "fsync:error=EIO:when=1"}, positions("1", "2", "4"), false},
}

// positions are those that are tried; the long form tries each of several commits too.
func positions(at ...string) []string {
	for n := range servicetest.Amount(0, 30) {
		if one := strconv.Itoa(n + 1); !slices.Contains(at, one) {
			at = append(at, one)
		}
	}
	return at
}

func TestFaultInACommitIsAnsweredByWhatStands(t *testing.T) {
	long(t)
	needTool(t, "strace")
	t.Parallel()
	var secondSyncs atomic.Int64
	t.Run("fault", func(t *testing.T) {
		for _, kind := range faultKinds {
			t.Run(kind.name, func(t *testing.T) {
				t.Parallel()
				var injected atomic.Int64
				t.Run("at", func(t *testing.T) {
					for _, at := range kind.at {
						t.Run(at, func(t *testing.T) {
							t.Parallel()
							tr := faultyCommits(t, kind, at)
							injected.Add(int64(tr.injected()))
							secondSyncs.Add(int64(tr.secondSyncs()))
						})
					}
				})
				if injected.Load() == 0 {
					t.Errorf("strace injected no fault at any of the positions %q", kind.at)
				}
			})
		}
	})
	if secondSyncs.Load() == 0 {
		t.Error("no fault hit the sync after a commit's meta page, the one that leaves a refused change visible")
	}
}

// faultyCommits writes while system calls fail, then without faults, and then
// looks again after a restart. It returns what the faulty process did.
func faultyCommits(t *testing.T, kind faultKind, at string) trace {
	faults := make([]string, len(kind.faults))
	for i, f := range kind.faults {
		faults[i] = f
		if strings.Contains(f, "%s") {
			faults[i] = fmt.Sprintf(f, at)
		}
	}
	db := filepath.Join(t.TempDir(), "test.db")
	p := startProcess(t, nil, "--demo", "--db", db)
	l := newLedger(t, p.URL, demoContract, demoOtherContract)
	prices := largeContract
	if !kind.grow {
		prices = 1
		l.growFile(t)
	}
	tracer := attach(t, p, faults...)
	const writes = 10
	for i := range writes {
		l.put(t, l.ids[i%len(l.ids)], prices)
		l.check(t)
	}
	tracer.detach()
	waitUntil(t, 3*time.Second, "the store can write again", func() error {
		if status := l.put(t, demoContract, prices); status != http.StatusOK {
			return fmt.Errorf("PUT is answered %d", status)
		}
		return nil
	})
	l.check(t)
	l.checkAfterRestart(t, p, db)
	tr := tracer.trace(t)
	tr.checkRemedy(t)
	return tr
}

func TestDiskThatGoesOnFailing(t *testing.T) {
	long(t)
	needTool(t, "strace")
	t.Parallel()
	db := filepath.Join(t.TempDir(), "test.db")
	p := startProcess(t, nil, "--demo", "--db", db)
	l := newLedger(t, p.URL, demoContract, demoOtherContract)
	l.growFile(t)
	list := l.list(t)
	prompt := &http.Client{Timeout: 2 * time.Second}
	const newContract = "00000000-0000-4000-8000-000000000001"
	writes := []struct {
		name, method, url string
		header            http.Header
		body              string
	}{
		{"replace", "PUT", l.url(demoContract), jsonBody, l.document(1)},
		{"make under an id", "PUT", l.url(newContract), http.Header{"Content-Type": {"application/json"}, "If-None-Match": {"*"}}, l.document(1)},
		{"make", "POST", l.collection(), jsonBody, l.document(1)},
		{"patch", "PATCH", l.url(demoContract), http.Header{"Content-Type": {mergePatchType}}, `{"supplier":"patched"}`},
		{"delete", "DELETE", l.url(demoOtherContract), nil, ""},
	}

	tracer := attach(t, p, "fdatasync,fsync:error=EIO")
	stopReading := make(chan struct{})
	reads := make(chan error, 1)
	go func() { reads <- readAll(l, stopReading) }()
	// Long enough that the store tries to mend itself, in vain, more than once.
	waitUntil(t, answerTimeout, "three syncs of the remedy failed", func() error {
		for _, w := range writes {
			resp, body := do(t, prompt, w.method, w.url, l.with(w.header), w.body)
			if resp.StatusCode != http.StatusServiceUnavailable {
				t.Fatalf("%s: %s %s on a failing disk: %s\n%s", w.name, w.method, w.url, resp.Status, head(body))
			}
			wantUnavailable(t, resp, body)
		}
		resp, body := do(t, prompt, "POST", l.base+"/oauth2/token/", http.Header{"Content-Type": {"application/x-www-form-urlencoded"}},
			"grant_type=client_credentials&client_id=demo&client_secret=demo-secret")
		if resp.StatusCode != http.StatusServiceUnavailable || resp.Header.Get("Retry-After") != retryAfter {
			t.Fatalf("POST /oauth2/token/ on a failing disk: %s, Retry-After %q\n%s", resp.Status, resp.Header.Get("Retry-After"), body)
		}
		resp, body = do(t, prompt, "GET", l.base+"/readyz", nil, "")
		wantUnavailable(t, resp, body)
		if resp, body := do(t, prompt, "GET", l.base+"/healthz", nil, ""); resp.StatusCode != http.StatusOK {
			t.Fatalf("GET /healthz on a failing disk: %s\n%s", resp.Status, body)
		}
		if now := l.list(t); now != list {
			t.Fatalf("the list on a failing disk changed from\n%s\nto\n%s", list, now)
		}
		if n := tracer.trace(t).count(func(c call) bool { return c.injected && c.name == "fsync" }); n < 3 {
			return fmt.Errorf("%d failed", n)
		}
		return nil
	})
	close(stopReading)
	if err := <-reads; err != nil {
		t.Errorf("a reader on a failing disk: %v", err)
	}

	tracer.detach()
	waitUntil(t, 3*time.Second, "the store is ready again", func() error {
		if resp, body := do(t, prompt, "GET", l.base+"/readyz", nil, ""); resp.StatusCode != http.StatusOK {
			return fmt.Errorf("GET /readyz: %s\n%s", resp.Status, body)
		}
		return nil
	})
	if now := l.list(t); now != list {
		t.Errorf("refused, and there when the disk works again: the list was\n%s\nand is\n%s", list, now)
	}
	if status := l.put(t, demoContract, 1); status != http.StatusOK {
		t.Errorf("PUT to a store that is ready: %d", status)
	}
	l.check(t)
	l.checkAfterRestart(t, p, db)
	tracer.trace(t).checkRemedy(t)
}

// readAll gets the contracts of a ledger again and again until stop.
func readAll(l *ledger, stop <-chan struct{}) error {
	want := maps.Clone(l.want)
	for {
		for id, doc := range want {
			if a := l.send("GET", id, ""); a.err != nil || a.status != http.StatusOK || a.body != doc {
				return fmt.Errorf("GET %s: %v\nwant\n%s", l.url(id), a, head(doc))
			}
		}
		select {
		case <-stop:
			return nil
		default:
		}
	}
}

// Also when /readyz has just found that all is well.
func TestReadyzFailsAfterACommitThatFailed(t *testing.T) {
	long(t)
	needTool(t, "strace")
	p := startProcess(t, straceCommand(filepath.Join(t.TempDir(), "trace"), "fdatasync:error=EIO:when=30+"), "--demo", "--db", shortPath(t))
	c := client(p.URL, "demo", "demo-secret")
	for range 5000 { // strace counts the calls of each thread apart
		_, _ = do(t, http.DefaultClient, "GET", p.URL+"/readyz", nil, "") // whose answer holds for a while
		put, _ := do(t, c, "PUT", contractsURL(p.URL, demoOrg, demoUser)+"/"+demoContract, jsonBody, "{}")
		if put.StatusCode == http.StatusOK { // also when a sync failed and the write stands
			continue
		}
		resp, body := do(t, http.DefaultClient, "GET", p.URL+"/readyz", nil, "")
		wantUnavailable(t, resp, body)
		return
	}
	t.Error("no commit failed")
}

// An import is told to be made, or nothing of it to be: and so it is, also after a restart.
func TestFaultInAnImportIsAnsweredByWhatStands(t *testing.T) {
	long(t)
	t.Parallel()
	needTool(t, "strace")
	file := manyLines(t, 6000, 300)
	want := readFile(t, file)
	var made, refused int
	for _, kind := range []string{"fdatasync:error=EIO", "pwrite64:error=ENOSPC"} {
		for at := 8; at <= 32; at += 4 { // later than the file is made
			t.Run(fmt.Sprintf("%s at %d", kind, at), func(t *testing.T) {
				db := shortPath(t)
				p := startProcess(t, straceCommand(filepath.Join(t.TempDir(), "trace"), fmt.Sprintf("%s:when=%d..%d", kind, at, at+1)), "--db", db)
				got := run(t, nil, "import", file, "--db", db)
				stands := ""
				switch {
				case got.status == 0 && got.stdout == "imported 6000 contracts\n":
					made++
					stands = want
				case got.status == 1 && strings.HasSuffix(got.stderr, "nothing was imported\n"), got.status == 1 && strings.Contains(got.stderr, "nothing was changed"):
					refused++
				default:
					t.Fatalf("%+v\n%s", got, p.Stderr)
				}
				waitFor(t, "what is left of it is dropped", func() bool {
					return run(t, nil, "export", "--db", db).stdout == stands
				})
				p.Kill(t)
				wantExport(t, db, stands)
				if got := ok(t, db, "check"); !strings.Contains(got, " is sound: ") {
					t.Error(got)
				}
			})
		}
	}
	t.Logf("made %d, refused %d", made, refused)
	if made == 0 || refused == 0 {
		t.Errorf("made %d, refused %d: the faults are not where they should be", made, refused)
	}
}

func TestFaultThatLeavesAWriteUndecided(t *testing.T) {
	long(t)
	needTool(t, "strace")
	t.Run("answered when the disk works again", func(t *testing.T) {
		t.Parallel()
		u := leaveUndecided(t)
		u.tracer.detach()
		var a answered
		select {
		case a = <-u.answer:
		case <-time.After(3 * time.Second):
			t.Fatalf("PUT %s: no answer 3 s after the disk works again\n%s", u.l.url(demoContract), u.p.Stderr)
		}
		u.l.record(t, demoContract, u.marker, a)
		u.l.check(t)
		waitUntil(t, 3*time.Second, "the store is ready again", func() error {
			if resp, body := do(t, u.l.client, "GET", u.l.base+"/readyz", nil, ""); resp.StatusCode != http.StatusOK {
				return fmt.Errorf("GET /readyz: %s\n%s", resp.Status, body)
			}
			return nil
		})
		u.l.check(t)
		u.l.checkAfterRestart(t, u.p, u.db)
		u.tracer.trace(t).checkRemedy(t)
	})
	t.Run("whole or not there when the process is killed", func(t *testing.T) {
		t.Parallel()
		u := leaveUndecided(t)
		if err := u.p.Cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		<-u.p.Ended
		if a := <-u.answer; a.err == nil {
			t.Errorf("PUT %s was answered as its process was killed: %v", u.l.url(demoContract), a)
		}
		checkFileSound(t, u.db)
		again := startProcess(t, nil, "--demo", "--db", u.db)
		u.l.base = again.URL
		u.checkEither(t)
		a := u.l.send("GET", demoContract, "")
		u.l.want[demoContract] = a.body
		if status := u.l.put(t, demoOtherContract, 1); status != http.StatusOK {
			t.Errorf("PUT %s after the restart: %d", u.l.url(demoOtherContract), status)
		}
		u.l.check(t)
		u.l.checkAfterRestart(t, again, u.db)
	})
}

// undecided is a write of which nobody can know whether it is on the disk: its
// meta page is written, its sync and that of the remedy have failed.
type undecided struct {
	p      *process
	db     string
	l      *ledger
	tracer *tracer
	marker string // in the document of the write
	answer <-chan answered
}

// leaveUndecided brings a write of demoContract into that state, and checks what
// can be asked for meanwhile. The disk goes on failing.
func leaveUndecided(t *testing.T) *undecided {
	t.Helper()
	u := &undecided{db: filepath.Join(t.TempDir(), "test.db")}
	u.p = startProcess(t, nil, "--demo", "--db", u.db)
	u.l = newLedger(t, u.p.URL, demoContract, demoOtherContract)
	u.l.growFile(t)
	// A committer that stays on its thread gets past its first sync and not past
	// the second. One that moves is seen to, and is tried again.
	for deadline := time.Now().Add(2 * answerTimeout); ; {
		u.tracer = attach(t, u.p, "fdatasync:error=EIO:when=2+", "fsync:error=EIO")
		answer := make(chan answered, 1)
		u.answer = answer
		doc := u.l.document(1)
		u.marker = u.l.marker()
		go func() { answer <- u.l.send("PUT", demoContract, doc) }()
		if u.isUndecided(t, deadline) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no write became undecided\n%s", u.p.Stderr)
		}
		u.tracer.detach()
		waitUntil(t, 3*time.Second, "the store can write again", func() error {
			if status := u.l.put(t, demoContract, 1); status != http.StatusOK {
				return fmt.Errorf("PUT is answered %d", status)
			}
			return nil
		})
	}

	if status := u.l.put(t, demoOtherContract, 1); status != http.StatusServiceUnavailable {
		t.Errorf("PUT %s while another write is undecided: %d, want 503", u.l.url(demoOtherContract), status)
	}
	resp, body := do(t, u.l.client, "GET", u.l.base+"/readyz", nil, "")
	wantUnavailable(t, resp, body)
	failed := u.failedRemedies(t)
	waitUntil(t, answerTimeout, "the remedy was tried again", func() error {
		u.checkEither(t)
		if n := u.failedRemedies(t); n == failed {
			return fmt.Errorf("%d attempts", n)
		}
		return nil
	})
	select {
	case a := <-u.answer:
		t.Fatalf("PUT %s was answered while nobody can know whether it is on the disk: %v", u.l.url(demoContract), a)
	default:
	}
	return u
}

// isUndecided waits until the trace shows that the write is undecided, or until
// it is answered.
func (u *undecided) isUndecided(t testing.TB, deadline time.Time) bool {
	t.Helper()
	for time.Now().Before(deadline) {
		select {
		case a := <-u.answer:
			u.l.record(t, demoContract, u.marker, a)
			u.l.check(t)
			return false
		case <-time.After(10 * time.Millisecond):
		}
		if u.tracer.trace(t).secondSyncs() > 0 && u.failedRemedies(t) > 0 {
			return true
		}
	}
	return false
}

func (u *undecided) failedRemedies(t testing.TB) int {
	return u.tracer.trace(t).count(func(c call) bool { return c.injected && c.name == "fsync" })
}

// checkEither fails unless the contract is what it was or what was written, and
// the others are what they were.
func (u *undecided) checkEither(t testing.TB) {
	t.Helper()
	for id, want := range u.l.want {
		a := u.l.send("GET", id, "")
		written := id == demoContract && strings.Contains(a.body, u.marker) && strings.HasSuffix(a.body, "}")
		if a.err != nil || a.status != http.StatusOK || a.body != want && !written {
			t.Fatalf("GET %s: %v\nwant\n%s", u.l.url(id), a, head(want))
		}
	}
}

func TestFaultAtTheStartLeavesTheFileAsItWas(t *testing.T) {
	long(t)
	needTool(t, "strace")
	for _, c := range []struct {
		name  string
		there bool
	}{
		{"a new file", false},
		{"an old file", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			db, out := filepath.Join(dir, "test.db"), filepath.Join(t.TempDir(), "trace")
			var before string
			if c.there {
				if err := startProcess(t, nil, "--demo", "--db", db).Terminate(t); err != nil {
					t.Fatalf("after SIGTERM: %v", err)
				}
				before = readFile(t, db)
			}
			cmd := command(t, straceCommand(out, "fdatasync,fsync:error=EIO"), "serve", "--addr", "127.0.0.1:0", "--demo", "--db", db)
			output, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(output), db) || strings.Contains(string(output), "panic") {
				t.Errorf("%v: got %v, want exit status 1 and a sentence about %s\n%s", cmd.Args, err, db, output)
			}
			if readTrace(t, out).injected() == 0 {
				t.Error("strace injected no fault")
			}
			if !c.there {
				if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
					t.Errorf("left behind: %v %v", left, err)
				}
				return
			}
			if after := readFile(t, db); after != before {
				t.Errorf("%s is not what it was", db)
			}
			checkFileSound(t, db)
		})
	}
}

func TestDiskFull(t *testing.T) {
	long(t)
	t.Parallel()
	disk := smallDisk(t, "8m")
	filler := filepath.Join(disk, "filler")
	if err := os.WriteFile(filler, make([]byte, 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	db := filepath.Join(disk, "test.db")
	p := startProcess(t, nil, "--demo", "--db", db)
	l := newLedger(t, p.URL, demoContract)
	sound := l.readTime(t)
	next := 0
	// makeNext makes a large contract, and tells whether it was refused.
	makeNext := func() (refused bool) {
		next++
		id := fmt.Sprintf("00000000-0000-4000-8000-%012d", next)
		return l.create(t, id, largeContract) != http.StatusCreated
	}
	for !makeNext() {
		if next > 1000 {
			t.Fatalf("%d contracts of some 100 KB fit onto a disk of 8 MiB", next)
		}
	}
	if next < 10 {
		t.Fatalf("only %d contracts fit onto the disk\n%s", next-1, p.Stderr)
	}
	l.check(t)
	for range 5 {
		if !makeNext() {
			t.Errorf("contract %d was made on a full disk", next)
		}
		l.check(t)
	}
	if status := l.put(t, demoContract, 10*largeContract); status != http.StatusServiceUnavailable {
		t.Errorf("PUT on a full disk: %d, want 503", status)
	}
	l.check(t)
	// Reads while writes go on to be refused. The store opens the file again after each
	// that it tries, for which reads wait: not many may.
	document := l.document(largeContract)
	stopWriting, refused := make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for {
			select {
			case <-stopWriting:
				refused <- n
				return
			default:
				if a := l.send("PUT", demoContract, document); a.status == http.StatusServiceUnavailable {
					n++
				}
			}
		}
	}()
	full := l.readTime(t)
	close(stopWriting)
	if n := <-refused; n == 0 {
		t.Error("no write was refused meanwhile")
	}
	if full > 4*sound+5*time.Millisecond {
		t.Errorf("a read takes %v on a full disk, and took %v before", full, sound)
	}
	l.check(t)

	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, 2*time.Second, "contracts are made again", func() error {
		if makeNext() {
			return fmt.Errorf("contract %d is refused", next)
		}
		return nil
	})
	if status := l.put(t, demoContract, 1); status != http.StatusOK {
		t.Errorf("PUT when there is space again: %d, want 200", status)
	}
	l.check(t)
	l.checkAfterRestart(t, p, db)
}

// smallDisk mounts a file system of a size of its own.
func smallDisk(t testing.TB, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("a full disk is a small tmpfs, which only root may mount; run the tests as root")
	}
	dir := t.TempDir()
	err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size)
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.EACCES) {
		t.Skipf("a full disk is a small tmpfs, and this root may not mount one (a container without CAP_SYS_ADMIN?): %v", err)
	}
	if err != nil {
		t.Fatalf("mount tmpfs on %s: %v", dir, err)
	}
	t.Cleanup(func() {
		// Also when the process has not let go of its file yet.
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}
