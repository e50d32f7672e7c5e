//go:build linux

package e2e

// These tests check what the commands say when a file system lacks something or is full. strace
// makes the system calls fail that a file system does not have.

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"energy-contracts/internal/servicetest"
)

func TestWhatAFileSystemLacksIsNamed(t *testing.T) {
	needTool(t, "strace")
	const local = "; use a directory on a local file system"
	for _, tt := range []struct {
		fault, of string // of is the path whose calls fail, if it is not ""
		args      string
		want      string // "" is success
	}{
		{"flock:error=ENOLCK", "", "serve --addr 127.0.0.1:0 --db DIR/new.db", "create database DIR/new.db: the file system of DIR has no file locks (no locks available)" + local},
		{"flock:error=ENOLCK", "", "serve --addr 127.0.0.1:0 --db DIR/old.db", "database DIR/old.db: the file system of DIR has no file locks (no locks available)" + local},
		{"flock:error=ENOLCK", "", "client list --db DIR/old.db", "database DIR/old.db: the file system of DIR has no file locks (no locks available)" + local},
		{"flock:error=ENOLCK", "", "check --db DIR/old.db", "database DIR/old.db: the file system of DIR has no file locks (no locks available)" + local},
		{"flock:error=ENOLCK", "", "restore DIR/old.db --db DIR/new.db", "nothing was restored: database DIR/old.db: the file system of DIR has no file locks (no locks available)" + local},
		{"flock:error=EOPNOTSUPP", "", "client list --db DIR/old.db", "database DIR/old.db: the file system of DIR has no file locks (operation not supported)" + local},
		{"linkat:error=EPERM", "", "client add --org " + demoOrg + " --db DIR/new.db", "create database DIR/new.db: the file system of DIR has no hard links (operation not permitted)" + local},
		{"linkat:error=EPERM", "", "restore DIR/old.db --db DIR/new.db", "the file system of DIR has no hard links (operation not permitted)" + local},
		{"mmap:error=ENODEV", "DIR/old.db", "client list --db DIR/old.db", "database DIR/old.db: the file system of DIR has no memory maps (no such device)" + local},
		{"mmap:error=ENODEV", "DIR/old.db", "check --db DIR/old.db", "database DIR/old.db: the file system of DIR has no memory maps (no such device)" + local},
		{"fsync:error=EINVAL", "DIR", "client add --org " + demoOrg + " --db DIR/new.db", "create database DIR/new.db: the file system of DIR has no sync of directories (a directory cannot be synced)" + local},
		{"fsync:error=EINVAL", "DIR", "restore DIR/old.db --db DIR/new.db", "the file system of DIR has no sync of directories (a directory cannot be synced)" + local},
		{"fsync:error=EINVAL", "DIR", "backup DIR/copy.db --db DIR/old.db", ""},
	} {
		t.Run(tt.fault+", "+strings.ReplaceAll(tt.args, "DIR/", ""), func(t *testing.T) {
			dir := t.TempDir()
			addClient(t, filepath.Join(dir, "old.db"))
			in := strings.NewReplacer("DIR", dir)
			var options []string
			if tt.of != "" {
				options = []string{"-P", in.Replace(tt.of)}
			}
			call, _, _ := strings.Cut(tt.fault, ":")
			out := filepath.Join(t.TempDir(), "trace")
			got := run(t, straceOf(call, options, out, tt.fault), strings.Fields(in.Replace(tt.args))...)
			if trace := readFile(t, out); !strings.Contains(trace, "(INJECTED)") {
				t.Errorf("strace injected no fault\n%s", trace)
			}
			said := withoutLog(got.stderr)
			if tt.want == "" && (got.status != 0 || said != "") ||
				tt.want != "" && (got.status != 1 || said != "energy-contracts: "+in.Replace(tt.want)+"\n") {
				t.Errorf("%+v, want %q", got, in.Replace(tt.want))
			}
			if _, err := os.Stat(filepath.Join(dir, "new.db")); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("there is a new database: %v", err)
			}
		})
	}
}

// withoutLog returns stderr without lines of the log.
func withoutLog(stderr string) string {
	return regexp.MustCompile(`(?m)^\{.*\n`).ReplaceAllString(stderr, "")
}

func TestFullFileSystemIsNamed(t *testing.T) {
	disk := smallDisk(t, "16k")
	db := filepath.Join(t.TempDir(), "test.db")
	ok(t, db, "import", servicetest.ManyLines(t, 100, 500))
	const other = ": no space left on device; free some space, or name another file"
	for args, want := range map[string]string{
		"serve --addr 127.0.0.1:0 --db DISK/new.db":         "create database DISK/new.db: write DISK/.new.db.N" + other + " with --db",
		"client add --org " + demoOrg + " --db DISK/new.db": "create database DISK/new.db: write DISK/.new.db.N" + other + " with --db",
		"backup --db DB DISK/backup":                        "write DISK/.backup.N" + other,
		"export --db DB DISK/export":                        "write DISK/.export.N" + other,
		"restore DB --db DISK/new.db":                       "copy DB: write DISK/.new.db.N" + other + " with --db",
	} {
		in := strings.NewReplacer("DISK", disk, "DB", db)
		got := run(t, nil, strings.Fields(in.Replace(args))...)
		said := regexp.MustCompile(`\.energy-contracts-\d+:`).ReplaceAllString(withoutLog(got.stderr), ".N:")
		if got.status != 1 || said != "energy-contracts: "+in.Replace(want)+"\n" {
			t.Errorf("%s: %+v, want %q", args, got, want)
		}
		if left, err := os.ReadDir(disk); err != nil || len(left) > 0 {
			t.Errorf("%s left behind: %v %v", args, left, err)
		}
	}
}

// No database can be open on such a file system, so the file is none that is in use.
func TestExportReplacesAFileOnAFileSystemWithoutLocks(t *testing.T) {
	needTool(t, "strace")
	db := shortPath(t)
	startProcess(t, nil, "--demo", "--db", db) // has the database open, so that only the export is locked
	file, out := filepath.Join(t.TempDir(), "out.jsonl"), filepath.Join(t.TempDir(), "trace")
	writeTo(t, file, []byte("an older one"))
	got := run(t, straceOf("flock", nil, out, "flock:error=ENOLCK"), "export", file, "--db", db)
	if got != (result{}) || readFile(t, file) != ok(t, db, "export") {
		t.Errorf("%+v, the file is\n%s", got, head(readFile(t, file)))
	}
	if trace := readFile(t, out); !strings.Contains(trace, "(INJECTED)") {
		t.Errorf("strace injected no fault\n%s", trace)
	}
}
