package main

// Keys and values in the buckets: their encoding, their checksums, and lookups that
// distinguish a missing key from a corrupt one.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/cespare/xxhash/v2"
	"go.etcd.io/bbolt"
)

// corruption is an error that says in which way a value with the right checksum is corrupt. It is
// ErrCorrupt for errors.Is.
type corruption string

// Error returns the text.
func (c corruption) Error() string { return string(c) }

// Is reports whether target is ErrCorrupt.
func (c corruption) Is(target error) bool { return target == ErrCorrupt }

// checksumSize is the size of a checksum in bytes.
const checksumSize = 8

// withChecksum returns the value to store under key: the checksum of key and value, then
// value. The checksum includes the key, so that a value found under a wrong key is corrupt.
func withChecksum(key, value []byte) []byte {
	return append(binary.BigEndian.AppendUint64(make([]byte, 0, checksumSize+len(value)), checksum(key, value)), value...)
}

// verifyChecksum returns the value that withChecksum stored under key. It returns ErrCorrupt
// if key and value do not match the checksum. The value is part of stored, not a copy.
func verifyChecksum(key, stored []byte) ([]byte, error) {
	if len(stored) < checksumSize || checksum(key, stored[checksumSize:]) != binary.BigEndian.Uint64(stored) {
		return nil, ErrCorrupt
	}
	return stored[checksumSize:], nil
}

// checksum returns the XXH64 of key followed by value.
func checksum(key, value []byte) uint64 {
	var d xxhash.Digest
	d.Reset()
	_, _ = d.Write(key) // a hash's Write cannot fail
	_, _ = d.Write(value)
	return d.Sum64()
}

// A value with a document begins with the checksum of its key and its head. The head has
// headMark, the fields of the bucket if it has any, the checksum of the document and its
// version. So the head can be verified and used without reading the document, which may be
// large.
//
// In a file of format 1 the value has neither headMark nor sums, and its checksum covers all of
// it. At the place of headMark it has the brace of a document, or the first byte of an expiry,
// which is 0.
const (
	headMark = 2
	// sumsSize is the size in bytes of the end of a head.
	sumsSize = checksumSize + len(Version{})
)

// withHead returns the value to store under key for a document, which has that version, and the
// fields of its bucket.
func withHead(key, fields, doc []byte, version Version) []byte {
	size := checksumSize + 1 + len(fields) + sumsSize
	stored := append(make([]byte, checksumSize, size+len(doc)), headMark)
	stored = append(stored, fields...)
	stored = binary.BigEndian.AppendUint64(stored, checksum(nil, doc))
	stored = append(stored, version[:]...)
	binary.BigEndian.PutUint64(stored, checksum(key, stored[checksumSize:]))
	return append(stored, doc...)
}

// headed is a stored value with a document whose head has been verified.
type headed struct {
	fields []byte
	sums   []byte // nil in a value of format 1, whose document has been verified too
	doc    []byte // without sums, use document
}

// verifyHead verifies the head of a value that withHead stored under key, with that many bytes of
// fields. It returns ErrCorrupt if key and head do not match the checksum. The slices of the
// result are part of stored, not copies.
func verifyHead(key, stored []byte, fields int) (h headed, err error) {
	if len(stored) <= checksumSize || stored[checksumSize] != headMark {
		all, err := verifyChecksum(key, stored)
		if err != nil || len(all) < fields {
			return headed{}, ErrCorrupt
		}
		return headed{fields: all[:fields], doc: all[fields:]}, nil
	}
	size := checksumSize + 1 + fields + sumsSize
	if len(stored) < size {
		return headed{}, ErrCorrupt
	}
	head, err := verifyChecksum(key, stored[:size])
	if err != nil {
		return headed{}, err
	}
	return headed{fields: head[1 : 1+fields], sums: head[1+fields:], doc: stored[size:]}, nil
}

// version returns the version of the document. It reads the document only in a value of format
// 1.
func (h headed) version() Version {
	if h.sums == nil {
		return versionOf(h.doc)
	}
	return Version(h.sums[checksumSize:])
}

// document returns the document. It returns ErrCorrupt if the document does not match its
// checksum.
func (h headed) document() ([]byte, error) {
	if h.sums != nil && checksum(nil, h.doc) != binary.BigEndian.Uint64(h.sums) {
		return nil, ErrCorrupt
	}
	return h.doc, nil
}

