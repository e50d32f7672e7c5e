package main

// The state that the handlers of the API share, and its settings.

import (
	"time"
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
	builtInTokens bool          // clients get tokens at the token endpoint of this service
	tokenLifetime time.Duration // of these tokens
	publicURL     string        // base of the URLs in the OAuth metadata; "" means the origin of the request
	issuer        *issuer       // authorization server whose tokens are accepted too; or nil
	origins       []string      // whose web pages may use the API from a browser; see cors.go
}
