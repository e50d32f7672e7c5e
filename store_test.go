package main

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"
)

// always and absent are preconditions.
func always(Version, bool) error { return nil }

var errThere = errors.New("there already")

func absent(_ Version, exists bool) error {
	if exists {
		return errThere
	}
	return nil
}

// openStore opens a store until the test ends. Then it fails the test unless the file is
// sound.
func openStore(t testing.TB, path string) (*Store, *clock) {
	t.Helper()
	c := &clock{}
	s, err := Open(path, c.now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		checkFileSound(t, path)
	})
	return s, c
}

// key returns the key of a contract of the demo user.
func key(n int) Key {
	return Key{Owner{demoOrg, demoUser}, ID(fmt.Sprintf("%08x-0000-4000-8000-000000000000", n))}
}

// transaction returns the id of the last committed transaction.
func transaction(t testing.TB, s *Store) uint64 {
	t.Helper()
	metas, err := readMetas(s.file)
	if err != nil {
		t.Fatal(err)
	}
	return currentMeta(metas).txid
}

func wantDocument(t testing.TB, s *Store, k Key, want string) {
	t.Helper()
	got, v, err := s.Get(nil, k, always)
	if err != nil || string(got) != want || v != versionOf(got) {
		t.Errorf("Get %s: %q, version %x, %v; want %q", k.bytes(), got, v, err, want)
	}
}

func TestContractIsMadeReplacedAndDeleted(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	if _, _, err := s.Get(nil, key(1), always); !errors.Is(err, ErrNotFound) {
		t.Errorf("before: %v", err)
	}
	first, err := s.Put(key(1), []byte(`{"a":1}`), absent)
	if err != nil {
		t.Fatal(err)
	}
	wantDocument(t, s, key(1), `{"a":1}`)
	if _, err := s.Put(key(1), []byte(`{"a":2}`), absent); !errors.Is(err, errThere) {
		t.Errorf("made twice: %v", err)
	}
	second, err := s.Put(key(1), []byte(`{"a":2}`), func(current Version, exists bool) error {
		if !exists || current != first {
			t.Errorf("check was asked about %x, %v", current, exists)
		}
		return nil
	})
	if err != nil || first == second {
		t.Errorf("replaced: versions %x and %x, %v", first, second, err)
	}
	wantDocument(t, s, key(1), `{"a":2}`)
	if back, err := s.Put(key(1), []byte(`{"a":1}`), always); err != nil || back != first {
		t.Errorf("an equal document has version %x, then %x, %v", first, back, err)
	}
	if err := s.Delete(key(1), always); err != nil {
		t.Error(err)
	}
	if _, _, err := s.Get(nil, key(1), always); !errors.Is(err, ErrNotFound) {
		t.Errorf("after: %v", err)
	}
}

func TestListKeepsUsersApart(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	last := strings.Repeat("f", 8) + demoUser[8:]
	for _, o := range []Owner{{demoOrg, demoUser}, {demoOrg, ID(last)}, {demoOtherOrg, demoUser}} {
		for _, n := range []int{3, 1, 2} {
			if _, err := s.Put(Key{o, key(n).Contract}, fmt.Appendf(nil, `"%s %s %d"`, o.Org[:4], o.User[:4], n), absent); err != nil {
				t.Fatal(err)
			}
		}
	}
	for o, want := range map[Owner]string{
		{demoOrg, demoUser}:      `"5f0c 016b 1","5f0c 016b 2","5f0c 016b 3"`,
		{demoOrg, ID(last)}:      `"5f0c ffff 1","5f0c ffff 2","5f0c ffff 3"`,
		{demoOtherOrg, demoUser}: `"c2a7 016b 1","c2a7 016b 2","c2a7 016b 3"`,
		{demoOtherOrg, ID(last)}: ``,
	} {
		page, err := s.List(nil, o, Range{})
		if err != nil || string(page.Documents) != want || page.More || page.Last != "" {
			t.Errorf("%v: %s, %+v, %v", o, page.Documents, page, err)
		}
	}
}

// count returns the number of keys of a bucket in a closed file.
func count(t testing.TB, path string, bucket []byte) (n int) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	_ = db.View(func(tx *bbolt.Tx) error {
		n = tx.Bucket(bucket).Stats().KeyN
		return nil
	})
	return n
}

