package main

// The store's methods for access tokens.

import (
	"fmt"

	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"
)

// AddToken stores a token; h is the hash of its text. If its client then has more tokens than
// tokenQuota allows, the oldest ends.
func (s *Store) AddToken(h Hash, t Token) error {
	if err := t.check(); err != nil {
		return fmt.Errorf("token of client %q: %w", t.Client, err)
	}
	b, err := json.Marshal(t)
	if err != nil {
		return fmt.Errorf("encode token: %w", err)
	}
	stored := withChecksum(h[:], append(expiryBytes(t.Expires), b...))
	return s.update(len(stored), func(tx *bbolt.Tx) error {
		ended, err := t.expiring(h, t.Expires).put(tx, stored)
		for _, key := range ended {
			tx.OnCommit(func() { s.cache.forgetToken(Hash(key)) })
		}
		return err
	})
}

// Token returns the token with this hash and sets the time when its client was last used to
// now. It returns ErrNotFound if the token is unknown or revoked or if its client has been
// removed, and ErrExpired if the token has expired. An expired token is kept for at least an
// hour (expiredKept); after that, Token returns ErrNotFound.
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

// readToken reads a token from the file. It returns ErrNotFound if the client has been
// removed, even if there is a later client with the same id.
func (s *Store) readToken(h Hash) (t Token, err error) {
	err = s.view(func(r *reader) error {
		if t, _, err = getToken(r.Tx, h); err != nil {
			return err
		}
		c, err := getClient(r.Tx, t.Client)
		if err == nil && !c.Created.Equal(t.ClientCreated) {
			return ErrNotFound // the token is of an earlier client with this id
		}
		return err
	})
	return t, err
}

// RevokeToken removes a token of a client. It returns ErrNotFound if the token is unknown and
// ErrForeign if it belongs to another client.
func (s *Store) RevokeToken(h Hash, client string) error {
	return s.update(0, func(tx *bbolt.Tx) error {
		t, v, err := getToken(tx, h)
		switch {
		case err != nil:
			return err
		case t.Client != client:
			return ErrForeign
		}
		tx.OnCommit(func() { s.cache.forgetToken(h) })
		return v.remove(tx)
	})
}
