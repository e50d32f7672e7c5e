package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

var ctx = context.Background()

// always and absent are what a write may ask for.
func always(Version, bool) error { return nil }

var errThere = errors.New("there already")

func absent(_ Version, exists bool) error {
	if exists {
		return errThere
	}
	return nil
}

// openStore opens a store until the test ends. Then its file must be sound.
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

func newPath(t testing.TB) string { return filepath.Join(t.TempDir(), "test.db") }

// key is the key of a contract of the demo user.
func key(n int) Key {
	return Key{Owner{demoOrg, demoUser}, ID(fmt.Sprintf("%08x-0000-4000-8000-000000000000", n))}
}

// transaction is the id of the last one that was committed.
func transaction(t testing.TB, s *Store) uint64 {
	t.Helper()
	metas, err := readMetas(s.file)
	if err != nil {
		t.Fatal(err)
	}
	return standing(metas).txid
}

// hold keeps the committer busy with one write until release is called, which
// waits for that write.
func hold(t testing.TB, s *Store) (release func()) {
	t.Helper()
	held, let, done := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	go func() {
		_, err := s.Put(ctx, key(0xffff), []byte("held"), func(Version, bool) error {
			close(held)
			<-let
			return nil
		})
		done <- err
	}()
	<-held
	return func() {
		close(let)
		if err := <-done; err != nil {
			t.Errorf("the write that held the committer: %v", err)
		}
	}
}

func wantDocument(t testing.TB, s *Store, k Key, want string) {
	t.Helper()
	got, v, err := s.Get(nil, k)
	if err != nil || string(got) != want || v != Version(sum(k.bytes(), got)) {
		t.Errorf("Get %s: %q, version %x, %v; want %q", k.bytes(), got, v, err, want)
	}
}

func TestContractIsMadeReplacedAndDeleted(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	if _, _, err := s.Get(nil, key(1)); !errors.Is(err, ErrNotFound) {
		t.Errorf("before: %v", err)
	}
	first, err := s.Put(ctx, key(1), []byte(`{"a":1}`), absent)
	if err != nil {
		t.Fatal(err)
	}
	wantDocument(t, s, key(1), `{"a":1}`)
	if _, err := s.Put(ctx, key(1), []byte(`{"a":2}`), absent); !errors.Is(err, errThere) {
		t.Errorf("made twice: %v", err)
	}
	second, err := s.Put(ctx, key(1), []byte(`{"a":2}`), func(current Version, exists bool) error {
		if !exists || current != first {
			t.Errorf("check was asked about %x, %v", current, exists)
		}
		return nil
	})
	if err != nil || first == second {
		t.Errorf("replaced: versions %x and %x, %v", first, second, err)
	}
	wantDocument(t, s, key(1), `{"a":2}`)
	if back, err := s.Put(ctx, key(1), []byte(`{"a":1}`), always); err != nil || back != first {
		t.Errorf("an equal document has version %x, then %x, %v", first, back, err)
	}
	if err := s.Delete(ctx, key(1), always); err != nil {
		t.Error(err)
	}
	if _, _, err := s.Get(nil, key(1)); !errors.Is(err, ErrNotFound) {
		t.Errorf("after: %v", err)
	}
}

