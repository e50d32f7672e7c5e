package main

// The memory of requests: a bound on what all of them together hold for bodies, for what is made of
// bodies, and for the documents in responses.

import (
	"bytes"
	"errors"
	"sync"
)

const (
	// tinyContent is the size in bytes up to which content is not counted: a body of 16 KiB and room
	// to read its end. A connection may hold as much for a header before anyone knows who sends it,
	// so counting less would bound nothing.
	tinyContent = 16<<10 + bytes.MinRead
	// smallContent is the size in bytes up to which content may use all of the memory: a body of
	// 128 KiB and room to read its end. Larger content leaves an eighth of the memory to it.
	smallContent = 128<<10 + bytes.MinRead
	// madeOfBody is how much memory a body takes at most until its request has ended, as a multiple
	// of the buffer that it arrives in: its prices and its document, the copies that the store
	// writes, and another copy for an Idempotency-Key.
	madeOfBody = 5
)

// errNoMemory is returned when a request would hold more memory than all requests may. The memory
// becomes free as other requests end.
var errNoMemory = errors.New("the requests in progress hold all the memory that they may")

// memory is the memory that the requests of a server may hold together.
type memory struct {
	bound int64 // in bytes

	mu    sync.Mutex
	held  int64 // by all requests
	large int64 // by those with more than smallContent
}

// inUse returns the number of bytes that requests hold.
func (m *memory) inUse() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.held
}

// share is the memory that one request holds. It belongs to the goroutine of the request. The zero
// value is a share of an unbounded memory.
type share struct {
	of    *memory // nil: unbounded
	size  int64   // in bytes
	large bool    // counted in memory.large
}

// resize makes the share what content of some bytes takes, which is times that many bytes. It
// returns errNoMemory, and leaves the share as it is, if that is more than is free. What large
// content takes is counted as no more than all large content may hold, so that a body of any size
// is accepted while there is no other large one. A client that is not known yet may use an eighth
// of the memory, and only while others use no more, so that it cannot keep the others from theirs.
func (s *share) resize(content, times int64, known bool) error {
	m := s.of
	if m == nil || content <= tinyContent {
		return nil
	}
	to := share{of: m, size: content * times, large: content > smallContent}
	mostLarge := m.bound - m.bound/8
	m.mu.Lock()
	defer m.mu.Unlock()
	most, large := m.bound, m.large
	if s.large {
		large -= s.size
	}
	if to.large {
		to.size = min(to.size, mostLarge)
		large += to.size
	}
	if !known {
		most = m.bound / 8
	}
	held := m.held - s.size + to.size
	if to.large && large > mostLarge || held > most {
		return errNoMemory
	}
	m.held, m.large, *s = held, large, to
	return nil
}

// shrink reduces the share to some bytes at most, or to nothing if these are not counted.
func (s *share) shrink(size int64) {
	if size <= tinyContent {
		size = 0
	}
	if s.size <= size {
		return
	}
	s.of.mu.Lock()
	defer s.of.mu.Unlock()
	s.of.held -= s.size - size
	if s.large {
		s.of.large -= s.size - size
	}
	s.size = size
}
