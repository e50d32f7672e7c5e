package main

// Read transactions of the store.

import (
	"fmt"
	"runtime/debug"

	"go.etcd.io/bbolt"
)

// take returns a reader that is not in use, or nil and the generation of a new one.
func (rs *readers) take() (r *reader, generation uint64) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if n := len(rs.idle); n > 0 {
		r, rs.idle = rs.idle[n-1], rs.idle[:n-1]
	}
	return r, rs.generation
}

// keep keeps a reader for the next view, or returns false if it is to be ended.
func (rs *readers) keep(r *reader) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.closed || r.generation != rs.generation {
		return false
	}
	rs.idle = append(rs.idle, r)
	return true
}

// count is how many are kept.
func (rs *readers) count() int {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return len(rs.idle)
}

// view runs fn in a read transaction. fn copies what it needs: bbolt's bytes are
// the mapped file, and gone with the transaction.
func (s *Store) view(fn func(*reader) error) (err error) {
	s.reopenLock.RLock()
	defer s.reopenLock.RUnlock()
	// A file that was cut off while it is mapped is a fault, not a panic.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	r, err := s.begin()
	if err != nil {
		return err
	}
	defer func() {
		p := recover()
		if p != nil {
			err = s.markDamaged(p)
		}
		if p != nil || !s.readers.keep(r) {
			s.rollback(r)
		}
	}()
	if r.contracts == nil {
		r.contracts = r.Bucket(bucketContracts).Cursor()
	}
	return fn(r)
}

func (s *Store) begin() (*reader, error) {
	if s.isDead() {
		return nil, ErrDamaged
	}
	r, generation := s.readers.take()
	if r != nil {
		return r, nil
	}
	tx, err := s.beginTx()
	if err != nil {
		return nil, err
	}
	return &reader{Tx: tx, generation: generation}, nil
}

func (s *Store) beginTx() (tx *bbolt.Tx, err error) {
	s.beginMu.Lock()
	defer s.beginMu.Unlock()
	if s.isDead() {
		return nil, ErrDamaged
	}
	if s.db == nil {
		return nil, ErrUnavailable
	}
	defer func() {
		if p := recover(); p != nil {
			err = s.markDead(p)
		}
	}()
	tx, err = s.db.Begin(false)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return tx, nil
}

// rollback ends a read transaction. It does not take beginMu: bbolt may be about to map
// the file anew, which waits for this transaction, and begin for that.
func (s *Store) rollback(r *reader) {
	if !s.isDead() {
		_ = r.Rollback() // cannot fail
	}
}

// endReaders ends the readers that are not in use, and has none kept until keepReaders.
func (s *Store) endReaders() {
	s.readers.mu.Lock()
	idle := s.readers.idle
	s.readers.idle, s.readers.closed = nil, true
	s.readers.generation++
	s.readers.mu.Unlock()
	for _, r := range idle {
		s.rollback(r)
	}
}

func (s *Store) keepReaders() {
	s.readers.mu.Lock()
	defer s.readers.mu.Unlock()
	s.readers.closed = false
	s.readers.generation++
}
