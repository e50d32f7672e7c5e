package main

// A database file that is moved, replaced or removed under a server, and its control socket.

import (
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const displacedDetail = "The database file was moved, replaced or removed, so writes are stopped; nothing was changed. The service's log says what to do."

func TestServerWhoseFileIsDisplacedRefusesWrites(t *testing.T) {
	other := string(soundFile(t))
	// displace moves, replaces or removes the file at the path of the database, and putBack undoes
	// that. The database is c.db in the directory d, and it is served through the link l.db.
	for _, tt := range []struct {
		name              string
		displace, putBack func(dir string) error
	}{
		{"moved",
			func(dir string) error { return os.Rename(dir+"/d/c.db", dir+"/d/moved") },
			func(dir string) error { return os.Rename(dir+"/d/moved", dir+"/d/c.db") }},
		{"removed, though it has another name",
			func(dir string) error {
				return errors.Join(os.Link(dir+"/d/c.db", dir+"/kept"), os.Remove(dir+"/d/c.db"))
			},
			func(dir string) error { return os.Link(dir+"/kept", dir+"/d/c.db") }},
		{"replaced",
			func(dir string) error {
				return errors.Join(os.Link(dir+"/d/c.db", dir+"/kept"),
					os.WriteFile(dir+"/other", []byte(other), 0o600), os.Rename(dir+"/other", dir+"/d/c.db"))
			},
			func(dir string) error {
				if now, err := os.ReadFile(dir + "/d/c.db"); err != nil || string(now) != other {
					return errors.New("the other file has changed")
				}
				return os.Rename(dir+"/kept", dir+"/d/c.db")
			}},
		{"in a directory that is moved",
			func(dir string) error { return os.Rename(dir+"/d", dir+"/e") },
			func(dir string) error { return os.Rename(dir+"/e", dir+"/d") }},
		{"in a directory that is replaced by a file",
			func(dir string) error {
				return errors.Join(os.Rename(dir+"/d", dir+"/e"), os.WriteFile(dir+"/d", nil, 0o600))
			},
			func(dir string) error { return errors.Join(os.Remove(dir+"/d"), os.Rename(dir+"/e", dir+"/d")) }},
		{"behind a link that leads elsewhere",
			func(dir string) error {
				return errors.Join(os.WriteFile(dir+"/other", []byte(other), 0o600), os.Remove(dir+"/l.db"), os.Symlink(dir+"/other", dir+"/l.db"))
			},
			func(dir string) error { return errors.Join(os.Remove(dir+"/l.db"), os.Symlink("d/c.db", dir+"/l.db")) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := filepath.Dir(shortPath(t))
			if err := errors.Join(os.Mkdir(dir+"/d", 0o700), os.Symlink("d/c.db", dir+"/l.db")); err != nil {
				t.Fatal(err)
			}
			p := startProcess(t, nil, "--demo", "--db", dir+"/l.db")
			a := newAuthor(t, p.URL)
			waitFor(t, "the server is ready", func() bool { return isReady(t, p.URL) })
			if err := tt.displace(dir); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				resp, got := do(t, http.DefaultClient, "PUT", contractsURL(p.URL, demoOrg, demoUser)+"/"+demoContract, with(jsonBody, "Authorization", "Bearer "+a.bearer), `{}`)
				wantUnavailable(t, resp, got)
				if doc := wantProblem(t, resp, got, 503); doc.Detail != displacedDetail {
					t.Errorf("PUT: %s", got)
				}
				resp, got = do(t, http.DefaultClient, "GET", p.URL+"/readyz", nil, "")
				wantUnavailable(t, resp, got)
				if doc := wantProblem(t, resp, got, 503); doc.Detail != displacedDetail {
					t.Errorf("readyz: %s", got)
				}
				a.check(t)
			}
			if n := strings.Count(p.Stderr.String(), "put that file back at its path, or run backup"); n != 1 {
				t.Errorf("the log says %d times what to do\n%s", n, p.Stderr)
			}
			if err := tt.putBack(dir); err != nil {
				t.Fatal(err)
			}
			a.create(t, key(1).Contract)
			waitFor(t, "the server is ready", func() bool { return isReady(t, p.URL) })
			a.check(t)
			if n := strings.Count(p.Stderr.String(), "the database file is back at its path"); n != 1 {
				t.Errorf("the log says %d times that the file is back\n%s", n, p.Stderr)
			}
			if err := p.Terminate(t); err != nil {
				t.Error(err)
			}
			checkFileSound(t, dir+"/d/c.db")
			a.base = startProcess(t, nil, "--demo", "--db", dir+"/l.db").URL
			a.check(t)
		})
	}
}

func isReady(t testing.TB, base string) bool {
	t.Helper()
	resp, _ := do(t, http.DefaultClient, "GET", base+"/readyz", nil, "")
	return resp.StatusCode == http.StatusOK
}

// Its only name is gone, and a backup brings back all of it.
func TestBackupSavesAFileThatWasRemoved(t *testing.T) {
	db := shortPath(t)
	p := startProcess(t, nil, "--demo", "--db", db)
	a := newAuthor(t, p.URL)
	a.create(t, key(1).Contract)
	if err := os.Remove(db); err != nil {
		t.Fatal(err)
	}
	backup := filepath.Join(t.TempDir(), "backup")
	if got := run(t, nil, "backup", backup, "--db", db); got.status != 0 {
		t.Fatalf("%+v", got)
	}
	if err := p.Terminate(t); err != nil {
		t.Error(err)
	}
	a.base = startProcess(t, nil, "--demo", "--db", backup).URL
	a.check(t)
}

func TestSocketIsRemovedByItsOwnServerOnly(t *testing.T) {
	slow(t)
	db := shortPath(t)
	first := startProcess(t, nil, "--demo", "--db", db)
	if err := os.Remove(db); err != nil {
		t.Fatal(err)
	}
	// Of the new file, and without a socket, since the first server serves that.
	second := startProcess(t, nil, "--db", db)
	if want := `there is no control socket, so commands cannot use the database while this server runs; fix the cause, or move the database to another directory","err":"` +
		db + ".sock: another process listens on it, perhaps a server whose database was moved, replaced or removed, or somebody else who may write to the directory; stop that process, and start this server again"; !strings.Contains(second.Stderr.String(), want) {
		t.Errorf("no warning %s\n%s", want, second.Stderr)
	}
	wantListed(t, db, "demo", "demo-other") // of the first server
	if err := second.Terminate(t); err != nil {
		t.Error(err)
	}
	wantListed(t, db, "demo", "demo-other")

	if err := os.Remove(db + ".sock"); err != nil {
		t.Fatal(err)
	}
	second = startProcess(t, nil, "--db", db) // with a socket
	c := addClient(t, db)
	if err := first.Terminate(t); err != nil {
		t.Error(err)
	}
	wantListed(t, db, c.ID) // of the second server
	wantSecret(t, second.URL, c, true)
	if err := second.Terminate(t); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(db + ".sock"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the second server has left its socket: %v", err)
	}
}
