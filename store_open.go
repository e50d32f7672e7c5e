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

// Open opens the database file at path, or makes it if there is nothing. The
// error says what is wrong with the file, and leaves it as it was; it wraps
// ErrInUse when another process has it.
func Open(path string, now func() time.Time, log *slog.Logger) (*Store, error) {
	if !exists(path) {
		if err := create(path); err != nil {
			return nil, fmt.Errorf("create database %s: %w; name a file in a directory where this account may make one with --db", path, err)
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
		return encodeClient(Client{Org: newID(), Scopes: Scopes{true, true}, Created: now()})
	})
	surveyed := false
	check := func(f *os.File, m meta) (err error) {
		if err := checkFile(f, m); err != nil {
			return err
		}
		surveyed, err = checkSmallFile(f, m)
		return err
	}
	if _, err := s.open(check, true); err != nil {
		return nil, err
	}
	go s.commitLoop()
	go s.recordLoop()
	if !surveyed {
		go s.checkBranches()
	}
	if err := s.settleImport(); err != nil {
		return nil, errors.Join(fmt.Errorf("an import that was cut short is still in %s: %w", path, err), s.Close())
	}
	return s, nil
}

// survey looks at the branch pages of a large file, and gives it up when one is broken: a
// search in it may have no end, which nothing but the end of the process would stop.
func (s *Store) checkBranches() {
	var first firstFault
	goOn := func(int64) error {
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
			if root := b.Root(); root != 0 { // else it is inside of its parent
				roots = append(roots, uint64(root))
			}
			return nil
		})
		if err != nil {
			return err
		}
		pageSize := int64(s.db.Info().PageSize)
		return checkBranches(s.file, pageSize, uint64(r.Size()/pageSize), roots, first.found, goOn)
	})
	if err != nil && !errors.Is(err, ErrClosed) {
		s.log.Warn("the branch pages of the database were not looked at", "err", err)
	}
	s.beginMu.Lock()
	defer s.beginMu.Unlock()
	if err := first.err(); err != nil && !s.isDead() {
		_ = s.markDead(err) // which the log has
	}
}

// Close commits what waits, and closes the file. No method may be called after.
func (s *Store) Close() error {
	s.recordUses(recordInterval)
	close(s.closing)
	select {
	case <-s.stopped:
	case <-s.dead:
		return nil
	}
	if s.damaged.Load() {
		return nil // bbolt may hold a lock for good; the process's end closes the file
	}
	s.reopenLock.Lock()
	defer s.reopenLock.Unlock()
	if s.db == nil {
		return nil
	}
	s.endReaders()
	return s.db.Close()
}
