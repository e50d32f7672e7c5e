package main

// The store's methods for contracts.

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/bbolt"
)

// pageBytes is what a list copies in one transaction, give or take a document.
const pageBytes = 256 << 10

// Get appends the document of a contract to buf.
func (s *Store) Get(buf []byte, k Key) ([]byte, Version, error) {
	var version Version
	err := s.view(func(r *reader) error {
		r.key = k.append(r.key[:0])
		value, err := seek(r.contracts, r.key)
		if err != nil {
			return err
		}
		doc, sum, err := verifyChecksum(r.key, value)
		if err != nil {
			return fmt.Errorf("contract %s: %w", r.key, err)
		}
		buf, version = append(buf, doc...), sum
		return nil
	})
	return buf, version, err
}

// Range is a part of a user's contracts, in the order of their ids.
type Range struct {
	After   ID  // exclusive; "" is the start
	Through ID  // inclusive; "" is the end
	Limit   int // at most so many; 0 is no limit
}

// Page is as much of a Range as one transaction copies.
type Page struct {
	Documents []byte // separated by commas
	Rest      Range  // what of the range is not in this page, when More
	More      bool
	// Last is the last contract of the range, when contracts follow it that the
	// limit excludes; else "".
	Last ID
}

// List appends documents to buf, about pageBytes of them.
func (s *Store) List(buf []byte, o Owner, r Range) (page Page, err error) {
	prefix := o.prefix()
	start := slices.Concat(prefix, []byte(r.After))
	err = s.view(func(reader *reader) error {
		c := reader.contracts
		k, v, err := seekAfter(c, start)
		if err != nil {
			return err
		}
		var last, copied []byte
		empty := len(buf)
		for n := 0; bytes.HasPrefix(k, prefix); k, v = c.Next() {
			id := k[len(prefix):]
			if r.Through != "" && string(id) > string(r.Through) {
				break
			}
			if n++; r.Limit > 0 && n > r.Limit {
				page.Last = ID(last)
				break
			}
			last = id
			if len(buf)-empty >= pageBytes {
				page.More = true
				if r.Limit == 0 {
					break
				}
				continue // on to the last one, by the keys alone
			}
			doc, _, err := verifyChecksum(k, v)
			if err != nil {
				return fmt.Errorf("contract %s: %w", k, err)
			}
			if len(buf) > empty {
				buf = append(buf, ',')
			}
			buf, copied = append(buf, doc...), id
		}
		if err := verifyEntry(k, v); err != nil { // or it may be one of these
			return err
		}
		if page.More {
			page.Rest = Range{After: ID(copied), Through: r.Through}
			if r.Limit > 0 {
				page.Rest.Through = ID(last)
			}
		}
		return nil
	})
	page.Documents = buf
	return page, err
}

// Selection is a part of all contracts; an ID that is "" selects any.
type Selection struct {
	Org, User ID
}

// scanBytes is what a scan looks at in one transaction, give or take a document.
const scanBytes = 1 << 20

// Scan tells each those of the selected contracts that follow after, in the order of
// their keys, until it has looked at scanBytes. The document is the file's own, and gone
// with the call. It returns where to go on, or false at the end.
func (s *Store) Scan(sel Selection, after Key, each func(k Key, doc []byte)) (last Key, more bool, err error) {
	var prefix []byte
	switch {
	case sel.Org != "" && sel.User != "":
		prefix = Owner(sel).prefix()
	case sel.Org != "":
		prefix = []byte(sel.Org + "/")
	}
	err = s.view(func(r *reader) error {
		c, start := r.contracts, prefix
		if after != (Key{}) {
			start = after.bytes()
		}
		k, v, err := seekAfter(c, start)
		if err != nil {
			return err
		}
		for size := 0; bytes.HasPrefix(k, prefix) && k != nil; k, v = c.Next() {
			if size > scanBytes {
				more = true
				return nil
			}
			size += len(k) + len(v)
			doc, _, err := verifyChecksum(k, v)
			key, ok := parseKey(k)
			if err != nil || !ok {
				return fmt.Errorf("contract %s: %w", k, ErrCorrupt)
			}
			last = key
			if sel.User == "" || sel.User == key.User {
				each(key, doc)
			}
		}
		return verifyEntry(k, v)
	})
	return last, more, err
}

// Check decides whether a change may be made to what the writes before it left.
// It is called on the committer, with exists false where there is no contract.
type Precondition func(current Version, exists bool) error

// Put replaces a contract, or makes it, if check returns nil.
func (s *Store) Put(k Key, doc []byte, check Precondition) (Version, error) {
	key := k.bytes()
	value := withChecksum(key, doc)
	return versionOf(value), s.update(func(tx *bbolt.Tx) error {
		if err := checkPrecondition(tx, key, check); err != nil {
			return err
		}
		return put(tx, bucketContracts, key, value)
	})
}

// Delete removes a contract, if check returns nil.
func (s *Store) Delete(k Key, check Precondition) error {
	key := k.bytes()
	return s.update(func(tx *bbolt.Tx) error {
		if err := checkPrecondition(tx, key, check); err != nil {
			return err
		}
		return remove(tx, bucketContracts, key)
	})
}

// checked asks check about the contract under key. The sum is what the document
// should be, and suffices: what is about to be replaced need not be whole.
func checkPrecondition(tx *bbolt.Tx, key []byte, check Precondition) error {
	value, err := seek(tx.Bucket(bucketContracts).Cursor(), key)
	switch {
	case errors.Is(err, ErrNotFound):
		return check(0, false)
	case err != nil:
		return err
	case len(value) < checksumSize:
		return fmt.Errorf("contract %s: %w", key, ErrCorrupt)
	}
	return check(versionOf(value), true)
}

// Idempotency makes a Create happen once (draft-ietf-httpapi-idempotency-key-header).
type Idempotency struct {
	Client string
	Key    string
	Body   Hash
}

// Created is a contract as Create first made it.
type Created struct {
	ID       ID
	Document []byte
	Version  Version
}

// Create makes a contract under a new id. With a key that made one in the last
// 24 hours it returns that one as it was, or ErrKeyReused if the body was
// another.
func (s *Store) Create(k Key, doc []byte, once *Idempotency) (Created, error) {
	key := k.bytes()
	value := withChecksum(key, doc)
	created := Created{k.Contract, doc, versionOf(value)}
	err := s.update(func(tx *bbolt.Tx) error {
		if once != nil {
			record := slices.Concat(k.prefix(), []byte(once.Client), []byte{0}, []byte(once.Key))
			now := s.now()
			first, expires, err := getExpiring(tx, bucketIdempotency, record)
			switch {
			case err == nil && now.Before(expires):
				return created.replay(k.Owner, once, first)
			case err != nil && !errors.Is(err, ErrNotFound):
				return err
			}
			first = slices.Concat(once.Body[:], []byte(k.Contract), doc)
			if err := putExpiring(tx, bucketIdempotency, record, now.Add(idempotencyLifetime), first); err != nil {
				return err
			}
		}
		return put(tx, bucketContracts, key, value)
	})
	if err != nil {
		return Created{}, err
	}
	return created, nil
}

// replay turns c into what an idempotency record says was created first.
func (c *Created) replay(o Owner, once *Idempotency, record []byte) error {
	n := len(once.Body)
	if !bytes.Equal(record[:n], once.Body[:]) {
		return ErrKeyReused
	}
	c.ID, c.Document = ID(record[n:n+36]), bytes.Clone(record[n+36:])
	c.Version = Version(checksum(Key{o, c.ID}.bytes(), c.Document))
	return nil
}
