package main

// Read transactions of the store.

import (
	"fmt"
	"runtime/debug"
	"time"

	"go.etcd.io/bbolt"
)

// view runs fn in a read transaction. fn must copy the data that it needs: bbolt's slices
// point into the mapped file and are valid only during the transaction. fn must not write
// to the store. If bbolt panics on a broken page, view returns an error that wraps
// ErrDamaged; if fn panics, one that wraps errPanic.
func (s *Store) view(fn func(*reader) error) (err error) {
	s.reopenLock.RLock()
	defer s.reopenLock.RUnlock()
	// If the mapped file is truncated, reading beyond its end is a memory fault, which
	// would end the process. Make it a panic.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	r, err := s.begin()
	if err != nil {
		return err
	}
	defer func() {
		p := recover()
		if p != nil {
			err = s.panicked(p)
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

// errGaveWay is returned by a long read that ended early because giveWay said so.
var errGaveWay = fmt.Errorf("%w at the moment, and a long read would be in the way; try again", ErrUnavailable)

// A long read gives way to a commit that takes longer than slowCommit, if the file is less than
// mostGrowth, in bytes, from outgrowing the reserved address space. Hardly a commit makes it grow
// by as much.
const (
	slowCommit = time.Second
	mostGrowth = 1 << 30
)

// giveWay returns errGaveWay if a long read transaction must end, since what waits for the end
// of it keeps all other reads waiting too: the reopening of the file after a failed commit, or
// a commit for which bbolt must map the file again. It is called often during a long read.
func (s *Store) giveWay() error {
	if s.reopenWanted.Load() {
		return errGaveWay
	}
	if s.busyFor() < slowCommit {
		return nil
	}
	if info, err := s.file.Stat(); err == nil && info.Size() < s.reserved-mostGrowth {
		return nil
	}
	return errGaveWay
}

// busyFor returns how long the committer goroutine has been at its commit or its reopening, or
// 0 if it waits for work.
func (s *Store) busyFor() time.Duration {
	since := s.busySince.Load()
	if since == nil {
		return 0
	}
	return time.Since(*since)
}

// begin returns an idle reader or begins a new one.
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

// beginTx begins a read transaction. If bbolt panics, it marks the store dead; see beginMu.
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

// rollback ends a read transaction. It does not take beginMu, which would deadlock when
// bbolt maps a larger file: the goroutine that holds beginMu waits for the mapping, and
// the mapping waits for this transaction to end.
func (s *Store) rollback(r *reader) {
	if !s.isDead() {
		_ = r.Rollback() // cannot fail
	}
}

// take returns an idle reader, or nil and the generation that a new reader belongs to.
func (rs *readers) take() (r *reader, generation uint64) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if n := len(rs.idle); n > 0 {
		r, rs.idle = rs.idle[n-1], rs.idle[:n-1]
	}
	return r, rs.generation
}

// keep stores r as idle for the next view. It returns false if the caller must end r
// instead, because a write is in progress or has begun since r did.
func (rs *readers) keep(r *reader) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.closed || r.generation != rs.generation {
		return false
	}
	rs.idle = append(rs.idle, r)
	return true
}

// count returns the number of idle readers.
func (rs *readers) count() int {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return len(rs.idle)
}

// endReaders ends the idle readers. Until keepReaders is called, readers in use are ended
// after their view. See readers for the reason.
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

// keepReaders lets readers that begin from now on be kept as idle. Those that began before
// may show an older commit.
func (s *Store) keepReaders() {
	s.readers.mu.Lock()
	defer s.readers.mu.Unlock()
	s.readers.closed = false
	s.readers.generation++
}
