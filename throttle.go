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
	// loginBurst is how many failures in a row a source may have without waiting.
	loginBurst = 10
	// loginInterval is the time after which a source may fail once more.
	loginInterval = 6 * time.Second
	// maxLoginSources is the most sources that are remembered, about 250 bytes each.
	// The one whose last failure is the longest ago is forgotten first.
	maxLoginSources = 1 << 14
)

// loginThrottle counts failed authentications by source. A client id is counted whether
// it exists or not, so that the count does not reveal which ids exist. The times passed
// to its methods have a monotonic reading, so that setting the clock back changes nothing.
type loginThrottle struct {
	mu       sync.Mutex
	failures *simplelru.LRU[loginSource, *rate.Limiter]
}

// loginSource is a client id together with the network that it authenticates from.
// Neither alone would do: clients behind one proxy share an address, and anybody may
// send anybody's id.
type loginSource struct {
	client  Hash // of the id, which may be long
	network netip.Prefix
}

// newLoginThrottle returns a throttle that has counted no failure.
func newLoginThrottle() *loginThrottle {
	failures, err := simplelru.NewLRU[loginSource, *rate.Limiter](maxLoginSources, nil)
	if err != nil {
		panic(err) // only a size below one is an error
	}
	return &loginThrottle{failures: failures}
}

// loginSourceOf returns the source of a client that authenticates from an address.
func loginSourceOf(client string, from netip.Addr) loginSource {
	bits := from.BitLen()
	if from.Is6() {
		bits = 64 // one subscriber's network (RFC 6177), who may use any address in it
	}
	network, _ := from.Prefix(bits) // cannot fail for these lengths
	return loginSource{hashOf(client), network}
}

// wait returns how long a client must wait before it may authenticate from an address,
// or 0.
func (t *loginThrottle) wait(client string, from netip.Addr, now time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	l, ok := t.failures.Peek(loginSourceOf(client, from))
	if !ok {
		return 0
	}
	return waitOf(l, now)
}

// failed counts a failure. It returns how long the client must wait if this failure
// exceeds the limit, else 0.
func (t *loginThrottle) failed(client string, from netip.Addr, now time.Time) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	source := loginSourceOf(client, from)
	l, ok := t.failures.Get(source)
	if !ok {
		l = rate.NewLimiter(rate.Every(loginInterval), loginBurst)
		t.failures.Add(source, l)
	}
	if l.AllowN(now, 1) {
		return 0
	}
	return waitOf(l, now)
}

// waitOf returns the time until l allows one more failure.
func waitOf(l *rate.Limiter, now time.Time) time.Duration {
	missing := 1 - l.TokensAt(now)
	return max(0, time.Duration(missing*float64(loginInterval)))
}
