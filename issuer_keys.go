package main

// The keys of the external issuer: where it publishes them, when they are fetched, and the keys that
// it does not publish.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/MicahParks/jwkset"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/time/rate"
)

const (
	// issuerTimeout is the timeout of a request to the issuer.
	issuerTimeout = 5 * time.Second
	// keyRefresh is the time after which the keys are fetched again. A key that the issuer
	// has withdrawn is accepted for as long at most, or, if the issuer cannot be reached,
	// until keyRefreshRetry after it can be reached again.
	keyRefresh      = time.Hour
	keyRefreshRetry = time.Minute
	// lookupBurst is how many times in a row tokens with unknown keys make the service fetch the
	// keys, and lookupInterval is the time after which they may do so once more. Anyone can send
	// tokens with made-up key ids, so a fetch for each would let them flood the issuer.
	lookupBurst    = 5
	lookupInterval = 10 * time.Second
	// missingTime is how long a key that was not published is taken to be missing without another
	// look, and maxMissing is the most such keys that are remembered, about 150 bytes each.
	missingTime = time.Minute
	maxMissing  = 1 << 10
	// maxIssuerDocument is the largest document that is read from the issuer, in bytes.
	maxIssuerDocument = 1 << 20
)

// issuerKeys are the keys of an issuer.
//
// They are fetched at the start and again every keyRefresh. A token that is signed with a key that
// is not among them may be signed with a new key, so its request fetches them at once, and waits. All
// requests that need the keys at the same time share one fetch. A key that is not published then is
// remembered as missing. (The HTTP storage of package jwkset is not used: it fetches for each such
// token, subject to a rate limit, and so refuses good tokens when many arrive at once.)
//
// Where it cannot be known whether a token is good, it gets a 503: errIssuerDown if its key is unknown
// and the issuer is down, errLookups if there were too many unknown keys. Tokens signed with a key
// that was fetched before are verified as usual, and wait for nothing.
type issuerKeys struct {
	url string // of the issuer
	log *slog.Logger
	now func() time.Time

	keys    atomic.Pointer[keySet] // nil until the first fetch succeeds
	down    atomic.Bool            // whether the last fetch failed
	missing missingKeys

	// fetching is held during a fetch, and guards the fields below. A request that needs
	// the result waits for it.
	fetching sync.Mutex
	fetched  time.Time // when the last fetch began, whether it succeeded or not
	keysURL  string    // jwks_uri of the metadata; "" if the metadata must be read first
	lookups  *rate.Limiter
}

// keySet is the set of keys that the issuer published when they were fetched.
type keySet struct {
	jwkset.Storage
	keyfunc.Keyfunc
}

// has reports whether the set, which may be nil, has a key with the id kid. It is false for
// "", even if a key was published without an id, so that fetch("") always fetches.
func (k *keySet) has(kid string) bool {
	if k == nil || kid == "" {
		return false
	}
	_, err := k.KeyRead(context.Background(), kid)
	return err == nil
}

// missingKeys remembers ids of keys that the issuer did not publish. The zero value has none.
type missingKeys struct {
	mu   sync.Mutex
	seen *simplelru.LRU[Hash, time.Time] // when, by the hash of the id, which may be long; nil if empty
}

// has reports whether a key was found to be missing within missingTime.
func (m *missingKeys) has(kid string, now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.seen == nil {
		return false
	}
	at, ok := m.seen.Get(hashOf(kid))
	return ok && now.Sub(at) < missingTime
}

// add remembers that a key is missing.
func (m *missingKeys) add(kid string, now time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.seen == nil {
		m.seen, _ = simplelru.NewLRU[Hash, time.Time](maxMissing, nil) // only a size below one is an error
	}
	m.seen.Add(hashOf(kid), now)
}

// with returns keys that include the one with the id kid, if the issuer publishes it. It returns
// errIssuerDown or errLookups if that cannot be known.
func (i *issuerKeys) with(kid string) (*keySet, error) {
	if keys := i.keys.Load(); keys.has(kid) || i.missing.has(kid, i.now()) {
		return keys, nil
	}
	if err := i.fetch(kid); err != nil {
		return nil, err
	}
	keys := i.keys.Load()
	if !keys.has(kid) {
		i.missing.add(kid, i.now())
	}
	return keys, nil
}

// refresh fetches the keys now and then every keyRefresh, or every keyRefreshRetry while
// that fails, until ctx is done. Without it, a key that the issuer has withdrawn would be
// accepted until some token with an unknown key makes the service fetch.
func (i *issuerKeys) refresh(ctx context.Context) {
	for {
		next := keyRefresh
		if i.fetch("") != nil {
			next = keyRefreshRetry
		}
		select {
		case <-time.After(next):
		case <-ctx.Done():
			return
		}
	}
}

