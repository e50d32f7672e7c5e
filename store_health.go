package main

// Readiness and statistics of the store.

import (
	"errors"
	"math"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.etcd.io/bbolt"
)

const (
	// readyInterval is the minimum time between two test commits by Ready.
	readyInterval = time.Second
	// readyTimeout is how long such a commit may take.
	readyTimeout = 3 * time.Second
)

// Ready returns nil if the store can write. At most once in readyInterval it tries a commit
// without changes, which also reopens the database if the last commit failed; between
// these attempts it returns the last result, or the error of a commit that has failed since.
// The error may wrap ErrUnavailable, ErrDisplaced, ErrBusy, ErrDamaged or ErrClosed. If the
// disk hangs, Ready returns within readyTimeout, and leaves no more than one write behind.
func (s *Store) Ready() error {
	s.ready.Lock()
	defer s.ready.Unlock()
	if time.Since(s.ready.at) < readyInterval {
		if failing := s.failing.Load(); s.ready.err == nil && failing != nil {
			return *failing
		}
		return s.ready.err
	}
	err := ErrUnavailable
	if s.busyFor() < readyTimeout {
		err = s.updateWithin(readyTimeout, 0, 0, func(*bbolt.Tx) error { return nil })
	}
	if errors.Is(err, ErrUnknown) {
		err = ErrUnavailable
	}
	s.ready.at, s.ready.err = time.Now(), err
	return err
}

// Waiting returns the number of writes in the queue, which wait for a commit to begin.
func (s *Store) Waiting() int {
	s.queue.Lock()
	defer s.queue.Unlock()
	return len(s.queue.writes)
}

// Stats describes the database file.
type Stats struct {
	Bytes     int64 // the size of the file
	FreePages int64 // pages that bbolt can reuse
	OpenReads int64 // read transactions in use, not counting idle ones
}

// Stats returns the current statistics. It returns false while the file is being reopened
// or cannot be opened.
func (s *Store) Stats() (Stats, bool) {
	if !s.reopenLock.TryRLock() { // monitoring must not wait for a disk that hangs
		return Stats{}, false
	}
	defer s.reopenLock.RUnlock()
	if s.db == nil {
		return Stats{}, false
	}
	info, err := s.file.Stat()
	if err != nil {
		return Stats{}, false
	}
	// The counts are not taken at one moment, so the difference may be negative.
	idle, db := s.readers.count(), s.db.Stats()
	stats := Stats{Bytes: info.Size(), FreePages: int64(db.FreePageN), OpenReads: int64(max(0, db.OpenTxN-idle))}
	if db.TxStats.GetWrite() == 0 { // bbolt has committed nothing and so counted no pages
		stats.FreePages = int64(s.freeAtOpen)
	}
	return stats, true
}

// newStoreMetrics creates the metrics of s. The gauges of the file are NaN while Stats
// returns false.
func newStoreMetrics(s *Store) *storeMetrics {
	set := metrics.NewSet()
	set.NewGauge(metricPrefix+"write_queue_length", func() float64 { return float64(s.Waiting()) })
	fileGauge := func(name string, get func(Stats) int64) {
		set.NewGauge(metricPrefix+name, func() float64 {
			if stats, ok := s.Stats(); ok {
				return float64(get(stats))
			}
			return math.NaN()
		})
	}
	fileGauge("database_size_bytes", func(s Stats) int64 { return s.Bytes })
	fileGauge("database_free_pages", func(s Stats) int64 { return s.FreePages })
	fileGauge("database_open_read_transactions", func(s Stats) int64 { return s.OpenReads })
	return &storeMetrics{
		set:      set,
		writes:   set.NewPrometheusHistogramExt(metricPrefix+"commit_writes", writesBounds),
		duration: set.NewPrometheusHistogramExt(metricPrefix+"commit_duration_seconds", durationBounds),
		wait:     set.NewPrometheusHistogramExt(metricPrefix+"write_queue_wait_seconds", durationBounds),
		failures: set.NewCounter(metricPrefix + "commit_failures_total"),
	}
}
