package main

// Group commit: every change goes through here, and here is decided what happens when a
// commit fails.

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime/debug"
	"slices"
	"time"
)

const (
	// queueLength bounds the writes that wait, and so the writes of one commit.
	queueLength = 1024
	// queueTimeout is how long a write waits for a place in the queue.
	queueTimeout = 5 * time.Second
	// mendInterval is the time between two attempts to mend a store whose disk
	// goes on failing.
	reopenInterval = time.Second
	// failurePause is how long writes are refused after a second failed commit
	// in a row, so that a full disk does not keep the readers waiting.
	failurePause = 100 * time.Millisecond
)

func (w *write) finish(err error) {
	w.err = err
	close(w.done)
}

// update makes a change and returns when it is on disk. The transaction is shared with
// other changes, which run in the order of their arrival.
func (s *Store) update(do change) error { return s.updateContext(context.Background(), do) }

// updateContext is update, but returns the context's error when the context ends first.
// The change may still be made after that.
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

// lead commits a write, and those that wait, on the spot, if no commit is under way and
// the disk was well the last time: a write that is alone need not wait for the
// committer to wake up. It returns false if the write is not in any commit yet.
func (s *Store) leadCommit(w *write) bool {
	if !s.committing.TryLock() {
		return false
	}
	defer s.committing.Unlock()
	if s.committer.reopenNeeded {
		return false
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	s.commit(append(s.waiting(nil), w))
	if len(s.committer.inDoubt) > 0 {
		s.wakeUp()
	}
	return true
}

// wakeUp tells the committer that there are writes that wait, or are undecided.
func (s *Store) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// enqueue gives a write to the committer.
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

// commitLoop is the committer: no timer, so that an idle store commits at once
// and a busy one shares the sync.
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
			batch = s.waiting(batch[:0])
			s.commit(batch)
		case <-retry:
			s.committing.Lock()
			s.reopen()
		case <-s.closing:
			s.committing.Lock() // for good: nobody leads a commit any more
			batch = s.waiting(batch[:0])
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

// waiting appends the writes that wait.
func (s *Store) waiting(batch []*write) []*write {
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

// commit makes the changes of a batch and answers each when it is known to stand
// or known not to.
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
		s.log.Error("commit failed", "err", err, "transaction", txid, "writes", len(batch))
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

// apply runs the writes of a batch in one transaction and commits it, if there
// is anything to commit. Each write that succeeded or failed alone has its err.
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
		return math.MaxUint64, err // an id that none reaches
	}
	txid = uint64(tx.ID())
	changed := false
	for _, w := range batch {
		w.err = w.do(tx)
		if errors.Is(w.err, errTx) {
			return txid, errors.Join(w.err, tx.Rollback())
		}
		changed = changed || w.err == nil
	}
	if !changed {
		return txid, tx.Rollback()
	}
	// More than the batch can have added, so that what expires does not pile up.
	if err := purge(tx, s.now().Add(-expiredKept), 2*len(batch)); err != nil {
		return txid, errors.Join(err, tx.Rollback())
	}
	err = tx.Commit()
	s.metrics.writes.Update(float64(len(batch)))
	s.metrics.duration.UpdateDuration(began)
	return txid, err
}

// mayStand tells whether the meta page of a failed commit got into the file. If
// not, the commit is undone for good, whatever becomes of the disk. It is asked
// before the file is unlocked, so that no other process's commit can be meant.
func (s *Store) mayBeCommitted(txid uint64) bool {
	metas, err := readMetas(s.file)
	return err != nil || currentMeta(metas).txid >= txid
}

// mend opens the file again after a failed commit, and answers the undecided
// writes by what stands then. It tells whether the store can write again.
//
// bbolt writes the meta page before the last sync. When that sync fails, the
// transaction is refused and yet visible, the kernel holds the page for clean
// though it is not on disk, and the next transaction overwrites pages that what
// is on disk still needs. Hence openFile with resync.
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
		s.log.Error("the disk goes on failing: writes are refused, and tried again in a second at the soonest; see to the disk, no restart is needed",
			"err", errors.Join(closeErr, err))
		if _, err := s.open(checkFile, false); err != nil {
			s.log.Error("the database cannot be read either", "err", err)
		}
		return false
	}
	s.log.Info("database opened again", "transaction", txid)
	c.reopenNeeded, c.pausedUntil = false, time.Time{}
	s.cache.forgetTokens() // no hook of the undecided writes has run
	for _, w := range c.inDoubt {
		if txid < c.inDoubtTx {
			w.err = ErrUnavailable
		}
		w.finish(w.err)
	}
	c.inDoubt = nil
	return true
}

func finish(batch []*write, err error) {
	for _, w := range batch {
		w.finish(err)
	}
}
