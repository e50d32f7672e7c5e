package main

// Keys and values in the buckets: their encoding, their checksums, and lookups that tell
// a missing key from a corrupt one.

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"strings"

	"github.com/cespare/xxhash/v2"
	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"
)

const checksumSize = 8

// seal puts the checksum of key and value before the value.
func withChecksum(key, value []byte) []byte {
	sealed := make([]byte, checksumSize, checksumSize+len(value))
	binary.BigEndian.PutUint64(sealed, checksum(key, value))
	return append(sealed, value...)
}

// unseal returns what was sealed, where it stands, or ErrCorrupt when it is not
// what it was.
func verifyChecksum(key, sealed []byte) ([]byte, Version, error) {
	if len(sealed) < checksumSize || checksum(key, sealed[checksumSize:]) != uint64(versionOf(sealed)) {
		return nil, 0, ErrCorrupt
	}
	return sealed[checksumSize:], versionOf(sealed), nil
}

func decodeJSON(key, sealed []byte, into any) error {
	b, _, err := verifyChecksum(key, sealed)
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

func versionOf(sealed []byte) Version { return Version(binary.BigEndian.Uint64(sealed)) }

func checksum(key, value []byte) uint64 {
	var d xxhash.Digest
	d.Reset()
	_, _ = d.Write(key) // a hash's Write cannot fail
	_, _ = d.Write(value)
	return d.Sum64()
}

// seek returns the sealed value of a key, or ErrNotFound. A bit that flipped in a key
// hides it: then one of its neighbors fails its checksum, and that is ErrCorrupt.
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

// intact is nil for what has its checksum, and where there is nothing.
func verifyEntry(key, sealed []byte) error {
	if key == nil {
		return nil
	}
	if _, _, err := verifyChecksum(key, sealed); err != nil {
		return fmt.Errorf("%q: %w", key, err)
	}
	return nil
}

func put(tx *bbolt.Tx, bucket, key, value []byte) error {
	if err := tx.Bucket(bucket).Put(key, value); err != nil {
		return fmt.Errorf("%w: put %s: %w", errTx, bucket, err)
	}
	return nil
}

func remove(tx *bbolt.Tx, bucket, key []byte) error {
	if err := tx.Bucket(bucket).Delete(key); err != nil {
		return fmt.Errorf("%w: delete %s: %w", errTx, bucket, err)
	}
	return nil
}

func (o Owner) prefix() []byte { return []byte(o.Org + "/" + o.User + "/") }

func (k Key) bytes() []byte {
	return k.append(make([]byte, 0, len(k.Org)+len(k.User)+len(k.Contract)+2))
}

func (k Key) append(b []byte) []byte {
	b = append(append(b, k.Org...), '/')
	b = append(append(b, k.User...), '/')
	return append(b, k.Contract...)
}

// parseKey is the reverse of bytes.
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

// seekAfter returns the first that follows on start, or ErrCorrupt where a broken one
// stands before it, that may be the first.
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
