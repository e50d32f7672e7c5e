package main

// Cross-origin requests: which web origins may use the API from a browser (Fetch standard,
// §3.3).

import (
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/rs/cors"
)

// withCORS lets web pages of the origins read the responses of next. It does not allow
// credentials in the sense of the standard, which would be cookies: the service has none,
// and a page sends its token in the Authorization field. A preflight request succeeds for
// every path, even for one that does not exist, and for every header field: scripts that
// measure a page add fields of their own to its requests, such as baggage. The response to the
// actual request then tells the page about the fault; a browser hides from the page why a
// preflight failed.
func withCORS(origins []string, next http.Handler) http.Handler {
	explained := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if isPreflight(r) {
			x := exchangeOf(w, r)
			if w.Header().Get("Access-Control-Allow-Origin") == "" {
				x.reason = refusedPreflight(r, origins)
			}
			if len(origins) > 0 {
				x.send(response{status: http.StatusNoContent})
				return
			}
		}
		next.ServeHTTP(w, r)
	})
	if len(origins) == 0 {
		return explained
	}
	return cors.New(cors.Options{
		AllowedOrigins: origins,
		AllowedMethods: []string{
			http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete,
		},
		AllowedHeaders: []string{"*"},
		ExposedHeaders: []string{
			"Accept-Patch", "Allow", "ETag", "Link", "Location", "Retry-After", "WWW-Authenticate", "X-Request-ID",
		},
		MaxAge:             7200, // seconds; Chromium caches a preflight response for no longer
		OptionsPassthrough: true, // to explained
	}).Handler(explained)
}

// isPreflight reports whether a browser asks with r if a page may send another request (Fetch
// standard, §3.3.2).
func isPreflight(r *http.Request) bool {
	return r.Method == http.MethodOptions && r.Header.Get("Origin") != "" && r.Header.Get("Access-Control-Request-Method") != ""
}

// refusedPreflight returns why a preflight request is refused if pages of the origins may use
// the API. The browser shows the page nothing of it, so it is for the log.
func refusedPreflight(r *http.Request, origins []string) string {
	origin := r.Header.Get("Origin")
	named := func(o string) bool { return o == "*" || strings.EqualFold(o, origin) }
	switch {
	case len(origins) == 0:
		return "preflight refused: there is no --cors-origin, so pages of other origins, such as " + quoted(origin) + ", may not use the API"
	case !slices.ContainsFunc(origins, named):
		return "preflight refused: no --cors-origin is " + quoted(origin)
	default:
		return "preflight refused: the API has no method " + quoted(r.Header.Get("Access-Control-Request-Method")) + " (methods are case-sensitive)"
	}
}

// checkCORSOrigin returns an error unless s is "*", which allows all origins, or an origin
// as browsers send it. Package cors would accept other texts too, but they would match no
// origin, or many.
func checkCORSOrigin(s string) error {
	if s == "*" {
		return nil
	}
	if strings.Contains(s, "*") { // package cors would take it for a pattern
		return errors.New("must be one origin, or * for all; repeat the flag for more")
	}
	u, err := url.Parse(s)
	if err != nil || !isOrigin(u, s) {
		return errors.New("must be an origin such as https://app.example:8443, or capacitor://localhost for an app, without a path")
	}
	if port := u.Port(); port != "" && port == map[string]string{"http": "80", "https": "443"}[u.Scheme] {
		return errors.New("must not have the port " + port + ", since browsers leave it out")
	}
	return nil
}

// parseOrigin parses an http or https origin: scheme, host and optional port. It returns
// an error if s has anything else, even a slash at the end.
func parseOrigin(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || !isOrigin(u, s) {
		return nil, errors.New("must be an origin such as https://energy.example:8443, without a path")
	}
	return u, nil
}

// isOrigin reports whether s, which u was parsed from, is no more than a scheme and a host with an
// optional port. Apps that show web pages of their own have schemes of their own.
func isOrigin(u *url.URL, s string) bool {
	return u.Scheme != "" && u.Hostname() != "" && u.Scheme+"://"+u.Host == s
}
