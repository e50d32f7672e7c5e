package main

// The check command, beside a server and without one, on databases with every known kind of
// fault.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"go.etcd.io/bbolt"
)

func TestCheckOfASoundDatabase(t *testing.T) {
	besideAndWithout(t, func(t *testing.T, db string, _ func() string) {
		ok(t, db, "import", absolute(t, contractLines))
		addClient(t, db)
		if got := ok(t, db, "check"); !strings.HasPrefix(got, db+" is sound: 4 contracts, 1 client, ") {
			t.Errorf("printed %q", got)
		}
		entries, err := os.ReadDir(filepath.Dir(db))
		for _, e := range entries {
			if name := e.Name(); name != "c.db" && name != "c.db.sock" {
				t.Errorf("left behind: %s, %v", name, err)
			}
		}
	})
}

func TestCheckSaysWhatIsWrongWithADocument(t *testing.T) {
	slow(t)
	const org, user = demoOrg, demoUser
	good := `{"energy_contract_type":null,"energy_prices":[],"id":"%s","building":null,"meter_id":null,"supplier":null,"currency_energy_price":null,"energy_price_includes_external_components":null}`
	id := func(n int) string { return string(key(n).Contract) }
	under := func(n int) string { return org + "/" + user + "/" + id(n) }
	sealed := func(n int, doc string) func(*bbolt.Tx) error {
		return func(tx *bbolt.Tx) error {
			return tx.Bucket(bucketContracts).Put([]byte(under(n)), withChecksum([]byte(under(n)), []byte(doc)))
		}
	}
	raw := func(bucket []byte, key, value string) func(*bbolt.Tx) error {
		return func(tx *bbolt.Tx) error { return tx.Bucket(bucket).Put([]byte(key), []byte(value)) }
	}
	sealedIn := func(bucket []byte, key, value string) func(*bbolt.Tx) error {
		return raw(bucket, key, string(withChecksum([]byte(key), []byte(value))))
	}
	for _, tt := range []struct {
		name string
		edit func(*bbolt.Tx) error
		want string
	}{
		{"a wrong checksum", raw(bucketContracts, under(1), "12345678{}"), `contracts "` + under(1) + `": stored value fails its checksum`},
		{"a value too short for one", raw(bucketContracts, under(1), "1234"), `contracts "` + under(1) + `": stored value fails its checksum`},
		{"no document", sealed(1, ""), "contract " + under(1) + ": is empty"},
		{"what is not JSON", sealed(1, `{"energy_prices":[`), "contract " + under(1) + ": #/energy_prices at byte 116: the JSON is cut off"},
		{"a broken rule", sealed(1, strings.Replace(fmt.Sprintf(good, id(1)), `"meter_id":null`, `"meter_id":"12345678901234567890"`, 1)), "contract " + under(1) + ": #/meter_id must be at most 19 characters, has 20"},
		{"two broken rules", sealed(1, strings.Replace(fmt.Sprintf(good, id(1)), `"building":null,"meter_id":null`, `"building":"b","meter_id":1`, 1)),
			"contract " + under(1) + ": #/meter_id must be a string or null, is a number\ncontract " + under(1) + `: #/building must be a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a or null, is "b"`},
		{"another contract's document", sealed(1, fmt.Sprintf(good, id(2))), "contract " + under(1) + ": says that it is contract " + under(2)},
		{"a document in another form", sealed(1, strings.Replace(fmt.Sprintf(good, id(1)), ",", ", ", 1)), "contract " + under(1) + ": is not in the form in which contracts are stored"},
		{"a key in upper case", sealedIn(bucketContracts, strings.ToUpper(under(1)), fmt.Sprintf(good, id(1))), `contracts "` + strings.ToUpper(under(1)) + `": the key is not three UUIDs in lower case, separated by slashes`},
		{"a key of two parts", sealedIn(bucketContracts, org+"/"+user, "{}"), `contracts "` + org + "/" + user + `": the key is not three UUIDs in lower case, separated by slashes`},
		{"a client that is none", sealedIn(bucketClients, "c", "[]"), `clients "c": the value is not a client`},
		{"a token without an end", sealedIn(bucketTokens, strings.Repeat("\x01", 32), "1"), `tokens "` + strings.Repeat("01", 32) + `": the value has no expiry`},
		{"a token that is none", sealedIn(bucketTokens, strings.Repeat("\x01", 32), "12345678[]"), `tokens "` + strings.Repeat("01", 32) + `": the value is not a token`},
		{"a token under a key that is no hash", sealedIn(bucketTokens, "\x01\x02", "12345678{}"), `tokens "0102": the key is not a SHA-256`},
		{"an idempotency record that is too short", sealedIn(bucketIdempotency, under(1)[:74]+"c\x00k", "12345678"), `idempotency "` + under(1)[:74] + `c\x00k": stored value fails its checksum`},
		{"an idempotency record of no client", sealedIn(bucketIdempotency, "c\x00k", strings.Repeat("0", firstFieldsSize)), `idempotency "c\x00k": the key is not that of a response to an idempotency key`},
		{"an idempotency record without an id", sealedIn(bucketIdempotency, under(1)[:74]+"c\x00k", strings.Repeat("0", firstFieldsSize)), `idempotency "` + under(1)[:74] + `c\x00k": the value has no contract id`},
		{"an idempotency record of no contract", func(tx *bbolt.Tx) error {
			k, doc := []byte(under(1)[:74]+"c\x00k"), []byte("garbage")
			fields := slices.Concat(make([]byte, expirySize), make([]byte, len(Hash{})), []byte(id(1)))
			return errors.Join(tx.Bucket(bucketIdempotency).Put(k, withHead(k, fields, doc, versionOf(doc))))
		}, "contract " + under(1) + ": # at byte 98: invalid character 'a' at start of value\nidempotency " + strconv.Quote(under(1)[:74]+"c\x00k") + ": the value is missing in the quota of its client"},
		{"a token in no quota", func(tx *bbolt.Tx) error {
			h := hashOf("t")
			return tx.Bucket(bucketTokens).Put(h[:], withChecksum(h[:], []byte("12345678"+`{"client_id":"c","org_id":"`+demoOrg+`","scope":"read"}`)))
		}, fmt.Sprintf("tokens \"%x\": the value is missing in the quota of its client", hashOf("t"))},
		{"an expiry of one byte", raw(bucketExpiry, "\x01", ""), `expiry "\x01": the entry does not name the key of a value that expires`},
		{"an expiry of the format", raw(bucketExpiry, "\x00\x00\x00\x00\x00\x00\x00\x01meta\x00format", ""), `expiry "\x00\x00\x00\x00\x00\x00\x00\x01meta\x00format": the entry does not name the key of a value that expires`},
		{"an expiry of no hash", raw(bucketExpiry, "\x00\x00\x00\x00\x00\x00\x00\x01tokens\x00t", ""), `expiry "\x00\x00\x00\x00\x00\x00\x00\x01tokens\x00t": the entry does not name the key of a value that expires`},
		{"a version that is not that of the document", func(tx *bbolt.Tx) error {
			k, doc := []byte(under(1)), []byte(fmt.Sprintf(good, id(1)))
			return tx.Bucket(bucketContracts).Put(k, withHead(k, nil, doc, Version{}))
		}, `contracts "` + under(1) + `": the version is not that of the document`},
		{"progress without an import", raw(bucketMeta, importKey, importAfter), "there is the progress of an import, but the import is missing"},
		{"an import's progress that is none", raw(bucketMeta, importKey, "after all"), "meta \"import\": the progress of the import is \"after all\"\nthere is the progress of an import, but the import is missing"},
		{"an idempotency key with a wrong checksum", raw(bucketIdempotency, "k\x00l", "123456789"), `idempotency "k\x00l": stored value fails its checksum`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for _, up := range []bool{false, true} {
				db := shortPath(t)
				ok(t, db, "import", absolute(t, contractLines))
				editBolt(t, db, tt.edit)
				before := readFile(t, db)
				var want string
				if up {
					startProcess(t, nil, "--db", db)
				}
				n := strings.Count(tt.want, "\n") + 1
				want = fmt.Sprintf("%s has %s; repair a contract with PUT or DELETE; for any other fault, restore a backup", db, counted(n, "fault"))
				if got := refusedCommand(t, db, want, "check"); got != tt.want+"\n" {
					t.Errorf("server %v: printed\n%swant\n%s", up, got, tt.want)
				}
				if !up && readFile(t, db) != before {
					t.Error("the file changed")
				}
			}
		})
	}
}

