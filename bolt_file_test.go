package main

// Files that are not a database, or a broken one: the service either refuses them with a clear
// error and leaves them as they were, or serves them without a wrong response.

import (
	"bytes"
	"encoding/binary"
	"energy-contracts/internal/servicetest"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// someContracts is the number of contracts in soundFile, which fill several pages.
const someContracts = 200

func someDocument(i int) string {
	return fmt.Sprintf(`{"energy_contract_type":null,"energy_prices":[],"id":"%s","building":null,"meter_id":"%d","supplier":"%s","currency_energy_price":null,"energy_price_includes_external_components":null}`,
		key(i).Contract, i, strings.Repeat(fmt.Sprint(i%10), 20))
}

// soundFile returns the content of a sound database.
func soundFile(t testing.TB) []byte {
	t.Helper()
	return withSomeContracts(t, newPath(t))
}

// withSomeContracts adds someContracts to a database and returns its content.
func withSomeContracts(t testing.TB, path string) []byte {
	t.Helper()
	s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	documents := map[Key][]byte{}
	for i := range someContracts {
		documents[key(i)] = []byte(someDocument(i))
	}
	if err := errors.Join(addClientAnd(s, documents), s.Close()); err != nil {
		t.Fatal(err)
	}
	return trimmed(t, path)
}

// addClientAnd stores a client and the documents in one transaction.
func addClientAnd(s *Store, documents map[Key][]byte) error {
	return s.update(0, func(tx *bbolt.Tx) error {
		err := putClient(tx, Client{ID: "a", Org: demoOrg, Scopes: Scopes{Read: true}})
		for k, doc := range documents {
			err = errors.Join(err, put(tx, bucketContracts, k.bytes(), withHead(k.bytes(), nil, doc, versionOf(doc))))
		}
		return err
	})
}

// trimmed returns the content of a database without the pages at its end that bbolt has
// allocated and not used yet.
func trimmed(t testing.TB, path string) []byte {
	t.Helper()
	metas, err := readMetas(open(t, path))
	if err != nil {
		t.Fatal(err)
	}
	return []byte(readFile(t, path))[:int(currentMeta(metas).pages)*pageSize]
}

// pageSize is the page size of a new bbolt file.
var pageSize = os.Getpagesize()

// changed returns a copy of a file with other bytes at an offset.
func changed(file []byte, at int, with []byte) []byte {
	c := bytes.Clone(file)
	copy(c[at:], with)
	return c
}

// boltFile returns the content of a bbolt file of another program.
func boltFile(t testing.TB, bucket, key, value string) []byte {
	t.Helper()
	path := newPath(t)
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket([]byte(bucket))
		if err != nil {
			return err
		}
		return b.Put([]byte(key), []byte(value))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	return []byte(readFile(t, path))
}

func TestFileThatIsNoDatabaseOfOursIsLeftAlone(t *testing.T) {
	sound := soundFile(t)
	zeros := make([]byte, pageSize)
	cases := []struct {
		name    string
		content []byte
		want    string
	}{
		{"empty", nil, "is empty"},
		{"text", []byte("energy contracts\n"), "is not a database"},
		{"a large text", bytes.Repeat([]byte("energy contracts\n"), 10000), "is not a database"},
		{"zeros", make([]byte, 1<<16), "is not a database"},
		{"another program's", boltFile(t, "things", "a", "b"), "not one of this program"},
		{"another program's with a like name", boltFile(t, "meta", "format", "energy-prices/1"), "not one of this program"},
		{"a newer version's", boltFile(t, "meta", "format", "energy-contracts/3"), "reads version 2 and earlier; use the program that wrote it"},
		{"one without contracts", boltFile(t, "meta", "format", "energy-contracts/2"), "is broken: it has no bucket contracts; restore a backup"},
		{"both meta pages broken", changed(changed(sound, 56, zeros[:8]), pageSize+56, zeros[:8]), "both its meta pages are broken"},
	}
	pages := len(sound) / pageSize
	for n := 1; n < pages; n++ {
		cases = append(cases, struct {
			name    string
			content []byte
			want    string
		}{fmt.Sprintf("cut off after %d of %d pages", n, pages), sound[:n*pageSize], "is truncated"})
	}
	for _, tt := range cases {
		t.Run(tt.name, func(t *testing.T) {
			path := writeFile(t, tt.content)
			s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
			if err == nil {
				s.Close()
				t.Fatal("opened")
			}
			if !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %q, want %q in it, and the file's name", err, tt.want)
			}
			if after := readFile(t, path); after != string(tt.content) {
				t.Error("the file has changed")
			}
		})
	}
	t.Run("and the program says so", func(t *testing.T) {
		path := writeFile(t, nil)
		if got := fails(t, "serve", "--db", path); !strings.Contains(got, path+": is empty, so it is not a database; remove it") {
			t.Errorf("an empty file: %q", got)
		}
	})
}

