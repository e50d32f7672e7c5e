package main

// The state that the endpoints of the API share.

import (
	"time"
)

// api serves the endpoints of the specification.
type api struct {
	*endpoints
	apiSettings
	store     *Store
	validator *Validator
	now       func() time.Time
	inFlight  inFlightKeys
	throttle  *loginThrottle
}

// apiSettings is what the command line says of the API.
type apiSettings struct {
	maxBody       int64         // bytes of a request's content
	builtInTokens bool          // there are clients, and tokens for them
	tokenLifetime time.Duration // of the built-in ones
	publicURL     string        // "" is the request's own origin
	issuer        *issuer       // nil: there is no other issuer of tokens
	origins       []string      // whose pages browsers may let use the API; see cors.go
}