func TestWhatExpiresLeavesTheFile(t *testing.T) {
	path := newPath(t)
	const gone = idempotencyLifetime + expiredKept + time.Minute
	t.Run("write", func(t *testing.T) {
		s, c := openStore(t, path)
		for round := range 3 {
			for i := range 20 {
				once := &Idempotency{Client: "a", Key: fmt.Sprint(i), Body: hashOf("b")}
				if _, err := s.Create(key(100*round+i), []byte("{}"), once); err != nil {
					t.Fatal(err)
				}
				token := Token{Client: "a", Org: demoOrg, Scopes: Scopes{Read: true}, Expires: c.now().Add(tokenLifetime)}
				if err := s.AddToken(hashOf(fmt.Sprint(round, i)), token); err != nil {
					t.Fatal(err)
				}
			}
			c.move(gone)
		}
		c.move(-gone) // the last round has not expired
	})
	for bucket, want := range map[string]int{"contracts": 60, "idempotency": 20, "tokens": 20, "expiry": 40} {
		if n := count(t, path, []byte(bucket)); n != want {
			t.Errorf("%s has %d keys, want %d", bucket, n, want)
		}
	}
}

func TestKeyBelongsToOneClientAndUser(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	other := key(4)
	other.User = demoContract
	for _, tt := range []struct {
		name  string
		key   Key
		once  Idempotency
		want  ID
		error error
	}{
		{"first", key(1), Idempotency{"a", "k", hashOf("x")}, key(1).Contract, nil},
		{"again", key(2), Idempotency{"a", "k", hashOf("x")}, key(1).Contract, nil},
		{"another body", key(2), Idempotency{"a", "k", hashOf("y")}, "", ErrKeyReused},
		{"another client", key(3), Idempotency{"b", "k", hashOf("y")}, key(3).Contract, nil},
		{"another user", other, Idempotency{"a", "k", hashOf("y")}, key(4).Contract, nil},
		{"another key", key(5), Idempotency{"a", "l", hashOf("x")}, key(5).Contract, nil},
	} {
		got, err := s.Create(tt.key, fmt.Appendf(nil, `{"id":"%s"}`, tt.key.Contract), &tt.once)
		if !errors.Is(err, tt.error) || err == nil && (got.ID != tt.want || !strings.Contains(string(got.Document), string(tt.want)) ||
			got.Version != versionOf(got.Document)) {
			t.Errorf("%s: %+v, %v, want %s, %v", tt.name, got, err, tt.want, tt.error)
		}
	}
	if _, _, err := s.Get(nil, key(2), always); !errors.Is(err, ErrNotFound) {
		t.Errorf("the repeated request made a contract too: %v", err)
	}
}

func TestClientsAndTokensSurviveARestart(t *testing.T) {
	path := newPath(t)
	c := Client{ID: "a", Org: demoOrg, Scopes: Scopes{Read: true}, Secret: hashOf("secret"), Created: time.Unix(1700000000, 0).UTC()}
	token := Token{Client: "a", Org: demoOrg, Scopes: Scopes{Write: true}, Expires: time.Unix(4000000000, 0).UTC(), ClientCreated: c.Created}
	t.Run("write", func(t *testing.T) {
		s, _ := openStore(t, path)
		if has, err := s.HasClients(); has || err != nil {
			t.Errorf("a new store has clients: %v, %v", has, err)
		}
		if err := errors.Join(s.AddClient(c), s.AddToken(hashOf("token"), token)); err != nil {
			t.Fatal(err)
		}
	})
	s, _ := openStore(t, path)
	if got, err := s.Client("a"); got != c || err != nil {
		t.Errorf("client %+v, %v", got, err)
	}
	if got, err := s.Token(hashOf("token")); got != token || err != nil {
		t.Errorf("token %+v, %v", got, err)
	}
	_, err1 := s.Client("b")
	_, err2 := s.Token(hashOf("b"))
	if !errors.Is(err1, ErrNotFound) || !errors.Is(err2, ErrNotFound) {
		t.Errorf("unknown ones: %v, %v", err1, err2)
	}
	if has, err := s.HasClients(); !has || err != nil {
		t.Errorf("has no clients: %v, %v", has, err)
	}
}

