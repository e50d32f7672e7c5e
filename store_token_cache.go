package main

// The token cache: it keeps the tokens that were checked recently, so that checking one again
// takes no transaction, and the times when clients were last used, so that these need not be
// written to the file at each use.

import (
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// maxCachedTokens is the most tokens that are cached, about 300 bytes each. The one whose last
// use is the longest ago is removed first.
const maxCachedTokens = 1 << 14

// tokenCache is shared by all requests. It never accepts a token that the file does not have,
// once the write that removed the token has returned:
//   - a token is added only after it was read from the file;
//   - a commit that removes a token, or its client, removes it from the cache before the
//     write returns (bbolt's Tx.OnCommit);
//   - a token that was read before such a commit is not added after it. For that, get
//     returns the value of changes before the file is read, and add ignores the token if
//     changes has another value.
//
// As OnCommit does not run for a commit that is in doubt, Store.settleDoubt empties the cache.
type tokenCache struct {
	mu     sync.Mutex
	tokens *simplelru.LRU[Hash, cachedToken]
	uses   map[string]*use // by client id
	// changes is the number of times that tokens were removed, except to make room.
	changes uint64
}

// cachedToken is a token with the last use of its client.
type cachedToken struct {
	token Token
	use   *use // the one in tokenCache.uses
}

// use holds times when a client was last used, in seconds since 1970.
type use struct {
	last     int64
	recorded int64 // the last time written to the file, or 0
}

// newTokenCache returns an empty cache.
func newTokenCache() *tokenCache {
	tokens, err := simplelru.NewLRU[Hash, cachedToken](maxCachedTokens, nil)
	if err != nil {
		panic(err) // only a size below one is an error
	}
	return &tokenCache{tokens: tokens, uses: make(map[string]*use)}
}

// get returns a cached token, which may have expired; if it has not, get marks its client as
// used. If ok is false, the caller reads the token from the file and passes it to add together
// with changes.
func (c *tokenCache) get(h Hash, now time.Time) (t Token, ok bool, changes uint64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r, ok := c.tokens.Get(h)
	if ok && now.Before(r.token.Expires) {
		r.use.last = now.Unix()
	}
	return r.token, ok, c.changes
}

// add caches a token that was read from the file and marks its client as used. It ignores the
// token if any token was removed since get returned changes: it could be this one.
func (c *tokenCache) add(h Hash, t Token, changes uint64, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if changes == c.changes {
		u := c.useOf(t.Client)
		u.last = now.Unix()
		c.tokens.Add(h, cachedToken{t, u})
	}
}

// markUsed sets the time when a client was last used.
func (c *tokenCache) markUsed(client string, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.useOf(client).last = now.Unix()
}

// useOf returns the use of a client, a new one if there is none. mu must be held.
func (c *tokenCache) useOf(client string) *use {
	u := c.uses[client]
	if u == nil {
		u = &use{}
		c.uses[client] = u
	}
	return u
}

// forgetToken removes a revoked token.
func (c *tokenCache) forgetToken(h Hash) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changes++
	c.tokens.Remove(h)
}

// forgetTokens removes all tokens. It is for changes that may concern any of them.
func (c *tokenCache) forgetTokens() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changes++
	c.tokens.Purge()
}

// forgetClient removes the last use of a client, and all tokens rather than only those of the
// client, since clients are rarely removed.
func (c *tokenCache) forgetClient(client string) {
	c.forgetTokens()
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.uses, client)
}

// lastUse returns the time when a client was last used. It returns false if this process has
// not seen the client used.
func (c *tokenCache) lastUse(client string) (at time.Time, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	u := c.uses[client]
	if u == nil {
		return time.Time{}, false
	}
	return time.Unix(u.last, 0), true
}

// unrecorded returns, by client id, the times of last use that differ by more than least from
// the time recorded in the file.
func (c *tokenCache) unrecorded(least time.Duration) map[string]time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	uses := make(map[string]time.Time)
	for client, u := range c.uses {
		if (time.Duration(u.last-u.recorded) * time.Second).Abs() > least {
			uses[client] = time.Unix(u.last, 0)
		}
	}
	return uses
}

// markRecorded records that these times of last use, by client id, are in the file.
func (c *tokenCache) markRecorded(uses map[string]time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for client, at := range uses {
		if u := c.uses[client]; u != nil {
			u.recorded = at.Unix()
		}
	}
}
