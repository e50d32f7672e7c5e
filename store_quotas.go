package main

// Quotas: how much one client keeps in a bucket, so that no client fills the disk.

import (
	"bytes"
	"encoding/binary"
	"slices"

	"go.etcd.io/bbolt"
)

// quota limits what one client keeps in a bucket. For each value, bucketQuotas has an entry with
// the size of the value, in the order of their age, so that the oldest can be found; before the
// entries of a client it has their total. The entries have no checksums: one that is wrong makes
// the quota wrong, but no value.
type quota struct {
	bucket []byte
	max    uint64
}

// The layout of a key in bucketQuotas: the first letter of the bucket and the start of the hash of
// the client id, which are the key of the total, and then for an entry the order and the key of its
// value. Sizes are in bytes.
const (
	quotaClientSize = 16
	quotaTotalSize  = 1 + quotaClientSize
	quotaEntrySize  = quotaTotalSize + 8 // without the key of the value
)

// totalKey returns the key of the total of a client.
func (q quota) totalKey(client string) []byte {
	h := hashOf(client)
	return append([]byte{q.bucket[0]}, h[:quotaClientSize]...)
}

// entryKey returns the key of the entry of a value.
func entryKey(totalKey []byte, order uint64, key []byte) []byte {
	return slices.Concat(totalKey, binary.BigEndian.AppendUint64(nil, order), key)
}

// add adds an entry to those of a client. If they are more than q.max then, it removes the entries
// of the oldest values until they are not, or only the new one is left, and returns the keys of
// these values. Values are of the same age if they have the same order.
func (q quota) add(tx *bbolt.Tx, totalKey, entry []byte, size uint64) (oldest [][]byte, err error) {
	b := tx.Bucket(bucketQuotas)
	total := quotaTotal(b, totalKey)
	// The entries are found before any is removed: until the commit, a search from the first one on
	// goes through all pages that have become empty.
	var entries [][]byte
	c := b.Cursor()
	for k, v := firstEntry(c, totalKey); total+size > q.max; k, v = c.Next() {
		if !bytes.HasPrefix(k, totalKey) {
			total = 0
			break
		}
		total -= min(total, entrySize(v))
		entries = append(entries, bytes.Clone(k))
	}
	for _, k := range entries {
		if len(k) >= quotaEntrySize {
			oldest = append(oldest, k[quotaEntrySize:])
		}
		if err := remove(tx, bucketQuotas, k); err != nil {
			return nil, err
		}
	}
	if err := put(tx, bucketQuotas, entry, binary.BigEndian.AppendUint64(nil, size)); err != nil {
		return nil, err
	}
	return oldest, putTotal(tx, totalKey, total+size)
}

// removeEntry removes an entry of a client, if there is one, and lowers the total.
func removeEntry(tx *bbolt.Tx, totalKey, entry []byte) error {
	b := tx.Bucket(bucketQuotas)
	size := b.Get(entry)
	if size == nil {
		return nil
	}
	total := quotaTotal(b, totalKey)
	total -= min(total, entrySize(size))
	if err := remove(tx, bucketQuotas, entry); err != nil {
		return err
	}
	return putTotal(tx, totalKey, total)
}

// removeEntryOf removes the entry of a value of a bucket whose client is unknown, since it is
// corrupt. It looks at all entries.
func removeEntryOf(tx *bbolt.Tx, bucket, key []byte) error {
	c := tx.Bucket(bucketQuotas).Cursor()
	for k, _ := c.Seek(bucket[:1]); bytes.HasPrefix(k, bucket[:1]); k, _ = c.Next() {
		if len(k) >= quotaEntrySize && bytes.Equal(k[quotaEntrySize:], key) {
			k = bytes.Clone(k)
			return removeEntry(tx, k[:quotaTotalSize], k)
		}
	}
	return nil
}

// quotaTotal returns the total of a client. If it is missing or corrupt, quotaTotal adds up the
// entries.
func quotaTotal(b *bbolt.Bucket, totalKey []byte) (total uint64) {
	if v, err := verifyChecksum(totalKey, b.Get(totalKey)); err == nil {
		return entrySize(v)
	}
	c := b.Cursor()
	for k, v := firstEntry(c, totalKey); bytes.HasPrefix(k, totalKey); k, v = c.Next() {
		total = min(total+entrySize(v), maxEntrySize)
	}
	return total
}

// putTotal stores the total of a client, or removes it if it is 0.
func putTotal(tx *bbolt.Tx, totalKey []byte, total uint64) error {
	if total == 0 {
		return remove(tx, bucketQuotas, totalKey)
	}
	return put(tx, bucketQuotas, totalKey, withChecksum(totalKey, binary.BigEndian.AppendUint64(nil, total)))
}

// firstEntry returns the oldest entry of a client, or nil.
func firstEntry(c *bbolt.Cursor, totalKey []byte) (key, size []byte) {
	k, v := c.Seek(totalKey)
	if bytes.Equal(k, totalKey) {
		k, v = c.Next()
	}
	if !bytes.HasPrefix(k, totalKey) {
		return nil, nil
	}
	return k, v
}

// maxEntrySize is the largest size of an entry or a total. None is as large, so that sums cannot
// overflow.
const maxEntrySize = 1 << 62

// entrySize returns the size that an entry or a total has, or 0 if it has none.
func entrySize(v []byte) uint64 {
	if len(v) != 8 {
		return 0
	}
	return min(binary.BigEndian.Uint64(v), maxEntrySize)
}
