package main

// Tests of the commands backup, restore and compact, with a server running and without one.

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"energy-contracts/internal/servicetest"

	"go.etcd.io/bbolt"
)

func TestBackupIsACopyOfTheDatabase(t *testing.T) {
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		ok(t, db, "import", absolute(t, contractLines))
		c := addClient(t, db)
		dir := t.TempDir()
		backup := filepath.Join(dir, "backup.db")
		if got := ok(t, db, "backup", backup); got != "" {
			t.Errorf("backup printed %q", got)
		}
		wantMode(t, backup)
		wantFiles(t, dir, "backup.db")
		if got := ok(t, db, "backup", "-"); got != readFile(t, backup) {
			t.Error("the backup on standard output differs from the one in a file")
		}
		// From here on, only the backup is used.
		if got, want := ok(t, backup, "check"), backup+" is sound: 4 contracts, 1 client, "; !strings.HasPrefix(got, want) {
			t.Errorf("check printed %q, want %q", got, want)
		}
		wantExport(t, backup, readFile(t, contractLines))
		p := startProcess(t, nil, "--db", backup)
		wantSecret(t, p.URL, c, true)

		// A backup replaces an older file, also one of another user, and a symbolic link
		// instead of the file it points to.
		ok(t, db, "client", "remove", c.ID)
		elsewhere := filepath.Join(t.TempDir(), "elsewhere")
		again, link := filepath.Join(dir, "again.db"), filepath.Join(dir, "link.db")
		for _, name := range []string{elsewhere, again} {
			if err := os.WriteFile(name, []byte("an older one"), 0o644); err != nil {
				t.Fatal(err)
			}
			if os.Getuid() == 0 {
				if err := os.Chown(name, 65534, 65534); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := os.Symlink(elsewhere, link); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{again, link} {
			ok(t, db, "backup", name)
			wantMode(t, name)
			if owner := ownerOf(t, name); owner[0] != uint32(os.Getuid()) {
				t.Errorf("%s is owned by %v", name, owner)
			}
			wantListed(t, name)
		}
		if got := readFile(t, elsewhere); got != "an older one" {
			t.Errorf("the target of the link is now %q", head(got))
		}
	})
}

func TestBackupRefusesWrongDestinations(t *testing.T) {
	slow(t)
	t.Parallel()
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		ok(t, db, "import", absolute(t, contractLines))
		dir := filepath.Dir(db)
		other := shortPath(t)
		startProcess(t, nil, "--db", other)
		pipe := filepath.Join(dir, "pipe")
		if err := syscall.Mkfifo(pipe, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, tt := range []struct{ name, file, want string }{
			{"the database itself", db, db + " is a database in use, so it was not replaced; name another file, or stop the process that uses it"},
			{"another server's", other, other + " is a database in use, so it was not replaced; name another file, or stop the process that uses it"},
			{"a pipe", pipe, pipe + " is not a file; name another file"},
			{"a directory", dir, dir + " is not a file; name another file"},
			{"in a directory that does not exist", filepath.Join(dir, "no", "b.db"), "create a file in " + filepath.Join(dir, "no") + ": no such file or directory; make the directory, or name another file"},
		} {
			refusedCommand(t, db, tt.want, "backup", tt.file)
		}
		wantExport(t, db, readFile(t, contractLines))
		if info, err := os.Lstat(pipe); err != nil || info.Mode().Type() != fs.ModeNamedPipe {
			t.Errorf("the pipe is %v, %v", info, err)
		}
	})
}

func TestCommandsNeedADatabase(t *testing.T) {
	db := shortPath(t)
	for _, args := range [][]string{{"backup", "x"}, {"backup", "-"}, {"check"}, {"compact"}, {"export"}, {"export", "x"}} {
		refusedCommand(t, db, "there is no database "+db+"; name an existing one with --db", args...)
	}
	wantFiles(t, filepath.Dir(db))
}

