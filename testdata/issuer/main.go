// Issuer is an independent authorization server for issuer_test.go: the certified library
// github.com/zitadel/oidc with the storage and the login form of its example. It adds
// clients whose tokens are each invalid in one way, and keys that can change while it
// runs and survive a restart.
package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/google/uuid"
	"github.com/zitadel/oidc/v3/example/server/exampleop"
	"github.com/zitadel/oidc/v3/example/server/storage"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"
)

// The organizations are those of the service's demo data.
const (
	org      = "5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11"
	otherOrg = "c2a7e5d4-3b1f-4e8a-8f60-7d9b5a1c3e22"
)

// redirectURI is the redirect URI of the client "web". Nothing needs to listen there.
const redirectURI = "http://127.0.0.1:9999/callback"

// clients are all clients, by id. The secret of each is its id and "-secret".
var clients = byID(
	client{id: "good", org: org},
	client{id: "reader", org: org, scopes: []string{"read"}},
	client{id: "other-org", org: otherOrg},
	client{id: "no-org"},
	client{id: "elsewhere", org: org, audience: "another-service"},
	// A token that was valid two hours ago for one hour, and one that will be valid in an
	// hour.
	client{id: "expired", org: org, skew: 2 * time.Hour, lifetime: -time.Hour},
	client{id: "early", org: org, skew: -time.Hour, lifetime: 2 * time.Hour},
	client{id: "web", org: org, audience: "web"}, // of users who log in
)

// client is an op.Client. It changes some methods of the library's example.
type client struct {
	*storage.Client
	id, org, audience string
	scopes            []string
	skew              time.Duration // of iat and nbf, which are earlier by it
	lifetime          time.Duration // of an access token, from now
}

func byID(all ...client) map[string]*client {
	m := make(map[string]*client)
	for _, c := range all {
		c.Client = storage.WebClient(c.id, c.id+"-secret", redirectURI)
		storage.RegisterClients(c.Client)
		if c.audience == "" {
			c.audience = "energy-contracts"
		}
		if c.scopes == nil {
			c.scopes = []string{"read", "write"}
		}
		if c.lifetime == 0 {
			c.lifetime = time.Hour
		}
		m[c.id] = &c
	}
	return m
}

func (c *client) AccessTokenType() op.AccessTokenType { return op.AccessTokenTypeJWT }
func (c *client) ClockSkew() time.Duration            { return c.skew }
func (c *client) IsScopeAllowed(scope string) bool    { return slices.Contains(c.scopes, scope) }
func (c *client) GrantTypes() []oidc.GrantType {
	return []oidc.GrantType{oidc.GrantTypeClientCredentials, oidc.GrantTypeCode}
}

// store is the storage of the library's example with these clients and keys.
type store struct {
	*storage.Storage
	file string

	mu   sync.Mutex
	keys []jose.JSONWebKey // with their private halves; the last one signs
}

func (s *store) GetClientByClientID(_ context.Context, id string) (op.Client, error) {
	if c := clients[id]; c != nil {
		return c, nil
	}
	return nil, errors.New("client not found")
}

func (s *store) ClientCredentials(ctx context.Context, id, secret string) (op.Client, error) {
	if err := s.AuthorizeClientIDSecret(ctx, id, secret); err != nil {
		return nil, err
	}
	return s.GetClientByClientID(ctx, id)
}

func (s *store) ClientCredentialsTokenRequest(_ context.Context, id string, scopes []string) (op.TokenRequest, error) {
	c := clients[id]
	if len(scopes) == 0 {
		scopes = c.scopes
	}
	for _, scope := range scopes {
		if !c.IsScopeAllowed(scope) {
			return nil, oidc.ErrInvalidScope()
		}
	}
	return &oidc.JWTTokenRequest{Subject: id, Audience: []string{c.audience}, Scopes: scopes}, nil
}

func (s *store) CreateAccessToken(ctx context.Context, req op.TokenRequest) (id string, expires time.Time, err error) {
	id, expires, err = s.Storage.CreateAccessToken(ctx, req)
	if c := clients[req.GetSubject()]; c != nil { // not a user
		expires = time.Now().Add(c.lifetime)
	}
	return id, expires, err
}

