package main

// The checker: looks for faults in a whole database file that no process writes.

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"runtime/debug"

	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"
)

// Examination is a look at a whole database.
type Checker struct {
	// Found is told each fault, in words.
	Report func(fault string)
	// Contract is told each contract whose key and checksum are right. The document
	// is the file's own, and gone with the call.
	Contract func(k Key, doc []byte)
	// Seen is told how many bytes more were looked at; all are looked at twice.
	Progress func(bytes int64)
}

// Contents is how much is in a database.
type Contents struct {
	Contracts, Clients int
	Bytes              int64 // of the file
}

// Examine looks at a file that nobody has open for writing, and leaves it as it is.
// Its error says why it cannot, without the path, and wraps ErrInUse when a server has
// it.
func (e Checker) Check(ctx context.Context, path string) (c Contents, err error) {
	c.Bytes, err = e.checkFile(ctx, path, func(tx *bbolt.Tx) error { return e.checkBuckets(ctx, tx, &c) })
	return c, err
}

// pages looks at the file's pages, of which it returns the bytes, and has next look at
// what is in them.
func (e Checker) checkFile(ctx context.Context, path string, next func(*bbolt.Tx) error) (bytes int64, err error) {
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
	bytes = int64(m.pages) * m.pageSize
	for i := range metas {
		if !metas[i].valid {
			e.Report(fmt.Sprintf("meta page %d is broken; the other one is used", i))
		}
	}
	broken := false
	found := func(fault string) { broken = true; e.Report(fault) }
	seen := func(n int64) error { e.Progress(n); return ctx.Err() }
	if err := checkPages(f, m, found, seen); err != nil {
		return bytes, err
	}
	if broken {
		return bytes, nil // bbolt would get lost in it
	}
	again, err := duplicate(f)
	if err != nil {
		return bytes, err
	}
	db, err := openReadOnly(again)
	if err != nil {
		return bytes, err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	err = db.View(func(tx *bbolt.Tx) error {
		for err := range tx.Check() {
			e.Report(err.Error())
		}
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() {
			if p := recover(); p != nil {
				e.Report(fmt.Sprint(p))
			}
		}()
		return next(tx)
	})
	return bytes, err
}

// values looks at what is in the buckets.
func (e Checker) checkBuckets(ctx context.Context, tx *bbolt.Tx, c *Contents) error {
	for _, bucket := range buckets {
		b := tx.Bucket(bucket)
		if b == nil {
			e.Report(fmt.Sprintf("the bucket %s is missing", bucket))
			continue
		}
		err := b.ForEach(func(k, v []byte) error {
			e.Progress(int64(len(k) + len(v)))
			if fault := e.checkValue(bucket, k, v, c); fault != "" {
				e.Report(fault)
			}
			return ctx.Err()
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// value says what is wrong with a value, or "".
func (e Checker) checkValue(bucket, k, sealed []byte, c *Contents) (fault string) {
	name := string(k) // of what stands there
	if bytes.Equal(bucket, bucketTokens) {
		name = hex.EncodeToString(k)
	}
	fail := func(err error) string { return fmt.Sprintf("%s %q: %v", bucket, name, err) }
	switch {
	case bytes.Equal(bucket, bucketMeta), bytes.Equal(bucket, bucketExpiry):
		return ""
	case bytes.Equal(bucket, bucketContracts):
		c.Contracts++
	case bytes.Equal(bucket, bucketClients):
		c.Clients++
	}
	value, _, err := verifyChecksum(k, sealed)
	if err != nil {
		return fail(err)
	}
	switch {
	case bytes.Equal(bucket, bucketContracts):
		key, ok := parseKey(k)
		if !ok {
			return fail(errors.New("is not a key of three UUIDs in lower case"))
		}
		e.Contract(key, value)
	case bytes.Equal(bucket, bucketClients):
		if json.Unmarshal(value, new(Client)) != nil {
			return fail(errors.New("is no client"))
		}
	case len(value) < expirySize:
		return fail(errors.New("has no time at which it expires"))
	case bytes.Equal(bucket, bucketTokens):
		if json.Unmarshal(value[expirySize:], new(Token)) != nil {
			return fail(errors.New("is no token"))
		}
	}
	return ""
}
