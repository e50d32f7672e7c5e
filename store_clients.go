package main

// The store's methods for clients, and the record of when each was last used.

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"
)

// Client returns a client, or ErrNotFound for an unknown id. For an unknown id it decodes a
// dummy client, so that the time it takes does not reveal which ids exist.
func (s *Store) Client(id string) (c Client, err error) {
	err = s.view(func(r *reader) error {
		c, err = getClient(r.Tx, id)
		if errors.Is(err, ErrNotFound) {
			dummy, dummyErr := s.dummyClient()
			if dummyErr == nil {
				_, dummyErr = decodeClient([]byte(dummyID), dummy)
			}
			if dummyErr != nil {
				return dummyErr
			}
		}
		return err
	})
	return c, err
}

// Clients returns all clients, in the order of their creation. LastUsed includes uses that
// are not in the file yet.
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

// HasClients reports whether there is at least one client.
func (s *Store) HasClients() (has bool, err error) {
	err = s.view(func(r *reader) error {
		k, _ := r.Bucket(bucketClients).Cursor().First()
		has = k != nil
		return nil
	})
	return has, err
}

// AddClient stores a client. It replaces a client with the same id, and so ends the tokens of
// that client.
func (s *Store) AddClient(c Client) error {
	return s.update(0, func(tx *bbolt.Tx) error {
		tx.OnCommit(func() { s.cache.forgetClient(c.ID) })
		return putClient(tx, c)
	})
}

// RotateClient gives a client a new secret. The old secret stays valid until graceEnds. If it, or
// the one before it, is one of the published secrets, anybody may have a token of the client: then
// the old secret and all tokens of the client end at once, and RotateClient returns true. It
// returns ErrNotFound for an unknown id.
func (s *Store) RotateClient(id string, secret Hash, graceEnds time.Time, published []Hash) (ended bool, err error) {
	err = s.update(0, func(tx *bbolt.Tx) error {
		c, err := getClient(tx, id)
		if err != nil {
			return err
		}
		now := s.now()
		ended = slices.Contains(published, c.Secret) || slices.Contains(published, c.Previous)
		if ended {
			// The tokens name the client by the time of its creation. The new time is later, so
			// that none of them has it.
			if least := c.Created.Add(1); now.Before(least) {
				c.Created = least
			} else {
				c.Created = now
			}
			tx.OnCommit(s.cache.forgetTokens)
		}
		c.Previous, c.PreviousUntil = c.Secret, graceEnds
		// If the old secret ends at once it is not stored, so that it does not become valid
		// again when the clock is set back.
		if ended || !now.Before(graceEnds) {
			c.Previous, c.PreviousUntil = Hash{}, time.Time{}
		}
		c.Secret = secret
		return putClient(tx, c)
	})
	return err == nil && ended, err
}

// RemoveClient removes a client. From then on Token returns ErrNotFound for its tokens,
// though they stay in the file until they expire. RemoveClient returns ErrNotFound for an
// unknown id.
func (s *Store) RemoveClient(id string) error {
	return s.update(0, func(tx *bbolt.Tx) error {
		if tx.Bucket(bucketClients).Get([]byte(id)) == nil {
			return ErrNotFound
		}
		tx.OnCommit(func() { s.cache.forgetClient(id) })
		return remove(tx, bucketClients, []byte(id))
	})
}

// dummyID is the id of Store.dummyClient.
const dummyID = "nobody"

// getClient returns a client. It returns ErrNotFound if there is none, and an error that wraps
// ErrCorrupt if its checksum is wrong or the program would not have stored it.
func getClient(tx *bbolt.Tx, id string) (c Client, err error) {
	key := []byte(id)
	value, err := seek(tx.Bucket(bucketClients).Cursor(), key, verifyValue)
	if err == nil {
		c, err = decodeClient(key, value)
	}
	if err != nil && !errors.Is(err, ErrNotFound) {
		err = fmt.Errorf("client %q: %w", id, err)
	}
	return c, err
}