func open(t testing.TB, path string) *os.File {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func TestOneBrokenMetaPageIsAWarning(t *testing.T) {
	sound := soundFile(t)
	metas, err := readMetas(open(t, writeFile(t, sound)))
	if err != nil {
		t.Fatal(err)
	}
	newer := 0
	if metas[1].txid > metas[0].txid {
		newer = 1
	}
	for broken := range 2 {
		t.Run(fmt.Sprintf("page %d", broken), func(t *testing.T) {
			log := &lockedBuffer{}
			path := writeFile(t, changed(sound, broken*pageSize+pageHeaderSize+40, []byte{0xff}))
			s, err := Open(path, time.Now, slog.New(slog.NewTextHandler(log, nil)))
			if err != nil {
				t.Fatal(err)
			}
			if !strings.Contains(log.String(), "one of the two meta pages of the database is broken") {
				t.Errorf("no warning\n%s", log)
			}
			if broken != newer {
				wantDocument(t, s, key(7), someDocument(7))
			} else if _, _, err := s.Get(nil, key(7), always); !errors.Is(err, ErrNotFound) { // the state before
				t.Errorf("before the last transaction: %v", err)
			}
			if _, err := s.Put(key(someContracts), []byte("{}"), always); err != nil {
				t.Error(err)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			checkFileSound(t, path)
		})
	}
}

func TestFileThatIsCutOffWhileItIsServed(t *testing.T) {
	for _, pages := range []int{0, 1, 3, 5} {
		t.Run(fmt.Sprintf("to %d pages", pages), func(t *testing.T) {
			t.Parallel()
			db := newPath(t)
			p := startProcess(t, nil, "--demo", "--db", db)
			url := contractsURL(p.URL, demoOrg, demoUser) + "/" + demoContract
			header := http.Header{"Authorization": {"Bearer " + token(t, p.URL, "demo", "demo-secret")}, "Content-Type": {"application/json"}}
			impatient := &http.Client{Timeout: 10 * time.Second}
			_, want := do(t, impatient, "GET", url, header, "")
			if err := os.Truncate(db, int64(pages*pageSize)); err != nil {
				t.Fatal(err)
			}
			for range 3 {
				resp, got := do(t, impatient, "GET", url, header, "")
				if resp.StatusCode != 200 || got != want {
					wantProblem(t, resp, got, 500)
				}
			}
			resp, got := do(t, impatient, "PUT", url, header, `{}`)
			if resp.StatusCode != 503 {
				wantProblem(t, resp, got, 500)
			}
			resp, got = do(t, impatient, "GET", p.URL+"/readyz", nil, "")
			if doc := wantProblem(t, resp, got, 503); resp.Header.Get("Retry-After") != "1" || !strings.Contains(doc.Detail, "is damaged") {
				t.Errorf("Retry-After %q\n%s", resp.Header.Get("Retry-After"), got)
			}
			if resp, got := do(t, impatient, "GET", p.URL+"/healthz", nil, ""); resp.StatusCode != 200 {
				t.Errorf("healthz: %s\n%s", resp.Status, got)
			}
			if err := p.Terminate(t); err != nil {
				t.Errorf("SIGTERM: %v", err)
			}
			if !strings.Contains(p.Stderr.String(), "run check or restore a backup") {
				t.Errorf("the log does not say what to do\n%s", p.Stderr)
			}
		})
	}
}

func TestProgramRefusesAFileThatIsNoneOfItsOwn(t *testing.T) {
	sound := soundFile(t)
	noise := make([]byte, 1<<16)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(noise) // never fails
	zeros := make([]byte, 8)
	for _, tt := range []struct {
		name    string
		content []byte
		want    string // with what to do about it
	}{
		{"empty", nil, "is empty, so it is not a database; remove it, or name another file"},
		{"text", []byte("energy contracts\n"), "is not a database, or both its meta pages are broken; restore a backup, or name another file"},
		{"random bytes", noise, "is not a database, or both its meta pages are broken; restore a backup, or name another file"},
		{"another program's", boltFile(t, "things", "a", "b"), "is a bbolt database, but not one of this program, or its root page is broken; name another file, or restore a backup"},
		{"a newer version's", boltFile(t, "meta", "format", "energy-contracts/3"), "reads version 2 and earlier; use the program that wrote it"},
		{"one without contracts", boltFile(t, "meta", "format", "energy-contracts/2"), "is broken: it has no bucket contracts; restore a backup"},
		{"half a file", sound[:len(sound)/2], fmt.Sprintf("is truncated: it has %d bytes, but its meta page requires %d; restore a backup", len(sound)/2, len(sound))},
		{"both meta pages broken", changed(changed(sound, pageHeaderSize+40, zeros), pageSize+pageHeaderSize+40, zeros), "both its meta pages are broken; restore a backup"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			path := writeFile(t, tt.content)
			for _, args := range [][]string{
				{"serve", "--addr", "127.0.0.1:0", "--db", path},
				{"serve", "--demo", "--addr", "127.0.0.1:0", "--db", path},
				{"client", "add", "--org", demoOrg, "--db", path},
			} {
				got := sentence(fails(t, args...))
				if want := "energy-contracts: database " + path + ": "; !strings.HasPrefix(got, want) || !strings.Contains(got, tt.want) || strings.Count(got, "\n") != 1 {
					t.Errorf("%v: %q, want one line: %q, then %q", args, got, want, tt.want)
				}
				if after := readFile(t, path); after != string(tt.content) {
					t.Errorf("%v has changed the file", args)
				}
			}
			// An unfinished file would be in the same directory.
			entries, err := os.ReadDir(filepath.Dir(path))
			if err != nil || len(entries) != 1 {
				t.Errorf("the directory has %v, %v; want the file alone", entries, err)
			}
		})
	}
}

func TestFileThatMayNotBeWritten(t *testing.T) {
	file, bearer := servedFile(t)
	wrapper := asNobody(t)
	for _, tt := range []struct {
		name      string
		dir, file os.FileMode
		want      string // "" is service
	}{
		{"a file that is read-only", 0o700, 0o400, "open %s: permission denied; use the account that owns it, or name another file with --db"},
		{"a file without any permission", 0o700, 0o000, "open %s: permission denied; use the account that owns it, or name another file with --db"},
		{"a file that is read-only, in such a directory", 0o500, 0o400, "open %s: permission denied; use the account that owns it, or name another file with --db"},
		{"a directory without any permission", 0o000, 0o600, "stat %s: permission denied; use the account that owns it, or name another file with --db"},
		{"a directory that is read-only", 0o500, 0o600, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := filepath.Dir(shortPath(t))
			if err := os.Chmod(dir, 0o755); err != nil { // which is another user's, if root tests
				t.Fatal(err)
			}
			dir = filepath.Join(dir, "d")
			db := filepath.Join(dir, "test.db")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			writeTo(t, db, file)
			if os.Getuid() == 0 {
				if err := errors.Join(os.Chown(db, nobody, nobody), os.Chown(dir, nobody, nobody)); err != nil {
					t.Fatal(err)
				}
			}
			if err := errors.Join(os.Chmod(db, tt.file), os.Chmod(dir, tt.dir)); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.Chmod(dir, 0o700) }) // else it cannot be cleaned up
			p := launch(t, wrapper, "--db", db)
			if (p.URL != "") != (tt.want == "") {
				t.Fatalf("listens on %q, want %q\n%s", p.URL, tt.want, p.Stderr)
			}
			if p.URL == "" {
				<-p.Ended
				if got, want := sentence(p.Stderr.String()), "energy-contracts: database "+db+": "+fmt.Sprintf(tt.want, db)+"\n"; p.Cmd.ProcessState.ExitCode() != 1 || got != want {
					t.Errorf("%v: %q, want %q", p.Cmd.ProcessState, got, want)
				}
				if err := os.Chmod(dir, 0o700); err != nil {
					t.Fatal(err)
				}
				if readFile(t, db) != string(file) {
					t.Error("refused, and changed")
				}
				return
			}
			resp, got := do(t, http.DefaultClient, "PUT", p.URL+contractsURL("", demoOrg, demoUser)+"/"+demoContract, with(jsonBody, "Authorization", "Bearer "+bearer), `{}`)
			if resp.StatusCode != 200 {
				t.Errorf("PUT: %s\n%s", resp.Status, got)
			}
			if err := p.Terminate(t); err != nil {
				t.Errorf("SIGTERM: %v\n%s", err, p.Stderr)
			}
		})
	}
}

