package main

// The control socket between a command and a running server.

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
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
	want := "energy-contracts: control socket " + db + ".sock: connect: permission denied; use the account that the server runs under\n"
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

// The address of a socket has about 100 bytes, and a path may have more.
func TestControlSocketOfALongPathIsFoundByAnyNameOfTheFile(t *testing.T) {
	top := filepath.Dir(shortPath(t))
	dir, link, tmp := filepath.Join(top, strings.Repeat("d", 120)), filepath.Join(top, "link"), filepath.Join(top, "tmp")
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Symlink(dir, link), os.Mkdir(tmp, 0o700)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("TMPDIR", tmp)
	names := []string{filepath.Join(dir, "c.db"), "c.db", filepath.Join(link, "c.db")}
	in := func(dir string, cmd *exec.Cmd) *exec.Cmd { cmd.Dir = dir; return cmd }
	for _, served := range names {
		p := servicetest.Start(t, in(dir, serve(t, nil, "--db", served)))
		for _, name := range names {
			out, err := in(dir, command(t, nil, "client", "add", "--org", demoOrg, "--db", name)).CombinedOutput()
			if err != nil {
				t.Fatalf("served as %s: client add --db %s: %v\n%s", served, name, err, out)
			}
			wantSecret(t, p.URL, addedClient(t, string(out)), true)
		}
		wantFiles(t, dir, "c.db", "c.db.sock")
		if err := p.Terminate(t); err != nil {
			t.Error(err)
		}
		wantFiles(t, dir, "c.db")
	}
	if left, _ := filepath.Glob(tmp + "/ec-*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestServerWithoutAControlSocketIsNamedByEachCommand(t *testing.T) {
	slow(t)
	none := filepath.Join(t.TempDir(), "none")
	for _, tt := range []struct {
		name, dir, file string
		tmp             string // directory for temporary files
		cause           string // %[1]s is the socket, %[2]d the longest address
		warned          bool   // by the server
	}{
		{"the socket was removed", ".", "c.db", os.TempDir(), "%[1]s: connect: no such file or directory", false},
		{"the name is too long", ".", strings.Repeat("f", 120), os.TempDir(),
			"%[1]s: the path is too long for a socket's address, which has at most %[2]d bytes, also through a link; use a shorter name for the database, or a shorter directory for temporary files (TMPDIR)", true},
		{"the path is too long, and there is no directory for temporary files", strings.Repeat("d", 120), "c.db", none,
			"%[1]s: the path has more than the %[2]d bytes of a socket's address, and a shorter link cannot be made: stat " + none + ": no such file or directory", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Join(filepath.Dir(shortPath(t)), tt.dir)
			if err := os.MkdirAll(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			db := filepath.Join(dir, tt.file)
			before := addClient(t, db)
			wrapper := []string{"env", "TMPDIR=" + tt.tmp}
			p := startProcess(t, wrapper, "--db", db)
			_ = os.Remove(db + ".sock")
			cause := fmt.Sprintf(tt.cause, db+".sock", maxSocketPath)
			if warning := fmt.Sprintf(`"msg":"there is no control socket, so commands cannot use the database while this server runs; fix the cause, or move the database to another directory","err":"%s`, cause); strings.Contains(p.Stderr.String(), warning) != tt.warned {
				t.Errorf("a warning %s: want %v\n%s", warning, tt.warned, p.Stderr)
			}
			wantSecret(t, p.URL, before, true)
			unreachable := "database " + db + ": another process has it open, but no server listens on the control socket " + cause + "; if that process is a server, its log says why; otherwise try again when it has ended"
			t.Run("command", func(t *testing.T) {
				for args, want := range map[string]string{
					"client list": unreachable, "client add --org " + demoOrg: unreachable, "check": unreachable,
					"backup -": unreachable, "export": unreachable, "import " + absolute(t, contractLines): unreachable,
					"restore --force " + absolute(t, contractLines): db + " is a database in use, so it was not replaced; name another file, or stop the process that uses it",
					"compact": "database " + db + ": another process has it open; stop that one (a running server?) or name another file with --db; nothing was changed",
				} {
					t.Run(args, func(t *testing.T) {
						t.Parallel() // most of it waits for a file that is in use
						got := run(t, wrapper, append(strings.Fields(args), "--db", db)...)
						if got != (ran{"", "energy-contracts: " + want + "\n", 1}) {
							t.Errorf("%+v\nwant %q", got, want)
						}
					})
				}
			})
			wantFiles(t, dir, tt.file)
			if err := p.Terminate(t); err != nil {
				t.Error(err)
			}
			wantListed(t, db, before.ID)
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

// strangersSocket makes the control socket of a database that of a server of another user, and
// returns the log of that server.
func strangersSocket(t *testing.T, db string) (log *lockedBuffer) {
	t.Helper()
	theirs := filepath.Join(filepath.Dir(db), "theirs.db")
	if err := os.Chmod(filepath.Dir(db), 0o1777); err != nil { // as /tmp
		t.Fatal(err)
	}
	p := startProcess(t, asNobody(t), "--db", theirs)
	if err := os.Rename(theirs+".sock", db+".sock"); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(db+".sock", 0o666); err != nil { // whoever connects is welcome
		t.Fatal(err)
	}
	return p.Stderr
}

func TestControlSocketThatAnotherUserMadeFirstGetsNothing(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("only root can be another user")
	}
	for _, tt := range []struct {
		name  string
		owner int
	}{
		{"its file is theirs", nobody},
		{"its file is the owner's, as after a hard link", 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			db := shortPath(t)
			c := addClient(t, db)
			log := strangersSocket(t, db)
			if err := os.Chown(db+".sock", tt.owner, tt.owner); err != nil {
				t.Fatal(err)
			}
			want := fmt.Sprintf("control socket %s.sock belongs to user %d, who is neither root, nor you, nor the owner of the database; nothing was sent to it; if you trust that user, use that account; otherwise remove the socket, and keep the database in a directory in which nobody else may make files", db, nobody)
			for _, args := range []string{
				"client list", "client add --org " + demoOrg, "client rotate " + c.ID, "client remove " + c.ID,
				"import " + absolute(t, contractLines), "export", "backup -", "check",
			} {
				if out := refusedCommand(t, db, want, strings.Fields(args)...); out != "" {
					t.Errorf("%s printed %q", args, out)
				}
			}
			if strings.Contains(log.String(), `"msg":"request"`) {
				t.Errorf("something reached the other server\n%s", log)
			}
			// The owner of a database may serve it.
			if err := os.Chown(db, nobody, nobody); err != nil {
				t.Fatal(err)
			}
			wantListed(t, db)
		})
	}
}

// The check belongs to the connection that carries the request, not to an earlier one.
func TestControlSocketThatIsReplacedBetweenTwoConnectionsGetsNothing(t *testing.T) {
	s := startOn(t, shortPath(t))
	c, err := dialControl(s.db)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(s.db+".sock", s.db+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(s.db+".moved", s.db+".sock"); err != nil {
		t.Fatal(err)
	}
	want := "request to the server: control socket " + s.db + ".sock is a link or another file, and not a socket, so nothing was sent to it; remove it"
	if _, _, err := c.send(t.Context(), http.MethodGet, "/clients", nil); err == nil || err.Error() != want {
		t.Errorf("%v, want %s", err, want)
	}
	refusedCommand(t, s.db, strings.TrimPrefix(want, "request to the server: "), "client", "list")
	if strings.Contains(s.log.String(), "msg=request") {
		t.Errorf("something reached the server\n%s", s.log)
	}
}

func TestControlSocketIsTrustedByItsUser(t *testing.T) {
	db := writeFile(t, nil)
	me := uint32(os.Geteuid())
	users := map[uint32]bool{0: true, me: true, me + 1: false, nobody: me == nobody}
	for user, trusted := range users {
		if err := checkUser(db, user); (err == nil) != trusted || err != nil && !errors.Is(err, errStranger) {
			t.Errorf("user %d: %v, want trusted %v", user, err, trusted)
		}
		if err := checkUser(db+".none", user); (err == nil) != trusted {
			t.Errorf("user %d, without a database: %v, want trusted %v", user, err, trusted)
		}
	}
}

func TestControlRequestsHoldToRules(t *testing.T) {
	s := startOn(t, shortPath(t))
	c := addClient(t, s.db)
	control, err := dialControl(s.db)
	if err != nil {
		t.Fatal(err)
	}
	const unreadable = "The server cannot read this request; use a command of the same version as the server."
	const scopes, grace = "scope: the scopes are read and write, separated by a space", "grace_seconds must be a number from 0 to 31536000"
	const org = `"org_id":"` + demoOrg + `"`
	secret := "/clients/" + c.ID + "/secret"
	for _, tt := range []struct {
		name, method, path, body string
		status                   int
		detail                   string
	}{
		{"a client without a scope", "POST", "/clients", `{` + org + `}`, 422, scopes},
		{"a client with an empty scope", "POST", "/clients", `{` + org + `,"scope":""}`, 422, scopes},
		{"a client with spaces for a scope", "POST", "/clients", `{` + org + `,"scope":"  "}`, 422, scopes},
		{"a client with an unknown scope", "POST", "/clients", `{` + org + `,"scope":"read admin"}`, 422, scopes},
		{"a client without an organization", "POST", "/clients", `{"scope":"read"}`, 422, "org_id must be a UUID of 36 characters, has 0"},
		{"a client of a UUID without dashes", "POST", "/clients", `{"org_id":"5f0c2b9e6f7a4f0e9b1d2a4c8e6d0f11","scope":"read"}`, 422, "org_id must be a UUID of 36 characters, has 32"},
		{"a client with an id of its own", "POST", "/clients", `{` + org + `,"scope":"read","client_id":"mine"}`, 400, unreadable},
		{"a client with two organizations", "POST", "/clients", `{` + org + `,` + org + `,"scope":"read"}`, 400, unreadable},
		{"two clients", "POST", "/clients", `{` + org + `,"scope":"read"}{` + org + `,"scope":"read"}`, 400, unreadable},
		{"a client of a number", "POST", "/clients", `{"org_id":1,"scope":"read"}`, 400, unreadable},
		{"nothing", "POST", "/clients", ``, 400, unreadable},
		{"a rotation without a grace", "POST", secret, `{}`, 422, grace},
		{"a rotation with a negative grace", "POST", secret, `{"grace_seconds":-1}`, 422, grace},
		{"a rotation with a grace of more than a year", "POST", secret, `{"grace_seconds":31536001}`, 422, grace},
		{"a rotation with a grace that overflows a duration", "POST", secret, `{"grace_seconds":9223372037}`, 422, grace},
		{"a rotation with a grace of a fraction", "POST", secret, `{"grace_seconds":1.5}`, 400, unreadable},
		{"a rotation with a grace that overflows a number", "POST", secret, `{"grace_seconds":9223372036854775808}`, 400, unreadable},
		{"a rotation of a client with a terminal's escape", "POST", "/clients/%1B%5B2J/secret", `{"grace_seconds":0}`, 404, "There is no client with this id; run \"client list\" to see the ids."},
		{"an export of something else", "GET", "/contracts?org=" + demoOrg, ``, 400, unreadable},
		{"an export of two organizations", "GET", "/contracts?org_id=" + demoOrg + "&org_id=" + demoOtherOrg, ``, 400, unreadable},
		{"an export of a query that is none", "GET", "/contracts?org_id=%zz", ``, 400, unreadable},
		{"an import that goes on with something else", "POST", "/contracts?keep_going=yes", ``, 422, "keep_going must be true or false"},
		{"an import with an unknown parameter", "POST", "/contracts?keep-going=true", ``, 400, unreadable},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := http.NewRequestWithContext(t.Context(), tt.method, "http://control"+tt.path, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			resp, err := control.http.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			failure{Status: tt.status, Detail: tt.detail}.Want(t, resp, string(got))
		})
	}
	wantListed(t, s.db, c.ID)
	wantSecret(t, s.url, c, true)
	ok(t, s.db, "backup", s.db+".backup")

	t.Run("an organization in upper case", func(t *testing.T) {
		var made credentials
		body := addClientRequest{strings.ToUpper(demoOrg), "read"}
		if err := control.call(t.Context(), controlRequest{method: "POST", path: "/clients", in: body, out: &made}); err != nil {
			t.Fatal(err)
		}
		known.Add(made.Secret)
		wantTokenStatus(t, s.url, token(t, s.url, made.ID, made.Secret), 200)
	})
}