func TestEveryFlippedBitFailsTheChecksum(t *testing.T) {
	k, doc := key(1).bytes(), []byte(`{"energy_contract_type":null,"energy_prices":[{"price":0.1523,"timestamp":null}]}`)
	fields := bytes.Repeat([]byte{7}, firstFieldsSize)
	for _, tt := range []struct {
		name   string
		sealed []byte
		fields int
	}{
		{"a contract", withHead(k, nil, doc, versionOf(doc)), 0},
		{"a first response", withHead(k, fields, doc, versionOf(doc)), len(fields)},
		{"a contract of format 1", withChecksum(k, doc), 0},
	} {
		t.Run(tt.name, func(t *testing.T) {
			read := func(key, stored []byte) ([]byte, error) {
				h, err := verifyHead(key, stored, tt.fields)
				if err != nil {
					return nil, err
				}
				if h.version() != versionOf(doc) { // only the head of a value of format 2 is verified
					t.Errorf("version %x of %q", h.version(), stored)
				}
				return h.document()
			}
			if got, err := read(k, tt.sealed); err != nil || !bytes.Equal(got, doc) {
				t.Fatalf("%q, %v", got, err)
			}
			for i := range 8 * (len(tt.sealed) + len(k)) {
				key, value := slices.Clone(k), slices.Clone(tt.sealed)
				if at := i / 8; at < len(value) {
					value[at] ^= 1 << (i % 8)
				} else {
					key[at-len(value)] ^= 1 << (i % 8)
				}
				if got, err := read(key, value); !errors.Is(err, ErrCorrupt) {
					t.Errorf("bit %d: %q, %v", i, got, err)
				}
			}
			for n := range len(tt.sealed) {
				if got, err := read(k, tt.sealed[:n]); !errors.Is(err, ErrCorrupt) {
					t.Errorf("cut to %d bytes: %q, %v", n, got, err)
				}
			}
		})
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	slow(t)
	path := newPath(t)
	openStore(t, path)
	started := time.Now()
	_, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
	if d := time.Since(started); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), path) || d > 2*time.Second {
		t.Errorf("after %s: %v", d, err)
	}
}

// listed reads all pages of a range.
func listed(t testing.TB, s *Store, o Owner, r Range) (documents string, last ID, pages int) {
	t.Helper()
	var all []string
	for {
		page, err := s.List([]byte("["), o, r)
		if err != nil {
			t.Fatalf("List %+v, page %d: %v", r, pages, err)
		}
		text, ok := strings.CutPrefix(string(page.Documents), "[") // what the buffer had is left alone
		if !ok {
			t.Fatalf("List %+v, page %d, does not start with what the buffer had: %.40q", r, pages, page.Documents)
		}
		if pages == 0 {
			last = page.Last
		} else if page.Last != "" || text == "" {
			t.Fatalf("List %+v, page %d: last %q, %d bytes", r, pages, page.Last, len(text))
		}
		if text != "" {
			all = append(all, text)
		}
		pages++
		if !page.More {
			return strings.Join(all, ","), last, pages
		}
		r = page.Rest
	}
}