// serveBroken runs serve on a file. If the file is refused, it returns nil and the output.
func serveBroken(t testing.TB, db string) (*process, string) {
	t.Helper()
	p := launch(t, nil, "--db", db)
	if p.URL != "" {
		return p, ""
	}
	<-p.Ended
	if code := p.Cmd.ProcessState.ExitCode(); code != 1 {
		t.Fatalf("%v ended with %v, want exit status 1\n%s", p.Cmd.Args, p.Cmd.ProcessState, p.Stderr)
	}
	return nil, p.Stderr.String()
}

// servedFile returns the content of a file with the demo data and someContracts of the demo
// user, and a token that it has.
func servedFile(t testing.TB) (file []byte, bearer string) {
	t.Helper()
	served := start(t, "--demo")
	bearer = token(t, served.url, "demo", "demo-secret")
	served.stop()
	withSomeContracts(t, served.db)
	// One of the two meta pages may break, so the last transaction must not matter.
	ok(t, served.db, "client", "add", "--org", demoOtherOrg)
	return trimmed(t, served.db), bearer
}

// A search below a branch page that leads to itself never ends. In a file that is too large to
// be checked as a whole before it is served, such a page is found soon after the start.
func TestLargeFileWithABranchBelowItself(t *testing.T) {
	slow(t)
	t.Parallel()
	db := newPath(t)
	s, err := Open(db, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	documents := map[Key][]byte{}
	const size = 100 << 10
	for i := range maxSmallFile/size + 1 {
		documents[key(i)] = bytes.Repeat([]byte("x"), size)
	}
	if err := addClientAnd(s, documents); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	url := contractsURL("", demoOrg, demoUser) + "/" + demoContract
	sound := startProcess(t, nil, "--demo", "--db", db)
	header := http.Header{"Authorization": {"Bearer " + token(t, sound.URL, "demo", "demo-secret")}, "Content-Type": {"application/json"}}
	for _, path := range []string{url, "/readyz"} {
		if resp, got := do(t, http.DefaultClient, "GET", sound.URL+path, header, ""); resp.StatusCode != 200 {
			t.Fatalf("GET %s of the sound file: %s\n%s", path, resp.Status, got)
		}
	}
	if err := sound.Terminate(t); err != nil {
		t.Fatal(err)
	}

	bolt, err := bbolt.Open(db, 0, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	var root int
	_ = bolt.View(func(tx *bbolt.Tx) error {
		root = int(tx.Bucket(bucketContracts).Root())
		return nil
	})
	if err := bolt.Close(); err != nil {
		t.Fatal(err)
	}
	file := readFile(t, db)
	page := []byte(file[root*pageSize:][:pageHeaderSize])
	last := int(binary.NativeEndian.Uint16(page[10:])) - 1
	if binary.NativeEndian.Uint16(page[8:]) != branchPageFlag || last < 1 {
		t.Fatalf("the root of the contracts is no branch: %x", page)
	}
	servicetest.BreakFile(t, db, root*pageSize+pageHeaderSize+last*elementSize+8, binary.NativeEndian.AppendUint64(nil, uint64(root)))
	found := fmt.Sprintf("page %d is used twice", root)
	p, said := serveBroken(t, db)
	if p == nil { // it was found before anybody could ask
		if !strings.Contains(said, found) || !strings.HasSuffix(said, "; restore a backup\n") {
			t.Errorf("refused with %q, want %q and what to do", said, found)
		}
		return
	}
	waitFor(t, "the branch is found", func() bool { return strings.Contains(p.Stderr.String(), found) })
	resp, got := do(t, http.DefaultClient, "GET", p.URL+url, header, "")
	wantProblem(t, resp, got, 500)
	resp, got = do(t, http.DefaultClient, "GET", p.URL+"/readyz", nil, "")
	wantUnavailable(t, resp, got)
	if err := p.Terminate(t); err != nil {
		t.Errorf("SIGTERM: %v\n%s", err, p.Stderr)
	}
}

// bbolt keeps small buckets inline in the root page and splits the root when they outgrow a
// page together. A few clients, tokens and keys are enough.
func TestFileWhoseRootIsSplitOpensAgain(t *testing.T) {
	splits := 0
	for clients := range 5 {
		for tokens := range 6 {
			path := newPath(t)
			var split bool
			write := func() {
				s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
				if err != nil {
					t.Fatal(err)
				}
				defer s.Close()
				for i := range clients {
					if err := s.AddClient(Client{ID: string(key(i).Contract), Org: demoOrg, Scopes: Scopes{true, true}}); err != nil {
						t.Fatal(err)
					}
				}
				for i := range tokens {
					token := Token{Client: string(key(i).Contract), Org: demoOrg, Scopes: Scopes{true, true}, Expires: time.Now().Add(tokenLifetime)}
					if err := s.AddToken(hashOf(fmt.Sprint(i)), token); err != nil {
						t.Fatal(err)
					}
				}
				for i := range 2 {
					once := &Idempotency{Client: string(key(0).Contract), Key: string(key(i).Contract), Body: hashOf("b")}
					if _, err := s.Create(key(i), []byte(strings.Repeat("x", 250)), once); err != nil {
						t.Fatal(err)
					}
				}
				metas, err := readMetas(s.file)
				if err != nil {
					t.Fatal(err)
				}
				m := currentMeta(metas)
				var header [pageHeaderSize]byte
				if _, err := s.file.ReadAt(header[:], int64(m.root)*m.pageSize); err != nil {
					t.Fatal(err)
				}
				split = binary.NativeEndian.Uint16(header[8:]) == branchPageFlag
			}
			write()
			s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Errorf("%d clients, %d tokens, root split %v: %v", clients, tokens, split, err)
				continue
			}
			wantDocument(t, s, key(0), strings.Repeat("x", 250))
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			checkFileSound(t, path)
			if split {
				splits++
			}
		}
	}
	if splits == 0 {
		t.Error("no root was split")
	}
}
