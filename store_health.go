package main

// Readiness and statistics of the store.

import (
	"context"
	"errors"
	"math"
	"time"

	"github.com/VictoriaMetrics/metrics"
	"go.etcd.io/bbolt"
)

// readyInterval is how long the answer of Ready holds.
const readyInterval = time.Second

// Ready tells whether the file can be written: it cannot if the last commit failed,
// and one without changes is tried here, at most once in a readyInterval. Its error
// wraps ErrUnavailable or ErrBusy.
func (s *Store) Ready() error {
	s.ready.Lock()
	defer s.ready.Unlock()
	if time.Since(s.ready.at) < readyInterval {
		if s.ready.err == nil && s.failing.Load() {
			return ErrUnavailable
		}
		return s.ready.err
	}
	ctx, cancel := context.WithTimeout(context.Background(), queueTimeout)
	defer cancel()
	err := s.updateContext(ctx, func(*bbolt.Tx) error { return nil })
	if errors.Is(err, context.DeadlineExceeded) {
		err = ErrUnavailable
	}
	s.ready.at, s.ready.err = time.Now(), err
	return err
}

// Waiting is how many writes wait for a commit to begin.
func (s *Store) Waiting() int { return len(s.queue) }

// Stats is how the file is.
type Stats struct {
	Bytes     int64
	FreePages int64
	OpenReads int64 // transactions
}

// Stats returns false while the file is being opened again.
func (s *Store) Stats() (Stats, bool) {
	if !s.reopenLock.TryRLock() { // who watches is not to wait for a disk that hangs
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
	idle, of := s.readers.count(), s.db.Stats()
	stats := Stats{Bytes: info.Size(), FreePages: int64(of.FreePageN), OpenReads: int64(max(0, of.OpenTxN-idle))}
	if of.TxStats.GetWrite() == 0 {
		stats.FreePages = int64(s.freeAtOpen)
	}
	return stats, true
}

func newStoreMetrics(s *Store) *storeMetrics {
	set := metrics.NewSet()
	set.NewGauge(metricPrefix+"write_queue_length", func() float64 { return float64(s.Waiting()) })
	ofFile := func(name string, get func(Stats) int64) {
		set.NewGauge(metricPrefix+name, func() float64 {
			if stats, ok := s.Stats(); ok {
				return float64(get(stats))
			}
			return math.NaN()
		})
	}
	ofFile("database_size_bytes", func(s Stats) int64 { return s.Bytes })
	ofFile("database_free_pages", func(s Stats) int64 { return s.FreePages })
	ofFile("database_open_read_transactions", func(s Stats) int64 { return s.OpenReads })
	return &storeMetrics{
		set:      set,
		writes:   set.NewPrometheusHistogramExt(metricPrefix+"commit_writes", writesBounds),
		duration: set.NewPrometheusHistogramExt(metricPrefix+"commit_duration_seconds", durationBounds),
		wait:     set.NewPrometheusHistogramExt(metricPrefix+"write_queue_wait_seconds", durationBounds),
		failures: set.NewCounter(metricPrefix + "commit_failures_total"),
	}
}