func TestWritesThatWaitShareACommit(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	before := transaction(t, s)
	release := hold(t, s)
	const writers = 100
	errs := make([]error, writers)
	var wg sync.WaitGroup
	for i := range writers {
		wg.Go(func() {
			check := always
			if i%2 == 1 {
				check = absent // of one contract, which all of these want to make
			}
			_, errs[i] = s.Put(ctx, key(i*((i+1)%2)+(i%2)), fmt.Appendf(nil, "%d", i), check)
		})
	}
	waitFor(t, "all writes wait", func() bool { return len(s.queue) == writers })
	release()
	wg.Wait()
	if n := transaction(t, s) - before; n != 2 {
		t.Errorf("%d transactions, want one for the write that was held and one for all that waited", n)
	}
	made := -1
	for i, err := range errs {
		switch {
		case i%2 == 0 && err != nil:
			t.Errorf("write %d: %v", i, err)
		case i%2 == 1 && err == nil && made >= 0:
			t.Errorf("writes %d and %d both made the contract", made, i)
		case i%2 == 1 && err == nil:
			made = i
		case i%2 == 1 && !errors.Is(err, errThere):
			t.Errorf("write %d: %v", i, err)
		}
	}
	if made < 0 {
		t.Fatal("no write made the contract")
	}
	wantDocument(t, s, key(1), fmt.Sprint(made))
	for i := 2; i < writers; i += 2 {
		wantDocument(t, s, key(i), fmt.Sprint(i))
	}
}

func TestRefusedWritesCommitNothing(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	before := transaction(t, s)
	no := errors.New("no")
	if _, err := s.Put(ctx, key(1), []byte("a"), func(Version, bool) error { return no }); !errors.Is(err, no) {
		t.Errorf("got %v", err)
	}
	if after := transaction(t, s); after != before {
		t.Errorf("transaction %d, then %d", before, after)
	}
}

func TestManyWritersAreAllThereAfterARestart(t *testing.T) {
	path := newPath(t)
	const writers, each = 64, 20
	t.Run("write", func(t *testing.T) {
		s, _ := openStore(t, path)
		var wg sync.WaitGroup
		for w := range writers {
			wg.Go(func() {
				for i := range each {
					if _, err := s.Put(ctx, key(w*each+i), fmt.Appendf(nil, "%d of %d", i, w), absent); err != nil {
						t.Errorf("write %d of %d: %v", i, w, err)
					}
				}
			})
		}
		wg.Wait()
	})
	s, _ := openStore(t, path)
	for w := range writers {
		for i := range each {
			wantDocument(t, s, key(w*each+i), fmt.Sprintf("%d of %d", i, w))
		}
	}
}

