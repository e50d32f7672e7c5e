package main

// Cross-origin requests: which web origins may use the API from a browser (Fetch standard,
// §3.3).

import (
	"errors"
	"net/http"
	"net/url"
	"strings"

	"github.com/rs/cors"
)

// withCORS lets web pages of the origins read the responses of next. It does not allow
// credentials in the sense of the standard, which would be cookies: the service has none,
// and a page sends its token in the Authorization field. A preflight request succeeds for
// every path, even for one that does not exist. The response to the actual request then tells
// the page about the fault; a browser hides from the page why a preflight failed.
func withCORS(origins []string, next http.Handler) http.Handler {
	return cors.New(cors.Options{
		AllowedOrigins: origins,
		AllowedMethods: []string{
			http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete,
		},
		AllowedHeaders: []string{"Authorization", "Content-Type", "Idempotency-Key", "If-Match", "If-None-Match"},
		ExposedHeaders: []string{
			"Accept-Patch", "Allow", "ETag", "Link", "Location", "Retry-After", "WWW-Authenticate", "X-Request-ID",
		},
		MaxAge: 7200, // seconds; Chromium caches a preflight response for no longer
	}).Handler(next)
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
	u, err := parseOrigin(s)
	if err != nil {
		return err
	}
	if port := u.Port(); port == map[string]string{"http": "80", "https": "443"}[u.Scheme] {
		return errors.New("must not have the port " + port + ", since browsers leave it out")
	}
	return nil
}

// parseOrigin parses an http or https origin: scheme, host and optional port. It returns
// an error if s has anything else, even a slash at the end.
func parseOrigin(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Scheme+"://"+u.Host != s {
		return nil, errors.New("must be an origin such as https://energy.example:8443, without a path")
	}
	return u, nil
}
