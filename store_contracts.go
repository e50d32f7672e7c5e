package main

// The store's methods for contracts.

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/bbolt"
)

// Get appends the document of a contract to buf. It returns ErrNotFound, or ErrCorrupt if the
// checksum of the document is wrong.
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

// Range selects contracts of an owner, in the order of their ids.
type Range struct {
	After   ID  // exclusive; "" means from the first contract
	Through ID  // inclusive; "" means to the last contract
	Limit   int // maximum number of contracts; 0 means no limit
}

// Page is the first part of a Range: the contracts that one call of List copies.
type Page struct {
	// Documents is the buffer that was passed to List, with the documents appended,
	// separated by commas.
	Documents []byte
	// More reports whether the range has contracts that are not in this page, and Rest is
	// then the range to list next. Limit has been replaced by Through in Rest, so that
	// contracts that are added meanwhile do not push others out of the list.
	More bool
	Rest Range
	// Last is the last contract of the range if Limit excludes contracts after it, else "".
	Last ID
}

// pageBytes is the size of the documents, in bytes, after which a Page ends. The last
// document may exceed it.
const pageBytes = 256 << 10

// List appends the first documents of a range to buf. A long list is copied in several
// transactions, one for each Page, so that a slow client does not keep one open. It returns
// ErrCorrupt if a document has a wrong checksum, or if a corrupt key may hide a contract of
// the range.
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
				continue // to find Last; only keys are read
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
		// If the key after the range is corrupt, it may be that of a contract in the range.
		if err := verifyEntry(k, v); err != nil {
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

// Selection selects contracts by organization and user. An ID of "" selects all.
type Selection struct {
	Org, User ID
}

// scanBytes is the size of the keys and values, in bytes, after which one call of Scan ends.
// The last contract may exceed it.
const scanBytes = 1 << 20

// Scan calls each for the selected contracts after the key, in the order of their keys,
// until it has read scanBytes. doc is part of the mapped file and valid only during the
// call. Scan returns the last key that it read and whether there are more contracts; if so,
// the caller passes that key to the next call. It returns ErrCorrupt as List does.
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

// Precondition decides whether a contract may be changed; an error refuses the change. It is
// called in the write transaction, after the writes before it have been applied, with the
// current version of the contract, or with exists false if there is no contract. The request
// that leads the group commit may be another one, so that it may be called on the goroutine
// of any request, or on the committer; it must not block.
type Precondition func(current Version, exists bool) error

// Put creates or replaces a contract if check returns nil, else it returns check's error. The
// Version is that of doc.
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

// Delete removes a contract if check returns nil, else it returns check's error. If there is
// no contract and check allows that, Delete does nothing.
func (s *Store) Delete(k Key, check Precondition) error {
	key := k.bytes()
	return s.update(func(tx *bbolt.Tx) error {
		if err := checkPrecondition(tx, key, check); err != nil {
			return err
		}
		return remove(tx, bucketContracts, key)
	})
}

// checkPrecondition calls check with the current version of the contract under key. Only the
// stored checksum is read, not compared with the document, so that a corrupt document can
// be replaced or deleted.
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

// Idempotency identifies a request, so that Create creates one contract however often the
// request is repeated (draft-ietf-httpapi-idempotency-key-header).
type Idempotency struct {
	Client string // client id
	Key    string // Idempotency-Key of the request
	Body   Hash   // of the request
}

// Created is a contract as Create created it. The stored contract may have been changed
// since then.
type Created struct {
	ID       ID
	Document []byte
	Version  Version
}

// Create stores a new contract; once may be nil. If the same client has created a contract
// of the same owner with the same idempotency key within idempotencyLifetime, Create returns
// that contract and stores nothing, or it returns ErrKeyReused if the body was different.
func (s *Store) Create(k Key, doc []byte, once *Idempotency) (Created, error) {
	key := k.bytes()
	value := withChecksum(key, doc)
	var created Created
	err := s.update(func(tx *bbolt.Tx) error {
		created = Created{k.Contract, doc, versionOf(value)}
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

// replay sets c to the contract in an idempotency record, which has the hash of the body, the
// contract id of 36 bytes and the document. It returns ErrKeyReused if the body is different.
func (c *Created) replay(o Owner, once *Idempotency, record []byte) error {
	n := len(once.Body)
	if !bytes.Equal(record[:n], once.Body[:]) {
		return ErrKeyReused
	}
	c.ID, c.Document = ID(record[n:n+36]), bytes.Clone(record[n+36:])
	c.Version = Version(checksum(Key{o, c.ID}.bytes(), c.Document))
	return nil
}
