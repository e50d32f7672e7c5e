package main

import (
	"context"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"
)

// bbolt maps a file that grows anew, which waits for every read transaction, and
// every new one waits for it: the end of one must not wait for the start of
// another.
func TestReadersGoOnWhileTheFileIsMappedAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "test.db")
	s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	// With a small map, so that it is outgrown often.
	s.endReaders()
	if err := s.db.Close(); err != nil {
		t.Fatal(err)
	}
	if s.db, err = bbolt.Open(path, 0o600, nil); err != nil {
		t.Fatal(err)
	}
	s.keepReaders()
	k := Key{Owner{demoOrg, demoUser}, demoContract}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			var buf []byte
			for ctx.Err() == nil {
				if buf, _, err := s.Get(buf[:0], k); err != nil && err != ErrNotFound {
					t.Errorf("Get: %v, %.100s", err, buf)
					return
				}
			}
		})
	}
	doc := []byte(strings.Repeat("x", 100<<10))
	for i := range 200 { // 20 MB: from 32 KiB it doubles ten times
		if _, err := s.Put(key(i), doc, always); err != nil {
			t.Errorf("Put: %v", err)
			break
		}
	}
	cancel()
	wg.Wait()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	checkFileSound(t, path)
}
