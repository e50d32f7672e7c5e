package main

// Keys and values in the buckets: their encoding, their checksums, and lookups that
// distinguish a missing key from a corrupt one.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/cespare/xxhash/v2"
	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"
)

// checksumSize is the size in bytes of the checksum before a stored value.
const checksumSize = 8

// withChecksum returns the value to store under key: the checksum of key and value, then
// value. The checksum includes the key, so that a value found under a wrong key is corrupt.
func withChecksum(key, value []byte) []byte {
	stored := make([]byte, checksumSize, checksumSize+len(value))
	binary.BigEndian.PutUint64(stored, checksum(key, value))
	return append(stored, value...)
}

// verifyChecksum returns the value that withChecksum stored under key, and its version. It
// returns ErrCorrupt if key and value do not match the checksum. The value is part of
// stored, not a copy.
func verifyChecksum(key, stored []byte) ([]byte, Version, error) {
	if len(stored) < checksumSize || checksum(key, stored[checksumSize:]) != uint64(versionOf(stored)) {
		return nil, 0, ErrCorrupt
	}
	return stored[checksumSize:], versionOf(stored), nil
}

// decodeJSON verifies the checksum of a value stored under key and decodes its JSON into
// into.
func decodeJSON(key, stored []byte, into any) error {
	b, _, err := verifyChecksum(key, stored)
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

// versionOf returns the checksum of a stored value, which is its version. It does not
// verify the checksum. stored has at least checksumSize bytes.
func versionOf(stored []byte) Version { return Version(binary.BigEndian.Uint64(stored)) }

// checksum returns the XXH64 of key followed by value.
func checksum(key, value []byte) uint64 {
	var d xxhash.Digest
	d.Reset()
	_, _ = d.Write(key) // a hash's Write cannot fail
	_, _ = d.Write(value)
	return d.Sum64()
}

// seek returns the value stored under key with its checksum, which it does not verify.
//
// If there is none, seek verifies the two entries between which key would be, and returns
// ErrCorrupt if one fails its checksum, else ErrNotFound. The reason: if a bit of a stored
// key flips, a lookup of the original key finds nothing, as if it had never been stored.
// But the entry is still at its place in the page, so the search ends at it or at the entry
// after it.
func seek(c *bbolt.Cursor, key []byte) ([]byte, error) {
	k, v := c.Seek(key)
	if bytes.Equal(k, key) {
		return v, nil
	}
	if err := verifyEntry(k, v); err != nil {
		return nil, err
	}
	if err := verifyEntry(c.Prev()); err != nil {
		return nil, err
	}
	return nil, ErrNotFound
}

// seekAfter returns the first entry whose key is greater than start, and moves c to it. The
// entry is not verified. If start itself is not a key, seekAfter verifies the entry before
// the first one, and returns ErrCorrupt if it fails its checksum: a flipped bit can make its
// key less than start, and a list would silently omit it.
func seekAfter(c *bbolt.Cursor, start []byte) (key, value []byte, err error) {
	if key, _ = c.Seek(start); bytes.Equal(key, start) {
		key, value = c.Next()
		return key, value, nil
	}
	if err := verifyEntry(c.Prev()); err != nil {
		return nil, nil, err
	}
	key, value = c.Seek(start)
	return key, value, nil
}

// verifyEntry returns an error that wraps ErrCorrupt if stored does not match its checksum.
// A nil key, which a cursor returns beyond either end of a bucket, is no error.
func verifyEntry(key, stored []byte) error {
	if key == nil {
		return nil
	}
	if _, _, err := verifyChecksum(key, stored); err != nil {
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
