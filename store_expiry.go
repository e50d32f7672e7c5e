package main

// Values that expire: tokens and idempotency keys.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"go.etcd.io/bbolt"
)

// expirySize is the size in bytes of an expiry: Unix time in seconds, big-endian.
const expirySize = 8

// expiredKept is how long an expired value stays in the file. Until then an expired token
// can be told from an unknown one; and if the clock is set forward by less than this and
// then back again, no value is lost early.
const expiredKept = time.Hour

// purge removes up to n values that expired at or before until, and their entries in the
// index, bucketExpiry. The index is sorted by expiry, so purge stops at the first later
// entry and never reads the rest.
//
// The index only says where to look, since it has no checksums, and since a value that is
// replaced leaves its earlier entry there. A value is removed if its own expiry, which its
// checksum covers, has passed too; else only the index entry is removed. A value that is
// corrupt, and so useless, is also removed.
func purge(tx *bbolt.Tx, until time.Time, n int) error {
	c := tx.Bucket(bucketExpiry).Cursor()
	for k, _ := c.First(); k != nil && n > 0; k, _ = c.First() {
		if until.Before(expiryOf(k)) {
			return nil
		}
		bucket, key, _ := bytes.Cut(k[expirySize:], []byte{0})
		if tx.Bucket(bucket) != nil {
			_, expires, err := getExpiring(tx, bucket, key)
			if err == nil && !until.Before(expires) || errors.Is(err, ErrCorrupt) {
				if err := remove(tx, bucket, key); err != nil {
					return err
				}
			}
		}
		if err := remove(tx, bucketExpiry, bytes.Clone(k)); err != nil {
			return err
		}
		n--
	}
	return nil
}

// putExpiring stores a value with its expiry, rounded up to a whole second, and adds it to
// the index.
func putExpiring(tx *bbolt.Tx, bucket, key []byte, expires time.Time, value []byte) error {
	stamp := binary.BigEndian.AppendUint64(nil, uint64(expires.Add(time.Second-1).Unix()))
	if err := put(tx, bucket, key, withChecksum(key, append(stamp, value...))); err != nil {
		return err
	}
	return put(tx, bucketExpiry, slices.Concat(stamp, bucket, []byte{0}, key), nil)
}

// removeExpiring removes a value and its index entry. expires is as getExpiring returned it.
func removeExpiring(tx *bbolt.Tx, bucket, key []byte, expires time.Time) error {
	if err := remove(tx, bucket, key); err != nil {
		return err
	}
	stamp := binary.BigEndian.AppendUint64(nil, uint64(expires.Unix()))
	return remove(tx, bucketExpiry, slices.Concat(stamp, bucket, []byte{0}, key))
}

// getExpiring returns a value, without its checksum and expiry, and its expiry. It also
// returns values that have expired and are not yet purged. It returns ErrNotFound if there
// is no value, and ErrCorrupt if it, or a neighbor of a missing one, fails its checksum.
// The value is valid only during the transaction.
func getExpiring(tx *bbolt.Tx, bucket, key []byte) ([]byte, time.Time, error) {
	value, err := seek(tx.Bucket(bucket).Cursor(), key)
	if err != nil {
		return nil, time.Time{}, err
	}
	b, _, err := verifyChecksum(key, value)
	if err == nil && len(b) < expirySize {
		err = ErrCorrupt
	}
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("%s %x: %w", bucket, key, err)
	}
	return b[expirySize:], expiryOf(b), nil
}

// expiryOf returns the expiry that b begins with.
func expiryOf(b []byte) time.Time {
	return time.Unix(int64(binary.BigEndian.Uint64(b)), 0)
}