func TestListIsEachContractOnceInOrder(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	// The ids are even numbers, so that there are ids between them. They fill more than three
	// pages.
	const contracts, step, size = 400, 2, 2000
	doc := func(i int) string { return fmt.Sprintf(`{"n":%0*d}`, size, i) }
	id := func(i int) ID { return key(step * i).Contract }
	owner := key(0).Owner
	samples := Samples{Documents: map[Key][]byte{}}
	for i := range contracts {
		samples.Documents[key(step*i)] = []byte(doc(i))
	}
	// The keys of these users are directly before and after, so that a list that reads too far
	// is noticed.
	for _, user := range []string{demoUser[:35], demoUser[:35] + "1", demoUser + "0"} {
		samples.Documents[Key{Owner{demoOrg, ID(user)}, id(0)}] = []byte(`"another user's"`)
	}
	if err := s.AddSamples(samples); err != nil {
		t.Fatal(err)
	}
	first, err := s.List(nil, owner, Range{})
	if err != nil || !first.More {
		t.Fatalf("the first page: more %v, %v", first.More, err)
	}
	full := strings.Count(string(first.Documents), "{") // documents in a full page
	for _, tt := range []struct {
		name     string
		r        Range
		from, to int // the contracts that are wanted: [from, to)
		more     bool
	}{
		{"all", Range{}, 0, contracts, false},
		{"a limit above all", Range{Limit: contracts + 1}, 0, contracts, false},
		{"a limit of all", Range{Limit: contracts}, 0, contracts, false},
		{"a limit of all but one", Range{Limit: contracts - 1}, 0, contracts - 1, true},
		{"a limit of one", Range{Limit: 1}, 0, 1, true},
		{"a limit of one less than a page", Range{Limit: full - 1}, 0, full - 1, true},
		{"a limit of a page", Range{Limit: full}, 0, full, true},
		{"a limit of one more than a page", Range{Limit: full + 1}, 0, full + 1, true},
		{"a limit of two pages", Range{Limit: 2 * full}, 0, 2 * full, true},
		{"after one", Range{After: id(9)}, 10, contracts, false},
		{"after an id that is none", Range{After: key(19).Contract}, 10, contracts, false},
		{"after one, with a limit", Range{After: id(9), Limit: 5}, 10, 15, true},
		{"after one, with a limit of several pages", Range{After: id(9), Limit: 300}, 10, 310, true},
		{"after one, with a limit of all that follow", Range{After: id(9), Limit: contracts - 10}, 10, contracts, false},
		{"after the last", Range{After: id(contracts - 1)}, 0, 0, false},
		{"after the last, with a limit", Range{After: id(contracts - 1), Limit: 1}, 0, 0, false},
		{"through one", Range{Through: id(9)}, 0, 10, false},
		{"through an id that is none", Range{Through: key(19).Contract}, 0, 10, false},
		{"through one, pages away", Range{After: id(4), Through: id(299)}, 5, 300, false},
		{"through the end", Range{Through: key(0xffffff).Contract}, 0, contracts, false},
		{"after and through the same", Range{After: id(9), Through: id(9)}, 0, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var want []string
			for i := tt.from; i < tt.to; i++ {
				want = append(want, doc(i))
			}
			wantLast := ID("")
			if tt.more {
				wantLast = id(tt.to - 1)
			}
			got, last, pages := listed(t, s, owner, tt.r)
			if got != strings.Join(want, ",") || last != wantLast {
				t.Errorf("List %+v: %d bytes in %d pages, %d documents, last %q; want %d documents, last %q",
					tt.r, len(got), pages, strings.Count(got, "{"), last, len(want), wantLast)
			}
			if n := max(1, (len(want)+full-1)/full); pages != n {
				t.Errorf("List %+v: %d pages, want %d", tt.r, pages, n)
			}
		})
	}
}

func TestDocumentLargerThanAPageIsListedWhole(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	var want []string
	for i := range 3 {
		want = append(want, fmt.Sprintf(`{"n":%0*d}`, pageBytes+i, i))
		if _, err := s.Put(key(i), []byte(want[i]), absent); err != nil {
			t.Fatal(err)
		}
	}
	got, last, pages := listed(t, s, key(0).Owner, Range{Limit: 3})
	if got != strings.Join(want, ",") || last != "" || pages != 3 {
		t.Errorf("%d bytes in %d pages, last %q", len(got), pages, last)
	}
}

func TestFirstAnswerIsRepeatedWhateverBecameOfTheContract(t *testing.T) {
	s, c := openStore(t, newPath(t))
	once := &Idempotency{Client: "a", Key: "k", Body: hashOf("body")}
	const doc = `{"n":1}`
	version := versionOf([]byte(doc))
	// create repeats the request. The handler makes a new id each time.
	create := func(when string, n int, want Key, wantVersion Version) {
		t.Helper()
		got, err := s.Create(key(n), []byte(doc), once)
		if err != nil || got.ID != want.Contract || string(got.Document) != doc || got.Version != wantVersion {
			t.Errorf("%s: %+v, %v; want %s of contract %s", when, got, err, doc, want.Contract)
		}
	}
	create("first", 1, key(1), version)
	if _, err := s.Put(key(1), []byte(`{"n":2}`), always); err != nil {
		t.Fatal(err)
	}
	create("after it was replaced", 2, key(1), version)
	wantDocument(t, s, key(1), `{"n":2}`)
	if err := s.Delete(key(1), always); err != nil {
		t.Fatal(err)
	}
	create("after it was deleted", 3, key(1), version)
	c.move(idempotencyLifetime - time.Minute)
	create("a minute before its end", 4, key(1), version)
	for n := range 5 {
		if got, _, err := s.Get(nil, key(n), always); !errors.Is(err, ErrNotFound) {
			t.Errorf("contract %d is there: %s, %v", n, got, err)
		}
	}
	c.move(2 * time.Minute)
	create("a minute after its end", 5, key(5), versionOf([]byte(doc)))
	wantDocument(t, s, key(5), doc)
	c.move(idempotencyLifetime - time.Minute)
	create("and that one's own day", 6, key(5), versionOf([]byte(doc)))
}

