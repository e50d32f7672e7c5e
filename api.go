package main

// The state that the handlers of the API share, and its settings.

import (
	"errors"
	"net/http"
	"net/url"
	"path"
	"strings"
	"time"
	"unicode/utf8"
)

// api is the http.Handler that serves the endpoints of openapi.json. Its methods are the handlers
// of the endpoints, in handler.go and oauth.go, and the checks of tokens, in auth.go.
type api struct {
	*endpoints
	apiSettings
	store     *Store
	validator *Validator
	now       func() time.Time
	inFlight  inFlightKeys
	throttle  *loginThrottle
}

// apiSettings are the settings of the API that the serve command takes from its flags.
type apiSettings struct {
	maxBody       int64         // maximum size of a request body, in bytes
	bodyMemory    int64         // bound on the memory of all requests, in bytes; see memory.go
	builtInTokens bool          // clients get tokens at the token endpoint of this service
	tokenLifetime time.Duration // of these tokens
	publicURL     string        // see baseURL; without a slash at its end; "" means the origin of the request
	issuer        *issuer       // authorization server whose tokens are accepted too; or nil
	origins       []string      // whose web pages may use the API from a browser; see cors.go
}

// checkPublicURL returns an error unless s is an origin with an optional path, which may end in a
// slash.
func checkPublicURL(s string) error {
	u, err := url.Parse(s)
	if err == nil {
		_, err = parseOrigin(strings.TrimSuffix(s, u.EscapedPath()))
	}
	if err == nil {
		if p := strings.TrimSuffix(u.Path, "/") + "/path"; path.Clean(p) == p {
			return nil
		}
	}
	return errors.New("must be a URL such as https://energy.example or https://energy.example/energy, without query and fragment")
}

// baseURL returns the URL, without a slash at its end, to which clients append the paths of the
// service: --public-url or, without that flag, the origin that the request was sent to.
func (a *api) baseURL(r *http.Request) (string, error) {
	if a.publicURL != "" {
		return a.publicURL, nil
	}
	origin := "http://" + r.Host
	if r.TLS != nil {
		origin = "https://" + r.Host
	}
	// In HTTP/2, the host may be any bytes.
	if _, err := parseOrigin(origin); err != nil || !utf8.ValidString(origin) {
		return "", &malformed{fault{Parameter: "Host", rule: "host", Detail: "must be a host name or address, with an optional port"}}
	}
	return origin, nil
}
