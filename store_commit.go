package main

// Group commit: every write to the database, and the recovery after a commit that failed.

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"slices"
	"time"

	"go.etcd.io/bbolt"
)

const (
	// queueLength is the capacity of the queue. A commit takes at most this many writes
	// from it.
	queueLength = 1024
	// queueTimeout is how long a write waits for room in a full queue before it fails
	// with ErrBusy.
	queueTimeout = 5 * time.Second
	// reopenInterval is the minimum time between two attempts to reopen the database
	// while reopening fails.
	reopenInterval = time.Second
	// failurePause is how long writes are refused after each failed commit but the first
	// in a row. Each failed commit reopens the file, which blocks all reads, so without
	// the pause a full disk would keep readers waiting.
	failurePause = 100 * time.Millisecond
)

// update runs do in a write transaction and returns when the transaction is synced to
// disk. The transaction is shared with the other writes of the same batch, which run one
// after another in the order of their arrival. A nil error means that the change survives
// a crash. After ErrBusy, ErrUnavailable or an error of do the change was not made; after
// ErrClosed, or ErrDamaged without ErrUnavailable, it may have been made.
func (s *Store) update(do change) error { return s.updateContext(context.Background(), do) }

// updateContext is like update but returns ctx's error when ctx ends first. The change
// may still be made afterwards.
func (s *Store) updateContext(ctx context.Context, do change) error {
	if s.damaged.Load() {
		return fmt.Errorf("%w: %w", ErrUnavailable, ErrDamaged)
	}
	w := &write{do: do, since: time.Now(), done: make(chan struct{})}
	if !s.leadCommit(w) {
		if err := s.enqueue(ctx, w); err != nil {
			return err
		}
	}
	select {
	case <-w.done:
		return w.err
	case <-ctx.Done():
		return ctx.Err()
	case <-s.dead:
		return ErrDamaged
	case <-s.stopped:
		select {
		case <-w.done:
			return w.err
		default:
			return ErrClosed
		}
	}
}

// leadCommit makes the calling goroutine the group-commit leader if no commit is in
// progress: it commits the queued writes together with w, so that a lone write need not
// wait for the committer goroutine to be scheduled. It returns false, without having
// queued w, if a commit is in progress or the database must be reopened first; reopening
// is left to the committer goroutine and its pauses.
func (s *Store) leadCommit(w *write) bool {
	if !s.committing.TryLock() {
		return false
	}
	defer s.committing.Unlock()
	if s.committer.reopenNeeded {
		return false
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	s.commit(append(s.takeQueued(nil), w))
	if len(s.committer.inDoubt) > 0 {
		s.wakeUp()
	}
	return true
}

// wakeUp wakes the committer goroutine: there are queued writes to commit, or writes in
// doubt for which it must set its retry timer. It never blocks; a wake-up that is already
// pending serves for this one too.
func (s *Store) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// enqueue adds w to the queue and wakes the committer goroutine. It returns ErrBusy if
// the queue stays full for queueTimeout.
func (s *Store) enqueue(ctx context.Context, w *write) error {
	defer s.wakeUp()
	select {
	case s.queue <- w:
		return nil
	default:
	}
	timeout := time.NewTimer(queueTimeout)
	defer timeout.Stop()
	select {
	case s.queue <- w:
		return nil
	case <-timeout.C:
		return ErrBusy
	case <-ctx.Done():
		return ctx.Err()
	case <-s.stopped:
		return ErrClosed
	}
}

// commitLoop is the committer goroutine. It commits the queued writes that no leader has
// taken, and reopens the database at intervals while writes are in doubt. It does not
// delay a commit to gather more writes: an idle store commits at once, and in a busy one
// the writes that arrive during a commit share the next sync.
func (s *Store) commitLoop() {
	defer close(s.stopped)
	debug.SetPanicOnFault(true)
	c := &s.committer
	batch := make([]*write, 0, queueLength)
	var retry <-chan time.Time
	for {
		select {
		case <-s.wake:
			s.committing.Lock()
			batch = s.takeQueued(batch[:0])
			s.commit(batch)
		case <-retry:
			s.committing.Lock()
			s.reopen()
		case <-s.closing:
			s.committing.Lock() // never unlocked: no goroutine can lead a commit any more
			batch = s.takeQueued(batch[:0])
			s.commit(batch)
			return
		}
		retry = nil
		if len(c.inDoubt) > 0 {
			retry = time.After(time.Until(c.pausedUntil))
		}
		s.committing.Unlock()
	}
}

// takeQueued moves queued writes to batch, up to queueLength in all, without blocking.
func (s *Store) takeQueued(batch []*write) []*write {
	for len(batch) < queueLength {
		select {
		case w := <-s.queue:
			batch = append(batch, w)
		default:
			return batch
		}
	}
	return batch
}

// commit commits a batch and finishes each of its writes once its outcome is certain. If
// the commit fails, it reopens the database. Writes whose outcome that does not settle
// stay in doubt, unfinished, until a later reopening succeeds. The caller holds committing.
func (s *Store) commit(batch []*write) {
	c := &s.committer
	if len(batch) == 0 {
		return
	}
	if s.damaged.Load() {
		finish(batch, fmt.Errorf("%w: %w", ErrUnavailable, ErrDamaged))
		return
	}
	if time.Now().Before(c.pausedUntil) || c.reopenNeeded && !s.reopen() {
		finish(batch, ErrUnavailable)
		return
	}
	for _, w := range batch {
		s.metrics.wait.UpdateDuration(w.since)
	}
	txid, err := s.apply(batch)
	switch {
	case err == nil:
		c.failures = 0
		s.failing.Store(false)
		for _, w := range batch {
			w.finish(w.err)
		}
	case errors.Is(err, ErrDamaged):
		finish(batch, err)
	default:
		s.log.Error("commit failed; reopening the database", "err", err, "transaction", txid, "writes", len(batch))
		c.failures++
		c.reopenNeeded = true
		s.failing.Store(true)
		s.metrics.failures.Inc()
		if s.mayBeCommitted(txid) {
			c.inDoubt, c.inDoubtTx = slices.Clone(batch), txid
		} else {
			finish(batch, ErrUnavailable)
		}
		if s.reopen() && c.failures > 1 {
			c.pausedUntil = time.Now().Add(failurePause)
		}
	}
}

// apply runs the writes of a batch in one transaction, and commits it unless every write
// returned an error. A nil error means that the outcome of each write is in its err. With
// any other error the transaction failed as a whole; txid is its id.
func (s *Store) apply(batch []*write) (txid uint64, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = s.markDamaged(p)
		}
	}()
	s.endReaders()
	defer s.keepReaders()
	began := time.Now()
	tx, err := s.db.Begin(true)
	if err != nil {
		return math.MaxUint64, err // nothing was written; no transaction reaches this id
	}
	txid = uint64(tx.ID())
	changed := false
	for _, w := range batch {
		if w.do == nil {
			continue // it has panicked
		}
		w.err = s.run(tx, w.do)
		switch {
		case errors.Is(w.err, errTx):
			return txid, errors.Join(w.err, tx.Rollback())
		case errors.Is(w.err, errPanic): // the others begin anew without it
			w.do = nil
			return s.apply(batch)
		}
		changed = changed || w.err == nil
	}
	if !changed {
		return txid, tx.Rollback()
	}
	// A write adds at most one expiring value. Removing up to twice as many keeps expired
	// values from piling up, and still bounds the work of one commit.
	if !s.committer.purgeFailed {
		err := s.run(tx, func(tx *bbolt.Tx) error { return purge(tx, s.now().Add(-expiredKept), 2*len(batch)) })
		switch {
		case errors.Is(err, errPanic):
			s.committer.purgeFailed = true
			return s.apply(batch)
		case err != nil:
			return txid, errors.Join(err, tx.Rollback())
		}
	}
	err = tx.Commit()
	s.metrics.writes.Update(float64(len(batch)))
	s.metrics.duration.UpdateDuration(began)
	return txid, err
}

