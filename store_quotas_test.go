package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// fillTokens adds tokens from first to last, many at once.
func fillTokens(t testing.TB, s *Store, c *clock, client string, first, last int) {
	t.Helper()
	var group sync.WaitGroup
	next := make(chan int)
	for range 200 {
		group.Go(func() {
			for n := range next {
				if err := issueToken(s, c, client, n); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for n := first; n <= last; n++ {
		next <- n
	}
	close(next)
	group.Wait()
}

// issueToken adds token n of a client.
func issueToken(s *Store, c *clock, client string, n int) error {
	now := c.now()
	return s.AddToken(hashOf(fmt.Sprint(client, n)), Token{Client: client, Org: demoOrg, Scopes: Scopes{Read: true}, Issued: now, Expires: now.Add(tokenLifetime)})
}

func TestOldestTokenOfAClientEndsWhenItHasTooMany(t *testing.T) {
	slow(t)
	s, c := openStore(t, newPath(t))
	for _, id := range []string{"a", "b"} {
		if err := s.AddClient(Client{ID: id, Org: demoOrg, Scopes: Scopes{Read: true}}); err != nil {
			t.Fatal(err)
		}
	}
	add := func(client string, n int) {
		t.Helper()
		if err := issueToken(s, c, client, n); err != nil {
			t.Fatal(err)
		}
	}
	wantLive := func(when, client string, n int, live bool) {
		t.Helper()
		if _, err := s.Token(hashOf(fmt.Sprint(client, n))); live && err != nil || !live && !errors.Is(err, ErrNotFound) {
			t.Errorf("%s: token %s %d: %v, want it to live: %v", when, client, n, err, live)
		}
	}
	add("b", 0)
	for n := range 5 {
		add("a", n)
	}
	fillTokens(t, s, c, "a", 5, int(tokenQuota.max)-1)
	for n := range 5 {
		wantLive("full", "a", n, true) // and is cached
	}
	add("a", 10_000)
	add("a", 10_001)
	for n := range 5 {
		wantLive("two more", "a", n, n > 1)
	}
	if err := s.RevokeToken(hashOf("a4"), "a"); err != nil {
		t.Fatal(err)
	}
	add("a", 10_002) // takes the place of the revoked one
	wantLive("one revoked and one more", "a", 2, true)
	add("a", 10_003)
	wantLive("one more", "a", 2, false)
	wantLive("one more", "a", 3, true)
	wantLive("one more", "a", 10_003, true)
	wantLive("at last", "b", 0, true)
	if got := keysIn(t, s, bucketTokens); got != int(tokenQuota.max)+1 {
		t.Errorf("the file has %d tokens", got)
	}
	if got := keysIn(t, s, bucketExpiry); got != int(tokenQuota.max)+1 {
		t.Errorf("the index has %d entries", got)
	}
}

// keysIn returns the number of keys of a bucket in an open store.
func keysIn(t testing.TB, s *Store, bucket []byte) (n int) {
	t.Helper()
	err := s.view(func(r *reader) error {
		return r.Bucket(bucket).ForEach(func(_, _ []byte) error { n++; return nil })
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestOldestFirstResponseOfAClientIsForgottenWhenTheyAreTooLarge(t *testing.T) {
	s, c := openStore(t, newPath(t))
	large := bytes.Repeat([]byte(" "), 4<<20)
	create := func(client string, n int) ID {
		t.Helper()
		c.move(time.Second)
		got, err := s.Create(key(n), append([]byte(fmt.Sprintf(`{"n":%d}`, n)), large...), &Idempotency{client, fmt.Sprint(n % 100), hashOf("b")})
		if err != nil {
			t.Fatal(err)
		}
		return got.ID
	}
	create("b", 50)
	const most = 64/4 - 1 // with their heads
	for n := range most {
		create("a", n)
	}
	if got := create("a", 100); got != key(0).Contract {
		t.Errorf("the first request again, before there are too many: %s", got)
	}
	if err := s.Delete(key(0), always); err != nil { // which gives back nothing of the quota
		t.Fatal(err)
	}
	create("a", most)
	if got := create("a", 101); got != key(1).Contract {
		t.Errorf("the second request again: %s", got)
	}
	if got := create("a", 200); got != key(200).Contract {
		t.Errorf("the first request again, when it is forgotten: %s", got)
	}
	if got := create("b", 150); got != key(50).Contract {
		t.Errorf("the request of another client again: %s", got)
	}
	// A response that is larger than all of the quota is kept alone.
	for n := range 2 {
		got, err := s.Create(key(300+n), bytes.Repeat(large, 17), &Idempotency{"a", "large", hashOf("b")})
		if err != nil || got.ID != key(300).Contract {
			t.Errorf("the largest, request %d: %s, %v", n, got.ID, err)
		}
	}
	if got := keysIn(t, s, bucketIdempotency); got != 2 {
		t.Errorf("there are %d first responses", got)
	}
}

// A quota that is broken neither stops the writes nor removes what it should not.
func TestBrokenQuotaIsMended(t *testing.T) {
	total := func(n uint64) []byte {
		return withChecksum(tokenQuota.totalKey("a"), binary.BigEndian.AppendUint64(nil, n))
	}
	entry := func(order uint64, key string) []byte {
		return entryKey(tokenQuota.totalKey("a"), order, []byte(key))
	}
	for _, tt := range []struct {
		name       string
		key, value []byte
		fault      string
		kept       bool // the tokens that were there
	}{
		{"a total with a wrong checksum", tokenQuota.totalKey("a"), make([]byte, 16), "stored value fails its checksum", true},
		{"a short total", tokenQuota.totalKey("a"), nil, "stored value fails its checksum", true},
		{"a total that is too small", tokenQuota.totalKey("a"), total(0), "the total is 0, but the entries add up to 2", true},
		{"the largest total", tokenQuota.totalKey("a"), total(math.MaxUint64), "the total is 4611686018427387904, but the entries add up to 2", false},
		{"an entry without its value", entry(0, "12345678901234567890123456789012"), binary.BigEndian.AppendUint64(nil, math.MaxUint64), "the total is 2, but the entries add up to 4611686018427387904", true},
		{"an entry whose key is none", entry(0, "short"), binary.BigEndian.AppendUint64(nil, 1), "the total is 2, but the entries add up to 3", true},
		{"a short entry", append(tokenQuota.totalKey("a"), 1), nil, "the key is neither one of a total nor one of an entry", true},
		{"an entry of no bucket", bytes.Repeat([]byte("x"), quotaEntrySize), nil, "the key is neither one of a total nor one of an entry", true},
		{"an empty entry", entry(0, ""), nil, "the entry is not that of a value", true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			path := newPath(t)
			// write adds two more tokens and looks which of them all are there.
			write := func(n int, kept bool) {
				t.Helper()
				c := &clock{}
				s, err := Open(path, c.now, slog.New(slog.DiscardHandler))
				if err != nil {
					t.Fatal(err)
				}
				if err := errors.Join(s.AddClient(Client{ID: "a", Org: demoOrg, Scopes: Scopes{Read: true}}), issueToken(s, c, "a", n), issueToken(s, c, "a", n+1)); err != nil {
					t.Fatal(err)
				}
				for i := range n + 2 {
					_, err := s.Token(hashOf(fmt.Sprint("a", i)))
					if live := i >= n || kept; live != (err == nil) {
						t.Errorf("token %d: %v, want it to live: %v", i, err, live)
					}
				}
				if err := s.Close(); err != nil {
					t.Fatal(err)
				}
			}
			write(0, true)
			edit(t, path, func(tx *bbolt.Tx) error { return tx.Bucket(bucketQuotas).Put(tt.key, tt.value) })
			got := run(t, nil, "check", "--db", path)
			if got.status != 1 || !strings.Contains(got.stdout, ": "+tt.fault+"\n") {
				t.Errorf("check: %+v, want %s", got, tt.fault)
			}
			write(2, tt.kept)
		})
	}
}

// An entry that leads to the token of another client ends nothing of that client.
func TestCraftedQuotaEndsNoTokenOfAnotherClient(t *testing.T) {
	path := newPath(t)
	c := &clock{}
	open := func() *Store {
		s, err := Open(path, c.now, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	for _, id := range []string{"a", "b"} {
		if err := errors.Join(s.AddClient(Client{ID: id, Org: demoOrg, Scopes: Scopes{Read: true}}), issueToken(s, c, id, 0)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	h := hashOf("b0")
	totalKey := tokenQuota.totalKey("a")
	entry := entryKey(totalKey, 0, h[:])
	edit(t, path, func(tx *bbolt.Tx) error {
		return errors.Join(
			tx.Bucket(bucketQuotas).Put(entry, binary.BigEndian.AppendUint64(nil, 10_000)),
			tx.Bucket(bucketQuotas).Put(totalKey, withChecksum(totalKey, binary.BigEndian.AppendUint64(nil, 10_001))))
	})
	if got, want := run(t, nil, "check", "--db", path), fmt.Sprintf("quotas %x: the entry is not that of a value\n", entry); got.status != 1 || got.stdout != want {
		t.Errorf("check: %+v, want %s", got, want)
	}
	s = open()
	if err := issueToken(s, c, "a", 1); err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{"a0", "a1", "b0"} {
		if _, err := s.Token(hashOf(token)); err != nil {
			t.Errorf("token %s: %v", token, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	checkFileSound(t, path)
}

// Version 0.1.0 knew no quota. The first commit enters all tokens of its file in the quotas, and the
// next token ends all that are too many, while other writes wait.
func TestFileOfFormat1WithManyTokensIsTakenInTime(t *testing.T) {
	slow(t)
	const tokens = 60_000
	path := newPath(t)
	if err := create(path); err != nil {
		t.Fatal(err)
	}
	expires := time.Now().Add(tokenLifetime)
	hashes := make([]Hash, tokens)
	for n := range hashes {
		hashes[n] = hashOf(fmt.Sprint("a", n))
	}
	slices.SortFunc(hashes, func(a, b Hash) int { return bytes.Compare(a[:], b[:]) }) // bbolt takes them faster so
	edit(t, path, func(tx *bbolt.Tx) error {
		for n, h := range hashes {
			age := time.Duration(n * 7919 % tokens) // in another order than the hashes
			stored := fmt.Appendf(expiryBytes(expires), `{"client_id":"a","org_id":"%s","scope":"read","expires":"%s"}`, demoOrg, expires.Add(-age).Format(time.RFC3339Nano))
			if err := put(tx, bucketTokens, h[:], withChecksum(h[:], stored)); err != nil {
				return err
			}
		}
		return errors.Join(tx.DeleteBucket(bucketQuotas), tx.Bucket(bucketMeta).Put([]byte(formatKey), []byte("energy-contracts/1")))
	})
	t.Run("commits", func(t *testing.T) {
		s, c := openStore(t, path)
		began := time.Now()
		err := s.updatePatiently(0, func(tx *bbolt.Tx) error { return nil })
		if err = errors.Join(err, issueToken(s, c, "a", tokens)); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > queueTimeout {
			t.Errorf("they took %v, in which other writes are refused", took)
		}
	})
	if n := count(t, path, bucketTokens); n != int(tokenQuota.max) {
		t.Errorf("%d tokens are left, want %d", n, tokenQuota.max)
	}
}