// The next start may store the staged contracts, so check checks them like stored ones.
func TestCheckLooksAtTheContractsOfAnUnfinishedImport(t *testing.T) {
	k, line, doc := key(1).bytes(), make([]byte, lineSize), []byte(someDocument(1))
	for _, tt := range []struct {
		name  string
		value []byte
		want  string
	}{
		{"no document", append(line, withChecksum(k, nil)...), fmt.Sprintf("contract %s: is empty", k)},
		{"a version that is not that of the document", append(line, withHead(k, nil, doc, Version{})...), fmt.Sprintf("import %q: the version is not that of the document", k)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path, _, _ := threeContracts(t)
			edit(t, path, func(tx *bbolt.Tx) error {
				b, err := tx.CreateBucket(bucketImport)
				if err != nil {
					return err
				}
				return errors.Join(b.Put(k, tt.value), tx.Bucket(bucketMeta).Put([]byte(importKey), []byte(importAfter)))
			})
			want := path + " has 1 fault; repair a contract with PUT or DELETE; for any other fault, restore a backup"
			if got := refusedCommand(t, path, want, "check"); got != tt.want+"\n" {
				t.Errorf("printed %swant %s", got, tt.want)
			}
		})
	}
}

func TestCheckOfADatabaseWithoutABucket(t *testing.T) {
	for _, bucket := range buckets[1:] {
		db := shortPath(t)
		ok(t, db, "import", absolute(t, contractLines))
		editBolt(t, db, func(tx *bbolt.Tx) error { return tx.DeleteBucket(bucket) })
		want := db + " has 1 fault; repair a contract with PUT or DELETE; for any other fault, restore a backup"
		if got, fault := refusedCommand(t, db, want, "check"), fmt.Sprintf("the bucket %s is missing\n", bucket); got != fault {
			t.Errorf("printed %swant %s", got, fault)
		}
	}
}

