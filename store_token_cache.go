package main

// The token cache: tokens that were checked recently, so that checking one again takes
// no transaction, and when each client was last used, so that recording it can wait.

import (
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// maxRemembered is how many tokens are remembered, about 300 bytes each; the one
// not used for longest makes room.
const maxCachedTokens = 1 << 14

// memory is shared by all requests. It never knows more than the file: what it
// holds was read there, and a commit that makes it untrue takes it out.
type tokenCache struct {
	mu     sync.Mutex
	tokens *simplelru.LRU[Hash, cachedToken]
	uses   map[string]*use // by client id
	// changes counts the commits that took tokens away. A token that was read
	// before one of them is not remembered after it.
	changes uint64
}

type cachedToken struct {
	token Token
	use   *use // the client's
}

// use is when a client was last used, in seconds since 1970.
type use struct {
	last     int64
	recorded int64 // what of it is in the file
}

func newTokenCache() *tokenCache {
	tokens, err := simplelru.NewLRU[Hash, cachedToken](maxCachedTokens, nil)
	if err != nil {
		panic(err) // only a size below one is an error
	}
	return &tokenCache{tokens: tokens, uses: make(map[string]*use)}
}

// token returns a token that is remembered, and counts as a use of its client
// unless it has expired. If there is none, learn takes what the file says
// together with the count of changes from before it was read.
func (m *tokenCache) get(h Hash, now time.Time) (t Token, ok bool, changes uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, ok := m.tokens.Get(h)
	if ok && now.Before(r.token.Expires) {
		r.use.last = now.Unix()
	}
	return r.token, ok, m.changes
}

// learn remembers a token, unless one was taken away since changes was counted:
// it could be this one.
func (m *tokenCache) add(h Hash, t Token, changes uint64, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if changes == m.changes {
		u := m.useOf(t.Client)
		u.last = now.Unix()
		m.tokens.Add(h, cachedToken{t, u})
	}
}

// used counts as a use of a client.
func (m *tokenCache) markUsed(client string, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.useOf(client).last = now.Unix()
}

// of is called with mu held.
func (m *tokenCache) useOf(client string) *use {
	u := m.uses[client]
	if u == nil {
		u = &use{}
		m.uses[client] = u
	}
	return u
}

// forgetToken forgets a token that was revoked.
func (m *tokenCache) forgetToken(h Hash) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.changes++
	m.tokens.Remove(h)
}

// forgetTokens forgets all tokens, after what is not known token by token.
func (m *tokenCache) forgetTokens() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.changes++
	m.tokens.Purge()
}

// forgetClient forgets a client, and all tokens: clients are removed seldom.
func (m *tokenCache) forgetClient(client string) {
	m.forgetTokens()
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.uses, client)
}

// lastUse returns when a client was last used, if that was in this process.
func (m *tokenCache) lastUse(client string) (at time.Time, ok bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	u := m.uses[client]
	if u == nil {
		return time.Time{}, false
	}
	return time.Unix(u.last, 0), true
}

// unrecorded returns the uses of which the file does not know, by client id: those
// more than least away from what it knows.
func (m *tokenCache) unrecorded(least time.Duration) map[string]time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	uses := make(map[string]time.Time)
	for client, u := range m.uses {
		if (time.Duration(u.last-u.recorded) * time.Second).Abs() > least {
			uses[client] = time.Unix(u.last, 0)
		}
	}
	return uses
}

// recorded says what the file knows now.
func (m *tokenCache) markRecorded(uses map[string]time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for client, at := range uses {
		if u := m.uses[client]; u != nil {
			u.recorded = at.Unix()
		}
	}
}
