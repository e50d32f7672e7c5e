//go:build linux

package e2e

// These tests check the store over HTTP while the disk fails: strace makes system calls of the
// running process fail, and a small file system fills up. They assert the promises to a client:
// a refused write is never visible, an acknowledged write is never lost, reads keep working,
// and no restart is needed.
//
// strace cannot simulate the data that the kernel loses in a power cut. Instead, the order of
// the system calls is checked: after a fault, nothing is written before both meta pages are
// synced again.

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

// faultKind is one way in which the disk fails, tried at several positions. strace counts the
// system calls of each thread separately, and commits may run on different threads, so a
// position does not mean a fixed point in a commit. The traces show which call was hit.
type faultKind struct {
	name   string
	faults []string // in the syntax of strace's inject=, with %s for the position
	at     []string // positions, in the syntax of strace's when=
	grow   bool     // the documents are large, so that the file must grow
}

var faultKinds = []faultKind{
	{"sync of a commit with EIO", []string{"fdatasync:error=EIO:when=%s"}, positions("1", "2", "3", "4", "1..2", "1..10", "2+2", "2+3"), false},
	{"sync of a commit with ENOSPC", []string{"fdatasync:error=ENOSPC:when=%s"}, positions("1", "2", "1..10"), false},
	{"write with EIO", []string{"pwrite64:error=EIO:when=%s"}, positions("1", "2", "3", "4", "5", "6", "1..10", "2+7"), false},
	{"write with ENOSPC", []string{"pwrite64:error=ENOSPC:when=%s"}, positions("1", "2", "3", "4", "5", "6", "1..10", "3+7"), false},
	{"sync of a growing file with EIO", []string{"fsync:error=EIO:when=%s"}, positions("1", "1..2"), true},
	{"growth with EIO", []string{"ftruncate:error=EIO:when=%s"}, positions("1", "1..10"), true},
	{"growth with ENOSPC", []string{"ftruncate:error=ENOSPC:when=%s"}, positions("1"), true},
	{"sync of a commit and of the reopening with EIO", []string{"fdatasync:error=EIO:when=%s", "fsync:error=EIO:when=1"}, positions("1", "2", "4"), false},
}

// positions returns the positions to try; with LONG=1 each from 1 to 30 is added.
func positions(at ...string) []string {
	for n := range servicetest.Amount(0, 30) {
		if one := strconv.Itoa(n + 1); !slices.Contains(at, one) {
			at = append(at, one)
		}
	}
	return at
}

func TestResponseAfterFaultInACommitMatchesTheDatabase(t *testing.T) {
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

// faultyCommits writes while system calls fail, then without faults, and checks the contracts
// after each write and after a restart. It returns the trace of the faulty process.
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
			return fmt.Errorf("PUT: %d, want 200", status)
		}
		return nil
	})
	l.check(t)
	l.checkAfterRestart(t, p, db)
	tr := tracer.trace(t)
	tr.checkReopening(t)
	return tr
}

func TestDiskThatKeepsFailing(t *testing.T) {
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
		{"create under an id", "PUT", l.url(newContract), http.Header{"Content-Type": {"application/json"}, "If-None-Match": {"*"}}, l.document(1)},
		{"create", "POST", l.collection(), jsonBody, l.document(1)},
		{"patch", "PATCH", l.url(demoContract), http.Header{"Content-Type": {mergePatchType}}, `{"supplier":"patched"}`},
		{"delete", "DELETE", l.url(demoOtherContract), nil, ""},
	}

	tracer := attach(t, p, "fdatasync,fsync:error=EIO")
	stopReading := make(chan struct{})
	reads := make(chan error, 1)
	go func() { reads <- readAll(l, stopReading) }()
	// This takes long enough that the store fails to reopen its file more than once.
	waitUntil(t, answerTimeout, "three syncs of the reopening failed", func() error {
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
			return fmt.Errorf("%d syncs failed", n)
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
		t.Errorf("a refused write is visible when the disk works again: the list was\n%s\nand is\n%s", list, now)
	}
	if status := l.put(t, demoContract, 1); status != http.StatusOK {
		t.Errorf("PUT when the store is ready again: %d, want 200", status)
	}
	l.check(t)
	l.checkAfterRestart(t, p, db)
	tracer.trace(t).checkReopening(t)
}

// readAll gets the contracts of a ledger repeatedly until stop is closed.
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

// TestReadyzFailsAfterACommitThatFailed checks that /readyz fails even if it has just reported
// that the store is ready.
func TestReadyzFailsAfterACommitThatFailed(t *testing.T) {
	long(t)
	needTool(t, "strace")
	p := startProcess(t, straceCommand(filepath.Join(t.TempDir(), "trace"), "fdatasync:error=EIO:when=30+"), "--demo", "--db", shortPath(t))
	c := client(p.URL, "demo", "demo-secret")
	for range 5000 { // strace counts the calls of each thread separately
		_, _ = do(t, http.DefaultClient, "GET", p.URL+"/readyz", nil, "") // its result is cached for a while
		put, _ := do(t, c, "PUT", contractsURL(p.URL, demoOrg, demoUser)+"/"+demoContract, jsonBody, "{}")
		if put.StatusCode == http.StatusOK { // also if a sync failed and the write was committed nevertheless
			continue
		}
		resp, body := do(t, http.DefaultClient, "GET", p.URL+"/readyz", nil, "")
		wantUnavailable(t, resp, body)
		return
	}
	t.Error("no commit failed")
}

