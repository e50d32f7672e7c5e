package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// toFormat1 makes a closed file of format 2 one of format 1.
func toFormat1(t testing.TB, path string) {
	t.Helper()
	edit(t, path, func(tx *bbolt.Tx) error {
		rewrite := func(bucket []byte, old func(k, v []byte) ([]byte, error)) error {
			values := map[string][]byte{}
			err := tx.Bucket(bucket).ForEach(func(k, v []byte) (err error) {
				values[string(k)], err = old(k, v)
				return err
			})
			for k, v := range values {
				err = errors.Join(err, tx.Bucket(bucket).Put([]byte(k), withChecksum([]byte(k), v)))
			}
			return err
		}
		withoutHead := func(fields int) func(k, v []byte) ([]byte, error) {
			return func(k, v []byte) ([]byte, error) {
				h, err := verifyHead(k, v, fields)
				return append(bytes.Clone(h.fields), h.doc...), err
			}
		}
		return errors.Join(
			rewrite(bucketContracts, withoutHead(0)),
			rewrite(bucketIdempotency, withoutHead(firstFieldsSize)),
			rewrite(bucketTokens, func(k, v []byte) ([]byte, error) {
				b, err := verifyChecksum(k, v)
				if err != nil {
					return nil, err
				}
				start, rest, _ := strings.Cut(string(b), `"issued":`)
				_, end, ok := strings.Cut(rest, ",")
				if !ok {
					return nil, fmt.Errorf("the token %q has no member issued", b)
				}
				return []byte(start + end), nil
			}),
			tx.DeleteBucket(bucketQuotas),
			tx.Bucket(bucketMeta).Put([]byte(formatKey), []byte("energy-contracts/1")),
			tx.Bucket(bucketMeta).Put([]byte(programKey), []byte("v0.1.0")),
		)
	})
}

// formatIn returns the format of a closed file, and the version of the program that gave it.
func formatIn(t testing.TB, path string) (format, program string) {
	t.Helper()
	edit(t, path, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketMeta)
		format, program = string(b.Get([]byte(formatKey))), string(b.Get([]byte(programKey)))
		return nil
	})
	return format, program
}

// tagOf returns the entity tag that content must have.
func tagOf(content string) string {
	return fmt.Sprintf(`"%x"`, sha256.Sum256([]byte(content)))[:33] + `"`
}

func TestEntityTagIs128BitsOfTheSHA256OfTheContent(t *testing.T) {
	s := start(t, "--demo")
	c := client(s.url, "demo", "demo-secret")
	list := contractsURL(s.url, demoOrg, demoUser)
	for _, tt := range []struct {
		method, url string
		header      http.Header
		body        string
	}{
		{"GET", list + "/" + demoContract, nil, ""},
		{"PUT", list + "/" + demoContract, jsonBody, `{"supplier":"Jämtkraft"}`},
		{"PATCH", list + "/" + demoContract, jsonBody, `{"supplier":"Vattenfall"}`},
		{"POST", list, with(jsonBody, "Idempotency-Key", "k"), `{"supplier":"Fortum"}`},
		{"POST", list, with(jsonBody, "Idempotency-Key", "k"), `{"supplier":"Fortum"}`},
		{"GET", s.url + openAPIPath, nil, ""},
		{"GET", s.url + docsPath, nil, ""},
	} {
		resp, got := do(t, c, tt.method, tt.url, tt.header, tt.body)
		want := tagOf(got)
		if tt.url == s.url+openAPIPath { // which is not put together to compute its tag
			want = resp.Header.Get("ETag")
		}
		if tag := resp.Header.Get("ETag"); resp.StatusCode != 200 || tag != want || len(tag) != len(tagOf("")) {
			t.Errorf("%s %s: %s, tag %s, want %s", tt.method, tt.url, resp.Status, tag, want)
		}
		if tt.method != "GET" {
			continue
		}
		head, nothing := do(t, c, "HEAD", tt.url, nil, "")
		if head.StatusCode != 200 || nothing != "" {
			t.Errorf("HEAD %s: %s, %q", tt.url, head.Status, nothing)
		}
		for _, name := range []string{"Etag", "Content-Length", "Content-Type"} {
			if head.Header.Get(name) != resp.Header.Get(name) {
				t.Errorf("HEAD %s: %s is %q, and %q for GET", tt.url, name, head.Header.Get(name), resp.Header.Get(name))
			}
		}
	}
}