// A backup must not keep its transaction open while a slow client reads it: a commit that
// must grow the file remaps it, and bbolt remaps only when no read transaction is open.
func TestBackupForASlowClientDoesNotBlockWriters(t *testing.T) {
	slow(t)
	db := shortPath(t)
	s := startOn(t, db, "--demo", "--metrics-addr", "127.0.0.1:0")
	l := newAuthor(t, s.url)
	for i := range 8 { // more than the socket's buffers hold
		l.create(t, key(i).Contract)
	}
	before := l.list(t)
	conn, err := net.Dial("unix", controlPath(db))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /backup HTTP/1.0\r\nHost: control\r\n\r\n")
	begin := make([]byte, len("HTTP/1.0 200 OK\r\n"))
	if _, err := io.ReadFull(conn, begin); err != nil || string(begin) != "HTTP/1.0 200 OK\r\n" {
		t.Fatalf("%q, %v", begin, err)
	}
	for i := range 40 {
		l.create(t, key(100+i).Contract)
	}
	if open := metric(t, scrape(t, s.log.String()), "energy_contracts_database_open_read_transactions"); open != "0" {
		t.Errorf("%s transactions are open while the backup is read", open)
	}
	wantFiles(t, filepath.Dir(db), "c.db", "c.db.sock")
	response, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	_, copied, _ := bytes.Cut(response, []byte("\r\n\r\n"))
	backup := writeFile(t, copied)
	again := startOn(t, backup, "--demo")
	if got := newAuthor(t, again.url).list(t); got != before {
		t.Errorf("the backup has %s\nwant the contracts when it began\n%s", head(got), head(before))
	}
	l.check(t)
}

// A snapshot fails while the database must be reopened after a failed commit. Otherwise a
// disk that fails during a long copy would block all readers and writers until the copy
// ends.
func TestBackupGivesWayToReopeningAfterAFailedCommit(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	s.reopenWanted.Store(true)
	if _, _, err := s.Snapshot(t.Context()); !errors.Is(err, ErrUnavailable) {
		t.Errorf("%v, want %v", err, ErrUnavailable)
	}
	s.reopenWanted.Store(false)
	f, _, err := s.Snapshot(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
}

// Two contracts are written in turn. A backup is a consistent snapshot, so the second is
// never ahead of the first in it, and at most one write behind.
func TestBackupIsAConsistentSnapshot(t *testing.T) {
	db := shortPath(t)
	s := startOn(t, db, "--demo")
	c := client(s.url, "demo", "demo-secret")
	url := contractsURL(s.url, demoOrg, demoUser) + "/"
	second := string(key(2).Contract)
	do(t, c, "PUT", url+second, with(jsonBody, "If-None-Match", "*"), `{"supplier":"0"}`)
	do(t, c, "PUT", url+demoContract, jsonBody, `{"supplier":"0"}`)
	stop := make(chan struct{})
	var writer sync.WaitGroup
	defer writer.Wait()
	defer close(stop)
	writer.Go(func() {
		for n := 1; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			for _, id := range []string{demoContract, second} {
				if resp, got := do(t, c, "PUT", url+id, jsonBody, fmt.Sprintf(`{"supplier":"%d"}`, n)); resp.StatusCode != 200 {
					t.Errorf("PUT: %s\n%s", resp.Status, got)
					return
				}
			}
		}
	})
	last := -1
	for round := range 10 {
		backup := filepath.Join(t.TempDir(), "b.db")
		ok(t, db, "backup", backup)
		suppliers := map[string]int{}
		for line := range strings.Lines(ok(t, backup, "export", "--org", demoOrg, "--user", demoUser)) {
			var c struct {
				ID       string
				Supplier string
			}
			if err := json.Unmarshal([]byte(line), &c); err != nil {
				t.Fatal(err)
			}
			suppliers[c.ID], _ = strconv.Atoi(c.Supplier)
		}
		first, second := suppliers[demoContract], suppliers[second]
		if first != second && first != second+1 || first < last {
			t.Errorf("backup %d has %d and %d, the previous backup had %d", round, first, second, last)
		}
		last = first
	}
	if last < 1 {
		t.Error("nothing was written during the backups")
	}
}

func TestBackupOfADatabaseWithAFaultIsRefused(t *testing.T) {
	besideAndWithoutBroken(t, func(t *testing.T, db string, id string) {
		backup := filepath.Join(t.TempDir(), "b.db")
		if err := os.WriteFile(backup, []byte("an older one"), 0o600); err != nil {
			t.Fatal(err)
		}
		refusedCommand(t, db, "database "+db+" has 1 fault, which the check command lists; the first is: contracts \""+id+"\": stored value fails its checksum; nothing was written to "+backup, "backup", backup)
		if got := readFile(t, backup); got != "an older one" {
			t.Errorf("the older file is now %q", head(got))
		}
	})
}

