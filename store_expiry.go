package main

// Values that expire, and of which one client keeps a limited amount: tokens, and the first
// responses to idempotency keys.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"
)

// expirySize is the size in bytes of an expiry: Unix time in seconds, big-endian.
const expirySize = 8

// expiredKept is how long an expired value stays in the file. Until then an expired token
// can be told from an unknown one; and if the clock is set forward by less than this and
// then back again, no value is lost early.
const expiredKept = time.Hour

// The values that one client keeps. The oldest are removed when there are more.
var (
	// tokenQuota is at most 10,000 tokens, of about 500 bytes each.
	tokenQuota = quota{bucketTokens, 10_000}
	// firstQuota is at most 64 MiB of first responses, or one response that is larger.
	firstQuota = quota{bucketIdempotency, 64 << 20}
)

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
		entry := bytes.Clone(k)
		bucket, key, ok := parseExpiryEntry(entry)
		if ok && until.Before(expiryOf(entry)) {
			return nil
		}
		if ok {
			if err := purgeValue(tx, until, bucket, key); err != nil {
				return err
			}
		}
		if err := remove(tx, bucketExpiry, entry); err != nil {
			return err
		}
		n--
	}
	return nil
}

// purgeValue removes a value if it expired at or before until, or is corrupt.
func purgeValue(tx *bbolt.Tx, until time.Time, bucket, key []byte) error {
	stored := tx.Bucket(bucket).Get(key)
	if stored == nil {
		return nil
	}
	v, err := decodeExpiring(bucket, key, stored)
	switch {
	case err != nil:
		return errors.Join(removeEntryOf(tx, bucket, key), remove(tx, bucket, key))
	case until.Before(v.expires):
		return nil
	}
	return v.remove(tx)
}

// expiryEntry returns the key in bucketExpiry for a value.
func expiryEntry(expires time.Time, bucket, key []byte) []byte {
	return slices.Concat(expiryBytes(expires), bucket, []byte{0}, key)
}

// parseExpiryEntry is the inverse of expiryEntry, but for the expiry. It returns false if the entry
// does not name the key of a value that expires.
func parseExpiryEntry(entry []byte) (bucket, key []byte, ok bool) {
	if len(entry) < expirySize {
		return nil, nil, false
	}
	bucket, key, _ = bytes.Cut(entry[expirySize:], []byte{0})
	return bucket, key, isExpiringKey(bucket, key)
}

// isExpiringKey reports whether a value that expires may have this key in a bucket.
func isExpiringKey(bucket, key []byte) (ok bool) {
	switch {
	case bytes.Equal(bucket, bucketTokens):
		ok = len(key) == len(Hash{})
	case bytes.Equal(bucket, bucketIdempotency):
		_, ok = clientOfFirst(key)
	}
	return ok
}

// expiryBytes returns an expiry as it is stored, rounded up to a whole second.
func expiryBytes(expires time.Time) []byte {
	return binary.BigEndian.AppendUint64(nil, uint64(expires.Add(time.Second-1).Unix()))
}

// expiryOf returns the expiry that b begins with.
func expiryOf(b []byte) time.Time {
	return time.Unix(int64(binary.BigEndian.Uint64(b)), 0)
}

// expiring is what has to be known of a stored value to remove it.
type expiring struct {
	quota   quota
	client  string
	order   uint64 // the place of the value among those of the client
	key     []byte
	size    uint64    // as its quota counts it
	expires time.Time // rounded up to a whole second
}

// decodeExpiring verifies a stored value of bucketTokens or bucketIdempotency, whose key is an
// isExpiringKey, and returns what has to be known to remove it. It does not read the document of a
// first response. Its error wraps ErrCorrupt.
func decodeExpiring(bucket, key, stored []byte) (v expiring, err error) {
	if bytes.Equal(bucket, bucketTokens) {
		t, expires, err := decodeToken(key, stored)
		return t.expiring(Hash(key), expires), err
	}
	_, v, err = decodeFirst(key, stored)
	return v, err
}

// entryKey returns the key of the value's entry in the quota of its client.
func (v expiring) entryKey() []byte { return entryKey(v.quota.totalKey(v.client), v.order, v.key) }

