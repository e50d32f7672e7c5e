package main

// The paths that people give for a database: links, paths of directories and pipes, and paths in
// directories that do not exist. What killed commands leave, and the mode of a file that replaces
// another one.

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// creating are the commands that create a database that does not exist.
func creating(t testing.TB) map[string][]string {
	t.Helper()
	backup := shortPath(t)
	ok(t, backup, "import", absolute(t, contractLines))
	return map[string][]string{
		"client add":      {"client", "add", "--org", demoOrg},
		"import":          {"import", absolute(t, contractLines)},
		"restore":         {"restore", backup},
		"restore --force": {"restore", "--force", backup},
	}
}

func TestDatabaseBehindADanglingLinkIsCreatedAtItsTarget(t *testing.T) {
	commands := creating(t)
	commands["serve"] = nil
	for name, args := range commands {
		for _, link := range []struct{ name, db, target string }{
			{"to a path", "link.db", "%s/real/c.db"},
			{"to a path from its own directory", "link.db", "real/c.db"},
			{"in a directory that is a link", "sub/link.db", "../c.db"}, // from real/sub
			{"to a link", "first.db", "link.db"},
		} {
			t.Run(name+", a link "+link.name, func(t *testing.T) {
				dir := filepath.Dir(shortPath(t))
				if err := os.MkdirAll(filepath.Join(dir, "real", "sub"), 0o700); err != nil {
					t.Fatal(err)
				}
				target := strings.ReplaceAll(link.target, "%s", dir)
				for _, made := range [][2]string{{"sub", "real/sub"}, {"link.db", "real/c.db"}, {link.db, target}} {
					_ = os.Remove(filepath.Join(dir, made[0]))
					if err := os.Symlink(made[1], filepath.Join(dir, made[0])); err != nil {
						t.Fatal(err)
					}
				}
				db := filepath.Join(dir, link.db)
				if args == nil {
					if err := startProcess(t, nil, "--db", db).Terminate(t); err != nil {
						t.Error(err)
					}
				} else {
					ok(t, db, args...)
				}
				if info, err := os.Lstat(filepath.Join(dir, "real", "c.db")); err != nil || info.Mode() != 0o600 {
					t.Errorf("the target of the link is %v, %v", info, err)
				}
				if info, err := os.Lstat(db); err != nil || info.Mode().Type() != fs.ModeSymlink {
					t.Errorf("the link is now %v, %v", info, err)
				}
				wantFiles(t, filepath.Join(dir, "real"), "c.db", "sub")
			})
		}
	}
}