// mayBeCommitted reports whether the commit of transaction txid, which failed, may still
// take effect. It may if its meta page was written to the file, or if the meta pages
// cannot be read. If the meta page was not written, the transaction is undone for good,
// even after a crash. It is called while the file is still locked: once the lock is
// released, another process could commit under the same id.
func (s *Store) mayBeCommitted(txid uint64) bool {
	metas, err := readMetas(s.file)
	return err != nil || currentMeta(metas).txid >= txid
}

// reopen closes and reopens the database after a failed commit. It reports whether the
// store can write again. If it can, the writes in doubt are finished: if the current meta
// page is that of their transaction or a later one, they were made, else they fail with
// ErrUnavailable. The caller holds committing.
//
// Reopening rewrites both meta pages and syncs (openFile with resync), for this reason.
// bbolt writes a transaction's meta page first and syncs it second. When that sync fails,
// the commit returns an error, yet the new meta page is in the kernel's page cache, where
// reads see it. The kernel may now consider the cached page clean, so that no later sync
// writes it, and the meta page on disk stays the old one. The next transaction would then
// overwrite pages that the old meta page still refers to, and a crash would leave a broken
// database. Rewriting the meta pages makes them dirty again, so that the sync writes them.
//
// If that fails too, the file is opened without it, for reads only: writes are refused
// until a later reopening succeeds.
func (s *Store) reopen() bool {
	c := &s.committer
	s.reopenWanted.Store(true)
	s.reopenLock.Lock()
	s.reopenWanted.Store(false)
	defer s.reopenLock.Unlock()
	var closeErr error
	s.endReaders()
	defer s.keepReaders()
	if s.db != nil {
		closeErr = s.db.Close()
	}
	txid, err := s.open(checkFile, true)
	if err != nil {
		c.pausedUntil = time.Now().Add(reopenInterval)
		s.log.Error("reopening the database failed, and writes are refused until it succeeds; free space on the disk or repair it; no restart is needed",
			"err", errors.Join(closeErr, err))
		if _, err := s.open(checkFile, false); err != nil {
			s.log.Error("the database cannot be opened for reading either; reads are refused too", "err", err)
		}
		return false
	}
	s.log.Info("database reopened; writes are accepted again", "transaction", txid)
	c.reopenNeeded, c.pausedUntil = false, time.Time{}
	// bbolt runs the OnCommit hooks, which remove revoked tokens from the cache, only
	// after a commit that succeeded, so not for the writes in doubt.
	s.cache.forgetTokens()
	for _, w := range c.inDoubt {
		if txid < c.inDoubtTx {
			w.err = ErrUnavailable
		}
		w.finish(w.err)
	}
	c.inDoubt = nil
	return true
}

// finish sets the outcome of a write and wakes the goroutine that waits for it.
func (w *write) finish(err error) {
	w.err = err
	close(w.done)
}

// finish finishes all writes of a batch with the same outcome.
func finish(batch []*write, err error) {
	for _, w := range batch {
		w.finish(err)
	}
}