// put stores the value with its entries in the index and in the quota of its client. It returns the
// keys of the older values that it has removed to make room.
func (v expiring) put(tx *bbolt.Tx, stored []byte) (ended [][]byte, err error) {
	oldest, err := v.quota.add(tx, v.quota.totalKey(v.client), v.entryKey(), v.size)
	if err != nil {
		return nil, err
	}
	for _, key := range oldest {
		if !isExpiringKey(v.quota.bucket, key) {
			continue
		}
		if err := v.end(tx, key); err != nil {
			return nil, err
		}
		ended = append(ended, key)
	}
	return ended, errors.Join(
		put(tx, v.quota.bucket, v.key, stored),
		put(tx, bucketExpiry, expiryEntry(v.expires, v.quota.bucket, v.key), nil))
}

// end removes another value of the same client, which is no longer in its quota. A corrupt value is
// removed too. The value of another client stays, since only a wrong entry leads to it.
func (v expiring) end(tx *bbolt.Tx, key []byte) error {
	bucket := v.quota.bucket
	stored := tx.Bucket(bucket).Get(key)
	if stored == nil {
		return nil
	}
	old, err := decodeExpiring(bucket, key, stored)
	switch {
	case err != nil:
		return remove(tx, bucket, key)
	case old.client != v.client:
		return nil
	}
	return old.removeCounted(tx)
}

// remove removes the value and its entries.
func (v expiring) remove(tx *bbolt.Tx) error {
	if err := removeEntry(tx, v.quota.totalKey(v.client), v.entryKey()); err != nil {
		return err
	}
	return v.removeCounted(tx)
}

// removeCounted is like remove for a value that is no longer in the quota of its client.
func (v expiring) removeCounted(tx *bbolt.Tx) error {
	if err := remove(tx, v.quota.bucket, v.key); err != nil {
		return err
	}
	return remove(tx, bucketExpiry, expiryEntry(v.expires, v.quota.bucket, v.key))
}

// getToken returns a token, and what has to be known to remove it. It also returns a token that has
// expired and is not yet purged. It returns ErrNotFound if there is none, and ErrCorrupt if it, or
// a neighbor of a missing one, fails its checksum.
func getToken(tx *bbolt.Tx, h Hash) (t Token, v expiring, err error) {
	stored, err := seek(tx.Bucket(bucketTokens).Cursor(), h[:], verifyValue)
	if err != nil {
		return t, v, err
	}
	t, expires, err := decodeToken(h[:], stored)
	if err != nil {
		return t, v, fmt.Errorf("%s %x: %w", bucketTokens, h, err)
	}
	return t, t.expiring(h, expires), nil
}

// decodeToken verifies and decodes the stored value of a token. It returns the token and the expiry
// stored beside it.
func decodeToken(key, stored []byte) (t Token, expires time.Time, err error) {
	b, err := verifyChecksum(key, stored)
	if err != nil {
		return t, expires, err
	}
	if len(b) < expirySize {
		return t, expires, corruption("the value has no expiry")
	}
	if err := json.Unmarshal(b[expirySize:], &t); err != nil {
		return t, expires, corruption("the value is not a token")
	}
	if err := t.check(); err != nil {
		return t, expires, corruption(err.Error())
	}
	return t, expiryOf(b), nil
}