// The files of TestFileThatIsNoDatabaseOfOursIsLeftAlone, with the messages of this command.
func TestCheckOfWhatIsNoDatabase(t *testing.T) {
	for _, tt := range []struct{ name, content, want string }{
		{"empty", "", "is empty, so it is not a database; remove it, or name another file"},
		{"text", strings.Repeat("text ", 9000), "is not a database, or both its meta pages are broken; restore a backup, or name another file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			db := writeFile(t, []byte(tt.content))
			refusedCommand(t, db, "database "+db+": "+tt.want, "check")
		})
	}
}

// examined returns the faults that the page checker finds in a file.
func examined(t testing.TB, file []byte) (faults []string, err error) {
	t.Helper()
	e := Checker{
		Report:   func(fault string) { faults = append(faults, fault) },
		Contract: func(Key, []byte) {},
		Progress: func(int64) {},
	}
	_, err = e.Check(t.Context(), writeFile(t, file))
	return faults, err
}

// largeFile returns a database with branch pages, a freelist and inline buckets.
func largeFile(t testing.TB) []byte {
	t.Helper()
	path := newPath(t)
	withSomeContracts(t, path)
	s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		if err := s.Delete(key(i), always); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Put(key(1000), bytes.Repeat([]byte("long "), 5000), always); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return trimmed(t, path)
}