// flipped changes one bit of a file. A process that has mapped the file sees the change.
func flipped(t testing.TB, path string, bit int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], bit/8); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << (bit % 8)
	if _, err := f.WriteAt(b[:], bit/8); err != nil {
		t.Fatal(err)
	}
}

// wantCorrupt fails the test unless contract 1 is reported as corrupt, alone and in a list,
// and its neighbors are returned.
func wantCorrupt(t testing.TB, s *Store, when string) {
	t.Helper()
	got, _, err := s.Get(nil, key(1), always)
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), string(key(1).bytes())) || len(got) > 0 {
		t.Errorf("%s: Get: %q, %v", when, got, err)
	}
	page, err := s.List(nil, key(1).Owner, Range{})
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), string(key(1).bytes())) {
		t.Errorf("%s: List: %q, %v", when, page.Documents, err)
	}
	wantDocument(t, s, key(0), someDocument(0))
	wantDocument(t, s, key(2), someDocument(2))
}

// threeContracts returns a closed file with the contracts 0, 1 and 2, and the position of the
// stored value of contract 1.
func threeContracts(t testing.TB) (path string, at, size int64) {
	t.Helper()
	path = newPath(t)
	s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	samples := Samples{Clients: []Client{{ID: "a", Org: demoOrg, Scopes: Scopes{Read: true}}}, Documents: map[Key][]byte{}}
	for i := range 3 {
		samples.Documents[key(i)] = []byte(someDocument(i))
	}
	if err := errors.Join(s.AddSamples(samples), s.Close()); err != nil {
		t.Fatal(err)
	}
	file, sealed := readFile(t, path), string(withHead(key(1).bytes(), nil, []byte(someDocument(1)), versionOf([]byte(someDocument(1)))))
	if n := strings.Count(file, sealed); n != 1 {
		t.Fatalf("the value is in the file %d times", n)
	}
	return path, int64(strings.Index(file, sealed)), int64(len(sealed))
}

func TestFlippedBitOfAStoredValueIsNeverAnAnswer(t *testing.T) {
	path, at, size := threeContracts(t)
	s, _ := openStore(t, path)
	for bit := 8 * at; bit < 8*(at+size); bit++ {
		flipped(t, path, bit)
		wantCorrupt(t, s, fmt.Sprintf("bit %d of the value", bit-8*at))
		flipped(t, path, bit)
		if t.Failed() {
			return
		}
	}
	wantDocument(t, s, key(1), someDocument(1))
}

func TestWriteHealsACorruptContract(t *testing.T) {
	for _, tt := range []struct {
		name string
		at   int64 // in the sealed value
		heal func(*Store) error
		want string // "" is gone
	}{
		{"replaced", 100, func(s *Store) error { _, err := s.Put(key(1), []byte("new"), always); return err }, "new"},
		{"replaced by what it was", 100, func(s *Store) error {
			// The checksum is intact, and so is the entity tag that a client has.
			_, err := s.Put(key(1), []byte(someDocument(1)), func(current Version, exists bool) error {
				if want := versionOf([]byte(someDocument(1))); !exists || current != want {
					return fmt.Errorf("found %x, %v, want %x", current, exists, want)
				}
				return nil
			})
			return err
		}, someDocument(1)},
		{"replaced, its sum being what is broken", 3, func(s *Store) error { _, err := s.Put(key(1), []byte("new"), always); return err }, "new"},
		{"deleted", 100, func(s *Store) error { return s.Delete(key(1), always) }, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path, at, _ := threeContracts(t)
			flipped(t, path, 8*(at+tt.at)+5)
			s, _ := openStore(t, path)
			wantCorrupt(t, s, "after a restart")
			if err := tt.heal(s); err != nil {
				t.Fatal(err)
			}
			documents := []string{someDocument(0), tt.want, someDocument(2)}
			if tt.want == "" {
				documents = slices.Delete(documents, 1, 2)
				if got, _, err := s.Get(nil, key(1), always); !errors.Is(err, ErrNotFound) {
					t.Errorf("Get: %s, %v", got, err)
				}
			} else {
				wantDocument(t, s, key(1), tt.want)
			}
			if got, _, _ := listed(t, s, key(1).Owner, Range{}); got != strings.Join(documents, ",") {
				t.Errorf("List: %s", got)
			}
		})
	}
}

