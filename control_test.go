package main

// The control socket between a command and a running server.

import (
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// asOwner returns a wrapper that removes the capabilities of root over permissions, so that
// the mode of a file applies to its owner.
func asOwner(t testing.TB) []string {
	t.Helper()
	if os.Getuid() != 0 {
		return nil
	}
	needTool(t, "setpriv")
	wrapper := []string{"setpriv", "--bounding-set", "-all", "--inh-caps", "-all"}
	if out, err := exec.Command(wrapper[0], append(wrapper[1:], "true")...).CombinedOutput(); err != nil {
		t.Skipf("%v: %v\n%s", wrapper, err, out)
	}
	return wrapper
}

func TestControlSocketIsTheOwnersWhateverTheUmask(t *testing.T) {
	slow(t)
	for _, umask := range []string{"0", "022", "077", "0177", "0277", "0777"} {
		t.Run(umask, func(t *testing.T) {
			t.Parallel() // most of it waits for a file that is in use
			wrapper := append(asOwner(t), "sh", "-c", "umask "+umask+` && exec "$@"`, "sh")
			for _, first := range []string{"serve", "client add"} {
				t.Run(first+" makes the file", func(t *testing.T) {
					db := shortPath(t)
					if first == "client add" {
						if got := run(t, wrapper, "client", "add", "--db", db, "--org", demoOrg); got.status != 0 {
							t.Fatalf("without a server: %+v", got)
						}
					}
					p := startProcess(t, wrapper, "--db", db)
					for path, want := range map[string]fs.FileMode{db: 0o600, db + ".sock": 0o600 | fs.ModeSocket} {
						if info, err := os.Lstat(path); err != nil {
							t.Errorf("%v\n%s", err, p.Stderr)
						} else if info.Mode() != want {
							t.Errorf("%s has mode %v, want %v", path, info.Mode(), want)
						}
					}
					got := run(t, wrapper, "client", "add", "--db", db, "--org", demoOrg)
					if got.status != 0 {
						t.Fatalf("beside the server: %+v\n%s", got, p.Stderr)
					}
					wantSecret(t, p.URL, addedClient(t, got.stdout), true)
					wantFiles(t, filepath.Dir(db), "c.db", "c.db.sock")
				})
			}
		})
	}
}

func TestControlSocketOfAnotherUserIsRefusedWithASentence(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	db := shortPath(t)
	// Another user can reach both files, and only the mode of the socket stops it.
	dir := filepath.Dir(db)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, nil, "--db", db)
	cmd := command(t, asNobody(t), "client", "list", "--db", db)
	out, _ := cmd.CombinedOutput()
	want := "energy-contracts: dial unix " + db + ".sock: connect: permission denied; use the account that the server runs under\n"
	if cmd.ProcessState.ExitCode() != 1 || string(out) != want {
		t.Errorf("%v\n%s, want\n%s", cmd.ProcessState, out, want)
	}
	if strings.Contains(p.Stderr.String(), "route=/clients") {
		t.Errorf("it reached the server\n%s", p.Stderr)
	}
}

func TestControlSocketGoesWithAServerThatCannotListen(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	db := shortPath(t)
	if got := fails(t, "serve", "--db", db, "--addr", taken.Addr().String()); !strings.Contains(got, "address already in use") {
		t.Errorf("got %q", got)
	}
	wantFiles(t, filepath.Dir(db), "c.db")
}

func TestControlSocketThatACrashLeftIsNoObstacle(t *testing.T) {
	db := shortPath(t)
	startProcess(t, nil, "--db", db).Kill(t)
	wantFiles(t, filepath.Dir(db), "c.db", "c.db.sock")
	c := addClient(t, db)
	wantListed(t, db, c.ID)
	c, _ = rotateClient(t, db, c.ID)
	for round := range 2 {
		p := startProcess(t, nil, "--db", db)
		wantSecret(t, p.URL, c, true)
		wantListed(t, db, c.ID) // the server has the file, so this went through its socket
		wantFiles(t, filepath.Dir(db), "c.db", "c.db.sock")
		if round == 0 {
			p.Kill(t)
		}
	}
}

func TestControlSocketSurvivesASecondServerThatIsRefused(t *testing.T) {
	slow(t)
	db := shortPath(t)
	link := shortPath(t)
	if err := os.Symlink(db, link); err != nil {
		t.Fatal(err)
	}
	p := startProcess(t, nil, "--db", db)
	for _, name := range []string{db, link} {
		got := run(t, nil, "serve", "--addr", "127.0.0.1:0", "--db", name)
		said := sentence(got.stderr)
		if want := "energy-contracts: database " + name + ": another process has it open"; got.status != 1 || got.stdout != "" || !strings.HasPrefix(said, want) || strings.Count(said, "\n") != 1 {
			t.Errorf("%+v, want %q", got, want)
		}
		c := addClient(t, db)
		wantSecret(t, p.URL, c, true)
		clientCommand(t, db, "remove", c.ID)
	}
	wantFiles(t, filepath.Dir(db), "c.db", "c.db.sock")
	wantFiles(t, filepath.Dir(link), "c.db")
}