func TestCheckerFindsEachBrokenPage(t *testing.T) {
	file := largeFile(t)
	if faults, err := examined(t, file); err != nil || len(faults) > 0 {
		t.Fatalf("of a sound file: %q, %v", faults, err)
	}
	metas, err := readMetas(open(t, writeFile(t, file)))
	if err != nil {
		t.Fatal(err)
	}
	m := currentMeta(metas)
	page := func(id uint64) int { return int(id) * pageSize }
	// The pages in use, except the root page, which is read first.
	var first, branch, leaf uint64
	for id := uint64(2); id < m.pages; id++ {
		faults, _ := examined(t, changed(file, page(id), make([]byte, 8)))
		if first == 0 && len(faults) > 0 && id != m.root {
			first = id
		}
		switch kind := binary.NativeEndian.Uint16(file[page(id)+8:]); {
		case len(faults) == 0 || id == m.root:
		case kind == branchPageFlag:
			branch = id
		case kind == leafPageFlag && binary.NativeEndian.Uint32(file[page(id)+12:]) == 0:
			leaf = id
		}
	}
	if branch == 0 || leaf == 0 {
		t.Fatalf("branch %d, leaf %d", branch, leaf)
	}
	u16 := func(n uint16) []byte { return binary.NativeEndian.AppendUint16(nil, n) }
	u32 := func(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
	u64 := func(n uint64) []byte { return binary.NativeEndian.AppendUint64(nil, n) }
	count := func(id uint64) int { return int(binary.NativeEndian.Uint16(file[page(id)+10:])) }
	keyAt := func(i int) int { // of the leaf
		element := page(leaf) + pageHeaderSize + i*elementSize
		return element + int(binary.NativeEndian.Uint32(file[element+4:]))
	}
	child := page(branch) + pageHeaderSize + 8 // the page id in the first element
	for _, tt := range []struct {
		name string
		at   int
		with []byte
		want string
	}{
		{"a branch below itself", child, u64(branch), fmt.Sprintf("page %d is used twice", branch)},
		{"a branch that leads out of the file", child, u64(1 << 40), fmt.Sprintf("a reference leads to page %d; the pages of this file are 2 to %d", uint64(1<<40), m.pages-1)},
		{"a branch that leads to a meta page", child, u64(1), fmt.Sprintf("a reference leads to page 1; the pages of this file are 2 to %d", m.pages-1)},
		{"a branch with nothing below", page(branch) + 10, u16(0), fmt.Sprintf("page %d is a branch page without elements", branch)},
		{"a branch with one page below", page(branch) + 10, u16(1), fmt.Sprintf("page %d is a branch page with one element only", branch)},
		{"a branch with more elements than fit", page(branch) + 10, u16(0xFFFF), fmt.Sprintf("page %d has 65535 elements, more than fit", branch)},
		{"a page with another's id", page(leaf), u64(leaf + 1), fmt.Sprintf("page %d has the id %d in its header", leaf, leaf+1)},
		{"a page of no kind", page(leaf) + 8, u16(0x40), fmt.Sprintf("page %d is neither a branch page nor a leaf page", leaf)},
		{"a page that goes on out of the file", page(leaf) + 12, u32(1 << 30), fmt.Sprintf("page %d overflows by %d pages, beyond the end of the file", leaf, 1<<30)},
		{"a page that goes on over another", page(first) + 12, u32(uint32(m.pages - first - 1)), " is used twice, or is in use and listed as free"},
		{"an element outside of its leaf", page(leaf) + pageHeaderSize + 12, u32(1 << 31), fmt.Sprintf("page %d has an element 0 that ends outside the page", leaf)},
		{"a leaf with fewer elements", page(leaf) + 10, u16(1), fmt.Sprintf("page %d has its element 0 at a wrong position", leaf)},
		{"a leaf with no elements", page(leaf) + 10, u16(0), fmt.Sprintf("page %d is a leaf page without elements", leaf)},
		{"an element of no kind", page(leaf) + pageHeaderSize, u32(2), fmt.Sprintf("page %d has an element 0 of an unknown kind", leaf)},
		{"a contract that is a bucket", page(leaf) + pageHeaderSize, u32(1), fmt.Sprintf("page %d has an element 0 that is a bucket inside a bucket", leaf)},
		{"free pages that are none", page(m.freelist) + 8, u16(leafPageFlag), fmt.Sprintf("page %d should hold the list of free pages, but does not", m.freelist)},
		{"more free pages than fit", page(m.freelist) + 10, u16(0xFFFE), "the list of free pages has 65534 entries, more than fit in its page"},
		{"a free page outside of the file", page(m.freelist) + pageHeaderSize, u64(1 << 40), fmt.Sprintf("a reference leads to page %d; the pages of this file are 2 to %d", uint64(1<<40), m.pages-1)},
		{"a free page that is free twice", page(m.freelist) + pageHeaderSize, file[page(m.freelist)+pageHeaderSize+8:][:8], " is listed as free, and is in use or listed again"},
		{"a free page that is in use", page(m.freelist) + pageHeaderSize, u64(leaf), fmt.Sprintf("page %d is used twice, or is in use and listed as free", leaf)},
		{"a page that is lost", page(m.freelist) + 10, u16(uint16(count(m.freelist) - 1)), " is neither in use nor free"},
		{"a leaf that is not the one that its branch means", keyAt(0), []byte("!"), fmt.Sprintf("page %d does not begin with the key that its branch page has for it", leaf)},
		{"keys out of order", keyAt(1), []byte("!"), fmt.Sprintf("page %d has the key of its element 1 out of order", leaf)},
		{"a key of the next page", keyAt(count(leaf) - 1), []byte("~"), fmt.Sprintf("page %d ends with a key that belongs to the next page", leaf)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			faults, err := examined(t, changed(file, tt.at, tt.with))
			if err != nil || !strings.Contains(strings.Join(faults, "\n"), tt.want) {
				t.Errorf("found %q, %v; want %q", faults, err, tt.want)
			}
		})
	}
	t.Run("no page of a database that was emptied", func(t *testing.T) {
		path := writeFile(t, file)
		s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		for i := range 1001 {
			if err := s.Delete(key(i), always); err != nil {
				t.Fatal(err)
			}
			if i%20 == 0 || i > 190 && i < 200 {
				if faults, err := examined(t, trimmed(t, path)); err != nil || len(faults) > 0 {
					t.Fatalf("without %d contracts: %q, %v", i, faults, err)
				}
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if faults, err := examined(t, trimmed(t, path)); err != nil || len(faults) > 0 {
			t.Errorf("%q, %v", faults, err)
		}
	})
	t.Run("a broken meta page", func(t *testing.T) {
		faults, err := examined(t, changed(file, pageHeaderSize+40, u64(0)))
		if want := "meta page 0 is broken; the other one is used"; err != nil || len(faults) == 0 || faults[0] != want {
			t.Errorf("found %q, %v; want %q", faults, err, want)
		}
	})
}

// A fault in mapped memory ends a process that does not expect it.
func TestCheckEndsInOrderWhateverTheFile(t *testing.T) {
	slow(t)
	file := largeFile(t)
	var seed [32]byte
	random := rand.New(rand.NewChaCha8(seed))
	for range 40 {
		broken := bytes.Clone(file)
		for range 1 + random.IntN(20) {
			// Most changes are in headers and elements.
			at := random.IntN(len(broken)/pageSize)*pageSize + random.IntN(200)
			broken[at] = byte(random.Uint32())
		}
		got := run(t, nil, "check", "--db", writeFile(t, broken))
		if got.status > 1 || strings.Contains(got.stderr, "goroutine ") {
			t.Fatalf("%+v", got)
		}
	}
}

// What a file or a link says must not control the terminal of a person who looks at it.
func TestCommandsPrintNoControlCharacters(t *testing.T) {
	const evil = "\x1b[2J\u009b2J\u202e\x07\x7f"
	db := shortPath(t)
	ok(t, db, "import", absolute(t, contractLines))
	editBolt(t, db, func(tx *bbolt.Tx) error {
		id := []byte(evil)
		client := []byte(`{"org_id":"` + demoOrg + `","scope":"read","secret_sha256":"` + strings.Repeat("0", 64) + `","created":"2026-11-26T00:00:00Z","previous_sha256":"` + strings.Repeat("0", 64) + `","previous_until":"0001-01-01T00:00:00Z","last_used":"0001-01-01T00:00:00Z"}`)
		return errors.Join(put(tx, bucketClients, id, withChecksum(id, client)), put(tx, bucketContracts, id, withChecksum(id, []byte("{}"))))
	})
	link := shortPath(t)
	if err := os.Symlink(filepath.Join(filepath.Dir(link), evil), link); err != nil {
		t.Fatal(err)
	}
	lines := writeFile(t, []byte(`{"`+`\u001b[2J\u009b2J\u202e`+`":1}`+"\n"+evil+"\n"+`{"org_id":"`+evil+`"}`+"\n"+
		`{"org_id":"`+demoOrg+`","user_id":"`+demoUser+`","id":"`+demoContract+`","energy_contract_type":"\u001b[2J\u009b2J\u202e","supplier":"`+strings.Repeat(`\u009b`, 101)+`"}`+"\n"))
	for _, tt := range []struct {
		args []string
		want string // a part of the output
	}{
		{[]string{"client", "list", "--db", db}, `list clients: client "\x1b[2J\u009b2J\u202e\a\x7f": the client id must have 1 to 255 printable ASCII characters and no spaces; run check`},
		{[]string{"client", "list", "--db", link}, `, which is a link to ` + filepath.Dir(link) + `/\x1b[2J\u009b2J\u202e\a\x7f; name`},
		{[]string{"client", "list", "--db", evil}, `there is no database \x1b[2J\u009b2J\u202e\a\x7f; name`},
		{[]string{"client", "list", evil}, `unexpected argument \x1b[2J`},
		{[]string{"check", "--db", db}, `contracts "\x1b[2J\u009b2J\u202e\a\x7f": the key is not`},
		{[]string{"backup", db + ".copy", "--db", db}, `contracts "\x1b[2J\u009b2J\u202e\a\x7f": the key is not`},
		{[]string{"restore", db, "--db", db + ".new"}, `contracts "\x1b[2J\u009b2J\u202e\a\x7f": the key is not`},
		{[]string{"import", lines, "--db", shortPath(t)}, "nothing was imported: 4 invalid lines"},
	} {
		got := run(t, nil, tt.args...)
		printed := got.stdout + got.stderr
		if i := strings.IndexFunc(printed, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }); i >= 0 || !utf8.ValidString(printed) {
			t.Errorf("%q prints %q", tt.args, printed)
		}
		if got.status != 1 || !strings.Contains(printed, tt.want) {
			t.Errorf("%q: %+v\nwant %s", tt.args, got, tt.want)
		}
	}
	clientCommand(t, db, "remove", evil)
	wantListed(t, db)
}