// edit changes a closed file with bbolt.
func edit(t testing.TB, path string, change func(*bbolt.Tx) error) {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(change), db.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestDocumentUnderAnotherKeyIsCorrupt(t *testing.T) {
	path, _, _ := threeContracts(t)
	edit(t, path, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketContracts)
		return b.Put(key(1).bytes(), bytes.Clone(b.Get(key(2).bytes())))
	})
	s, _ := openStore(t, path)
	wantCorrupt(t, s, "with the value of contract 2")
}

func TestCorruptClientTokenAndKeyAreRefusedAndExpireAsOthersDo(t *testing.T) {
	path := newPath(t)
	c := Client{ID: "a", Org: demoOrg, Scopes: Scopes{Read: true}}
	once := &Idempotency{Client: "a", Key: "k", Body: hashOf("b")}
	t.Run("write", func(t *testing.T) {
		s, clock := openStore(t, path)
		token := Token{Client: "a", Org: demoOrg, Scopes: Scopes{Read: true}, Expires: clock.now().Add(tokenLifetime)}
		_, err := s.Create(key(1), []byte("{}"), once)
		if err := errors.Join(err, s.AddClient(c), s.AddToken(hashOf("t"), token)); err != nil {
			t.Fatal(err)
		}
	})
	edit(t, path, func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{bucketClients, bucketTokens, bucketIdempotency} {
			k, v := tx.Bucket(name).Cursor().First()
			k, v = bytes.Clone(k), bytes.Clone(v)
			v[len(v)-2] ^= 4
			if err := tx.Bucket(name).Put(k, v); err != nil {
				return err
			}
		}
		return nil
	})
	t.Run("read", func(t *testing.T) {
		s, clock := openStore(t, path)
		if got, err := s.Client("a"); !errors.Is(err, ErrCorrupt) {
			t.Errorf("client: %+v, %v", got, err)
		}
		if got, err := s.Token(hashOf("t")); !errors.Is(err, ErrCorrupt) {
			t.Errorf("token: %+v, %v", got, err)
		}
		if got, err := s.Create(key(2), []byte("{}"), once); !errors.Is(err, ErrCorrupt) {
			t.Errorf("create with the key: %+v, %v", got, err)
		}
		if _, _, err := s.Get(nil, key(2), always); !errors.Is(err, ErrNotFound) {
			t.Errorf("refused, and there: %v", err)
		}
		clock.move(idempotencyLifetime + expiredKept + time.Minute)
		if err := s.AddClient(c); err != nil { // heals the client; its commit removes the others
			t.Fatal(err)
		}
		if got, err := s.Client("a"); got != c || err != nil {
			t.Errorf("client, stored again: %+v, %v", got, err)
		}
		if got, err := s.Create(key(3), []byte("{}"), once); err != nil || got.ID != key(3).Contract {
			t.Errorf("create with the key a day later: %+v, %v", got, err)
		}
	})
	for bucket, want := range map[string]int{"contracts": 2, "clients": 1, "tokens": 0, "idempotency": 1, "expiry": 1} {
		if n := count(t, path, []byte(bucket)); n != want {
			t.Errorf("%s has %d keys, want %d", bucket, n, want)
		}
	}
}

// Entries of the index that are no entries of a value are removed, and nothing else.
func TestCraftedExpiryChangesNothingElse(t *testing.T) {
	long := "\x00\x00\x00\x00\x00\x00\x00\x01"
	for name, entry := range map[string]string{
		"one byte":                     "\x01",
		"an expiry only":               long,
		"the format":                   long + "meta\x00format",
		"a contract":                   long + "contracts\x00" + string(key(1).bytes()),
		"a client":                     long + "clients\x00a",
		"a token whose key is no hash": long + "tokens\x00short",
		"an index entry":               long + "expiry\x00\x01",
		"a first response of nobody":   long + "idempotency\x00k",
		"no bucket":                    long + "\x00",
		"an expiry that overflows":     "\xff\xff\xff\xff\xff\xff\xff\xff" + "tokens\x00" + strings.Repeat("t", 32),
	} {
		t.Run(name, func(t *testing.T) {
			path, _, _ := threeContracts(t)
			edit(t, path, func(tx *bbolt.Tx) error { return tx.Bucket(bucketExpiry).Put([]byte(entry), nil) })
			for range 2 {
				t.Run("write", func(t *testing.T) {
					s, _ := openStore(t, path)
					if _, err := s.Put(key(4), []byte(someDocument(4)), always); err != nil {
						t.Error(err)
					}
					for i := range 3 {
						wantDocument(t, s, key(i), someDocument(i))
					}
					if _, err := s.Client("a"); err != nil {
						t.Error(err)
					}
				})
			}
			if n := count(t, path, bucketExpiry); n != 0 {
				t.Errorf("the index has %d entries", n)
			}
		})
	}
}

