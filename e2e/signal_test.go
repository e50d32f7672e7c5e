//go:build linux

package e2e

// Signals, and readers of the log and of standard output that leave or hang: the service goes on,
// or it and the commands end in order.

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

// demoDirectories returns the directories of --demo, which are in the directory of TMPDIR.
func demoDirectories(t testing.TB, tmp string) []string {
	t.Helper()
	found, err := filepath.Glob(tmp + "/energy-contracts-demo-*")
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// wantEnded fails the test unless a server ends with status 0 and has stopped in order.
func wantEnded(t testing.TB, p *process) {
	t.Helper()
	select {
	case err := <-p.Ended:
		lines := strings.Split(strings.TrimSpace(p.Stderr.String()), "\n")
		if last := lines[len(lines)-1]; err != nil || !strings.Contains(last, `"msg":"stopped"`) {
			t.Errorf("ended with %v, and its last line is\n%s", p.Cmd.ProcessState, last)
		}
	case <-time.After(answerTimeout):
		t.Fatalf("still running\n%s", p.Stderr)
	}
}

func TestEachSignalIsIgnoredOrEndsTheServiceInOrder(t *testing.T) {
	for _, tt := range []struct {
		signal syscall.Signal
		ends   bool
	}{
		{syscall.SIGTERM, true}, {syscall.SIGINT, true}, {syscall.SIGQUIT, true},
		{syscall.SIGHUP, false}, {syscall.SIGPIPE, false}, {syscall.SIGUSR1, false}, {syscall.SIGUSR2, false},
		{syscall.SIGALRM, false}, {syscall.SIGVTALRM, false}, {syscall.SIGCHLD, false}, {syscall.SIGCONT, false},
		{syscall.SIGURG, false}, {syscall.SIGWINCH, false}, {syscall.SIGIO, false}, {syscall.SIGPWR, false},
		{syscall.SIGXCPU, false}, {syscall.SIGXFSZ, false},
	} {
		t.Run(tt.signal.String(), func(t *testing.T) {
			t.Parallel()
			db, tmp := shortPath(t), t.TempDir()
			demo := serve(t, nil, "--demo")
			demo.Env = append(demo.Env, "TMPDIR="+tmp)
			services := []*process{servicetest.Start(t, demo), startProcess(t, nil, "--db", db)}
			if found := demoDirectories(t, tmp); len(found) != 1 {
				t.Fatalf("--demo has the directories %q", found)
			}
			for _, p := range services {
				if err := p.Cmd.Process.Signal(tt.signal); err != nil {
					t.Fatal(err)
				}
				if !tt.ends {
					if resp, got := do(t, http.DefaultClient, "GET", p.URL+"/readyz", nil, ""); resp.StatusCode != 200 {
						t.Errorf("%s\n%s", resp.Status, got)
					}
					time.Sleep(100 * time.Millisecond) // an idle service stops in less
					if strings.Contains(p.Stderr.String(), `"msg":"stopp`) {
						t.Errorf("it stops\n%s", p.Stderr)
					}
					if err := p.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
						t.Fatal(err)
					}
				}
				wantEnded(t, p)
			}
			if found := demoDirectories(t, tmp); len(found) != 0 {
				t.Errorf("--demo leaves %q", found)
			}
			if files, err := filepath.Glob(filepath.Dir(db) + "/*"); err != nil || len(files) != 1 || files[0] != db {
				t.Errorf("left are %q, %v", files, err)
			}
			checkFileSound(t, db)
		})
	}
}

// impatient is a client for services that may hang.
var impatient = &http.Client{Timeout: 10 * time.Second}