// check is like document, but also returns ErrCorrupt if the version is not that of the document.
// That takes longer, and the head is verified, so that only Check calls it.
func (h headed) check() ([]byte, error) {
	doc, err := h.document()
	if err == nil && h.version() != versionOf(doc) {
		err = corruption("the version is not that of the document")
	}
	return doc, err
}

// verifier returns an error that wraps ErrCorrupt if a stored value does not match its checksum.
// It does not read the document of a value that has a head.
type verifier func(key, stored []byte) error

// verifyValue is the verifier of values without a head.
func verifyValue(key, stored []byte) error {
	_, err := verifyChecksum(key, stored)
	return err
}

// verifyContract is the verifier of bucketContracts.
func verifyContract(key, stored []byte) error {
	_, err := verifyHead(key, stored, 0)
	return err
}

// seek returns the value stored under key with its checksum, which it does not verify.
//
// If there is none, seek verifies the two entries between which key would be, and returns
// ErrCorrupt if one fails, else ErrNotFound. The reason: if a bit of a stored key flips, a
// lookup of the original key finds nothing, as if it had never been stored. But the entry is
// still at its place in the page, so the search ends at it or at the entry after it.
func seek(c *bbolt.Cursor, key []byte, verify verifier) ([]byte, error) {
	k, v := c.Seek(key)
	if bytes.Equal(k, key) {
		return v, nil
	}
	if err := verify.entry(k, v); err != nil {
		return nil, err
	}
	if err := verify.entry(c.Prev()); err != nil {
		return nil, err
	}
	return nil, ErrNotFound
}

// seekAfter returns the first contract whose key is greater than start, and moves c to it. The
// contract is not verified. If start itself is not a key, seekAfter verifies the entry before
// the first one, and returns ErrCorrupt if it fails: a flipped bit can make its key less than
// start, and a list would silently omit it.
func seekAfter(c *bbolt.Cursor, start []byte) (key, value []byte, err error) {
	if key, _ = c.Seek(start); bytes.Equal(key, start) {
		key, value = c.Next()
		return key, value, nil
	}
	if err := verifier(verifyContract).entry(c.Prev()); err != nil {
		return nil, nil, err
	}
	key, value = c.Seek(start)
	return key, value, nil
}

// entry verifies an entry that a cursor returned. A nil key, which it returns beyond either end
// of a bucket, is no error.
func (verify verifier) entry(key, stored []byte) error {
	if key == nil {
		return nil
	}
	if err := verify(key, stored); err != nil {
		return fmt.Errorf("%q: %w", key, err)
	}
	return nil
}

// put stores value under key. An error of bbolt's wraps errTx.
func put(tx *bbolt.Tx, bucket, key, value []byte) error {
	if err := tx.Bucket(bucket).Put(key, value); err != nil {
		return fmt.Errorf("%w: put %s: %w", errTx, bucket, err)
	}
	return nil
}

// remove removes key, if it exists. An error of bbolt's wraps errTx.
func remove(tx *bbolt.Tx, bucket, key []byte) error {
	if err := tx.Bucket(bucket).Delete(key); err != nil {
		return fmt.Errorf("%w: delete %s: %w", errTx, bucket, err)
	}
	return nil
}

// prefix returns the bytes that the keys of all the owner's contracts begin with.
func (o Owner) prefix() []byte { return []byte(o.Org + "/" + o.User + "/") }

// bytes returns the key of a contract as bucketContracts has it: org_id/user_id/contract_id.
func (k Key) bytes() []byte {
	return k.append(make([]byte, 0, len(k.Org)+len(k.User)+len(k.Contract)+2))
}

// append appends bytes to b.
func (k Key) append(b []byte) []byte {
	b = append(append(b, k.Org...), '/')
	b = append(append(b, k.User...), '/')
	return append(b, k.Contract...)
}

// parseKey is the inverse of bytes. It returns false if b is not a key in canonical form.
func parseKey(b []byte) (k Key, ok bool) {
	parts := strings.Split(string(b), "/")
	if len(parts) != 3 {
		return k, false
	}
	for i, id := range []*ID{&k.Org, &k.User, &k.Contract} {
		var err error
		if *id, err = parseID(parts[i]); err != nil || string(*id) != parts[i] {
			return k, false
		}
	}
	return k, true
}