// expiring returns what has to be known to remove t. A token of a file of format 1 does not have
// the time when it was issued, but none is older than maxLifetime when it expires.
func (t Token) expiring(h Hash, expires time.Time) expiring {
	issued := t.Issued
	if issued.IsZero() {
		issued = t.Expires.Add(-maxLifetime)
	}
	return expiring{tokenQuota, t.Client, uint64(issued.UnixNano()), h[:], 1, expires}
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

// first is the first response to an idempotency key.
type first struct {
	body     Hash // of the request
	id       ID
	response headed
}

// firstFieldsSize is the size in bytes of the fields in the head of a first response: its expiry,
// the hash of the body of the request and the id of the contract.
const firstFieldsSize = expirySize + len(Hash{}) + idSize

// first returns the first response to an idempotency key as it is stored, and what has to be known
// to store it.
func (i *Idempotency) first(o Owner, c Created, expires time.Time) (v expiring, stored []byte) {
	key := slices.Concat(o.prefix(), []byte(i.Client), []byte{0}, []byte(i.Key))
	fields := slices.Concat(expiryBytes(expires), i.Body[:], []byte(c.ID))
	stored = withHead(key, fields, c.Document, c.Version)
	return expiringFirst(key, stored, i.Client, expiryOf(fields)), stored
}

// expiringFirst returns what has to be known to store or remove a first response. All live equally
// long, so that the one that expires first is the oldest.
func expiringFirst(key, stored []byte, client string, expires time.Time) expiring {
	return expiring{firstQuota, client, uint64(expires.Unix()), key, uint64(len(stored)), expires}
}

// clientOfFirst returns the client id in the key of a first response. It returns false if the key
// is not one.
func clientOfFirst(key []byte) (client string, ok bool) {
	const owner = idSize + 1 + idSize + 1 // bytes of Owner.prefix
	end := bytes.LastIndexByte(key, 0)
	if end < owner || key[idSize] != '/' || key[owner-1] != '/' {
		return "", false
	}
	return string(key[owner:end]), true
}

// getFirst returns the first response under a key, and what has to be known to remove it. Only the
// head of the response is verified. It also returns a response that has expired and is not yet
// purged, and the errors of getToken.
func getFirst(tx *bbolt.Tx, key []byte) (f first, v expiring, err error) {
	stored, err := seek(tx.Bucket(bucketIdempotency).Cursor(), key, verifyFirst)
	if err != nil {
		return f, v, err
	}
	if f, v, err = decodeFirst(key, stored); err != nil {
		return f, v, fmt.Errorf("%s %q: %w", bucketIdempotency, key, err)
	}
	return f, v, nil
}

// verifyFirst is the verifier of bucketIdempotency.
func verifyFirst(key, stored []byte) error {
	_, err := verifyHead(key, stored, firstFieldsSize)
	return err
}

// decodeFirst verifies the head of a stored first response and decodes it.
func decodeFirst(key, stored []byte) (f first, v expiring, err error) {
	f.response, err = verifyHead(key, stored, firstFieldsSize)
	if err != nil {
		return f, v, err
	}
	client, ok := clientOfFirst(key)
	if !ok {
		return f, v, corruption("the key is not that of a response to an idempotency key")
	}
	fields := f.response.fields
	f.body = Hash(fields[expirySize:])
	id := string(fields[expirySize+len(f.body):])
	if f.id, err = parseID(id); err != nil || string(f.id) != id {
		return f, v, corruption("the value has no contract id")
	}
	return f, expiringFirst(key, stored, client, expiryOf(fields)), nil
}

// repeat returns the contract of a first response. It returns ErrKeyReused if the body of the
// request was different.
func (f first) repeat(once *Idempotency) (Created, error) {
	if f.body != once.Body {
		return Created{}, ErrKeyReused
	}
	doc, err := f.response.document()
	if err != nil {
		return Created{}, fmt.Errorf("the first response to the idempotency key %q: %w", once.Key, err)
	}
	return Created{f.id, bytes.Clone(doc), f.response.version()}, nil
}

// upgrade makes a file of format 1 one of format 2. It adds the tokens and first responses to the
// quotas of their clients, but not the totals, which the next value of a client adds up.
func upgrade(tx *bbolt.Tx) error {
	exists := tx.Bucket(bucketQuotas) != nil
	if exists && bytes.Equal(tx.Bucket(bucketMeta).Get([]byte(formatKey)), currentFormat) {
		return nil
	}
	if exists {
		if err := tx.DeleteBucket(bucketQuotas); err != nil {
			return fmt.Errorf("%w: delete bucket: %w", errTx, err)
		}
	}
	quotas, err := tx.CreateBucket(bucketQuotas)
	if err != nil {
		return fmt.Errorf("%w: create bucket: %w", errTx, err)
	}
	type entry struct {
		key  []byte
		size uint64
	}
	var entries []entry
	err = putFormat(tx)
	for _, bucket := range [][]byte{bucketTokens, bucketIdempotency} {
		err = errors.Join(err, tx.Bucket(bucket).ForEach(func(k, stored []byte) error {
			if !isExpiringKey(bucket, k) {
				return nil // check reports it, and what is corrupt
			}
			if v, err := decodeExpiring(bucket, k, stored); err == nil {
				entries = append(entries, entry{v.entryKey(), v.size})
			}
			return nil
		}))
	}
	// In the order of the keys, since bbolt keeps new keys in one sorted list until the commit:
	// one that is not the last moves all that follow.
	slices.SortFunc(entries, func(a, b entry) int { return bytes.Compare(a.key, b.key) })
	for i := 0; i < len(entries) && err == nil; i++ {
		err = quotas.Put(entries[i].key, binary.BigEndian.AppendUint64(nil, entries[i].size))
	}
	if err != nil {
		return fmt.Errorf("%w: change the format: %w", errTx, err)
	}
	return nil
}
