package main

// The token cache must never know more than the file.

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// tokenStore opens a store with a client and a token for each text.
func tokenStore(t testing.TB, texts ...string) (*Store, *clock, Client) {
	t.Helper()
	s, clock := openStore(t, newPath(t))
	c := Client{ID: "a", Org: demoOrg, Scopes: Scopes{Read: true}, Secret: hashOf("secret"), Created: time.Unix(1700000000, 0).UTC()}
	if err := s.AddClient(c); err != nil {
		t.Fatal(err)
	}
	for _, text := range texts {
		addToken(t, s, clock, c, text)
	}
	return s, clock, c
}

// addToken stores a token of client c that expires after tokenLifetime.
func addToken(t testing.TB, s *Store, clock *clock, c Client, text string) {
	t.Helper()
	token := Token{Client: c.ID, ClientCreated: c.Created, Org: c.Org, Scopes: c.Scopes, Expires: clock.now().Add(tokenLifetime)}
	if err := s.AddToken(hashOf(text), token); err != nil {
		t.Fatal(err)
	}
}

// wantToken checks a token twice, so that the second time it is in the cache.
func wantToken(t testing.TB, s *Store, text string, want error) {
	t.Helper()
	for range 2 {
		if got, err := s.Token(hashOf(text)); !errors.Is(err, want) || (got != Token{}) != (want == nil) {
			t.Errorf("token %q: %+v, %v, want %v", text, got, err, want)
		}
	}
}

func TestTokenIsValidUntil(t *testing.T) {
	for _, tt := range []struct {
		name string
		end  func(t *testing.T, s *Store, clock *clock, c Client)
		want error
	}{
		{"nothing happens", func(*testing.T, *Store, *clock, Client) {}, nil},
		{"it is revoked", func(t *testing.T, s *Store, _ *clock, c Client) {
			if err := s.RevokeToken(hashOf("t"), c.ID); err != nil {
				t.Error(err)
			}
		}, ErrNotFound},
		{"another client fails to revoke it", func(t *testing.T, s *Store, _ *clock, c Client) {
			if err := s.RevokeToken(hashOf("t"), "b"); !errors.Is(err, ErrForeign) {
				t.Error(err)
			}
		}, nil},
		{"its client is removed", func(t *testing.T, s *Store, _ *clock, c Client) {
			if err := s.RemoveClient(c.ID); err != nil {
				t.Error(err)
			}
		}, ErrNotFound},
		{"its client is removed, and another is added with the same id", func(t *testing.T, s *Store, _ *clock, c Client) {
			c.Created = c.Created.Add(time.Nanosecond)
			if err := errors.Join(s.RemoveClient(c.ID), s.AddClient(c)); err != nil {
				t.Error(err)
			}
		}, ErrNotFound},
		{"its client is replaced by another with the same id", func(t *testing.T, s *Store, _ *clock, c Client) {
			c.Created = c.Created.Add(time.Nanosecond)
			if err := s.AddClient(c); err != nil {
				t.Error(err)
			}
		}, ErrNotFound},
		{"its client gets a new secret, which changes nothing", func(t *testing.T, s *Store, clock *clock, c Client) {
			if ended, err := s.RotateClient(c.ID, hashOf("new"), clock.now(), []Hash{hashOf("another")}); err != nil || ended {
				t.Error(ended, err)
			}
		}, nil},
		{"its client had a published secret and gets a new one", func(t *testing.T, s *Store, clock *clock, c Client) {
			if ended, err := s.RotateClient(c.ID, hashOf("new"), clock.now().Add(time.Hour), []Hash{c.Secret}); err != nil || !ended {
				t.Error(ended, err)
			}
		}, ErrNotFound},
		{"it expires", func(_ *testing.T, _ *Store, clock *clock, _ Client) { clock.move(tokenLifetime) }, ErrExpired},
		{"it has expired, but is kept, and there are writes", func(t *testing.T, s *Store, clock *clock, c Client) {
			clock.move(tokenLifetime + expiredKept - time.Minute)
			addToken(t, s, clock, c, "another")
		}, ErrExpired},
		{"the clock is set forward and back", func(t *testing.T, s *Store, clock *clock, c Client) {
			clock.move(tokenLifetime)
			wantToken(t, s, "t", ErrExpired)
			addToken(t, s, clock, c, "another")
			clock.move(-time.Hour)
		}, nil},
	} {
		for _, before := range []struct {
			name string
			uses int
		}{{"never used", 0}, {"used before", 1}} {
			t.Run(tt.name+", "+before.name, func(t *testing.T) {
				s, clock, c := tokenStore(t, "t", "other")
				for range before.uses {
					wantToken(t, s, "t", nil)
				}
				tt.end(t, s, clock, c)
				wantToken(t, s, "t", tt.want)
			})
		}
	}
}