// TestResponseAfterFaultInAnImportMatchesTheDatabase checks that an import is reported either
// as done or as without effect, and that the database agrees, also after a restart.
func TestResponseAfterFaultInAnImportMatchesTheDatabase(t *testing.T) {
	long(t)
	t.Parallel()
	needTool(t, "strace")
	file := servicetest.ManyLines(t, 6000, 300)
	want := readFile(t, file)
	var imported, refused int
	for _, kind := range []string{"fdatasync:error=EIO", "pwrite64:error=ENOSPC"} {
		for at := 8; at <= 32; at += 4 { // after the file is created
			t.Run(fmt.Sprintf("%s at %d", kind, at), func(t *testing.T) {
				db := shortPath(t)
				p := startProcess(t, straceCommand(filepath.Join(t.TempDir(), "trace"), fmt.Sprintf("%s:when=%d..%d", kind, at, at+1)), "--db", db)
				got := run(t, nil, "import", file, "--db", db)
				content := export("")
				switch {
				case got.status == 0 && got.stdout == "imported 6000 contracts\n":
					imported++
					content = want
				case got.status == 1 && strings.HasSuffix(got.stderr, "nothing was imported\n"), got.status == 1 && strings.Contains(got.stderr, "nothing was changed"):
					refused++
				default:
					t.Fatalf("%+v\n%s", got, p.Stderr)
				}
				waitFor(t, "the rest of the import is dropped", func() bool {
					return run(t, nil, "export", "--db", db).stdout == content
				})
				p.Kill(t)
				wantExport(t, db, content)
				if got := ok(t, db, "check"); !strings.Contains(got, " is sound: ") {
					t.Error(got)
				}
			})
		}
	}
	t.Logf("imported %d, refused %d", imported, refused)
	if imported == 0 || refused == 0 {
		t.Errorf("imported %d, refused %d, want some of each; change the positions of the faults", imported, refused)
	}
}

