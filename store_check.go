package main

// The checker: it finds the faults of a database file: those of its pages and those of the
// values in its buckets.

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"slices"

	"go.etcd.io/bbolt"
)

// Checker has the functions that Check calls. None may be nil.
type Checker struct {
	// Report is called with each fault, a text for the operator.
	Report func(fault string)
	// Contract is called for each contract whose key and checksums are right, also for those of
	// an unfinished import. doc is part of the mapped file and valid only during the call.
	Contract func(k Key, doc []byte)
	// Progress is called with the number of bytes checked since the last call. In total these
	// are about twice the size of the file: first the pages are checked, then the values.
	Progress func(bytes int64)
}

// Contents is the size of a database. Contracts and Clients are 0 if the pages have faults,
// as the values are not read then.
type Contents struct {
	Contracts, Clients int
	Bytes              int64 // of all pages
}

// Check checks the database file at path, which no process may have open for writing, and
// does not change it. A fault is passed to Report and is not an error. Check returns an error
// if the file cannot be checked: without the path, and wrapping ErrInUse if a process such as
// a server has it open; or the error of ctx.
func (c Checker) Check(ctx context.Context, path string) (contents Contents, err error) {
	contents.Bytes, err = c.checkFile(ctx, path, func(tx *bbolt.Tx) error { return c.checkBuckets(ctx, tx, &contents) })
	return contents, err
}

// checkFile checks the pages of the file and returns their size in bytes. If the pages have no
// fault, it then calls next in a read transaction. It does without bbolt's own check, which finds
// nothing that checkPages does not find, and takes memory for each page.
func (c Checker) checkFile(ctx context.Context, path string, next func(*bbolt.Tx) error) (bytes int64, err error) {
	f, err := openLocked(path, os.O_RDONLY)
	if err != nil {
		return bytes, err
	}
	defer f.Close()
	metas, err := readMetas(f)
	if err != nil {
		return bytes, err
	}
	m := currentMeta(metas)
	if err := checkFile(f, m); err != nil {
		return bytes, err
	}
	bytes = m.bytes()
	broken := false
	report := func(fault string) { broken = true; c.Report(fault) }
	for i := range metas {
		switch {
		case !metas[i].valid:
			c.Report(fmt.Sprintf("meta page %d is broken; the other one is used", i))
		case !metas[i].hasHeader(uint64(i)):
			report(fmt.Sprintf("meta page %d has the header of another page", i))
		}
	}
	if m.txid > lastTransaction {
		report(fmt.Sprintf("the meta page has the transaction %d, which no database has reached", m.txid))
	}
	progress := func(n int64) error { c.Progress(n); return ctx.Err() }
	if err := checkPages(f, m, report, progress); err != nil {
		return bytes, err
	}
	if broken {
		return bytes, nil // bbolt could crash or loop forever
	}
	again, err := duplicate(f)
	if err != nil {
		return bytes, err
	}
	db, err := openReadOnly(again)
	if err != nil {
		return bytes, err
	}
	// Reading the mapped file can still fault, for example on a bad disk sector, or if another
	// program cuts off the file. Such a fault is reported instead of ending the process.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			c.Report(fmt.Sprintf("reading the values stopped: %v", p))
			return // bbolt may still hold a lock, and closing would deadlock
		}
		err = errors.Join(err, db.Close())
	}()
	return bytes, db.View(func(tx *bbolt.Tx) error {
		err := tx.ForEach(func(name []byte, _ *bbolt.Bucket) error {
			if !isBucket(name) {
				c.Report(fmt.Sprintf("the bucket %s is none of this program's", quoted(string(name))))
			}
			return ctx.Err()
		})
		if err != nil {
			return err
		}
		return next(tx)
	})
}

// isBucket reports whether a bucket of the store has this name.
func isBucket(name []byte) bool {
	named := func(bucket []byte) bool { return bytes.Equal(bucket, name) }
	return named(bucketImport) || slices.ContainsFunc(buckets, named)
}

// checkBuckets checks the values in all buckets and counts them in contents.
func (c Checker) checkBuckets(ctx context.Context, tx *bbolt.Tx, contents *Contents) error {
	meta := tx.Bucket(bucketMeta)
	if meta == nil {
		c.Report(fmt.Sprintf("the bucket %s is missing", bucketMeta))
		return nil
	}
	format, _ := parseFormat(meta.Get([]byte(formatKey))) // checkFile has accepted it
	quotas := quotaChecker{report: c.Report, tx: tx}
	for _, bucket := range slices.Concat(buckets, [][]byte{bucketImport}) {
		b := tx.Bucket(bucket)
		if b == nil {
			if !bytes.Equal(bucket, bucketImport) && (format > 1 || !bytes.Equal(bucket, bucketQuotas)) {
				c.Report(fmt.Sprintf("the bucket %s is missing", bucket))
			}
			continue
		}
		err := b.ForEach(func(k, v []byte) error {
			c.Progress(int64(len(k) + len(v)))
			if bytes.Equal(bucket, bucketQuotas) {
				quotas.check(k, v)
			} else if err := c.checkValue(tx, bucket, k, v, contents); err != nil {
				name := string(k)
				if bytes.Equal(bucket, bucketTokens) {
					name = hex.EncodeToString(k)
				}
				c.Report(fmt.Sprintf("%s %q: %v", bucket, name, err))
			}
			return ctx.Err()
		})
		if err != nil {
			return err
		}
	}
	quotas.end()
	if tx.Bucket(bucketImport) == nil && meta.Get([]byte(importKey)) != nil {
		c.Report("there is the progress of an import, but the import is missing")
	}
	return nil
}

