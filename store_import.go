package main

// An import on its way into the store. Contracts are staged in a bucket of their own, in
// transactions of bounded size; then the import is either dropped or committed and moved
// to the contracts. Once committed it is carried out in any case: by the next Open if the
// process ends.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
)

// ErrImporting: there is an import already, and there is one at a time.
var ErrImporting = errors.New("another import is running")

// importKey in bucketMeta is there once an import is decided: "after ", and the key of
// the contract that was moved last.
const (
	importKey   = "import"
	importAfter = "after "
)

const (
	// importBytes and importContracts are what one transaction of an import writes,
	// so that other writers do not wait for long.
	importBytes     = 1 << 20
	importContracts = 1000
	// importFill is how full pages get where keys come in order, as an export's do.
	importFill = 0.9
	// lineSize is the size of a line's number before a staged value.
	lineSize = 8
)

// Import is a number of contracts that are stored all or not at all, in place of those
// that have their keys. Its methods are for one goroutine.
type Import struct {
	s       *Store
	decided bool
	done    bool
}

// StartImport returns ErrImporting while there is another import. The caller closes it.
func (s *Store) StartImport() (*Import, error) {
	if !s.importing.CompareAndSwap(false, true) {
		return nil, ErrImporting
	}
	i := &Import{s: s}
	err := i.s.update(func(tx *bbolt.Tx) error {
		if err := dropStaged(tx); err != nil {
			return err
		}
		if _, err := tx.CreateBucket(bucketImport); err != nil {
			return fmt.Errorf("%w: create bucket: %w", errTx, err)
		}
		return nil
	})
	if err != nil {
		s.importing.Store(false)
		return nil, err
	}
	return i, nil
}

// ImportLine is a contract and the number of the line that it comes from.
type ImportLine struct {
	Key      Key
	Document []byte
	Line     int64
}

// Stage takes contracts, about importBytes and importContracts at most. For each it
// returns the line that had a contract of the same key before, or 0: the first one
// counts.
func (i *Import) Stage(lines []ImportLine) (before []int64, err error) {
	before = make([]int64, len(lines))
	return before, i.s.update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketImport)
		b.FillPercent = importFill
		for n, l := range lines {
			key := l.Key.bytes()
			if first := b.Get(key); first != nil {
				before[n] = int64(binary.BigEndian.Uint64(first))
				continue
			}
			value := append(binary.BigEndian.AppendUint64(nil, uint64(l.Line)), withChecksum(key, l.Document)...)
			if err := put(tx, bucketImport, key, value); err != nil {
				return err
			}
		}
		return nil
	})
}

// Decide makes it sure that all that is staged gets stored.
func (i *Import) Decide() error {
	err := i.s.update(func(tx *bbolt.Tx) error {
		return put(tx, bucketMeta, []byte(importKey), []byte(importAfter))
	})
	i.decided = err == nil
	return err
}

// Apply stores some of what is staged, after Decide, and tells how many contracts and
// whether that is all. While the disk refuses it waits.
func (i *Import) Apply() (moved int, done bool, err error) {
	moved, i.done, err = i.s.moveStaged()
	if errors.Is(err, ErrBusy) || errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrDamaged) {
		select {
		case <-time.After(reopenInterval):
			return 0, false, nil
		case <-i.s.closing:
			return 0, false, ErrClosed
		}
	}
	return moved, i.done, err
}

// Close drops what is staged, or if it is decided stores it.
func (i *Import) Close() {
	defer i.s.importing.Store(false)
	var err error
	for i.decided && !i.done && err == nil {
		_, _, err = i.Apply()
	}
	if !i.decided {
		err = i.s.update(dropStaged)
	}
	if err != nil {
		i.s.log.Warn("an import is left in the database; the next start sees to it", "decided", i.decided, "err", err)
	}
}

// settleImport finishes an import that was decided before the process ended, and drops
// one that was not.
func (s *Store) settleImport() error {
	var staged, decided bool
	err := s.view(func(r *reader) error {
		staged = r.Bucket(bucketImport) != nil
		decided = r.Bucket(bucketMeta).Get([]byte(importKey)) != nil
		return nil
	})
	if err != nil || !staged {
		return err
	}
	if !decided {
		s.log.Info("dropping an import that was cut short")
		return s.update(dropStaged)
	}
	s.log.Info("finishing an import that was cut short")
	for done := false; !done && err == nil; {
		_, done, err = s.moveStaged()
	}
	return err
}

// moveStaged stores what one transaction holds of a decided import.
func (s *Store) moveStaged() (moved int, done bool, err error) {
	err = s.update(func(tx *bbolt.Tx) error {
		moved = 0
		start := bytes.TrimPrefix(tx.Bucket(bucketMeta).Get([]byte(importKey)), []byte(importAfter))
		tx.Bucket(bucketContracts).FillPercent = importFill // which put's is too: it is one Bucket
		c := tx.Bucket(bucketImport).Cursor()
		k, v := c.Seek(start)
		if bytes.Equal(k, start) {
			k, v = c.Next()
		}
		var last []byte
		for size := 0; k != nil && moved < importContracts && size < importBytes; k, v = c.Next() {
			last = bytes.Clone(k)
			if err := put(tx, bucketContracts, last, bytes.Clone(v[lineSize:])); err != nil {
				return err
			}
			size += len(v)
			moved++
		}
		if done = k == nil; done {
			return dropStaged(tx)
		}
		return put(tx, bucketMeta, []byte(importKey), append([]byte(importAfter), last...))
	})
	return moved, done && err == nil, err
}

// dropStaged removes an import from the file, decided or not.
func dropStaged(tx *bbolt.Tx) error {
	if err := remove(tx, bucketMeta, []byte(importKey)); err != nil {
		return err
	}
	if tx.Bucket(bucketImport) == nil {
		return nil
	}
	if err := tx.DeleteBucket(bucketImport); err != nil {
		return fmt.Errorf("%w: delete bucket: %w", errTx, err)
	}
	return nil
}
