package main

// The paths that people give for a database: links, paths of directories and pipes, and paths in
// directories that do not exist.

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
