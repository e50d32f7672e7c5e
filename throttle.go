package main

// The login throttle: how often a client may fail to authenticate before it must wait.

import (
	"net/netip"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/time/rate"
)

const (
	// guessBurst is how many failures in a row are free, of an id or an address.
	guessBurst = 10
	// guessInterval is the time after which one more is.
	guessInterval = 6 * time.Second
	// maxGuessers bounds each of the lists below, about 200 bytes an entry; the
	// one that failed the longest ago makes room.
	maxGuessers = 1 << 14
)

// guesses counts failed authentications. An id is counted whether it exists or
// not, so that the count tells nothing. The times that it is told have a monotonic
// reading, as time.Now's: that a clock is set back changes nothing.
type guesses struct {
	mu        sync.Mutex
	clients   *simplelru.LRU[Hash, *rate.Limiter] // by the hash of an id, which may be long
	addresses *simplelru.LRU[netip.Prefix, *rate.Limiter]
	// places tells whether the last attempt of an id from an address succeeded. Then
	// it may go on whatever others do: behind a proxy all come from one address.
	places *simplelru.LRU[place, bool]
}

// place is a client id and whom it came from.
type place struct {
	client  Hash
	address netip.Prefix
}

func newGuesses() *guesses {
	return &guesses{
		clients:   newLRU[Hash, *rate.Limiter](maxGuessers),
		addresses: newLRU[netip.Prefix, *rate.Limiter](maxGuessers),
		places:    newLRU[place, bool](maxGuessers),
	}
}

// newLRU panics if size is below one.
func newLRU[K comparable, V any](size int) *simplelru.LRU[K, V] {
	l, err := simplelru.NewLRU[K, V](size, nil)
	if err != nil {
		panic(err)
	}
	return l
}

func placeOf(client string, from netip.Addr) place {
	bits := from.BitLen()
	if from.Is6() {
		bits = 64 // what one subscriber gets (RFC 6177), and can change within at will
	}
	prefix, _ := from.Prefix(bits) // has no error for so many bits
	return place{hashOf(client), prefix}
}

// wait returns how long an address must not authenticate as a client; 0 is now.
// Failures elsewhere do not keep a client out that has not failed here.
func (g *guesses) wait(client string, from netip.Addr, now time.Time) (wait time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := placeOf(client, from)
	good, known := g.places.Peek(p)
	if l, ok := g.clients.Peek(p.client); ok && known && !good {
		wait = waitOf(l, now)
	}
	if l, ok := g.addresses.Peek(p.address); ok && !good {
		wait = max(wait, waitOf(l, now))
	}
	return wait
}

// failed counts a failure, and returns how long to wait if it was one too many.
func (g *guesses) failed(client string, from netip.Addr, now time.Time) (wait time.Duration) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p := placeOf(client, from)
	g.places.Add(p, false)
	return max(countFailure(g.clients, p.client, now), countFailure(g.addresses, p.address, now))
}

func countFailure[K comparable](failures *simplelru.LRU[K, *rate.Limiter], key K, now time.Time) time.Duration {
	l, ok := failures.Get(key)
	if !ok {
		l = rate.NewLimiter(rate.Every(guessInterval), guessBurst)
		failures.Add(key, l)
	}
	if l.AllowN(now, 1) {
		return 0
	}
	return waitOf(l, now)
}

func waitOf(l *rate.Limiter, now time.Time) time.Duration {
	missing := 1 - l.TokensAt(now)
	return max(0, time.Duration(missing*float64(guessInterval)))
}

// succeeded remembers that a client has authenticated.
func (g *guesses) succeeded(client string, from netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.places.Add(placeOf(client, from), true)
}
