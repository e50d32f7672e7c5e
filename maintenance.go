package main

// What is done with a database as a whole: a copy of it while it is written, a look
// at all that is in it, and a file without its free pages. Part of the store.

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"

	"github.com/go-json-experiment/json"
	"go.etcd.io/bbolt"
)

// compactTxBytes is what one transaction of a compaction writes, in bytes.
const compactTxBytes = 16 << 20

// Snapshot returns a copy of the database as one transaction left it, and its size in
// bytes: a file beside it that has no name any more. It is on local disk so that the
// transaction is over soon, however slowly the copy is read: an open one keeps a file
// that grows from being mapped anew, and so all writers waiting
// (https://github.com/etcd-io/bbolt/issues/850). It ends with ErrUnavailable when the
// disk fails meanwhile.
func (s *Store) Snapshot(ctx context.Context) (_ *os.File, size int64, err error) {
	f, err := os.CreateTemp(filepath.Dir(s.path), "."+filepath.Base(s.path)+".*")
	if err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := os.Remove(f.Name()); err != nil {
		return nil, 0, err
	}
	w := &snapshotWriter{ctx: ctx, s: s, f: f}
	err = s.view(func(r *reader) error {
		size, err = r.WriteTo(w)
		return err
	})
	if err != nil && w.err != nil {
		err = w.err // which bbolt does not always wrap
	}
	if err != nil {
		return nil, 0, fmt.Errorf("copy the database beside itself: %w", err)
	}
	metas, err := readMetas(f)
	if err != nil {
		return nil, 0, fmt.Errorf("the copy of the database: %w", err)
	}
	if err := checkFile(f, standing(metas)); err != nil {
		return nil, 0, fmt.Errorf("the copy of the database: %w", err)
	}
	again, err := duplicate(f)
	if err != nil {
		return nil, 0, err
	}
	db, err := openReadOnly(again)
	if err != nil {
		return nil, 0, fmt.Errorf("the copy of the database: %w", err)
	}
	if err := db.Close(); err != nil {
		return nil, 0, err
	}
	_, err = f.Seek(0, io.SeekStart)
	return f, size, err
}

// snapshotWriter writes as long as somebody wants it, and nobody waits for its
// transaction to end.
type snapshotWriter struct {
	ctx context.Context
	s   *Store
	f   *os.File
	err error // of the Write that failed
}

func (w *snapshotWriter) Write(b []byte) (n int, err error) {
	switch {
	case w.ctx.Err() != nil:
		err = w.ctx.Err()
	case w.s.wantGate.Load():
		err = ErrUnavailable
	default:
		n, err = w.f.Write(b)
	}
	w.err = err
	return n, err
}

// openReadOnly opens a file for reading that checkFile has passed. Closing it closes
// f, and so does its error.
func openReadOnly(f *os.File) (_ *bbolt.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", ErrDamaged, p)
		}
		if err != nil {
			f.Close()
		}
	}()
	return bbolt.Open(f.Name(), 0, &bbolt.Options{
		ReadOnly: true,
		Timeout:  lockTimeout,
		OpenFile: func(string, int, os.FileMode) (*os.File, error) { return f, nil },
	})
}

// Examination is a look at a whole database.
type Examination struct {
	// Found is told each fault, in words.
	Found func(fault string)
	// Contract is told each contract whose key and checksum are right. The document
	// is the file's own, and gone with the call.
	Contract func(k Key, doc []byte)
	// Seen is told how many bytes more were looked at; all are looked at twice.
	Seen func(bytes int64)
}

// Contents is how much is in a database.
type Contents struct {
	Contracts, Clients int
	Bytes              int64 // of the file
}

// Examine looks at a file that nobody has open for writing, and leaves it as it is.
// Its error says why it cannot, without the path, and wraps ErrInUse when a server has
// it.
func (e Examination) Examine(ctx context.Context, path string) (c Contents, err error) {
	c.Bytes, err = e.pages(ctx, path, func(tx *bbolt.Tx) error { return e.values(ctx, tx, &c) })
	return c, err
}

// pages looks at the file's pages, of which it returns the bytes, and has next look at
// what is in them.
func (e Examination) pages(ctx context.Context, path string, next func(*bbolt.Tx) error) (bytes int64, err error) {
	f, err := openLocked(path, os.O_RDONLY)
	if err != nil {
		return bytes, err
	}
	defer f.Close()
	metas, err := readMetas(f)
	if err != nil {
		return bytes, err
	}
	m := standing(metas)
	if err := checkFile(f, m); err != nil {
		return bytes, err
	}
	bytes = int64(m.pages) * m.pageSize
	for i := range metas {
		if !metas[i].valid {
			e.Found(fmt.Sprintf("meta page %d is broken; the other one is used", i))
		}
	}
	broken := false
	found := func(fault string) { broken = true; e.Found(fault) }
	seen := func(n int64) error { e.Seen(n); return ctx.Err() }
	if err := surveyPages(f, m, found, seen); err != nil {
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
			e.Found(err.Error())
		}
		defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
		defer func() {
			if p := recover(); p != nil {
				e.Found(fmt.Sprint(p))
			}
		}()
		return next(tx)
	})
	return bytes, err
}

// values looks at what is in the buckets.
func (e Examination) values(ctx context.Context, tx *bbolt.Tx, c *Contents) error {
	for _, bucket := range buckets {
		b := tx.Bucket(bucket)
		if b == nil {
			e.Found(fmt.Sprintf("the bucket %s is missing", bucket))
			continue
		}
		err := b.ForEach(func(k, v []byte) error {
			e.Seen(int64(len(k) + len(v)))
			if fault := e.value(bucket, k, v, c); fault != "" {
				e.Found(fault)
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
func (e Examination) value(bucket, k, sealed []byte, c *Contents) (fault string) {
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
	value, _, err := unseal(k, sealed)
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

// Compact puts a copy without free pages in the place of the database, if verify finds
// nothing wrong with it, and returns the sizes of both in bytes. Nothing else is to be
// done with the store from then on than to close it.
func (s *Store) Compact(verify func(path string) error) (before, after int64, err error) {
	f, err := createAtomicDB(s.path)
	if err != nil {
		return 0, 0, err
	}
	defer f.discard()
	if err := s.compactTo(f.Name()); err != nil {
		return 0, 0, fmt.Errorf("write the database anew: %w", err)
	}
	if err := verify(f.Name()); err != nil {
		return 0, 0, err
	}
	old, err1 := s.file.Stat()
	compacted, err2 := f.Stat()
	if err := errors.Join(err1, err2); err != nil {
		return 0, 0, err
	}
	return old.Size(), compacted.Size(), f.replace()
}

func (s *Store) compactTo(path string) (err error) {
	to, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: lockTimeout})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = s.damage(p)
		}
	}()
	return bbolt.Compact(to, s.db, compactTxBytes)
}