func TestPathsThatLeadToNoFileAreRefusedWithASentence(t *testing.T) {
	commands := creating(t)
	serve := []string{"serve", "--addr", "127.0.0.1:0"}
	existing := map[string][]string{"client list": {"client", "list"}, "export": {"export"}, "check": {"check"}, "compact": {"compact"}}
	dir := filepath.Dir(shortPath(t))
	path := func(name string) string { return filepath.Join(dir, name) }
	err := os.Mkdir(path("dir"), 0o700)
	for from, to := range map[string]string{"astray": path("no/c.db"), "circle": "other", "other": "circle", "to-dir": "dir"} {
		if err == nil {
			err = os.Symlink(to, path(from))
		}
	}
	if err == nil {
		err = syscall.Mkfifo(path("pipe"), 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("n", 300)
	for _, tt := range []struct {
		name, db string
		creating string // what a command says that creates a database
		existing string // what one says that needs a database; "" is the same
	}{
		{"a directory that does not exist", "no/c.db", "create a file in %s/no: no such file or directory; make the directory, or name another file with --db",
			"there is no database %s/no/c.db; name an existing one with --db"},
		{"a link into such a directory", "astray", "create a file in %s/no: no such file or directory; make the directory, or name another file with --db",
			"there is no database %s/astray, which is a link to %[1]s/no/c.db; name an existing one with --db"},
		{"links in a circle", "circle", "stat %s/circle: too many levels of symbolic links; name another file with --db", ""},
		{"a directory", "dir", "%s/dir is not a file; name another file with --db", ""},
		{"a link to a directory", "to-dir", "%s/to-dir is not a file; name another file with --db", ""},
		{"a pipe", "pipe", "%s/pipe is not a file; name another file with --db", ""},
		{"a file as a directory", "file/c.db", "stat %s/file/c.db: not a directory; name another file with --db", ""},
		{"a name that is too long", long, "stat %s/" + long + ": file name too long; name another file with --db", ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if err := os.WriteFile(path("file"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			db := path(tt.db)
			// says returns what a command prints, without the words before the cause.
			says := func(args []string) string {
				got := run(t, nil, append(args, "--db", db)...)
				if got.status != 1 || got.stdout != "" {
					t.Errorf("%q: %+v", args, got)
				}
				said := strings.TrimPrefix(sentence(got.stderr), "energy-contracts: ")
				said = strings.TrimPrefix(said, "create ")
				return strings.TrimPrefix(said, "database "+db+": ")
			}
			want := fmt.Sprintf(tt.creating, dir)
			for name, args := range commands {
				if got := says(args); got != want+"\n" {
					t.Errorf("%s says %q, want %q", name, got, want)
				}
			}
			if got := says(serve); got != want+"\n" {
				t.Errorf("serve says %q, want %q", got, want)
			}
			if tt.existing != "" {
				want = fmt.Sprintf(tt.existing, dir)
			}
			for name, args := range existing {
				if got := strings.TrimSuffix(says(args), "; nothing was changed\n"); strings.TrimSuffix(got, "\n") != want {
					t.Errorf("%s says %q, want %q", name, got, want)
				}
			}
		})
	}
	wantFiles(t, dir, "astray", "circle", "dir", "file", "other", "pipe", "to-dir")
}

func TestEmptyNameOfTheDatabaseIsTheDefault(t *testing.T) {
	cmd := command(t, nil, "check")
	cmd.Dir, cmd.Env = t.TempDir(), append(cmd.Environ(), "ENERGY_CONTRACTS_DB=")
	out, _ := cmd.CombinedOutput()
	if want := "energy-contracts: there is no database energy-contracts.db; name an existing one with --db\n"; string(out) != want {
		t.Errorf("check says %q, want %q", out, want)
	}
}

// leftoverOf returns the name of a temporary file for a destination, in the same directory.
func leftoverOf(path string, number int) string {
	return filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.energy-contracts-%d", filepath.Base(path), number))
}

// startRestore starts "restore -" and returns once it has written what it has read so far, the
// line "half", to its temporary file.
func startRestore(t testing.TB, db string, flags ...string) (cmd *exec.Cmd, stdin io.WriteCloser, temporary string) {
	t.Helper()
	before, _ := filepath.Glob(filepath.Dir(db) + "/.*")
	cmd, stdin, _ = startPiped(t, append(append([]string{"restore"}, flags...), "-", "--db", db)...)
	if _, err := io.WriteString(stdin, "half\n"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the temporary file has the line", func() bool {
		files, _ := filepath.Glob(filepath.Dir(db) + "/.*")
		for _, f := range files {
			if info, err := os.Lstat(f); !slices.Contains(before, f) && err == nil && info.Size() == 5 {
				temporary = f
			}
		}
		return temporary != ""
	})
	return cmd, stdin, temporary
}

func TestKilledCommandLeavesAFileThatTheNextStartRemoves(t *testing.T) {
	db := shortPath(t)
	ok(t, db, "import", absolute(t, contractLines))
	cmd, _, temporary := startRestore(t, db, "--force")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	wantFiles(t, filepath.Dir(db), filepath.Base(temporary), "c.db")
	p := startProcess(t, nil, "--db", db)
	wantFiles(t, filepath.Dir(db), "c.db", "c.db.sock")
	if line := fmt.Sprintf(`"level":"INFO","msg":"removed a temporary file that a killed process left","file":%q,"bytes":5}`, temporary); !strings.Contains(p.Stderr.String(), line) {
		t.Errorf("the log has no %s\n%s", line, p.Stderr)
	}
}

func TestEachCommandRemovesLeftoversOfItsDestinationOnly(t *testing.T) {
	dir := filepath.Dir(shortPath(t))
	db, backup, lines := filepath.Join(dir, "c.db"), filepath.Join(dir, "backup"), filepath.Join(dir, "lines")
	ok(t, db, "import", absolute(t, contractLines))
	ok(t, db, "backup", backup)
	// These files are not leftovers and stay: their names differ, or they are not regular files.
	kept := []string{
		".c.db.energy-contracts-", ".c.db.energy-contracts-1x", ".c.db.energy-contracts-1.old", ".c.db.123", "c.db.energy-contracts-1", ".other.energy-contracts-1",
	}
	for _, name := range kept {
		writeTo(t, filepath.Join(dir, name), []byte("mine"))
	}
	err := errors.Join(os.Mkdir(leftoverOf(db, 2), 0o700), os.Symlink(backup, leftoverOf(db, 3)), syscall.Mkfifo(leftoverOf(db, 4), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{leftoverOf(db, 2), leftoverOf(db, 3), leftoverOf(db, 4), db, backup} {
		kept = append(kept, filepath.Base(path))
	}
	destinations := []string{db, backup, lines}
	for _, tt := range []struct {
		args        []string
		destination string
	}{
		{[]string{"client", "list"}, db},
		{[]string{"import", absolute(t, contractLines)}, db},
		{[]string{"compact"}, db},
		{[]string{"restore", "--force", backup}, db},
		{[]string{"backup", backup}, backup},
		{[]string{"export", lines}, lines},
	} {
		for _, path := range destinations {
			writeTo(t, leftoverOf(path, 1), []byte("left"))
		}
		ok(t, db, tt.args...)
		want := slices.Clone(kept)
		for _, path := range destinations {
			// Those that have the database open in this process remove its leftovers too.
			if path != tt.destination && (path != db || tt.args[0] == "restore") {
				want = append(want, filepath.Base(leftoverOf(path, 1)))
			}
		}
		if exists(lines) {
			want = append(want, filepath.Base(lines))
		}
		slices.Sort(want)
		wantFiles(t, dir, want...)
	}
}

func TestTemporaryFileOfARunningCommandIsKept(t *testing.T) {
	db := shortPath(t)
	backup := shortPath(t)
	ok(t, backup, "import", absolute(t, contractLines))
	first, firstIn, temporary := startRestore(t, db)
	second, secondIn, _ := startRestore(t, db)
	secondIn.Close()
	if err := second.Wait(); second.ProcessState.ExitCode() != 1 {
		t.Errorf("the second one: %v", err)
	}
	addClient(t, db) // makes the database and opens it
	wantFiles(t, filepath.Dir(db), filepath.Base(temporary), "c.db")
	firstIn.Close()
	if err := first.Wait(); first.ProcessState.ExitCode() != 1 {
		t.Errorf("the first one: %v", err)
	}
	wantFiles(t, filepath.Dir(db), "c.db")
}

func TestReplacedDatabaseKeepsItsModeAndGroup(t *testing.T) {
	backup := shortPath(t)
	ok(t, backup, "import", absolute(t, contractLines))
	type placed struct {
		owner [2]uint32
		mode  fs.FileMode
	}
	own := [2]uint32{uint32(os.Geteuid()), uint32(os.Getegid())}
	for _, tt := range []struct {
		name      string
		as        []string // the wrapper of the command
		was, want placed
		root      bool // only root can make this
	}{
		{"for its group", nil, placed{own, 0o640}, placed{own, 0o640}, false},
		{"for nobody else", nil, placed{own, 0o600}, placed{own, 0o600}, false},
		{"for everybody", nil, placed{own, 0o664}, placed{own, 0o664}, false},
		{"with a set-user-ID and a sticky bit", nil, placed{own, 0o640 | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky}, placed{own, 0o640}, false},
		{"of another user", nil, placed{[2]uint32{nobody, nobody}, 0o640}, placed{[2]uint32{nobody, nobody}, 0o640}, true},
		{"of another group", nil, placed{[2]uint32{0, nobody}, 0o660}, placed{[2]uint32{0, nobody}, 0o660}, true},
		{"of a group that the user is not in", asNobody(t), placed{[2]uint32{nobody, 0}, 0o664}, placed{[2]uint32{nobody, nobody}, 0o604}, true},
		{"of another user, and writable for the group", asNobody(t), placed{[2]uint32{1, nobody}, 0o660}, placed{[2]uint32{nobody, nobody}, 0o660}, true},
	} {
		if tt.root && os.Geteuid() != 0 {
			continue
		}
		for _, args := range [][]string{{"compact"}, {"restore", "--force", backup}} {
			t.Run(tt.name+", "+args[0], func(t *testing.T) {
				db := shortPath(t)
				ok(t, db, "import", absolute(t, contractLines))
				if tt.root {
					err := errors.Join(os.Chown(filepath.Dir(db), nobody, nobody), os.Chown(db, int(tt.was.owner[0]), int(tt.was.owner[1])),
						os.Chmod(filepath.Dir(backup), 0o755), os.Chmod(backup, 0o644))
					if err != nil {
						t.Fatal(err)
					}
				}
				if err := os.Chmod(db, tt.was.mode); err != nil {
					t.Fatal(err)
				}
				if got := run(t, tt.as, append(args, "--db", db)...); got.status != 0 || got.stderr != "" {
					t.Fatalf("%+v", got)
				}
				info, err := os.Stat(db)
				if err != nil {
					t.Fatal(err)
				}
				if got := (placed{ownerOf(t, db), info.Mode()}); got != tt.want {
					t.Errorf("got %v, want %v", got, tt.want)
				}
			})
		}
	}
}

func TestNewDatabaseAndBackupAreTheOwnersOnly(t *testing.T) {
	db := shortPath(t)
	ok(t, db, "import", absolute(t, contractLines))
	if err := os.Chmod(db, 0o640); err != nil {
		t.Fatal(err)
	}
	backup, restored := db+".backup", db+".restored"
	writeTo(t, backup, []byte("an older one"))
	if err := os.Chmod(backup, 0o644); err != nil { // anybody may have put it there
		t.Fatal(err)
	}
	ok(t, db, "backup", backup)
	ok(t, restored, "restore", backup)
	wantMode(t, backup)
	wantMode(t, restored)
}
