package main

// The store's methods for clients, and the record of when each was last used.

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"
)

// Client returns ErrNotFound for an unknown id, after the same work as for a known
// one, so that the time tells nobody which ids there are.
func (s *Store) Client(id string) (c Client, err error) {
	err = s.view(func(r *reader) error {
		c, err = getClient(r.Tx, id)
		if errors.Is(err, ErrNotFound) {
			decoy, broken := s.dummyClient()
			if broken = errors.Join(broken, decodeJSON(nil, decoy, &c)); broken != nil {
				return broken
			}
			c = Client{}
		}
		return err
	})
	return c, err
}

// Clients returns all clients, in the order of their making.
func (s *Store) Clients() (clients []Client, err error) {
	err = s.view(func(r *reader) error {
		return r.Bucket(bucketClients).ForEach(func(k, _ []byte) error {
			c, err := getClient(r.Tx, string(k))
			clients = append(clients, c)
			return err
		})
	})
	for i, c := range clients {
		if at, ok := s.cache.lastUse(c.ID); ok {
			clients[i].LastUsed = at
		}
	}
	slices.SortStableFunc(clients, func(a, b Client) int { return a.Created.Compare(b.Created) })
	return clients, err
}

// HasClients tells whether there is a client at all.
func (s *Store) HasClients() (has bool, err error) {
	err = s.view(func(r *reader) error {
		k, _ := r.Bucket(bucketClients).Cursor().First()
		has = k != nil
		return nil
	})
	return has, err
}

// AddClient stores a client under its id, in place of the one there was.
func (s *Store) AddClient(c Client) error {
	return s.update(func(tx *bbolt.Tx) error {
		tx.OnCommit(func() { s.cache.forgetClient(c.ID) })
		return putClient(tx, c)
	})
}

// RotateClient gives a client a new secret. The one it had is good until graceEnds.
// It returns ErrNotFound for an unknown id.
func (s *Store) RotateClient(id string, secret Hash, graceEnds time.Time) error {
	return s.update(func(tx *bbolt.Tx) error {
		c, err := getClient(tx, id)
		if err != nil {
			return err
		}
		c.Previous, c.PreviousUntil = c.Secret, graceEnds
		if !s.now().Before(graceEnds) { // not to come back with a clock that is set back
			c.Previous, c.PreviousUntil = Hash{}, time.Time{}
		}
		c.Secret = secret
		return putClient(tx, c)
	})
}

// RemoveClient removes a client and with it all its tokens: they are not found any
// more, though they stay in the file until they expire. It returns ErrNotFound for
// an unknown id.
func (s *Store) RemoveClient(id string) error {
	return s.update(func(tx *bbolt.Tx) error {
		if tx.Bucket(bucketClients).Get([]byte(id)) == nil {
			return ErrNotFound
		}
		tx.OnCommit(func() { s.cache.forgetClient(id) })
		return remove(tx, bucketClients, []byte(id))
	})
}

func getClient(tx *bbolt.Tx, id string) (c Client, err error) {
	key := []byte(id)
	value, err := seek(tx.Bucket(bucketClients).Cursor(), key)
	if err == nil {
		err = decodeJSON(key, value, &c)
	}
	c.ID = id
	return c, err
}

func putClient(tx *bbolt.Tx, c Client) error {
	value, err := encodeClient(c)
	if err != nil {
		return err
	}
	return put(tx, bucketClients, []byte(c.ID), value)
}

func encodeClient(c Client) ([]byte, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode client: %w", err)
	}
	return withChecksum([]byte(c.ID), b), nil
}

// Samples are clients and documents to start with.
type Samples struct {
	Clients   []Client
	Documents map[Key][]byte
}

// AddSamples stores the samples in one transaction, unless the first of their
// clients is there already.
func (s *Store) AddSamples(samples Samples) error {
	return s.update(func(tx *bbolt.Tx) error {
		if tx.Bucket(bucketClients).Get([]byte(samples.Clients[0].ID)) != nil {
			return nil
		}
		for _, c := range samples.Clients {
			if err := putClient(tx, c); err != nil {
				return err
			}
		}
		for k, doc := range samples.Documents {
			key := k.bytes()
			if err := put(tx, bucketContracts, key, withChecksum(key, doc)); err != nil {
				return err
			}
		}
		return nil
	})
}

// recordInterval is how often it is written down when clients were last used.
const recordInterval = time.Minute

// Used tells that a client was used just now.
func (s *Store) MarkUsed(client string) { s.cache.markUsed(client, s.now()) }

// recordLoop writes down when clients were last used, at most once in a
// recordInterval.
func (s *Store) recordLoop() {
	timer := time.NewTimer(recordInterval)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			s.recordUses(0)
			timer.Reset(recordInterval)
		case <-s.closing:
			return
		}
	}
}

// errUnchanged: there is nothing to commit.
var errUnchanged = errors.New("nothing to write")

// recordUses writes down when clients were last used, if that is more than least away
// from what the file says: later, or earlier when the clock was set back.
func (s *Store) recordUses(least time.Duration) {
	uses := s.cache.unrecorded(least)
	if len(uses) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), queueTimeout)
	defer cancel()
	err := s.updateContext(ctx, func(tx *bbolt.Tx) error {
		err := errUnchanged
		for id, at := range uses {
			c, broken := getClient(tx, id)
			if broken != nil || at.Sub(c.LastUsed).Abs() <= least { // or removed
				continue
			}
			c.LastUsed = at
			if err = putClient(tx, c); err != nil {
				return err
			}
		}
		return err
	})
	if err != nil && !errors.Is(err, errUnchanged) {
		s.log.Warn("when clients were last used is not written down", "err", err)
		return
	}
	s.cache.markRecorded(uses)
}