// serveOn starts a service whose log a test cannot search for its address, and returns its URL.
func serveOn(t testing.TB, cmd *exec.Cmd, port int) (url string) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	url = fmt.Sprintf("http://127.0.0.1:%d", port)
	waitUntil(t, answerTimeout, "it serves", func() error {
		resp, err := impatient.Get(url + "/healthz")
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
	return url
}

// wantServing fails the test unless a service stores a contract, and ends with status 0 on
// SIGTERM.
func wantServing(t testing.TB, cmd *exec.Cmd, url string) {
	t.Helper()
	for range 10 {
		resp, got := do(t, client(url, "demo", "demo-secret"), "PUT", contractsURL(url, demoOrg, demoUser)+"/"+demoContract, jsonBody, `{}`)
		if resp.StatusCode != 200 {
			t.Fatalf("%s\n%s", resp.Status, got)
		}
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

func TestServiceGoesOnWithoutTheReaderOfItsLogAndOutput(t *testing.T) {
	for name, start := range map[string]func(t *testing.T, cmd *exec.Cmd, port int) (url string){
		"a log whose reader leaves": func(t *testing.T, cmd *exec.Cmd, port int) string {
			log, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			url := serveOn(t, cmd, port)
			head := exec.Command("head", "-n", "1")
			head.Stdin = log
			if got := succeeds(t, head); !strings.Contains(got, `"msg":"starting"`) {
				t.Errorf("the log begins with %s", got)
			}
			log.Close()
			return url
		},
		"an output that nobody reads": func(t *testing.T, cmd *exec.Cmd, port int) string {
			cmd.Stdout = withoutReader(t)
			return serveOn(t, cmd, port)
		},
		"an output that is full": func(t *testing.T, cmd *exec.Cmd, port int) string {
			cmd.Stdout = fullPipe(t)
			return serveOn(t, cmd, port)
		},
		"a log on a full disk": func(t *testing.T, cmd *exec.Cmd, port int) string {
			cmd.Stderr = fullDisk(t)
			return serveOn(t, cmd, port)
		},
		"no log and no output, as with 2>&- >&-": func(t *testing.T, cmd *exec.Cmd, port int) string {
			cmd.Args = append([]string{"sh", "-c", `exec "$0" "$@" 2>&- >&-`}, cmd.Args...)
			sh, err := exec.LookPath("sh")
			if err != nil {
				t.Fatal(err)
			}
			cmd.Path = sh
			return serveOn(t, cmd, port)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			port := freePort(t)
			cmd := command(t, nil, "serve", "--demo", "--db", shortPath(t), "--addr", "127.0.0.1:"+strconv.Itoa(port))
			wantServing(t, cmd, start(t, cmd, port))
		})
	}
}

// withoutReader returns a pipe that nobody reads.
func withoutReader(t testing.TB) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	t.Cleanup(func() { w.Close() })
	return w
}

// fullDisk returns a file on a disk that is full.
func fullDisk(t testing.TB) *os.File {
	t.Helper()
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { full.Close() })
	return full
}

// fullPipe returns a pipe with no room left, whose reader hangs.
func fullPipe(t testing.TB) *os.File {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close(); w.Close() })
	if err := w.SetWriteDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, 4<<20)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the pipe is not full: %v", err)
	}
	return w
}

// The lines that a reader gets and those that the service says are lost are all lines.
func TestReaderOfTheLogThatHangsDelaysNobody(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	cmd := command(t, nil, "serve", "--demo", "--db", shortPath(t), "--addr", "127.0.0.1:"+strconv.Itoa(port))
	log, err := cmd.StderrPipe()
	if err != nil {
		t.Fatal(err)
	}
	url := serveOn(t, cmd, port)
	const requests = 20_000
	for range requests {
		if resp, got := do(t, impatient, "GET", url+"/api", nil, ""); resp.StatusCode != 404 {
			t.Fatalf("%s\n%s", resp.Status, got)
		}
	}
	lines := bufio.NewScanner(log)
	seen, lost := 0, 0
	for lost == 0 && lines.Scan() {
		var line struct {
			Msg    string
			Status int
			Lines  int
		}
		if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
			t.Fatalf("%v: %s", err, lines.Text())
		}
		if line.Msg == "request" && line.Status == 404 {
			seen++
		}
		lost = line.Lines
	}
	if seen+lost != requests || lost < requests/4 {
		t.Errorf("%d lines, and %d are lost, of %d; %v", seen, lost, requests, lines.Err())
	}
	rest := make(chan struct{})
	go func() { _, _ = io.Copy(io.Discard, log); close(rest) }()
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	<-rest
	if err := cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

func TestCommandsEndInOrderWhenNobodyReadsTheirOutput(t *testing.T) {
	broken := filepath.Join(t.TempDir(), "broken.jsonl")
	writeTo(t, broken, []byte("{}\n"))
	for _, up := range []bool{true, false} {
		for _, tt := range []struct {
			args   []string
			status int
			stderr string
		}{
			{[]string{"export", "-"}, 1, ""},
			{[]string{"backup", "-"}, 1, ""},
			{[]string{"check"}, 1, ""},
			{[]string{"import", broken}, 1, "energy-contracts: nothing was imported: 1 invalid line out of 1; correct the input, or use --keep-going to import the valid lines\n"},
		} {
			t.Run(fmt.Sprintf("%s, server %v", tt.args[0], up), func(t *testing.T) {
				db := shortPath(t)
				p := startProcess(t, nil, "--demo", "--db", db)
				if !up {
					if err := p.Terminate(t); err != nil {
						t.Fatal(err)
					}
				}
				cmd := command(t, nil, append(tt.args, "--db", db)...)
				var stderr bytes.Buffer
				cmd.Stdout, cmd.Stderr = withoutReader(t), &stderr
				err := cmd.Run()
				if cmd.ProcessState.ExitCode() != tt.status || stderr.String() != tt.stderr {
					t.Errorf("%v, %q; want status %d and %q", err, &stderr, tt.status, tt.stderr)
				}
				if left := filesBeside(t, db); len(left) != 1 && !up || len(left) != 2 && up {
					t.Errorf("left are %v", left)
				}
			})
		}
	}
}