// A token that is read just before it is revoked must not be cached after that.
func TestRevokedTokenIsNeverValidAgain(t *testing.T) {
	var texts []string
	for i := range 200 {
		texts = append(texts, fmt.Sprint(i))
	}
	s, _, c := tokenStore(t, texts...)
	for _, text := range texts {
		var revoked atomic.Bool
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() {
				for again := 0; again < 3; {
					after := revoked.Load()
					_, err := s.Token(hashOf(text))
					switch {
					case after && !errors.Is(err, ErrNotFound):
						t.Errorf("token %s, after it was revoked: %v", text, err)
						return
					case after:
						again++
					case err != nil && !errors.Is(err, ErrNotFound):
						t.Errorf("token %s: %v", text, err)
						return
					}
				}
			})
		}
		if err := s.RevokeToken(hashOf(text), c.ID); err != nil {
			t.Error(err)
		}
		revoked.Store(true)
		wg.Wait()
	}
}

func TestRevokedTokenIsDeletedFromTheFileAtOnce(t *testing.T) {
	s, _, c := tokenStore(t, "t")
	if err := s.RevokeToken(hashOf("t"), c.ID); err != nil {
		t.Error(err)
	}
	if err := s.RevokeToken(hashOf("t"), c.ID); !errors.Is(err, ErrNotFound) {
		t.Errorf("revoked again: %v", err)
	}
	_ = s.view(func(r *reader) error {
		for _, name := range [][]byte{bucketTokens, bucketExpiry} {
			if n := r.Bucket(name).Inspect().KeyN; n != 0 {
				t.Errorf("%s has %d keys", name, n)
			}
		}
		return nil
	})
}

func TestTokenCacheIsBounded(t *testing.T) {
	m := newTokenCache()
	now := time.Now()
	for i := range 3 * maxCachedTokens {
		m.add(hashOf(fmt.Sprint(i)), Token{Client: "a", Expires: now.Add(time.Hour)}, 0, now)
	}
	if n := m.tokens.Len(); n != maxCachedTokens {
		t.Errorf("%d tokens are cached, want %d", n, maxCachedTokens)
	}
	if _, ok, _ := m.get(hashOf(fmt.Sprint(3*maxCachedTokens-1)), now); !ok {
		t.Error("the last token is not cached")
	}
}

func TestLastUseIsWrittenAtMostOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, _, c := tokenStore(t, "t")
		recorded := func() (at time.Time) {
			t.Helper()
			err := s.view(func(r *reader) error {
				c, err := getClient(r.Tx, c.ID)
				at = c.LastUsed
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			return at
		}
		opened := transaction(t, s)
		first := time.Now()
		for range 590 { // 59 s
			wantToken(t, s, "t", nil)
			time.Sleep(100 * time.Millisecond)
		}
		synctest.Wait()
		if at, n := recorded(), transaction(t, s)-opened; !at.IsZero() || n != 0 {
			t.Errorf("within a minute: %v, after %d transactions", at, n)
		}
		if list, err := s.Clients(); err != nil || list[0].LastUsed.Sub(first).Round(time.Minute) != time.Minute {
			t.Errorf("Clients does not return the last use: %+v, %v", list, err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if at, n := recorded(), transaction(t, s)-opened; at.Sub(first).Round(time.Minute) != time.Minute || n != 1 {
			t.Errorf("after a minute: %v, after %d transactions", at, n)
		}
		time.Sleep(time.Hour) // without use
		synctest.Wait()
		if n := transaction(t, s) - opened; n != 1 {
			t.Errorf("after an hour without use: %d transactions", n)
		}
	})
}

func TestCloseWritesTheLastUseUnlessItWasWrittenJustBefore(t *testing.T) {
	path := newPath(t)
	var first, second time.Time
	c := Client{ID: "a", Org: demoOrg, Scopes: Scopes{Read: true}, Created: time.Unix(1700000000, 0).UTC()}
	use := func(after time.Duration) (at time.Time, transactions uint64) {
		t.Run("use", func(t *testing.T) {
			s, clock := openStore(t, path)
			clock.move(after)
			before := transaction(t, s)
			if after == 0 {
				if err := s.AddClient(c); err != nil {
					t.Fatal(err)
				}
				before++
			}
			s.MarkUsed(c.ID)
			at, transactions = clock.now(), before
		})
		t.Run("count transactions", func(t *testing.T) {
			s, _ := openStore(t, path)
			transactions = transaction(t, s) - transactions
		})
		return at, transactions
	}
	var n [3]uint64
	first, n[0] = use(0)
	_, n[1] = use(30 * time.Second)
	second, n[2] = use(2 * time.Minute)
	if n != [3]uint64{1, 0, 1} {
		t.Errorf("%v transactions for the uses", n)
	}
	s, _ := openStore(t, path)
	if got, err := s.Client(c.ID); err != nil || got.LastUsed.Unix() != second.Unix() {
		t.Errorf("%v, %v; used at %v and %v", got.LastUsed, err, first, second)
	}
}