func TestControlSocketIsFoundByAnyNameOfTheFile(t *testing.T) {
	slow(t)
	dir, elsewhere := filepath.Dir(shortPath(t)), filepath.Dir(shortPath(t))
	db := filepath.Join(dir, "c.db")
	addClient(t, db)
	toFile, toDir := filepath.Join(elsewhere, "file.db"), filepath.Join(elsewhere, "dir")
	for link, target := range map[string]string{toFile: db, toDir: dir} {
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
	}
	cwd, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	relative, err := filepath.Rel(cwd, db)
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]string{
		"its own": db, "a link": toFile, "a link to its directory": filepath.Join(toDir, "c.db"),
		"a path with detours": filepath.Join(elsewhere) + "/../" + filepath.Base(dir) + "//c.db",
	}
	for name, path := range names {
		t.Run(name, func(t *testing.T) {
			p := startProcess(t, nil, "--db", path)
			for other, path := range names {
				c := addClient(t, path)
				wantSecret(t, p.URL, c, true)
				if got := clientCommand(t, path, "remove", c.ID); got != "" {
					t.Errorf("%s: %q", other, got)
				}
			}
			// The server runs in the process of the test, whose directory is known.
			if out := commandAt(t, time.Now, "client", "list", "--db", relative); !strings.HasPrefix(out, "CLIENT") {
				t.Errorf("a relative path: %q", out)
			}
			wantFiles(t, dir, "c.db", "c.db.sock")
			wantFiles(t, elsewhere, "dir", "file.db")
			if err := p.Terminate(t); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestControlSocketOfTooLongAPathIsAWarning(t *testing.T) {
	slow(t)
	for _, tt := range []struct{ name, dir, file string }{
		{"a long directory", strings.Repeat("d", 120), "c.db"},
		// The path of the file may be short enough although that of the socket is not.
		{"a long name", ".", strings.Repeat("f", 120)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // most of it waits for a file that is in use
			dir := filepath.Join(filepath.Dir(shortPath(t)), tt.dir)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			db := filepath.Join(dir, tt.file)
			before := addClient(t, db)
			p := startProcess(t, nil, "--db", db)
			if n := strings.Count(p.Stderr.String(), `"level":"WARN","msg":"there is no control socket`); n != 1 {
				t.Errorf("%d warnings\n%s", n, p.Stderr)
			}
			wantSecret(t, p.URL, before, true)
			got := run(t, nil, "client", "list", "--db", db)
			if want := "energy-contracts: database " + db + ": another process has it open"; got.status != 1 || got.stdout != "" || !strings.HasPrefix(got.stderr, want) || strings.Count(got.stderr, "\n") != 1 {
				t.Errorf("beside the server: %+v, want %q", got, want)
			}
			wantFiles(t, dir, tt.file)
			if err := p.Terminate(t); err != nil {
				t.Error(err)
			}
			wantListed(t, db, before.ID)
			rotateClient(t, db, before.ID)
			clientCommand(t, db, "remove", before.ID)
			wantListed(t, db)
			wantFiles(t, dir, tt.file)
		})
	}
}

// A file that is not a socket belongs to the user, so it is not replaced.
func TestControlSocketTakesNobodysPlace(t *testing.T) {
	slow(t)
	for _, tt := range []struct {
		name string
		make func(path string) error
		kept func(path string) error
	}{
		{"an empty directory",
			func(path string) error { return os.Mkdir(path, 0o700) },
			func(path string) error { _, err := os.ReadDir(path); return err }},
		{"a directory with a file",
			func(path string) error {
				if err := os.Mkdir(path, 0o700); err != nil {
					return err
				}
				return os.WriteFile(filepath.Join(path, "f"), []byte("mine"), 0o600)
			},
			func(path string) error { return wantContent(filepath.Join(path, "f")) }},
		{"a file", func(path string) error { return os.WriteFile(path, []byte("mine"), 0o600) }, wantContent},
		{"a link to a file",
			func(path string) error {
				if err := os.WriteFile(path+".target", []byte("mine"), 0o600); err != nil {
					return err
				}
				return os.Symlink(path+".target", path)
			}, wantContent},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // most of it waits for a file that is in use
			db := shortPath(t)
			c := addClient(t, db)
			if err := tt.make(db + ".sock"); err != nil {
				t.Fatal(err)
			}
			wantListed(t, db, c.ID) // without a server
			p := startProcess(t, nil, "--db", db)
			wantSecret(t, p.URL, c, true)
			if !strings.Contains(p.Stderr.String(), `"level":"WARN","msg":"there is no control socket`) {
				t.Errorf("no warning\n%s", p.Stderr)
			}
			if got := run(t, nil, "client", "list", "--db", db); got.status != 1 || !strings.Contains(got.stderr, "another process has it open") {
				t.Errorf("beside the server: %+v", got)
			}
			if err := p.Terminate(t); err != nil {
				t.Error(err)
			}
			if left, _ := filepath.Glob(filepath.Dir(db) + "/.sock-*"); len(left) > 0 {
				t.Errorf("left behind: %v", left)
			}
			if err := tt.kept(db + ".sock"); err != nil {
				t.Errorf("it is gone: %v", err)
			}
		})
	}
}

func wantContent(path string) error {
	b, err := os.ReadFile(path)
	if err == nil && string(b) != "mine" {
		err = fmt.Errorf("%s has %q", path, b)
	}
	return err
}

// Requests that a command of the same version never sends.
func TestControlRefusesASelectionThatIsNone(t *testing.T) {
	s := startOn(t, shortPath(t), "--demo")
	c, err := dialControl(s.db)
	if err != nil {
		t.Fatal(err)
	}
	_, _, err = c.send(t.Context(), http.MethodGet, "/contracts?org_id=x", nil)
	if want := "org_id must be a UUID of 36 characters, has 1"; err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
}