// A document that is corrupt shows which requests read it.
func TestOnlyTheResponseWithADocumentReadsIt(t *testing.T) {
	s := start(t, "--demo")
	const after = "3c90c3cc-0d44-4b50-8888-8dd25736052b" // the demo contract is its neighbor
	list := contractsURL(s.url, demoOrg, demoUser)
	c := client(s.url, "demo", "demo-secret")
	resp, sound := do(t, c, "GET", list+"/"+demoContract, nil, "")
	tag := resp.Header.Get("ETag")
	s.stop()
	key := []byte(demoOrg + "/" + demoUser + "/" + demoContract)
	edit(t, s.db, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketContracts)
		return b.Put(key, bytes.Replace(b.Get(key), []byte("0.1523"), []byte("0.1522"), 1))
	})
	s = startOn(t, s.db)
	c = client(s.url, "demo", "demo-secret")
	list = contractsURL(s.url, demoOrg, demoUser)
	for _, tt := range []struct {
		name, method, id string
		header           http.Header
		status           int
	}{
		{"the document", "GET", demoContract, nil, 500},
		{"a precondition that is true", "GET", demoContract, with(http.Header{}, "If-Match", tag), 500},
		{"its length", "HEAD", demoContract, nil, 200},
		{"nothing new", "GET", demoContract, with(http.Header{}, "If-None-Match", tag), 304},
		{"a precondition that is false", "GET", demoContract, with(http.Header{}, "If-Match", tagOf("other")), 412},
		{"a false one of a change", "PUT", demoContract, with(jsonBody, "If-Match", tagOf("other")), 412},
		{"a false one of a patch", "PATCH", demoContract, with(jsonBody, "If-Match", tagOf("other")), 412},
		{"a false one of DELETE", "DELETE", demoContract, with(http.Header{}, "If-Match", tagOf("other")), 412},
		{"the neighbor of a missing contract", "GET", after, nil, 404},
		{"that of one to be deleted", "DELETE", after, nil, 404},
		{"that of one to be replaced", "PUT", after, jsonBody, 404},
		{"that of a new one", "PUT", after, with(jsonBody, "If-None-Match", "*"), 201},
		{"the one to be replaced", "PUT", demoContract, with(jsonBody, "If-Match", tag), 200},
	} {
		resp, got := do(t, c, tt.method, list+"/"+tt.id, tt.header, "{}")
		if resp.StatusCode != tt.status {
			t.Errorf("%s: %s %s: %s\n%s\nwant %d", tt.name, tt.method, tt.id, resp.Status, got, tt.status)
		}
		if tt.name == "its length" && resp.ContentLength != int64(len(sound)) {
			t.Errorf("HEAD: %d bytes, want %d", resp.ContentLength, len(sound))
		}
	}
}