// The secret is nowhere else, so that its loss is no success.
func TestSecretThatCannotBePrintedIsAnError(t *testing.T) {
	db := shortPath(t)
	id := strings.Fields(ok(t, db, "client", "add", "--org", demoOrg))[1]
	full := fullDisk(t)
	for _, args := range [][]string{{"client", "add", "--org", demoOrg}, {"client", "rotate", id}} {
		for to, file := range map[string]*os.File{"no space left on device": full, "broken pipe": withoutReader(t)} {
			t.Run(args[1]+", "+to, func(t *testing.T) {
				cmd := command(t, nil, append(args, "--db", db)...)
				var stderr bytes.Buffer
				cmd.Stdout, cmd.Stderr = file, &stderr
				err := cmd.Run()
				want := regexp.MustCompile(`^energy-contracts: print the secret: write /dev/stdout: ` + to + `; run "client rotate \S{36}" to get another one\n$`)
				if cmd.ProcessState.ExitCode() != 1 || !want.MatchString(stderr.String()) {
					t.Errorf("%v\n%s", err, &stderr)
				}
			})
		}
	}
}

// systemd reads its socket, but a supervisor of another kind may not.
func TestServiceStopsAlthoughItsSupervisorHangs(t *testing.T) {
	t.Parallel()
	path := filepath.Join(filepath.Dir(shortPath(t)), "notify")
	deaf, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer deaf.Close()
	conn, err := net.Dial("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = io.WriteString(conn, "x")
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("the socket is not full: %v", err)
	}
	cmd := serve(t, nil, "--demo")
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+path)
	p := servicetest.Start(t, cmd)
	if err := p.Cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	wantEnded(t, p)
	if n := strings.Count(p.Stderr.String(), `"msg":"cannot notify systemd of the state of the service","state":"`); n != 2 {
		t.Errorf("%d warnings\n%s", n, p.Stderr)
	}
}

func TestExportToHeadIsSilent(t *testing.T) {
	db := shortPath(t)
	ok(t, db, "import", servicetest.ManyLines(t, 5000, 500))
	cmd := command(t, []string{"sh", "-c", `"$0" "$@" | head -n 1`}, "export", "-", "--db", db)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || stderr.Len() > 0 || bytes.Count(out, []byte("\n")) != 1 || !json.Valid(out) {
		t.Errorf("%v\n%s%s", err, &stderr, out)
	}
}

// startRestore starts restore from standard input, and waits until it has its temporary file.
func startRestore(t testing.TB, wrapper []string, db string) (cmd *exec.Cmd, stdin io.WriteCloser) {
	t.Helper()
	cmd = command(t, wrapper, "restore", "-", "--db", db)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	waitFor(t, "it has a temporary file", func() bool { return len(filesBeside(t, db)) == 1 })
	return cmd, stdin
}

// filesBeside returns the files in the directory of a path.
func filesBeside(t testing.TB, path string) []os.DirEntry {
	t.Helper()
	files, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

func TestSignalEndsACommandInOrder(t *testing.T) {
	for _, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT, syscall.SIGHUP} {
		t.Run(signal.String(), func(t *testing.T) {
			db := shortPath(t)
			cmd, stdin := startRestore(t, nil, db)
			if err := cmd.Process.Signal(signal); err != nil {
				t.Fatal(err)
			}
			err := cmd.Wait() // although its input goes on
			stdin.Close()
			if left := filesBeside(t, db); cmd.ProcessState.ExitCode() != 1 || len(left) > 0 {
				t.Errorf("%v, left are %v", err, left)
			}
		})
	}
}

// nohup makes a process ignore SIGHUP, which must stay so.
func TestCommandUnderNohupIgnoresSIGHUP(t *testing.T) {
	needTool(t, "nohup")
	db := shortPath(t)
	p := startProcess(t, nil, "--demo", "--db", db)
	backup := run(t, nil, "backup", "-", "--db", db)
	if err := p.Terminate(t); err != nil || backup.status != 0 {
		t.Fatal(err, backup.stderr)
	}
	restored := shortPath(t)
	cmd, stdin := startRestore(t, []string{"nohup"}, restored)
	if err := cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(stdin, backup.stdout); err != nil {
		t.Fatal(err)
	}
	stdin.Close()
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	checkFileSound(t, restored)
}
