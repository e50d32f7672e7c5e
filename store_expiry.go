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

const expirySize = 8

// expiredKept is how long what has expired stays in the file. An expired token is
// still known to have been one, and a clock that is set forward by as much, and back
// again, takes nothing away before its time.
const expiredKept = time.Hour

// purge removes what expired until a time, at most n values. A value says itself when
// it expires; the index only says where to look.
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

// putExpiring stores a value that expires, at the next whole second, and that purge
// removes some time later.
func putExpiring(tx *bbolt.Tx, bucket, key []byte, expires time.Time, value []byte) error {
	stamp := binary.BigEndian.AppendUint64(nil, uint64(expires.Add(time.Second-1).Unix()))
	if err := put(tx, bucket, key, withChecksum(key, append(stamp, value...))); err != nil {
		return err
	}
	return put(tx, bucketExpiry, slices.Concat(stamp, bucket, []byte{0}, key), nil)
}

// removeExpiring removes a value before its time.
func removeExpiring(tx *bbolt.Tx, bucket, key []byte, expires time.Time) error {
	if err := remove(tx, bucket, key); err != nil {
		return err
	}
	stamp := binary.BigEndian.AppendUint64(nil, uint64(expires.Unix()))
	return remove(tx, bucketExpiry, slices.Concat(stamp, bucket, []byte{0}, key))
}

// getExpiring returns a value and when it expires, which may be long ago, or
// ErrNotFound. The value dies with the transaction.
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

func expiryOf(b []byte) time.Time {
	return time.Unix(int64(binary.BigEndian.Uint64(b)), 0)
}