// fetch returns nil once the keys include kid, or a fetch that began after the call has succeeded: a
// key that is still missing then is not published. All callers that wait meanwhile share that fetch.
// It returns errIssuerDown if the fetch fails, and errLookups if lookups allows none. It always
// fetches if kid is "".
//
// After a failed fetch callers do not wait: one of them tries again if lookups allows it, and the
// others get errIssuerDown at once. So an issuer that is known to be down delays one request at a
// time.
func (i *issuerKeys) fetch(kid string) error {
	called := time.Now()
	if !i.fetching.TryLock() {
		if i.down.Load() {
			return errIssuerDown
		}
		i.fetching.Lock()
	}
	defer i.fetching.Unlock()
	shared := i.fetched.After(called)
	switch {
	case i.keys.Load().has(kid) || shared && !i.down.Load():
		return nil
	case shared:
		return errIssuerDown
	case kid != "" && !i.lookups.AllowN(i.now(), 1):
		if i.down.Load() {
			return errIssuerDown
		}
		return errLookups
	}
	i.fetched = time.Now()
	keys, err := i.fetchKeys()
	if err != nil {
		i.keysURL = "" // the keys may have moved, so read the metadata again
		if !i.down.Swap(true) {
			i.log.Warn("the issuer cannot be reached, so tokens signed with a key that is not known yet get status 503; they make the server try again, but for the first few at most every 10 seconds", "issuer", i.url, "err", err)
		}
		return fmt.Errorf("%w: %w", errIssuerDown, err)
	}
	i.keys.Store(keys)
	if i.down.Swap(false) {
		i.log.Info("the issuer can be reached again", "issuer", i.url)
	}
	return nil
}

// fetchKeys fetches the issuer's JWK Set. It ignores keys that are malformed or of an
// unknown type, so that the other keys can be used (RFC 7517 §5). The caller must hold
// fetching.
func (i *issuerKeys) fetchKeys() (*keySet, error) {
	if i.keysURL == "" {
		var err error
		if i.keysURL, err = i.discover(); err != nil {
			return nil, err
		}
	}
	var set struct {
		Keys []jsontext.Value `json:"keys"`
	}
	if err := readDocument(i.keysURL, &set); err != nil {
		return nil, err
	}
	if set.Keys == nil {
		return nil, fmt.Errorf("%s: not a JWK Set: the member keys is missing", i.keysURL)
	}
	storage := jwkset.NewMemoryStorage()
	for _, raw := range set.Keys {
		jwk, err := jwkset.NewJWKFromRawJSON([]byte(raw), jwkset.JWKMarshalOptions{}, jwkset.JWKValidateOptions{})
		if err == nil {
			err = storage.KeyWrite(context.Background(), jwk)
		}
		if err != nil {
			i.log.Debug("ignoring a key of the issuer that cannot be used", "issuer", i.url, "err", err)
		}
	}
	keys, err := keyfunc.New(keyfunc.Options{Storage: storage, UseWhitelist: []jwkset.USE{jwkset.UseSig, ""}})
	return &keySet{storage, keys}, err
}

// metadataPath is the path of the metadata document of an authorization server (RFC 8414
// §3): of the issuer's, and of the one that the built-in authorization server serves.
const metadataPath = "/.well-known/oauth-authorization-server"

// discover returns the URL of the issuer's JWK Set. It reads the URL from the metadata
// document of RFC 8414 §3 or, if that fails, from the one of OpenID Connect Discovery §4,
// which more issuers serve. The two differ in where they put the path of the issuer.
func (i *issuerKeys) discover() (keysURL string, err error) {
	u, err := url.Parse(i.url)
	if err != nil {
		return "", err
	}
	issuerPath := strings.TrimSuffix(u.Path, "/")
	oauth, openID := *u, *u
	oauth.Path = metadataPath + issuerPath
	openID.Path = issuerPath + "/.well-known/openid-configuration"
	for _, address := range []string{oauth.String(), openID.String()} {
		keysURL, metadataErr := i.readMetadata(address)
		if metadataErr == nil {
			return keysURL, nil
		}
		err = errors.Join(err, metadataErr)
	}
	return "", err
}

// readMetadata returns jwks_uri from the metadata document at address. It returns an error
// if the document is of another issuer, or if the keys of an https issuer would be fetched
// over http.
func (i *issuerKeys) readMetadata(address string) (keysURL string, err error) {
	var m struct {
		Issuer  string `json:"issuer"`
		JWKSURI string `json:"jwks_uri"`
	}
	if err := readDocument(address, &m); err != nil {
		return "", err
	}
	if m.Issuer != i.url { // RFC 8414 §3.3
		return "", fmt.Errorf("%s: names the issuer %q, but --issuer is %q; they must be exactly the same", address, m.Issuer, i.url)
	}
	u, err := url.Parse(m.JWKSURI)
	if err != nil || u.Host == "" || u.Scheme != "https" && (u.Scheme != "http" || strings.HasPrefix(i.url, "https:")) {
		return "", fmt.Errorf("%s: jwks_uri is %q, but must be an https URL", address, m.JWKSURI)
	}
	return m.JWKSURI, nil
}

// issuerHTTP is the client for requests to the issuer. It follows up to 10 redirects, but
// not from https to http: a key is trusted only because it comes from the issuer's server,
// which http does not prove.
var issuerHTTP = &http.Client{
	Timeout: issuerTimeout,
	CheckRedirect: func(to *http.Request, via []*http.Request) error {
		switch {
		case via[0].URL.Scheme == "https" && to.URL.Scheme != "https":
			return errors.New("redirects from https to " + to.URL.Scheme)
		case len(via) >= 10:
			return errors.New("redirects too often")
		}
		return nil
	},
}

// readDocument gets the JSON document at address and unmarshals it into the value that
// into points to.
func readDocument(address string, into any) error {
	resp, err := issuerHTTP.Get(address)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", address, resp.Status)
	}
	if err := json.UnmarshalRead(io.LimitReader(resp.Body, maxIssuerDocument), into); err != nil {
		return fmt.Errorf("%s: %w", address, err)
	}
	return nil
}