// checkValue checks the value of a key in a bucket. Its errors complete a sentence that begins with
// the key.
func (c Checker) checkValue(tx *bbolt.Tx, bucket, k, stored []byte, contents *Contents) error {
	switch string(bucket) {
	case string(bucketMeta):
		if string(k) == importKey {
			_, err := parseImportProgress(stored)
			return err
		}
	case string(bucketContracts):
		contents.Contracts++
		return c.checkContract(k, stored)
	case string(bucketClients):
		contents.Clients++
		if _, err := decodeClient(k, stored); err != nil {
			return err
		}
	case string(bucketTokens):
		if !isExpiringKey(bucket, k) {
			return errors.New("the key is not a SHA-256")
		}
		v, err := decodeExpiring(bucket, k, stored)
		if err != nil {
			return err
		}
		return checkInQuota(tx, v)
	case string(bucketIdempotency):
		return c.checkFirst(tx, k, stored)
	case string(bucketExpiry):
		if _, _, ok := parseExpiryEntry(k); !ok {
			return errors.New("the entry does not name the key of a value that expires")
		}
	case string(bucketImport):
		if len(stored) < lineSize {
			return ErrCorrupt
		}
		return c.checkContract(k, stored[lineSize:]) // the next start may store it
	}
	return nil
}

// checkContract checks a stored contract, and passes it to Contract. Its errors are as those of
// checkValue.
func (c Checker) checkContract(k, stored []byte) error {
	contract, err := verifyHead(k, stored, 0)
	if err != nil {
		return err
	}
	doc, err := contract.check()
	if err != nil {
		return err
	}
	key, ok := parseKey(k)
	if !ok {
		return errors.New("the key is not three UUIDs in lower case, separated by slashes")
	}
	c.Contract(key, doc)
	return nil
}

// checkFirst checks a stored first response, and passes its contract to Contract. Its errors are as
// those of checkValue.
func (c Checker) checkFirst(tx *bbolt.Tx, k, stored []byte) error {
	f, v, err := decodeFirst(k, stored)
	if err != nil {
		return err
	}
	doc, err := f.response.check()
	if err != nil {
		return err
	}
	key, ok := parseKey(slices.Concat(k[:2*(idSize+1)], []byte(f.id)))
	if !ok {
		return errors.New("the key does not begin with the UUIDs of an organization and a user in lower case")
	}
	c.Contract(key, doc)
	return checkInQuota(tx, v)
}

// checkInQuota returns an error unless the quota of its client has an entry for a value. A file of
// format 1 has no quotas.
func checkInQuota(tx *bbolt.Tx, v expiring) error {
	if b := tx.Bucket(bucketQuotas); b != nil && b.Get(v.entryKey()) == nil {
		return errors.New("the value is missing in the quota of its client")
	}
	return nil
}

// quotaChecker checks the entries of bucketQuotas, which come in their order.
type quotaChecker struct {
	report   func(fault string)
	tx       *bbolt.Tx
	totalKey []byte // of the client whose entries come
	total    uint64 // that is stored
	stored   bool   // whether a total is stored
	sum      uint64 // of the entries
}

// check checks the next entry.
func (q *quotaChecker) check(k, v []byte) {
	if len(k) < quotaTotalSize || len(k) > quotaTotalSize && len(k) < quotaEntrySize || !bytes.ContainsAny(k[:1], "ti") {
		q.report(fmt.Sprintf("%s %x: the key is neither one of a total nor one of an entry", bucketQuotas, k))
		return
	}
	if !bytes.Equal(k[:quotaTotalSize], q.totalKey) {
		q.end()
		*q = quotaChecker{report: q.report, tx: q.tx, totalKey: bytes.Clone(k[:quotaTotalSize])}
	}
	if len(k) == quotaTotalSize {
		total, err := verifyChecksum(k, v)
		if err != nil {
			q.report(fmt.Sprintf("%s %x: %v", bucketQuotas, k, err))
			return
		}
		q.total, q.stored = entrySize(total), true
		return
	}
	q.sum = min(q.sum+entrySize(v), maxEntrySize)
	if !q.isEntry(k, v) {
		q.report(fmt.Sprintf("%s %x: the entry is not that of a value", bucketQuotas, k))
	}
}

// isEntry reports whether an entry is that of the value whose key it has. A value that is corrupt is
// reported elsewhere.
func (q *quotaChecker) isEntry(k, v []byte) bool {
	bucket, key := bucketIdempotency, k[quotaEntrySize:]
	if k[0] == bucketTokens[0] {
		bucket = bucketTokens
	}
	stored := q.tx.Bucket(bucket).Get(key)
	if stored == nil || !isExpiringKey(bucket, key) {
		return false
	}
	value, err := decodeExpiring(bucket, key, stored)
	return err != nil || bytes.Equal(value.entryKey(), k) && entrySize(v) == value.size
}

// end checks the total of the client whose entries came last.
func (q *quotaChecker) end() {
	if q.stored && q.total != q.sum {
		q.report(fmt.Sprintf("%s %x: the total is %d, but the entries add up to %d", bucketQuotas, q.totalKey, q.total, q.sum))
	}
}
