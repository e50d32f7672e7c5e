package main

// Cross-origin requests from browsers: which origins may use the API (Fetch standard, §3.3).

import (
	"errors"
	"net/http"
	"net/url"
	"strings"

	"github.com/rs/cors"
)

// forOrigins lets browsers tell the pages of the origins what next answers. There
// are no cookies here, so no credentials in the standard's sense: a page sends its
// token itself. A preflight is answered whatever its path: that there is nothing is
// for the request itself to be told, as a browser would not say why a preflight failed.
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
		MaxAge: 7200, // seconds; Chromium keeps no answer for longer
	}).Handler(next)
}

// checkCORSOrigin accepts an origin as browsers send it, or "*" for all of them.
func checkCORSOrigin(s string) error {
	if s == "*" {
		return nil
	}
	if strings.Contains(s, "*") { // which would be a pattern
		return errors.New("must be one origin, or * for all; repeat the flag for more")
	}
	u, err := parseOrigin(s)
	if err != nil {
		return err
	}
	if port := u.Port(); port == map[string]string{"http": "80", "https": "443"}[u.Scheme] {
		return errors.New("must be without the port " + port + ", as browsers leave it out")
	}
	return nil
}

// parseOrigin accepts scheme, host and port, and nothing else.
func parseOrigin(s string) (*url.URL, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || u.Scheme+"://"+u.Host != s {
		return nil, errors.New("must be an origin such as https://energy.example:8443, without a path")
	}
	return u, nil
}
