package main

// Opening and closing the store.

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"go.etcd.io/bbolt"
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
		queue:   make(chan *write, queueLength),
		wake:    make(chan struct{}, 1),
		closing: make(chan struct{}),
		stopped: make(chan struct{}),
		dead:    make(chan struct{}),
		cache:   newTokenCache(),
	}
	s.metrics = newStoreMetrics(s)
	s.dummyClient = sync.OnceValues(func() ([]byte, error) {
		return encodeClient(Client{ID: dummyID, Org: newID(), Scopes: Scopes{true, true}, Created: now()})
	})
	checked := false // all pages of the file
	check := func(f *os.File, m meta) (err error) {
		if err := checkFile(f, m); err != nil {
			return err
		}
		checked, err = checkSmallFile(f, m)
		return err
	}
	if _, err := s.open(check, true); err != nil {
		return nil, err
	}
	removeLeftovers(withoutLinks(path), func(name string, bytes int64) {
		log.Info("removed a temporary file that a killed process left", "file", name, "bytes", bytes)
	})
	go s.commitLoop()
	go s.recordLoop()
	if !checked {
		go s.checkBranches()
	}
	switch err := s.settleImport(); {
	case errors.Is(err, ErrDamaged):
		return nil, errors.Join(fmt.Errorf("database %s: %w; restore a backup", path, err), s.Close())
	case err != nil:
		return nil, errors.Join(fmt.Errorf("database %s contains an interrupted import, which could not be finished or dropped: %w; the log has the cause", path, err), s.Close())
	}
	return s, nil
}

// checkBranches checks the branch pages of a large file in the background, while serving.
// If one is broken, it marks the store dead: a lookup could follow the broken page in
// circles forever, and only the end of the process would stop it.
func (s *Store) checkBranches() {
	var first firstFault
	progress := func(int64) error { // ends the check when the store is closed
		select {
		case <-s.closing:
			return ErrClosed
		default:
			return nil
		}
	}
	err := s.view(func(r *reader) error {
		var roots []uint64
		err := r.ForEach(func(_ []byte, b *bbolt.Bucket) error {
			if root := b.Root(); root != 0 { // 0 is an inline bucket, which has no pages
				roots = append(roots, uint64(root))
			}
			return nil
		})
		if err != nil {
			return err
		}
		pageSize := int64(s.db.Info().PageSize)
		return checkBranches(s.file, pageSize, uint64(r.Size()/pageSize), roots, first.found, progress)
	})
	if err != nil && !errors.Is(err, ErrClosed) {
		s.log.Warn("the branch pages of the database could not be checked; stop the service and run check", "err", err)
	}
	s.beginMu.Lock()
	defer s.beginMu.Unlock()
	if err := first.err(); err != nil && !s.isDead() {
		_ = s.markDead(err) // it is logged
	}
}

// Close commits the queued writes and closes the file. Writes in doubt fail with ErrClosed.
// No method may be called after Close. If the file is damaged or the store is
// dead, the file stays open until the process ends.
func (s *Store) Close() error {
	s.recordUses(recordInterval)
	close(s.closing)
	select {
	case <-s.stopped:
	case <-s.dead:
		return nil
	}
	if s.damaged.Load() {
		return nil // after a panic bbolt may still hold a lock, and closing would deadlock
	}
	s.reopenLock.Lock()
	defer s.reopenLock.Unlock()
	if s.db == nil {
		return nil
	}
	s.endReaders()
	return s.db.Close()
}
