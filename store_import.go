package main

// Imports. An import stores all its contracts or none, but may be too large for one
// transaction, which would keep other writers waiting. So it is done in three steps:
//
//  1. Stage writes the contracts to bucketImport, in transactions of bounded size. If the
//     process ends now, the next Open drops them.
//  2. Commit writes importKey to bucketMeta. From here on the import survives a crash.
//  3. Move moves the staged contracts to bucketContracts, in transactions of bounded size,
//     and at last removes bucketImport and importKey. If the process ends now, the next Open
//     moves the rest.
//
// During the third step, readers see some of the new contracts and not yet others.

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
)

// ErrImporting is returned by StartImport while another import is running.
var ErrImporting = errors.New("another import is running")

// importKey is in bucketMeta while there is a committed import. Its value is importAfter
// followed by the key of the contract that was moved last, if any.
const (
	importKey   = "import"
	importAfter = "after "
)

const (
	// importBytes and importContracts limit one transaction of an import, so that other
	// writers do not wait for long. The last contract may exceed importBytes.
	importBytes     = 1 << 20
	importContracts = 1000
	// importFill is the part of a page that bbolt fills before it starts another one. It is
	// higher than bbolt's default, since the keys of an export come in order, so that a full
	// page gets no more of them.
	importFill = 0.9
	// lineSize is the size, in bytes, of the line number before a staged value.
	lineSize = 8
)

// Import is an import that is running. Its contracts replace stored ones with the same keys.
// The caller calls Stage until all contracts are staged, then Commit, then Move until it is
// done, and at last Close, also after an error. Import is not safe for concurrent use.
type Import struct {
	s         *Store
	committed bool // Commit has succeeded
	done      bool // all contracts are moved
}

