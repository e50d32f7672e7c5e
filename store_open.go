package main

// Opening and closing the store.

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// Open opens the database file at path, and creates it if it does not exist. It also
// finishes or drops an import that the last process did not complete. A file that fails
// the checks is left unchanged, and the error describes its fault. The error wraps ErrInUse
// when another process has the file open.
func Open(path string, now func() time.Time, log *slog.Logger) (*Store, error) {
	if !exists(path) {
		if err := create(path); err != nil {
			return nil, fmt.Errorf("create %w", ofDatabase(path, err))
		}
	}
	s := &Store{
		path:    path,
		now:     now,
		log:     log,
		wake:    make(chan struct{}, 1),
		closing: make(chan struct{}),
		stopped: make(chan struct{}),
		dead:    make(chan struct{}),
		cache:   newTokenCache(),
	}
	s.stop = sync.OnceFunc(func() { close(s.stopped) })
	s.metrics = newStoreMetrics(s)
	s.dummyClient = sync.OnceValues(func() ([]byte, error) {
		return encodeClient(Client{ID: dummyID, Org: newID(), Scopes: Scopes{true, true}, Created: now()})
	})
	checked := false // all pages of the file
	check := func(f *os.File, m meta) (err error) {
		if err := checkFile(f, m); err != nil {
			return err
		}
		if checked, err = checkBeforeUse(f, m); err != nil {
			return err
		}
		return checkRoot(f, m)
	}
	if err := s.open(check); err != nil {
		return nil, err
	}
	removeLeftovers(withoutLinks(path), func(name string, bytes int64) {
		log.Info("removed a temporary file that a killed process left", "file", name, "bytes", bytes)
	})
	go s.commitLoop()
	go s.recordLoop()
	if !checked {
		done := make(chan struct{})
		go func() { defer close(done); s.checkBranches() }()
		select {
		case <-done:
		case <-time.After(branchesTime):
		}
	}
	switch err := s.settleImport(); {
	case errors.Is(err, ErrDamaged):
		return nil, errors.Join(fmt.Errorf("database %s: %w; restore a backup", path, err), s.Close())
	case err != nil:
		return nil, errors.Join(fmt.Errorf("database %s contains an interrupted import, which could not be finished or dropped: %w; the log has the cause", path, err), s.Close())
	}
	return s, nil
}

// branchesTime is how long Open waits for checkBranches. Until that ends, a search could follow
// a broken page in circles, which ends the process when its stack or its memory is full. The
// branch pages of a file that was read lately, or of a few GB on a fast disk, take no longer.
const branchesTime = time.Second

// checkBranches checks the branch pages of a large file in the background, while serving.
// If one is broken, it marks the store dead: a lookup could follow the broken page in
// circles forever, and only the end of the process would stop it.
//
// The check may take long. It begins again after it gave way to a commit or a reopening, and
// when the file cannot be opened at the moment.
func (s *Store) checkBranches() {
	var first firstFault
	err := s.lookAtBranches(&first)
	for errors.Is(err, ErrUnavailable) && first.err() == nil {
		select {
		case <-time.After(reopenInterval):
			err = s.lookAtBranches(&first)
		case <-s.closing:
			return
		}
	}
	if err != nil && !errors.Is(err, ErrClosed) {
		s.log.Warn("the branch pages of the database could not be checked; stop the service and run check", "err", err)
	}
	s.beginMu.Lock()
	defer s.beginMu.Unlock()
	if err := first.err(); err != nil && !s.isDead() {
		_ = s.markDead(err) // it is logged
	}
}

// lookAtBranches checks the branch pages, in one read transaction. It returns errGaveWay if it
// had to end that early, and ErrClosed if the store was closed.
func (s *Store) lookAtBranches(first *firstFault) error {
	progress := func(int64) error {
		select {
		case <-s.closing:
			return ErrClosed
		default:
			return s.giveWay()
		}
	}
	return s.view(func(r *reader) error {
		metas, err := readMetas(s.file)
		if err != nil {
			return err
		}
		for _, m := range metas {
			if m.valid && m.txid == uint64(r.ID()) {
				return checkBranches(s.file, m, first.found, progress)
			}
		}
		return errGaveWay // to two commits, since the transaction began
	})
}

// closeTimeout is how long Close waits for the last commit. Before that it may wait for
// queueTimeout.
const closeTimeout = 5 * time.Second

// Close commits the queued writes and closes the file. Writes in doubt fail with ErrClosed.
// No method may be called after Close. If the file is damaged or the store is dead, the file
// stays open until the process ends; so it does if the last commit takes longer than
// closeTimeout, and then the writes that have not ended fail with ErrClosed too.
func (s *Store) Close() error {
	s.recordUses(recordInterval)
	close(s.closing)
	select {
	case <-s.stopped:
	case <-s.dead:
		return nil
	case <-time.After(closeTimeout):
		s.log.Error("the disk does not answer, so the last commit was not waited for; the next start finds out what is on the disk", "file", s.path)
		s.stop()
		return nil
	}
	if s.damaged.Load() {
		return nil // after a panic bbolt may still hold a lock, and closing would deadlock
	}
	s.reopenLock.Lock()
	defer s.reopenLock.Unlock()
	if s.db == nil {
		return s.file.Close()
	}
	s.endReaders()
	return errors.Join(s.db.Close(), s.file.Close())
}
