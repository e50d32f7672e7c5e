package main

// The store's methods for access tokens.

import (
	"fmt"
	"time"

	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"
)

// AddToken stores a token under the hash of its text.
func (s *Store) AddToken(h Hash, t Token) error {
	b, err := json.Marshal(t)
	if err != nil {
		return fmt.Errorf("encode token: %w", err)
	}
	return s.update(func(tx *bbolt.Tx) error {
		return putExpiring(tx, bucketTokens, h[:], t.Expires, b)
	})
}

// Token returns a token, which counts as a use of its client. For one that is
// unknown, revoked or of a removed client it returns ErrNotFound, and for one that
// has expired ErrExpired, for at least an hour.
func (s *Store) Token(h Hash) (Token, error) {
	now := s.now()
	t, ok, changes := s.cache.get(h, now)
	if !ok {
		var err error
		if t, err = s.readToken(h); err != nil {
			return Token{}, err
		}
	}
	if !now.Before(t.Expires) {
		return Token{}, ErrExpired
	}
	if !ok {
		s.cache.add(h, t, changes, now)
	}
	return t, nil
}

func (s *Store) readToken(h Hash) (t Token, err error) {
	err = s.view(func(r *reader) error {
		if t, _, err = getToken(r.Tx, h); err != nil {
			return err
		}
		c, err := getClient(r.Tx, t.Client)
		if err == nil && !c.Created.Equal(t.ClientCreated) {
			return ErrNotFound // of one that had its id before
		}
		return err
	})
	return t, err
}

// RevokeToken removes a token of a client. It returns ErrNotFound for an unknown
// token and ErrForeign for another client's.
func (s *Store) RevokeToken(h Hash, client string) error {
	return s.update(func(tx *bbolt.Tx) error {
		t, expiry, err := getToken(tx, h)
		switch {
		case err != nil:
			return err
		case t.Client != client:
			return ErrForeign
		}
		tx.OnCommit(func() { s.cache.forgetToken(h) })
		return removeExpiring(tx, bucketTokens, h[:], expiry)
	})
}

// getToken returns a token and the expiry that it is stored with.
func getToken(tx *bbolt.Tx, h Hash) (t Token, expiry time.Time, err error) {
	b, expiry, err := getExpiring(tx, bucketTokens, h[:])
	if err != nil {
		return t, expiry, err
	}
	if err := json.Unmarshal(b, &t); err != nil {
		return t, expiry, fmt.Errorf("decode token: %w", err)
	}
	return t, expiry, nil
}