func TestStoreRefusesClientsAndTokensThatItWouldNotMake(t *testing.T) {
	good := Client{ID: "good", Org: demoOrg, Scopes: Scopes{Read: true}}
	const (
		idSays  = "the client id must have 1 to 255 printable ASCII characters and no spaces"
		orgSays = "the organization must be "
	)
	for _, tt := range []struct {
		name string
		edit func(c *Client)
		want string
	}{
		{"no id", func(c *Client) { c.ID = "" }, idSays},
		{"a long id", func(c *Client) { c.ID = strings.Repeat("x", 256) }, idSays},
		{"an id with a space", func(c *Client) { c.ID = "a b" }, idSays},
		{"an id that ends a line", func(c *Client) { c.ID = "a\n" }, idSays},
		{"an id that clears a terminal", func(c *Client) { c.ID = "\x1b[2J" }, idSays},
		{"an id with a delete character", func(c *Client) { c.ID = "a\x7f" }, idSays},
		{"an id beyond ASCII", func(c *Client) { c.ID = "a\u009b2J" }, idSays},
		{"an id with an invalid byte", func(c *Client) { c.ID = "a\x9b2J" }, idSays},
		{"no organization", func(c *Client) { c.Org = "" }, orgSays + "a UUID of 36 characters, has 0"},
		{"an organization in upper case", func(c *Client) { c.Org = ID(strings.ToUpper(demoOrg)) }, orgSays + "in lower case"},
		{"no scope", func(c *Client) { c.Scopes = Scopes{} }, errUnknownScope.Error()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := newPath(t)
			bad := good
			bad.ID = "bad"
			tt.edit(&bad)
			token := Token{Client: bad.ID, Org: bad.Org, Scopes: bad.Scopes, Expires: time.Now().Add(tokenLifetime)}
			wantRefused := func(what string, err error, want string) {
				t.Helper()
				if err == nil || err.Error() != want {
					t.Errorf("%s: %v, want %s", what, err, want)
				}
			}
			said := fmt.Sprintf("client %q: %s", bad.ID, tt.want)
			t.Run("when it writes", func(t *testing.T) {
				s, _ := openStore(t, path)
				wantRefused("client", s.AddClient(bad), said)
				wantRefused("token", s.AddToken(hashOf("t"), token), "token of "+said)
				if err := s.AddClient(good); err != nil {
					t.Fatal(err)
				}
				if got, err := s.Clients(); err != nil || len(got) != 1 {
					t.Errorf("%v, %v", got, err)
				}
			})
			if bad.ID == "" || bad.Scopes == (Scopes{}) || strings.Contains(bad.ID, "\x9b") { // bbolt has no such key, and JSON has no such text
				return
			}
			edit(t, path, func(tx *bbolt.Tx) error {
				b, err1 := json.Marshal(bad)
				h := hashOf("t")
				bt, err2 := json.Marshal(token)
				return errors.Join(err1, err2, put(tx, bucketClients, []byte(bad.ID), withChecksum([]byte(bad.ID), b)),
					put(tx, bucketTokens, h[:], withChecksum(h[:], append(expiryBytes(token.Expires), bt...))))
			})
			t.Run("when it reads", func(t *testing.T) {
				s, _ := openStore(t, path)
				_, err := s.Client(bad.ID)
				wantRefused("client", err, said)
				_, err = s.Clients()
				wantRefused("clients", err, said)
				_, err = s.Token(hashOf("t"))
				wantRefused("token", err, fmt.Sprintf("tokens %x: %s", hashOf("t"), tt.want))
				if err := s.RemoveClient(bad.ID); err != nil { // the way out
					t.Error(err)
				}
				if got, err := s.Clients(); err != nil || len(got) != 1 {
					t.Errorf("%v, %v", got, err)
				}
			})
		})
	}
}