func TestFaultThatLeavesAWriteInDoubt(t *testing.T) {
	long(t)
	needTool(t, "strace")
	t.Run("response comes when the disk works again", func(t *testing.T) {
		t.Parallel()
		u := leaveInDoubt(t)
		u.tracer.detach()
		var a answered
		select {
		case a = <-u.response:
		case <-time.After(3 * time.Second):
			t.Fatalf("PUT %s: no response 3 s after the disk works again\n%s", u.l.url(demoContract), u.p.Stderr)
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
		u.tracer.trace(t).checkReopening(t)
	})
	t.Run("present in full or absent after the process is killed", func(t *testing.T) {
		t.Parallel()
		u := leaveInDoubt(t)
		if err := u.p.Cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		<-u.p.Ended
		if a := <-u.response; a.err == nil {
			t.Errorf("PUT %s got a response although the process was killed: %v", u.l.url(demoContract), a)
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

// inDoubt is a write that may or may not be on the disk: its meta page is written, but the sync
// after it and that of the reopening have failed.
type inDoubt struct {
	p        *process
	db       string
	l        *ledger
	tracer   *tracer
	marker   string // in the document of the write
	response <-chan answered
}

// leaveInDoubt leaves a write of demoContract in doubt, and checks reads, other writes and
// /readyz meanwhile. The disk still fails when it returns.
func leaveInDoubt(t *testing.T) *inDoubt {
	t.Helper()
	u := &inDoubt{db: filepath.Join(t.TempDir(), "test.db")}
	u.p = startProcess(t, nil, "--demo", "--db", u.db)
	u.l = newLedger(t, u.p.URL, demoContract, demoOtherContract)
	u.l.growFile(t)
	// If the commit stays on one thread, its first sync succeeds and its second fails. If it
	// moves to another thread, strace counts again from one: then another write is tried.
	for deadline := time.Now().Add(2 * answerTimeout); ; {
		u.tracer = attach(t, u.p, "fdatasync:error=EIO:when=2+", "fsync:error=EIO")
		response := make(chan answered, 1)
		u.response = response
		doc := u.l.document(1)
		u.marker = u.l.marker()
		go func() { response <- u.l.send("PUT", demoContract, doc) }()
		if u.isInDoubt(t, deadline) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("no write was left in doubt\n%s", u.p.Stderr)
		}
		u.tracer.detach()
		waitUntil(t, 3*time.Second, "the store can write again", func() error {
			if status := u.l.put(t, demoContract, 1); status != http.StatusOK {
				return fmt.Errorf("PUT: %d, want 200", status)
			}
			return nil
		})
	}

	if status := u.l.put(t, demoOtherContract, 1); status != http.StatusServiceUnavailable {
		t.Errorf("PUT %s while another write is in doubt: %d, want 503", u.l.url(demoOtherContract), status)
	}
	resp, body := do(t, u.l.client, "GET", u.l.base+"/readyz", nil, "")
	wantUnavailable(t, resp, body)
	failed := u.failedReopenings(t)
	waitUntil(t, answerTimeout, "the reopening was tried again", func() error {
		u.checkEither(t)
		if n := u.failedReopenings(t); n == failed {
			return fmt.Errorf("%d attempts", n)
		}
		return nil
	})
	select {
	case a := <-u.response:
		t.Fatalf("PUT %s got a response while it is in doubt: %v", u.l.url(demoContract), a)
	default:
	}
	return u
}

// isInDoubt waits until the trace shows that the write is in doubt, or until its response
// comes, and reports whether the write is in doubt.
func (u *inDoubt) isInDoubt(t testing.TB, deadline time.Time) bool {
	t.Helper()
	for time.Now().Before(deadline) {
		select {
		case a := <-u.response:
			u.l.record(t, demoContract, u.marker, a)
			u.l.check(t)
			return false
		case <-time.After(10 * time.Millisecond):
		}
		if u.tracer.trace(t).secondSyncs() > 0 && u.failedReopenings(t) > 0 {
			return true
		}
	}
	return false
}

// failedReopenings returns the number of syncs of a reopening that have failed.
func (u *inDoubt) failedReopenings(t testing.TB) int {
	return u.tracer.trace(t).count(func(c call) bool { return c.injected && c.name == "fsync" })
}

// checkEither fails the test unless the contract has its old or its new content and the others
// are unchanged.
func (u *inDoubt) checkEither(t testing.TB) {
	t.Helper()
	for id, want := range u.l.want {
		a := u.l.send("GET", id, "")
		written := id == demoContract && strings.Contains(a.body, u.marker) && strings.HasSuffix(a.body, "}")
		if a.err != nil || a.status != http.StatusOK || a.body != want && !written {
			t.Fatalf("GET %s: %v\nwant\n%s", u.l.url(id), a, head(want))
		}
	}
}

func TestFaultAtTheStartLeavesTheFileUnchanged(t *testing.T) {
	long(t)
	needTool(t, "strace")
	for _, c := range []struct {
		name   string
		exists bool
	}{
		{"a new file", false},
		{"an old file", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			db, out := filepath.Join(dir, "test.db"), filepath.Join(t.TempDir(), "trace")
			var before string
			if c.exists {
				if err := startProcess(t, nil, "--demo", "--db", db).Terminate(t); err != nil {
					t.Fatalf("after SIGTERM: %v", err)
				}
				before = readFile(t, db)
			}
			cmd := command(t, straceCommand(out, "fdatasync,fsync:error=EIO"), "serve", "--addr", "127.0.0.1:0", "--demo", "--db", db)
			output, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(output), db) || strings.Contains(string(output), "panic") {
				t.Errorf("%v: got %v, want exit status 1 and a message that names %s\n%s", cmd.Args, err, db, output)
			}
			if readTrace(t, out).injected() == 0 {
				t.Error("strace injected no fault")
			}
			if !c.exists {
				if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
					t.Errorf("the failed start left files behind: %v %v", left, err)
				}
				return
			}
			if after := readFile(t, db); after != before {
				t.Errorf("the failed start changed %s", db)
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
	timeBefore := l.readTime(t)
	next := 0
	// createNext creates a large contract, and reports whether it was refused.
	createNext := func() (refused bool) {
		next++
		id := fmt.Sprintf("00000000-0000-4000-8000-%012d", next)
		return l.create(t, id, largeContract) != http.StatusCreated
	}
	for !createNext() {
		if next > 1000 {
			t.Fatalf("%d contracts of some 100 KB fit on a disk of 8 MiB", next)
		}
	}
	if next < 10 {
		t.Fatalf("only %d contracts fit on the disk\n%s", next-1, p.Stderr)
	}
	l.check(t)
	for range 5 {
		if !createNext() {
			t.Errorf("contract %d was created on a full disk", next)
		}
		l.check(t)
	}
	if status := l.put(t, demoContract, 10*largeContract); status != http.StatusServiceUnavailable {
		t.Errorf("PUT on a full disk: %d, want 503", status)
	}
	l.check(t)
	// Read while writes are still refused. The store reopens the file after each write that
	// it tries, and reads wait for that; so it must not try many.
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
	timeFull := l.readTime(t)
	close(stopWriting)
	if n := <-refused; n == 0 {
		t.Error("no write was refused meanwhile")
	}
	if timeFull > 4*timeBefore+5*time.Millisecond {
		t.Errorf("a read takes %v on a full disk, and took %v before", timeFull, timeBefore)
	}
	l.check(t)

	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	waitUntil(t, 2*time.Second, "contracts can be created again", func() error {
		if createNext() {
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

// smallDisk mounts a tmpfs of a size, and returns its directory.
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
		// MNT_DETACH unmounts even if the process still has its file open.
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}