// decodeClient verifies and decodes the stored form of a client.
func decodeClient(key, stored []byte) (c Client, err error) {
	b, err := verifyChecksum(key, stored)
	if err != nil {
		return Client{}, err
	}
	if json.Unmarshal(b, &c) != nil {
		return Client{}, corruption("the value is not a client")
	}
	c.ID = string(key)
	if err := c.check(); err != nil {
		return Client{}, corruption(err.Error())
	}
	return c, nil
}

// putClient stores a client under its id. It stores nothing that getClient would refuse.
func putClient(tx *bbolt.Tx, c Client) error {
	value, err := encodeClient(c)
	if err != nil {
		return err
	}
	return put(tx, bucketClients, []byte(c.ID), value)
}

// encodeClient returns the stored form of a client: its JSON with a checksum.
func encodeClient(c Client) ([]byte, error) {
	if err := c.check(); err != nil {
		return nil, fmt.Errorf("client %q: %w", c.ID, err)
	}
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode client: %w", err)
	}
	return withChecksum([]byte(c.ID), b), nil
}

// Samples are the clients and contracts of a demo.
type Samples struct {
	Clients   []Client
	Documents map[Key][]byte
}

// demoKey is the key in bucketMeta of a mark: the file has, or has had, the samples.
const demoKey = "demo"

// AddSamples stores the samples in one transaction, with a mark. It stores none of them, and
// returns ErrHadSamples, if the file has ever had samples: they may have been changed or removed
// on purpose. A file of version 0.1.0 has no mark; it has had them if it has any of them.
func (s *Store) AddSamples(samples Samples) error {
	had := false
	err := s.update(0, func(tx *bbolt.Tx) error {
		if tx.Bucket(bucketMeta).Get([]byte(demoKey)) != nil {
			return ErrHadSamples
		}
		if err := put(tx, bucketMeta, []byte(demoKey), []byte("loaded")); err != nil {
			return err
		}
		if had = hasSample(tx, samples); had {
			return nil
		}
		for _, c := range samples.Clients {
			if err := putClient(tx, c); err != nil {
				return fmt.Errorf("%w: %w", errTx, err)
			}
		}
		for k, doc := range samples.Documents {
			key := k.bytes()
			if err := put(tx, bucketContracts, key, withHead(key, nil, doc, versionOf(doc))); err != nil {
				return err
			}
		}
		return nil
	})
	if err == nil && had {
		return ErrHadSamples
	}
	return err
}

// hasSample reports whether the file has one of the clients or contracts, in whatever form.
func hasSample(tx *bbolt.Tx, samples Samples) bool {
	for _, c := range samples.Clients {
		if tx.Bucket(bucketClients).Get([]byte(c.ID)) != nil {
			return true
		}
	}
	for k := range samples.Documents {
		if tx.Bucket(bucketContracts).Get(k.bytes()) != nil {
			return true
		}
	}
	return false
}

// recordInterval is the time between two writes of the times when clients were last used.
const recordInterval = time.Minute

// MarkUsed sets the time when a client was last used to now. The file has it within about a
// recordInterval.
func (s *Store) MarkUsed(client string) { s.cache.markUsed(client, s.now()) }

// recordLoop writes to the file when clients were last used, once in a recordInterval, until
// the store is closed.
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

// errUnchanged is returned by the change of recordUses if it has changed nothing, so that
// nothing is committed.
var errUnchanged = errors.New("nothing to write")

// recordUses writes to the file when clients were last used, for those whose time in the file
// differs by more than least. The new time is earlier if the clock was set back.
func (s *Store) recordUses(least time.Duration) {
	uses := s.cache.unrecorded(least)
	if len(uses) == 0 {
		return
	}
	err := s.updateWithin(queueTimeout, 0, 0, func(tx *bbolt.Tx) error {
		err := errUnchanged
		for id, at := range uses {
			c, getErr := getClient(tx, id)
			if getErr != nil || at.Sub(c.LastUsed).Abs() <= least { // removed, or corrupt
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
		s.log.Warn("could not store when clients were last used; while the service runs, it tries again every minute", "err", err)
		return
	}
	s.cache.markRecorded(uses)
}