func TestFileOfFormat1IsTakenAndChangesItsFormatWithTheFirstCommit(t *testing.T) {
	path := newPath(t)
	token := Token{Client: "a", Org: demoOrg, Scopes: Scopes{Read: true}, Issued: time.Now().UTC().Round(0), Expires: time.Now().Add(time.Hour).UTC().Round(0)}
	once := &Idempotency{Client: "a", Key: "k", Body: hashOf("b")}
	t.Run("write", func(t *testing.T) {
		s, _ := openStore(t, path)
		_, err1 := s.Put(key(0), []byte(someDocument(0)), absent)
		_, err2 := s.Create(key(1), []byte(someDocument(1)), once)
		err3 := s.AddClient(Client{ID: "a", Org: demoOrg, Scopes: Scopes{Read: true}})
		if err := errors.Join(err1, err2, err3, s.AddToken(hashOf("t"), token)); err != nil {
			t.Fatal(err)
		}
	})
	toFormat1(t, path)
	token.Issued = time.Time{}
	checkFileSound(t, path)
	wantOld := func(t *testing.T, s *Store) {
		t.Helper()
		wantDocument(t, s, key(0), someDocument(0))
		if v, size, err := s.Find(key(1), always); v != versionOf([]byte(someDocument(1))) || size != len(someDocument(1)) || err != nil {
			t.Errorf("Find: version %x, %d bytes, %v", v, size, err)
		}
		if got, err := s.readToken(hashOf("t")); got != token || err != nil {
			t.Errorf("token %+v, %v, want %+v", got, err, token)
		}
		page, err := s.List(nil, key(0).Owner, Range{})
		if want := someDocument(0) + "," + someDocument(1); string(page.Documents) != want || err != nil {
			t.Errorf("list: %s, %v", page.Documents, err)
		}
	}
	t.Run("read", func(t *testing.T) {
		s, _ := openStore(t, path)
		wantOld(t, s)
	})
	if format, program := formatIn(t, path); format != "energy-contracts/1" || program != "v0.1.0" {
		t.Errorf("after it was read: %s of %s", format, program)
	}
	t.Run("a write that fails", func(t *testing.T) {
		s, _ := openStore(t, path)
		if _, err := s.Put(key(0), []byte("new"), absent); !errors.Is(err, errThere) {
			t.Error(err)
		}
	})
	if format, _ := formatIn(t, path); format != "energy-contracts/1" {
		t.Errorf("after a write that failed: %s", format)
	}
	t.Run("write", func(t *testing.T) {
		s, c := openStore(t, path)
		if _, err := s.Put(key(2), []byte(someDocument(2)), absent); err != nil {
			t.Fatal(err)
		}
		if err := s.Delete(key(2), func(v Version, exists bool) error {
			if !exists || v != versionOf([]byte(someDocument(2))) {
				t.Errorf("%x, %v", v, exists)
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		wantOld(t, s)
		again, err := s.Create(key(3), []byte(someDocument(3)), once)
		if again.ID != key(1).Contract || string(again.Document) != someDocument(1) || again.Version != versionOf([]byte(someDocument(1))) || err != nil {
			t.Errorf("the first response: %+v, %v", again, err)
		}
		_, err = s.Put(key(0), []byte(someDocument(0)), func(v Version, exists bool) error {
			if !exists || v != versionOf([]byte(someDocument(0))) {
				t.Errorf("%x, %v", v, exists)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		// What expired of the old file leaves the new one, and its quotas.
		c.move(idempotencyLifetime + expiredKept + time.Minute)
		if err := s.AddClient(Client{ID: "b", Org: demoOrg, Scopes: Scopes{Read: true}}); err != nil {
			t.Fatal(err)
		}
	})
	if format, program := formatIn(t, path); format != "energy-contracts/2" || program != readBuild().Version {
		t.Errorf("after it was written: %s of %s", format, program)
	}
	edit(t, path, func(tx *bbolt.Tx) error {
		for k, marked := range map[Key]bool{key(0): true, key(1): false} {
			if v := tx.Bucket(bucketContracts).Get(k.bytes()); v[checksumSize] == headMark != marked {
				t.Errorf("contract %s: the value %q has a head: %v", k.Contract, v[:checksumSize+1], !marked)
			}
		}
		return nil
	})
	for _, bucket := range [][]byte{bucketTokens, bucketIdempotency, bucketExpiry, bucketQuotas} {
		if n := count(t, path, bucket); n != 0 {
			t.Errorf("%s has %d keys", bucket, n)
		}
	}
}

// The rules of importKey and of a staged value hold for a file of format 1 too.
func TestImportOfFormat1IsFinished(t *testing.T) {
	path := newPath(t)
	t.Run("write", func(t *testing.T) {
		s, _ := openStore(t, path)
		if _, err := s.Put(key(0), []byte(someDocument(0)), absent); err != nil {
			t.Fatal(err)
		}
	})
	toFormat1(t, path)
	edit(t, path, func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucket(bucketImport)
		if err != nil {
			return err
		}
		k := key(1).bytes()
		return errors.Join(
			b.Put(k, append(make([]byte, lineSize), withChecksum(k, []byte(someDocument(1)))...)),
			tx.Bucket(bucketMeta).Put([]byte(importKey), []byte(importAfter)))
	})
	checkFileSound(t, path)
	s, _ := openStore(t, path)
	wantDocument(t, s, key(0), someDocument(0))
	wantDocument(t, s, key(1), someDocument(1))
}

// A staged value that is corrupt is not moved over a contract that is sound.
func TestCorruptValueOfACommittedImportIsLeftOut(t *testing.T) {
	for _, tt := range []struct {
		name  string
		value []byte
	}{
		{"short", []byte("1234")},
		{"no value", nil},
		{"a line number only", make([]byte, lineSize)},
		{"a wrong checksum", append(make([]byte, lineSize+checksumSize), "{}"...)},
		{"another document", func() []byte {
			doc := []byte(someDocument(0))
			v := append(make([]byte, lineSize), withHead(key(0).bytes(), nil, doc, versionOf(doc))...)
			v[len(v)-3] ^= 1
			return v
		}()},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path, _, _ := threeContracts(t)
			k := key(1).bytes()
			edit(t, path, func(tx *bbolt.Tx) error {
				b, err := tx.CreateBucket(bucketImport)
				if err != nil {
					return err
				}
				return errors.Join(b.Put(k, tt.value), tx.Bucket(bucketMeta).Put([]byte(importKey), []byte(importAfter)))
			})
			want := fmt.Sprintf("%s has 1 fault; repair a contract with PUT or DELETE; for any other fault, restore a backup", path)
			if got := refusedCommand(t, path, want, "check"); got != fmt.Sprintf("import %q: stored value fails its checksum\n", k) {
				t.Errorf("check printed %s", got)
			}
			var log lockedBuffer
			s, err := Open(path, time.Now, slog.New(slog.NewTextHandler(&log, nil)))
			if err != nil {
				t.Fatal(err)
			}
			for i := range 3 {
				wantDocument(t, s, key(i), someDocument(i))
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
			if said := log.String(); !strings.Contains(said, "a contract of a committed import is corrupt and was left out; import it again") || !strings.Contains(said, string(k)) {
				t.Errorf("the log does not say that the contract was left out\n%s", said)
			}
			checkFileSound(t, path)
		})
	}
}

// BenchmarkLargeNeighbors compares requests that look at documents of 4 MiB without needing them
// with the same requests for documents of 200 bytes.
func BenchmarkLargeNeighbors(b *testing.B) {
	s, _ := openStore(b, newPath(b))
	large := []byte(`{"supplier":"` + strings.Repeat("a", 4<<20) + `"}`)
	for n, doc := range map[int][]byte{1: large, 3: large, 11: []byte(someDocument(1)), 13: []byte(someDocument(3))} {
		if _, err := s.Put(key(n), doc, always); err != nil {
			b.Fatal(err)
		}
	}
	for _, bench := range []struct {
		name string
		do   func(of int) error
		want error
	}{
		{"missing", func(of int) error { _, _, err := s.Get(nil, key(of+2), always); return err }, ErrNotFound},
		{"head", func(of int) error { _, _, err := s.Find(key(of+1), always); return err }, nil},
		{"none-match", func(of int) error {
			_, _, err := s.Get(nil, key(of+1), func(Version, bool) error { return errNoneMatch })
			return err
		}, errNoneMatch},
	} {
		b.Run(bench.name, func(b *testing.B) {
			const each = 2000
			var took [2]time.Duration // of the large ones, and of the small ones
			for b.Loop() {
				for i, of := range []int{0, 10} {
					began := time.Now()
					for range each {
						if err := bench.do(of); !errors.Is(err, bench.want) {
							b.Fatal(err)
						}
					}
					took[i] += time.Since(began)
				}
			}
			b.ReportMetric(float64(took[0])/float64(took[1]), "×small")
			b.ReportMetric(0, "ns/op")
		})
	}
}