// StartImport begins an import, which the caller must close. It returns ErrImporting while
// another import is running.
func (s *Store) StartImport() (*Import, error) {
	if !s.importing.CompareAndSwap(false, true) {
		return nil, ErrImporting
	}
	i := &Import{s: s}
	err := i.s.updatePatiently(0, func(tx *bbolt.Tx) error {
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

// ImportLine is a contract and the number of its line in the input, from 1.
type ImportLine struct {
	Key      Key
	Document []byte
	Line     int64
}

// Stage stages contracts, in one transaction: the caller passes about importBytes and at most
// importContracts. If a contract has the same key as one that is staged already, it is not
// staged, and before has the line number of the first one at its index; else before has 0.
func (i *Import) Stage(lines []ImportLine) (before []int64, err error) {
	before = make([]int64, len(lines))
	return before, i.s.updatePatiently(importBytes, func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketImport)
		b.FillPercent = importFill
		clear(before)
		for n, l := range lines {
			key := l.Key.bytes()
			if first := b.Get(key); len(first) >= lineSize {
				before[n] = int64(binary.BigEndian.Uint64(first))
				continue
			}
			value := append(binary.BigEndian.AppendUint64(nil, uint64(l.Line)), withHead(key, nil, l.Document, versionOf(l.Document))...)
			if err := put(tx, bucketImport, key, value); err != nil {
				return err
			}
		}
		return nil
	})
}

// Commit commits the import; from here on it survives a crash. If Commit returns an error,
// the import is not committed, unless the error is ErrClosed or wraps ErrDamaged: then it is
// not known whether the import is committed, and the next Open finds out.
func (i *Import) Commit() error {
	err := i.s.updatePatiently(0, func(tx *bbolt.Tx) error {
		return put(tx, bucketMeta, []byte(importKey), []byte(importAfter))
	})
	i.committed = err == nil
	return err
}

// Move moves some staged contracts to the other contracts, in one transaction, and returns
// their number and whether all are moved now. It may be called after Commit only. While the
// store cannot write, Move waits for a reopenInterval, moves nothing and returns no error, so
// that the caller tries again. It returns ErrClosed when the store is closed, and
// an error that wraps ErrDamaged if the file is damaged.
func (i *Import) Move() (moved int, done bool, err error) {
	moved, i.done, err = i.s.moveStaged()
	if errors.Is(err, ErrUnavailable) && !errors.Is(err, ErrDamaged) {
		select {
		case <-time.After(reopenInterval):
			return 0, false, nil
		case <-i.s.closing:
			return 0, false, ErrClosed
		}
	}
	return moved, i.done, err
}

// Close ends the import. If it is committed, Close moves the contracts that are left; else it
// drops the staged contracts.
func (i *Import) Close() {
	defer i.s.importing.Store(false)
	var err error
	for i.committed && !i.done && err == nil {
		_, _, err = i.Move()
	}
	if !i.committed {
		err = i.s.updatePatiently(0, dropStaged)
	}
	if err != nil {
		i.s.log.Warn("an import is left unfinished in the database; the next start finishes it if it is committed, or else drops it", "committed", i.committed, "err", err)
	}
}

// settleImport finishes an import that an earlier process left unfinished, if it is committed,
// or else drops it.
func (s *Store) settleImport() error {
	var staged, committed bool
	err := s.view(func(r *reader) error {
		staged = r.Bucket(bucketImport) != nil
		committed = r.Bucket(bucketMeta).Get([]byte(importKey)) != nil
		return nil
	})
	if err != nil || !staged {
		return err
	}
	if !committed {
		s.log.Info("dropping an import that was interrupted before it was committed; nothing of it was imported")
		return s.updatePatiently(0, dropStaged)
	}
	s.log.Info("finishing an import that was interrupted after it was committed")
	for done := false; !done && err == nil; {
		_, done, err = s.moveStaged()
	}
	return err
}

// moveStaged moves contracts of a committed import until importBytes or importContracts are
// moved, in one transaction. The staged contracts stay in bucketImport until all are moved;
// importKey records the last one moved, so that none is moved twice, which could undo a
// change that a client has made since.
func (s *Store) moveStaged() (moved int, done bool, err error) {
	err = s.updatePatiently(importBytes, func(tx *bbolt.Tx) error {
		moved = 0
		start, err := parseImportProgress(tx.Bucket(bucketMeta).Get([]byte(importKey)))
		if err != nil {
			return err
		}
		// put calls tx.Bucket too, which returns the same Bucket within a transaction.
		tx.Bucket(bucketContracts).FillPercent = importFill
		c := tx.Bucket(bucketImport).Cursor()
		k, v := c.Seek(start)
		if bytes.Equal(k, start) {
			k, v = c.Next()
		}
		var last []byte
		for size := 0; k != nil && moved < importContracts && size < importBytes; k, v = c.Next() {
			last = bytes.Clone(k)
			size += len(k) + len(v)
			if err := verifyStaged(last, v); err != nil {
				// The contract that is stored may be sound.
				s.log.Error("a contract of a committed import is corrupt and was left out; import it again", "contract", string(last), "err", err)
				continue
			}
			if err := put(tx, bucketContracts, last, bytes.Clone(v[lineSize:])); err != nil {
				return err
			}
			moved++
		}
		if done = k == nil; done {
			return dropStaged(tx)
		}
		return put(tx, bucketMeta, []byte(importKey), append([]byte(importAfter), last...))
	})
	if err != nil {
		return 0, false, err // without a look at moved, which a change that goes on may still write
	}
	return moved, done, nil
}

// verifyStaged returns an error that wraps ErrCorrupt if a staged value is not a contract, or not
// one with this key.
func verifyStaged(key, v []byte) error {
	if _, ok := parseKey(key); !ok || len(v) < lineSize {
		return ErrCorrupt
	}
	_, err := readContract(key, v[lineSize:])
	return err
}

// parseImportProgress returns the key of the contract that was moved last, or nil, from the value of
// importKey. It returns an error that wraps ErrCorrupt if the value is not of that form.
func parseImportProgress(value []byte) (last []byte, err error) {
	last, ok := bytes.CutPrefix(value, []byte(importAfter))
	if _, isKey := parseKey(last); !ok || len(last) > 0 && !isKey {
		return nil, corruption(fmt.Sprintf("the progress of the import is %q", value))
	}
	return last, nil
}

// dropStaged removes bucketImport and importKey from the file, if they are there.
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
