package main

// Group commit: every write to the database, and the recovery after a commit that failed.

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"runtime/debug"
	"slices"
	"syscall"
	"time"

	"go.etcd.io/bbolt"
)

const (
	// queueTimeout is how long a write of a request waits for its commit to begin before it
	// fails with ErrBusy.
	queueTimeout = 5 * time.Second
	// commitTimeout is how long it waits after that for its commit to end before it fails with
	// ErrUnknown. So a write of a request takes 30 seconds at most.
	commitTimeout = 25 * time.Second
	// patiently is the time that a write waits which is part of a longer task: until the store
	// is closed.
	patiently = time.Duration(math.MaxInt64)

	// commitBytes bounds what one commit writes, in bytes, and so what a disk that hangs keeps
	// in memory of the writes whose callers have given up. A single write may exceed it.
	commitBytes = 64 << 20
	// leastWrite is the size in bytes that a smaller write counts as, for the pages that bbolt
	// changes for it. So a commit has at most 1,024 writes.
	leastWrite = 64 << 10

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
// after another in the order of their arrival. size is the size of what do stores, in bytes.
// A nil error means that the change survives a crash. After ErrBusy, ErrUnavailable or an
// error of do the change was not made; after ErrUnknown or ErrClosed, or ErrDamaged without
// ErrUnavailable, it may have been made, and do may still be running: nobody may read then
// what do writes.
func (s *Store) update(size int, do change) error {
	return s.updateWithin(queueTimeout, commitTimeout, size, do)
}

// updatePatiently is update without a limit of time, except that it ends when the store is
// closed.
func (s *Store) updatePatiently(size int, do change) error {
	return s.updateWithin(patiently, patiently, size, do)
}

// updateWithin is update with other limits: queued for the commit to begin, and then taken for
// it to end.
func (s *Store) updateWithin(queued, taken time.Duration, size int, do change) error {
	if s.damaged.Load() {
		return fmt.Errorf("%w: %w", ErrUnavailable, ErrDamaged)
	}
	w := &write{do: do, size: max(size, leastWrite), since: time.Now(), done: make(chan struct{})}
	s.queue.Lock()
	s.queue.writes = append(s.queue.writes, w)
	s.queue.Unlock()
	s.wakeUp()
	for _, limit := range []time.Duration{queued, taken} {
		timeout := time.NewTimer(limit)
		defer timeout.Stop()
		select {
		case <-w.done:
			return w.err
		case <-timeout.C:
			if s.withdraw(w) {
				return ErrBusy
			}
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
	return ErrUnknown
}

// withdraw takes w out of the queue. It returns false if a commit has it.
func (s *Store) withdraw(w *write) bool {
	s.queue.Lock()
	defer s.queue.Unlock()
	i := slices.Index(s.queue.writes, w)
	if i >= 0 {
		s.queue.writes = slices.Delete(s.queue.writes, i, i+1)
	}
	return i >= 0
}

// take moves the writes of the next commit from the queue to batch: as many as commitBytes has
// room for, but at least one if there are any.
func (s *Store) take(batch []*write) []*write {
	s.queue.Lock()
	defer s.queue.Unlock()
	size := 0
	for _, w := range s.queue.writes {
		if size += w.size; size > commitBytes && len(batch) > 0 {
			break
		}
		batch = append(batch, w)
	}
	s.queue.writes = slices.Delete(s.queue.writes, 0, len(batch))
	return batch
}

// wakeUp wakes the committer goroutine: there are queued writes to commit. It never blocks; a
// wake-up that is already pending serves for this one too.
func (s *Store) wakeUp() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// commitLoop is the committer goroutine. It commits the queued writes, and reopens the
// database at intervals while writes are in doubt. It does not delay a commit to gather more
// writes: an idle store commits at once, and in a busy one the writes that arrive during a
// commit share the next sync.
func (s *Store) commitLoop() {
	defer s.stop()
	debug.SetPanicOnFault(true)
	var batch []*write
	for closing := false; !closing; {
		var retry <-chan time.Time
		if len(s.committer.inDoubt) > 0 {
			retry = time.After(reopenInterval)
		}
		select {
		case <-s.wake:
		case <-retry:
			s.markBusy()
			s.reopen()
		case <-s.closing:
			closing = true
		}
		for batch = s.take(batch); len(batch) > 0; batch = s.take(batch) {
			s.markBusy()
			s.commit(batch)
			clear(batch) // it would keep their values in memory
			batch = batch[:0]
		}
		s.busySince.Store(nil)
	}
}

// markBusy records that the committer goroutine begins a commit or a reopening.
func (s *Store) markBusy() {
	now := time.Now()
	s.busySince.Store(&now)
}

// commit commits a batch and finishes each of its writes once its outcome is certain. If
// the commit fails, it reopens the database. Writes whose outcome that does not settle
// stay in doubt, unfinished, until a later reopening succeeds.
func (s *Store) commit(batch []*write) {
	c := &s.committer
	if err := s.mayCommit(); err != nil {
		finish(batch, err)
		return
	}
	for _, w := range batch {
		s.metrics.wait.UpdateDuration(w.since)
	}
	txid, err := s.apply(batch)
	switch {
	case err == nil:
		c.failures = 0
		s.failing.Store(nil)
		for _, w := range batch {
			w.finish(w.err)
		}
	case errors.Is(err, ErrDamaged):
		finish(batch, err)
	default:
		s.log.Error("commit failed; reopening the database", "err", err, "transaction", txid, "writes", len(batch))
		c.failures++
		c.reopenNeeded = true
		s.failing.Store(&ErrUnavailable)
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

// mayCommit returns nil if a commit may be tried, after it has reopened the database if that is
// needed. Otherwise its error wraps ErrUnavailable.
func (s *Store) mayCommit() error {
	c := &s.committer
	if s.damaged.Load() {
		return fmt.Errorf("%w: %w", ErrUnavailable, ErrDamaged)
	}
	if err := s.inPlace(); err != nil {
		s.failing.Store(&err)
		return err
	}
	if time.Now().Before(c.pausedUntil) || c.reopenNeeded && !s.reopen() {
		return ErrUnavailable
	}
	return nil
}

// inPlace returns nil if the file at the path of the database is the open one, or if that
// cannot be told, and otherwise an error that wraps ErrUnavailable and ErrDisplaced. It logs
// when that changes. A write to a file without its name would be lost, and one beside another
// process that has the new file would not be seen.
func (s *Store) inPlace() error {
	placed, err := os.Stat(s.path)
	displaced := errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) ||
		err == nil && !os.SameFile(placed, s.opened)
	if displaced != s.committer.displaced {
		s.committer.displaced = displaced
		if displaced {
			s.log.Error("the database file was moved, replaced or removed, so writes are refused, and reads show the file that this server still has open; "+
				"put that file back at its path, or run backup to save what it has and then stop this server", "file", s.path)
		} else {
			s.log.Info("the database file is back at its path; writes are accepted again", "file", s.path)
		}
	}
	if displaced {
		return fmt.Errorf("%w: %w", ErrUnavailable, ErrDisplaced)
	}
	return nil
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
	if err := upgrade(tx); err != nil {
		return txid, errors.Join(err, tx.Rollback())
	}
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
// even after a crash.
func (s *Store) mayBeCommitted(txid uint64) bool {
	metas, err := readMetas(s.file)
	return err != nil || currentMeta(metas).txid >= txid
}

// reopen makes the file sound after a failed commit, and opens it with bbolt again. It reports
// whether the store can write again.
//
// First it rewrites both meta pages and syncs (resync), for this reason. bbolt writes a
// transaction's meta page first and syncs it second. When that sync fails, the commit returns
// an error, yet the new meta page is in the kernel's page cache, where reads see it. The
// kernel may now consider the cached page clean, so that no later sync writes it, and the meta
// page on disk stays the old one. The next transaction would then overwrite pages that the old
// meta page still refers to, and a crash would leave a broken database. Rewriting the meta
// pages makes them dirty again, so that the sync writes them. This may take as long as the disk
// likes: reads go on with the db as it is.
//
// After that sync the writes in doubt have an outcome, and db is replaced, which no longer
// waits for a sync. bbolt may have taken pages for free that an open read transaction still
// reads, so all of them must end first.
func (s *Store) reopen() bool {
	c := &s.committer
	if s.inPlace() != nil {
		return false
	}
	m, err := s.resync()
	if err != nil {
		c.pausedUntil = time.Now().Add(reopenInterval)
		s.log.Error("reopening the database failed, and writes are refused until it succeeds; free space on the disk or repair it; no restart is needed", "err", err)
		return false
	}
	s.settleDoubt(m.txid)
	if s.damaged.Load() {
		return false // after a panic bbolt may still hold a lock, and closing would deadlock
	}
	if err := s.replaceDB(m); err != nil {
		c.pausedUntil = time.Now().Add(reopenInterval)
		s.log.Error("the database cannot be opened again after a commit that failed, and reads and writes are refused until it can; no restart is needed", "err", err)
		return false
	}
	s.log.Info("database reopened; writes are accepted again", "transaction", m.txid)
	c.reopenNeeded, c.pausedUntil = false, time.Time{}
	return true
}

// resync makes the current meta page durable, and returns it. The file is still locked, unless
// an earlier replaceDB failed: then resync locks it again.
func (s *Store) resync() (m meta, err error) {
	if err = lock(s.file, syscall.LOCK_EX); err == nil {
		m, err = syncMetas(s.file, checkFile, s.log)
	}
	if err != nil {
		return m, ofDatabase(s.path, err)
	}
	return m, nil
}

// settleDoubt finishes the writes in doubt, since txid is now on the disk as the last
// transaction: if that is their transaction or a later one, they were made, else they fail with
// ErrUnavailable.
func (s *Store) settleDoubt(txid uint64) {
	c := &s.committer
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
}

// replaceDB closes db and opens it again. The file stays locked meanwhile.
func (s *Store) replaceDB(m meta) error {
	s.reopenWanted.Store(true)
	s.reopenLock.Lock()
	s.reopenWanted.Store(false)
	defer s.reopenLock.Unlock()
	s.endReaders()
	defer s.keepReaders()
	s.closeDB()
	return s.openDB(m)
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