// besideAndWithoutBroken runs test twice, with a server running and without one, on a
// database in which the contract with the key id has a wrong checksum.
func besideAndWithoutBroken(t *testing.T, test func(t *testing.T, db, id string)) {
	t.Helper()
	for _, up := range []bool{true, false} {
		t.Run(fmt.Sprintf("server %v", up), func(t *testing.T) {
			db := shortPath(t)
			ok(t, db, "import", absolute(t, contractLines))
			id := demoOrg + "/" + demoUser + "/" + demoContract
			editBolt(t, db, func(tx *bbolt.Tx) error {
				b := tx.Bucket(bucketContracts)
				value := bytes.Clone(b.Get([]byte(id)))
				value[len(value)-2] ^= 1
				return b.Put([]byte(id), value)
			})
			if up {
				startProcess(t, nil, "--db", db)
			}
			test(t, db, id)
		})
	}
}

func TestRestorePutsABackupInPlace(t *testing.T) {
	source := shortPath(t)
	ok(t, source, "import", absolute(t, contractLines))
	c := addClient(t, source)
	backup := filepath.Join(t.TempDir(), "b.db")
	ok(t, source, "backup", backup)

	t.Run("where no database exists", func(t *testing.T) {
		db := shortPath(t)
		ok(t, db, "restore", backup)
		wantMode(t, db)
		wantFiles(t, filepath.Dir(db), "c.db")
		p := startProcess(t, nil, "--db", db)
		wantSecret(t, p.URL, c, true)
	})
	t.Run("from standard input", func(t *testing.T) {
		db := shortPath(t)
		cmd := command(t, nil, "restore", "--db", db, "-")
		cmd.Stdin = strings.NewReader(readFile(t, backup))
		if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
			t.Fatalf("%v\n%s", err, out)
		}
		wantExport(t, db, readFile(t, contractLines))
	})
	// A file of bbolt is longer than it must be, and may be on a disk with nothing but zeros after it.
	t.Run("and no more than its pages", func(t *testing.T) {
		content, tail := readFile(t, backup), strings.Repeat("\x00", 20<<20)
		long := writeFile(t, []byte(content))
		if err := os.Truncate(long, 1<<40); err != nil {
			t.Fatal(err)
		}
		for _, file := range []string{long, "-"} {
			db := shortPath(t)
			cmd, stdin, stderr := startPiped(t, "restore", "--db", db, file)
			if file == "-" {
				if _, err := io.WriteString(stdin, content+tail); err != nil {
					t.Errorf("whoever writes to the pipe gets %v", err)
				}
			}
			stdin.Close()
			if err := cmd.Wait(); err != nil {
				t.Fatalf("%v\n%s", err, stderr)
			}
			wantExport(t, db, readFile(t, contractLines))
			if info, err := os.Stat(db); err != nil || info.Size() > 1<<20 {
				t.Errorf("it has %d bytes, %v; the backup has %d", info.Size(), err, len(content))
			}
		}
	})
	t.Run("over another only with --force", func(t *testing.T) {
		db := shortPath(t)
		addClient(t, db)
		if os.Getuid() == 0 { // the file of a service is another user's, and must stay so
			if err := os.Chown(db, 65534, 65534); err != nil {
				t.Fatal(err)
			}
		}
		owner := ownerOf(t, db)
		before := readFile(t, db)
		refusedCommand(t, db, db+" already exists; use --force to replace it", "restore", backup)
		if readFile(t, db) != before {
			t.Error("restore without --force changed the file")
		}
		ok(t, db, "restore", "--force", backup)
		wantMode(t, db)
		if now := ownerOf(t, db); now != owner {
			t.Errorf("the owner is %v, was %v", now, owner)
		}
		wantListed(t, db, c.ID)
		wantFiles(t, filepath.Dir(db), "c.db")
	})
	t.Run("over a broken one, through a link", func(t *testing.T) {
		db := writeFile(t, []byte("no database at all"))
		link := shortPath(t)
		if err := os.Symlink(db, link); err != nil {
			t.Fatal(err)
		}
		ok(t, link, "restore", "--force", backup)
		wantListed(t, db, c.ID)
		if info, err := os.Lstat(link); err != nil || info.Mode().Type() != fs.ModeSymlink {
			t.Errorf("the link is %v, %v", info, err)
		}
	})
	t.Run("beside the socket left by a crash", func(t *testing.T) {
		db := shortPath(t)
		startProcess(t, nil, "--db", db).Kill(t)
		ok(t, db, "restore", "--force", backup)
		wantListed(t, db, c.ID)
	})
}

