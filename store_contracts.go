package main

// The store's methods for contracts.

import (
	"bytes"
	"errors"
	"fmt"
	"slices"

	"go.etcd.io/bbolt"
)

// Get appends the document of a contract to buf, if check returns nil. Otherwise it returns check's
// error, and the version if there is a contract, without having read the document. If there is no
// contract and check allows that, Get returns ErrNotFound. It returns ErrCorrupt if the checksum
// of the contract is wrong.
func (s *Store) Get(buf []byte, k Key, check Precondition) (_ []byte, version Version, err error) {
	err = s.view(func(r *reader) error {
		contract, err := r.find(k)
		if err != nil {
			return missing(err, check)
		}
		version = contract.version()
		if err := check(version, true); err != nil {
			return err
		}
		doc, err := contract.document()
		if err != nil {
			return fmt.Errorf("contract %s: %w", r.key, err)
		}
		buf = append(buf, doc...)
		return nil
	})
	return buf, version, err
}

// Find returns the version of a contract and the size of its document in bytes. It returns errors
// as Get does, but does not read the document.
func (s *Store) Find(k Key, check Precondition) (version Version, size int, err error) {
	err = s.view(func(r *reader) error {
		contract, err := r.find(k)
		if err != nil {
			return missing(err, check)
		}
		version, size = contract.version(), len(contract.doc)
		return check(version, true)
	})
	return version, size, err
}

// find returns a contract of which only the head is verified. It leaves the key of the contract in
// r.key.
func (r *reader) find(k Key) (headed, error) {
	r.key = k.append(r.key[:0])
	value, err := seek(r.contracts, r.key, verifyContract)
	if err != nil {
		return headed{}, err
	}
	contract, err := verifyHead(r.key, value, 0)
	if err != nil {
		return headed{}, fmt.Errorf("contract %s: %w", r.key, err)
	}
	return contract, nil
}

// missing returns the error of check for a contract that does not exist, if err is ErrNotFound and
// there is one, else err.
func missing(err error, check Precondition) error {
	if errors.Is(err, ErrNotFound) {
		if err := check(Version{}, false); err != nil {
			return err
		}
	}
	return err
}

// readContract returns the document of a stored contract.
func readContract(key, stored []byte) ([]byte, error) {
	contract, err := verifyHead(key, stored, 0)
	if err != nil {
		return nil, err
	}
	return contract.document()
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
			doc, err := readContract(k, v)
			if err != nil {
				return fmt.Errorf("contract %s: %w", k, err)
			}
			if len(buf) > empty {
				buf = append(buf, ',')
			}
			buf, copied = append(buf, doc...), id
		}
		// If the key after the range is corrupt, it may be that of a contract in the range.
		if err := verifier(verifyContract).entry(k, v); err != nil {
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
			doc, err := readContract(k, v)
			key, ok := parseKey(k)
			if err != nil || !ok {
				return fmt.Errorf("contract %s: %w", k, ErrCorrupt)
			}
			last = key
			if sel.User == "" || sel.User == key.User {
				each(key, doc)
			}
		}
		return verifier(verifyContract).entry(k, v)
	})
	return last, more, err
}

// Precondition decides whether a contract may be read or changed; an error refuses that. It is
// called in the transaction, after the writes before it have been applied, with the current
// version of the contract, or with exists false if there is no contract. The version is zero if
// the contract is corrupt. For a write it is called on the committer goroutine, perhaps after the
// caller has given up; it must not block.
type Precondition func(current Version, exists bool) error

// Put creates or replaces a contract if check returns nil, else it returns check's error. The
// Version is that of doc.
func (s *Store) Put(k Key, doc []byte, check Precondition) (Version, error) {
	key, version := k.bytes(), versionOf(doc)
	value := withHead(key, nil, doc, version)
	return version, s.update(len(value), func(tx *bbolt.Tx) error {
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
	return s.update(0, func(tx *bbolt.Tx) error {
		if err := checkPrecondition(tx, key, check); err != nil {
			return err
		}
		return remove(tx, bucketContracts, key)
	})
}

// checkPrecondition calls check with the current version of the contract under key. It does not
// read the document, and allows a head that is corrupt, so that a corrupt contract can be
// replaced or deleted.
func checkPrecondition(tx *bbolt.Tx, key []byte, check Precondition) error {
	value, err := seek(tx.Bucket(bucketContracts).Cursor(), key, verifyContract)
	if errors.Is(err, ErrNotFound) {
		return check(Version{}, false)
	}
	if err != nil {
		return err
	}
	var current Version
	if contract, err := verifyHead(key, value, 0); err == nil {
		current = contract.version()
	}
	return check(current, true)
}

// Create stores a new contract; once may be nil. If the same client has created a contract of the
// same owner with the same idempotency key within idempotencyLifetime, Create returns that contract
// and stores nothing, or it returns ErrKeyReused if the body was different. If the client then keeps
// more first responses than firstQuota allows, the oldest is forgotten.
func (s *Store) Create(k Key, doc []byte, once *Idempotency) (Created, error) {
	key, made := k.bytes(), Created{k.Contract, doc, versionOf(doc)}
	value := withHead(key, nil, doc, made.Version)
	var first expiring
	var response []byte
	if once != nil {
		first, response = once.first(k.Owner, made, s.now().Add(idempotencyLifetime))
	}
	var created Created
	err := s.update(len(value)+len(response), func(tx *bbolt.Tx) error {
		created = made
		if once == nil {
			return put(tx, bucketContracts, key, value)
		}
		earlier, v, err := getFirst(tx, first.key)
		switch {
		case err == nil && s.now().Before(v.expires):
			created, err = earlier.repeat(once)
			return err
		case err == nil:
			err = v.remove(tx)
		case errors.Is(err, ErrNotFound):
			err = nil
		}
		if err != nil {
			return err
		}
		if _, err := first.put(tx, response); err != nil {
			return err
		}
		return put(tx, bucketContracts, key, value)
	})
	if err != nil {
		return Created{}, err
	}
	return created, nil
}