// GetPrivateClaimsFromScopes adds the claims to an access token that RFC 9068 and the service
// require.
func (s *store) GetPrivateClaimsFromScopes(_ context.Context, _, id string, scopes []string) (map[string]any, error) {
	claims := map[string]any{"scope": strings.Join(scopes, " ")}
	if org := clients[id].org; org != "" {
		claims["org_id"] = org
	}
	return claims, nil
}

// SetUserinfoFromRequest adds the organization to an ID token too, so that only its type is
// wrong in place of an access token.
func (s *store) SetUserinfoFromRequest(ctx context.Context, info *oidc.UserInfo, req op.IDTokenRequest, scopes []string) error {
	info.AppendClaims("org_id", clients[req.GetClientID()].org)
	return s.Storage.SetUserinfoFromRequest(ctx, info, req, scopes)
}

type signingKey struct{ jose.JSONWebKey }

func (k signingKey) ID() string { return k.KeyID }
func (k signingKey) Key() any   { return k.JSONWebKey.Key }
func (k signingKey) SignatureAlgorithm() jose.SignatureAlgorithm {
	return jose.SignatureAlgorithm(k.Algorithm)
}

type publicKey struct{ jose.JSONWebKey }

func (k publicKey) ID() string  { return k.KeyID }
func (k publicKey) Key() any    { return k.JSONWebKey.Public().Key }
func (k publicKey) Use() string { return k.JSONWebKey.Use }
func (k publicKey) Algorithm() jose.SignatureAlgorithm {
	return jose.SignatureAlgorithm(k.JSONWebKey.Algorithm)
}

func (s *store) SigningKey(context.Context) (op.SigningKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return signingKey{s.keys[len(s.keys)-1]}, nil
}

func (s *store) SignatureAlgorithms(context.Context) ([]jose.SignatureAlgorithm, error) {
	return []jose.SignatureAlgorithm{jose.RS256, jose.ES256}, nil
}

func (s *store) KeySet(context.Context) (set []op.Key, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range s.keys {
		set = append(set, publicKey{k})
	}
	return set, nil
}

// rotate signs with a new key from now on and still publishes the others.
func (s *store) rotate(algorithm jose.SignatureAlgorithm) error {
	var key crypto.Signer
	var err error
	if algorithm == jose.ES256 {
		key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	} else {
		key, err = rsa.GenerateKey(rand.Reader, 2048)
	}
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = append(s.keys, jose.JSONWebKey{Key: key, KeyID: uuid.NewString(), Algorithm: string(algorithm), Use: "sig"})
	return s.save()
}

// withdraw publishes only the key that signs.
func (s *store) withdraw() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys = s.keys[len(s.keys)-1:]
	return s.save()
}

func (s *store) save() error {
	b, err := json.Marshal(jose.JSONWebKeySet{Keys: s.keys})
	if err != nil {
		return err
	}
	return os.WriteFile(s.file, b, 0o600)
}

func (s *store) load() error {
	b, err := os.ReadFile(s.file)
	if errors.Is(err, os.ErrNotExist) {
		return s.rotate(jose.RS256)
	}
	if err != nil {
		return err
	}
	var set jose.JSONWebKeySet
	err = json.Unmarshal(b, &set)
	s.keys = set.Keys
	return err
}

func main() {
	addr := flag.String("addr", "127.0.0.1:0", "listen on this address")
	keys := flag.String("keys", "", "keep the keys in this file")
	flag.Parse()
	listener, err := net.Listen("tcp", *addr)
	if err != nil {
		log.Fatal(err)
	}
	issuer := "http://" + listener.Addr().String()
	s := &store{Storage: storage.NewStorage(storage.NewUserStore(issuer)), file: *keys}
	if err := s.load(); err != nil {
		log.Fatal(err)
	}
	control := func(do func(*http.Request) error) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			if err := do(r); err != nil {
				http.Error(w, err.Error(), http.StatusInternalServerError)
			}
		}
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /rotate", control(func(r *http.Request) error { return s.rotate(jose.SignatureAlgorithm(r.FormValue("alg"))) }))
	mux.HandleFunc("POST /withdraw", control(func(*http.Request) error { return s.withdraw() }))
	mux.Handle("/", exampleop.SetupServer(issuer, s, slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})), false))
	fmt.Println(issuer)
	log.Fatal(http.Serve(listener, mux))
}