func TestListKeepsUsersApart(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	last := strings.Repeat("f", 8) + demoUser[8:]
	for _, o := range []Owner{{demoOrg, demoUser}, {demoOrg, ID(last)}, {demoOtherOrg, demoUser}} {
		for _, n := range []int{3, 1, 2} {
			if _, err := s.Put(ctx, Key{o, key(n).Contract}, fmt.Appendf(nil, `"%s %s %d"`, o.Org[:4], o.User[:4], n), absent); err != nil {
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

// count is how many keys a bucket has in a file that is closed.
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
	t.Run("write", func(t *testing.T) {
		s, c := openStore(t, path)
		for round := range 3 {
			for i := range 20 {
				once := &Idempotency{Client: "a", Key: fmt.Sprint(i), Body: hashOf("b")}
				if _, err := s.Create(ctx, key(100*round+i), []byte("{}"), once); err != nil {
					t.Fatal(err)
				}
				token := Token{Client: "a", Org: demoOrg, Scopes: Scopes{Read: true}, Expires: c.now().Add(tokenLifetime)}
				if err := s.AddToken(ctx, hashOf(fmt.Sprint(round, i)), token); err != nil {
					t.Fatal(err)
				}
			}
			c.move(25 * time.Hour)
		}
		c.move(-25 * time.Hour) // the last round has not expired
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
		got, err := s.Create(ctx, tt.key, fmt.Appendf(nil, `{"id":"%s"}`, tt.key.Contract), &tt.once)
		if !errors.Is(err, tt.error) || err == nil && (got.ID != tt.want || !strings.Contains(string(got.Document), string(tt.want)) ||
			got.Version != Version(sum(Key{tt.key.Owner, tt.want}.bytes(), got.Document))) {
			t.Errorf("%s: %+v, %v, want %s, %v", tt.name, got, err, tt.want, tt.error)
		}
	}
	if _, _, err := s.Get(nil, key(2)); !errors.Is(err, ErrNotFound) {
		t.Errorf("the repeated request made a contract too: %v", err)
	}
}

func TestClientsAndTokensSurviveARestart(t *testing.T) {
	path := newPath(t)
	c := Client{ID: "a", Org: demoOrg, Scopes: Scopes{Read: true}, Secret: hashOf("secret"), Created: time.Unix(1700000000, 0).UTC()}
	token := Token{Client: "a", Org: demoOrg, Scopes: Scopes{Write: true}, Expires: time.Unix(4000000000, 0)}
	t.Run("write", func(t *testing.T) {
		s, _ := openStore(t, path)
		if has, err := s.HasClients(); has || err != nil {
			t.Errorf("a new store has clients: %v, %v", has, err)
		}
		if err := errors.Join(s.AddClient(ctx, c), s.AddToken(ctx, hashOf("token"), token)); err != nil {
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
	k := key(1).bytes()
	sealed := seal(k, []byte(`{"energy_contract_type":null,"energy_prices":[{"price":0.1523,"timestamp":null}]}`))
	if _, _, err := unseal(k, sealed); err != nil {
		t.Fatal(err)
	}
	for i := range 8 * (len(sealed) + len(k)) {
		key, value := slices.Clone(k), slices.Clone(sealed)
		if at := i / 8; at < len(value) {
			value[at] ^= 1 << (i % 8)
		} else {
			key[at-len(value)] ^= 1 << (i % 8)
		}
		if got, _, err := unseal(key, value); !errors.Is(err, ErrCorrupt) {
			t.Errorf("bit %d: %q, %v", i, got, err)
		}
	}
	for n := range len(sealed) {
		if got, _, err := unseal(k, sealed[:n]); !errors.Is(err, ErrCorrupt) {
			t.Errorf("cut to %d bytes: %q, %v", n, got, err)
		}
	}
}

func TestWriteThatCannotGetIntoTheQueueIsRefused(t *testing.T) {
	t.Parallel()
	s, _ := openStore(t, newPath(t))
	release := hold(t, s)
	var wg sync.WaitGroup
	for i := range queueLength {
		wg.Go(func() {
			if _, err := s.Put(ctx, key(i), []byte("waits"), always); err != nil {
				t.Errorf("a write that waited: %v", err)
			}
		})
	}
	waitFor(t, "the queue is full", func() bool { return len(s.queue) == queueLength })
	gone, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := s.Put(gone, key(0x8000), []byte("gone"), always); !errors.Is(err, context.Canceled) {
		t.Errorf("of a client that left: %v", err)
	}
	started := time.Now()
	_, err := s.Put(ctx, key(0x8001), []byte("one too many"), always)
	if d := time.Since(started); !errors.Is(err, ErrBusy) || d < queueTimeout {
		t.Errorf("after %s: %v", d, err)
	}
	release()
	wg.Wait()
	if _, _, err := s.Get(nil, key(0x8001)); !errors.Is(err, ErrNotFound) {
		t.Errorf("refused, and there: %v", err)
	}
}

func TestReadyCommitsOnceForManyWhoAsk(t *testing.T) {
	s, _ := openStore(t, newPath(t))
	before := transaction(t, s)
	started := time.Now()
	for range 100 {
		if err := s.Ready(ctx); err != nil {
			t.Error(err)
		}
	}
	n := transaction(t, s) - before
	if most := 1 + uint64(time.Since(started)/readyInterval); n < 1 || n > most {
		t.Errorf("%d transactions, want 1 to %d", n, most)
	}
}

func TestSecondOpenIsRefused(t *testing.T) {
	path := newPath(t)
	openStore(t, path)
	started := time.Now()
	_, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
	if d := time.Since(started); !errors.Is(err, ErrInUse) || !strings.Contains(err.Error(), path) || d > 2*time.Second {
		t.Errorf("after %s: %v", d, err)
	}
}