func TestRestoreIsRefused(t *testing.T) {
	slow(t)
	source := shortPath(t)
	ok(t, source, "import", absolute(t, contractLines))
	backup := filepath.Join(t.TempDir(), "b.db")
	ok(t, source, "backup", backup)
	t.Run("while a server runs", func(t *testing.T) {
		db := shortPath(t)
		p := startProcess(t, nil, "--db", db)
		c := addClient(t, db)
		refusedCommand(t, db, "a server has "+db+" open; stop it first", "restore", "--force", backup)
		refusedCommand(t, db, "a server has "+db+" open; stop it first", "restore", backup)
		wantSecret(t, p.URL, c, true)
		// Without its socket, the server is still recognized by its lock on the file.
		if err := os.Remove(db + ".sock"); err != nil {
			t.Fatal(err)
		}
		refusedCommand(t, db, db+" is a database in use, so it was not replaced; name another file, or stop the process that uses it", "restore", "--force", backup)
		wantSecret(t, p.URL, c, true)
	})
	sound := readFile(t, backup)
	half := writeFile(t, []byte(sound[:len(sound)/2]))
	none := writeFile(t, []byte("no database at all, but longer than nothing"))
	var compressed bytes.Buffer
	w := gzip.NewWriter(&compressed)
	if _, err := io.WriteString(w, sound); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	zipped := writeFile(t, compressed.Bytes())
	faulty := writeFile(t, []byte(sound))
	editBolt(t, faulty, func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketContracts).Put([]byte("a/b"), withChecksum([]byte("a/b"), []byte("{}")))
	})
	missing := filepath.Join(t.TempDir(), "none.db")
	for _, tt := range []struct{ name, file, want string }{
		{"of half a file", half, fmt.Sprintf("nothing was restored: database %s: is truncated: it has %d bytes, but its meta page requires %d; restore a backup", half, len(sound)/2, len(sound))},
		{"of no database", none, "nothing was restored: database " + none + ": is not a database, or both its meta pages are broken; restore a backup, or name another file"},
		{"of a compressed one", zipped, "nothing was restored: database " + zipped + ": is compressed with gzip; decompress it and restore it again"},
		{"of a database with a fault", faulty, "nothing was restored: database " + faulty + " has 1 fault, which the check command lists; the first is: contracts \"a/b\": the key is not three UUIDs in lower case, separated by slashes"},
		{"of nothing", missing, "open " + missing + ": no such file or directory; name a file that this account may read, or - for standard input"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			db := shortPath(t)
			refusedCommand(t, db, tt.want, "restore", tt.file)
			wantFiles(t, filepath.Dir(db))
			c := addClient(t, db)
			refusedCommand(t, db, tt.want, "restore", "--force", tt.file)
			wantListed(t, db, c.ID)
			wantFiles(t, filepath.Dir(db), "c.db")
		})
	}
}

// A wrong input may be larger than the disk.
func TestRestoreLooksAtItsInputAsItArrives(t *testing.T) {
	source := shortPath(t)
	ok(t, source, "import", servicetest.ManyLines(t, 1000, 500))
	editBolt(t, source, func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketMeta).Put([]byte(formatKey), []byte("other/1"))
	})
	other := readFile(t, source)
	const noDatabase = "is not a database, or both its meta pages are broken; restore a backup, or name another file"
	t.Run("from standard input", func(t *testing.T) {
		for name, tt := range map[string]struct{ start, want string }{
			"text":           {strings.Repeat("no database at all ", 10_000), noDatabase},
			"zeros":          {strings.Repeat("\x00", 200<<10), noDatabase},
			"a file of gzip": {gzipMagic + strings.Repeat("x", 200<<10), "is compressed with gzip; decompress it and restore it again"},
		} {
			t.Run(name, func(t *testing.T) {
				db := shortPath(t)
				cmd, stdin, stderr := startPiped(t, "restore", "--db", db, "-")
				_, _ = io.WriteString(stdin, tt.start) // and no end
				_ = cmd.Wait()
				if want := "energy-contracts: nothing was restored: database -: " + tt.want + "\n"; cmd.ProcessState.ExitCode() != 1 || stderr.String() != want {
					t.Errorf("%v\n%s, want %s", cmd.ProcessState, stderr, want)
				}
				wantFiles(t, filepath.Dir(db))
			})
		}
	})
	// The limit of the file size is smaller than the file, so the file cannot be copied whole.
	t.Run("from a file", func(t *testing.T) {
		small := []string{"sh", "-c", `ulimit -f 256 && exec "$@"`, "sh"}
		for name, tt := range map[string]struct{ content, want string }{
			"text":                          {strings.Repeat("no database at all ", 100_000), noDatabase},
			"a database of another program": {other, "is a bbolt database, but not one of this program, or its root page is broken; name another file, or restore a backup"},
		} {
			t.Run(name, func(t *testing.T) {
				file := writeFile(t, []byte(tt.content))
				got := run(t, small, "restore", file, "--db", shortPath(t))
				if want := (ran{"", "energy-contracts: nothing was restored: database " + file + ": " + tt.want + "\n", 1}); got != want {
					t.Errorf("%+v\nwant %+v", got, want)
				}
			})
		}
	})
}

func TestCompactRemovesFreePages(t *testing.T) {
	slow(t)
	db := shortPath(t)
	p := startProcess(t, nil, "--demo", "--db", db)
	l := newAuthor(t, p.URL)
	for i := range 30 {
		l.create(t, key(i).Contract)
	}
	for i := range 30 {
		l.remove(t, key(i).Contract)
	}
	before := readFile(t, db)
	t.Run("not beside a server", func(t *testing.T) {
		refusedCommand(t, db, "database "+db+": another process has it open; stop that one (a running server?) or name another file with --db; nothing was changed", "compact")
		if readFile(t, db) != before {
			t.Error("the file changed")
		}
	})
	if err := p.Terminate(t); err != nil {
		t.Fatal(err)
	}
	if os.Getuid() == 0 { // the file of a service is another user's, and must stay so
		if err := os.Chown(db, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	owner := ownerOf(t, db)
	contents, clients := ok(t, db, "export"), ok(t, db, "client", "list")
	var was, is int
	printed := ok(t, db, "compact")
	if _, err := fmt.Sscanf(printed, "compacted "+db+" from %d to %d bytes\n", &was, &is); err != nil || was < 1<<20 || is > 128<<10 {
		t.Errorf("compact printed %q, %v", printed, err)
	}
	if info, err := os.Stat(db); err != nil || info.Size() != int64(is) {
		t.Errorf("stat: %v, %v; want a size of %d", info, err, is)
	}
	wantMode(t, db)
	wantFiles(t, filepath.Dir(db), "c.db")
	if now := ownerOf(t, db); now != owner {
		t.Errorf("the owner is %v, was %v", now, owner)
	}
	if got := ok(t, db, "check"); !strings.Contains(got, " is sound: 5 contracts, 2 clients, ") {
		t.Errorf("check printed %q", got)
	}
	wantExport(t, db, contents)
	if got := ok(t, db, "client", "list"); got != clients {
		t.Errorf("clients: %s\nwere %s", got, clients)
	}
	again := startProcess(t, nil, "--demo", "--db", db)
	l.base = again.URL
	// The token from before the compaction is still valid.
	l.check(t)
}

// ownerOf returns the user and group ID of the file at path.
func ownerOf(t testing.TB, path string) [2]uint32 {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	s := info.Sys().(*syscall.Stat_t)
	return [2]uint32{s.Uid, s.Gid}
}

func TestCompactLeavesADatabaseWithAFaultAlone(t *testing.T) {
	db := shortPath(t)
	ok(t, db, "import", absolute(t, contractLines))
	editBolt(t, db, func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketContracts).Put([]byte("a/b"), withChecksum([]byte("a/b"), []byte("{}")))
	})
	before := readFile(t, db)
	refusedCommand(t, db, "database "+db+" has 1 fault, which the check command lists; the first is: contracts \"a/b\": the key is not three UUIDs in lower case, separated by slashes; nothing was changed", "compact")
	if readFile(t, db) != before {
		t.Error("the file changed")
	}
	wantFiles(t, filepath.Dir(db), "c.db")
}

// A process that waits for the lock of a file while that file is replaced must open the
// new file, for the lock of the old one protects nothing.
func TestProcessThatWaitsDuringACompactionOpensTheNewFile(t *testing.T) {
	db := shortPath(t)
	ok(t, db, "import", absolute(t, contractLines))
	held, err := openLocked(db, os.O_RDWR)
	if err != nil {
		t.Fatal(err)
	}
	cmd := command(t, nil, "client", "add", "--org", demoOrg, "--db", db)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the command has the file open", func() bool {
		files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", cmd.Process.Pid))
		for _, f := range files {
			if to, _ := os.Readlink(f); to == db {
				return true
			}
		}
		return len(files) == 0 // no /proc: nothing to wait for
	})
	f, err := createAtomic(db)
	if err != nil {
		t.Fatal(err)
	}
	defer f.discard()
	if _, err := io.Copy(f, held); err != nil {
		t.Fatal(err)
	}
	if err := f.replace(); err != nil {
		t.Fatal(err)
	}
	held.Close()
	if err := cmd.Wait(); err != nil {
		t.Fatalf("%v\n%s", err, &out)
	}
	wantListed(t, db, addedClient(t, out.String()).ID)
}
