package main

// The store's type, its errors and its buckets: contracts, clients and tokens in one
// bbolt file. The other files named store_*.go have its methods.

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/bbolt"
)

// What the store's methods return, wrapped, where a caller must branch.
var (
	// ErrNotFound: there is no such contract, client or token.
	ErrNotFound = errors.New("not found")
	// ErrKeyReused: the idempotency key stands for another request.
	ErrKeyReused = errors.New("idempotency key used for another request")
	// ErrUnavailable: the change is not made, since the disk refuses writes.
	ErrUnavailable = errors.New("the store cannot write")
	// ErrBusy: the change is not made, since too many others wait.
	ErrBusy = errors.New("the store has too many writes waiting")
	// ErrCorrupt: a stored value does not have its checksum.
	ErrCorrupt = errors.New("stored value fails its checksum")
	// ErrExpired: the token was good once.
	ErrExpired = errors.New("expired")
	// ErrForeign: the token is another client's.
	ErrForeign = errors.New("belongs to another client")
	// ErrClosed: the store was closed.
	ErrClosed = errors.New("the store is closed")
)

// errTx wraps what bbolt itself refuses. Nothing of such a transaction stands.
var errTx = errors.New("transaction failed")

// The buckets; the comment of Store says what is in each.
var (
	bucketMeta        = []byte("meta")
	bucketContracts   = []byte("contracts")
	bucketClients     = []byte("clients")
	bucketTokens      = []byte("tokens")
	bucketIdempotency = []byte("idempotency")
	bucketExpiry      = []byte("expiry")
	bucketImport      = []byte("import") // there during an import only
	buckets           = [][]byte{bucketMeta, bucketContracts, bucketClients, bucketTokens, bucketIdempotency, bucketExpiry}
)

// Store is a bbolt file of format version 1:
//
//	bucket       key                            value
//	meta         format                         energy-contracts/1
//	             program                        the version of the program that made the file
//	contracts    org_id/user_id/contract_id     sum, the contract as it is answered
//	clients      client_id                      sum, JSON of Client
//	tokens       SHA-256 of the token           sum, expiry, JSON of Token
//	idempotency  org_id/user_id/client_id␀key   sum, expiry, SHA-256 of the body, contract_id, document
//	expiry       expiry, bucket, ␀, key         nothing: where to look for what has expired
//	import       org_id/user_id/contract_id     line, sum, document: staged, as staging.go says
//
// A sum is the XXH64 of key and value, an expiry the seconds since 1970 when the value
// expires, an expiredKept after which a commit may remove it; both are 8 bytes,
// big-endian. Keys are canonical: UUIDs in lower case.
//
// A write that finds no commit under way makes one; else it waits in a queue, and all
// that wait share the next one. They are answered when it is synced. Reads copy what
// they need and leave their transaction before anything else happens; they may see a
// commit while its last sync is still under way, as bbolt's do.
type Store struct {
	path string
	now  func() time.Time
	log  *slog.Logger

	queue   chan *write
	wake    chan struct{} // of the committer: see wakeUp
	closing chan struct{} // closed by Close
	stopped chan struct{} // closed by the committer, as its last act

	metrics *storeMetrics
	cache   *tokenCache
	// importing: there is an Import.
	importing atomic.Bool
	// decoy returns a sealed client that nobody is.
	dummyClient func() ([]byte, error)

	// gate is held for reading by every read transaction, and for writing while
	// db is closed and opened again.
	reopenLock sync.RWMutex
	db         *bbolt.DB // nil while the file cannot be opened
	file       *os.File  // db's own
	// wantGate: somebody waits to hold gate for writing.
	reopenWanted atomic.Bool
	// freeAtOpen is how many free pages the file had then: bbolt counts them from the
	// first commit on.
	freeAtOpen uint64

	readers readers

	// beginMu is held around the start of a read transaction. bbolt takes a lock
	// of its own there, and never lets go of it when it panics on a meta page that
	// is gone. Then dead is closed, and db not touched again; so it is when a search
	// could have no end.
	beginMu sync.Mutex
	dead    chan struct{}

	// damaged is set for good by the first broken page: no more writes.
	damaged atomic.Bool
	// failing: the last commit failed.
	failing atomic.Bool

	ready struct {
		sync.Mutex
		at  time.Time
		err error
	}

	// committing is held by who makes a commit or mends the file, and for good once
	// the store is closed.
	committing sync.Mutex
	committer  committer
}

// change is what a write does in its transaction. It changes nothing when it
// returns an error, unless that is an errTx.
type change func(*bbolt.Tx) error

// write is one change on its way to the committer.
type write struct {
	do    change
	since time.Time     // it waits
	err   error         // the outcome, valid when done is closed
	done  chan struct{} // closed when the outcome is known
}

// committer is what is remembered of commits that failed.
type committer struct {
	// failures counts the commits that failed since the last that did not.
	failures int
	// mending: a commit failed, and the file has not been opened again yet.
	reopenNeeded bool
	// pausedUntil: writes are refused without an attempt.
	pausedUntil time.Time
	// undecided are the writes of a failed commit whose meta page is in the file
	// and may or may not be on the disk; undecidedTx is its transaction.
	inDoubt   []*write
	inDoubtTx uint64
}

// reader is a read transaction. One that is not in use is kept for the next view,
// until a write begins: to begin and end it costs more than a Get does.
type reader struct {
	*bbolt.Tx
	contracts *bbolt.Cursor // in bucketContracts
	key       []byte        // room for one, for Get

	generation uint64 // readers' when it began
}

// readers keeps those that are not in use, all of the transaction that stands. A
// write first ends them: bbolt reuses no page that an open one may need, and waits
// for all of them when it has to map the file anew.
type readers struct {
	mu         sync.Mutex
	idle       []*reader
	closed     bool
	generation uint64 // of what may be kept; a write makes a new one
}

// damage turns bbolt's panic on a broken page into an error, and stops writes.
func (s *Store) markDamaged(p any) error {
	if s.damaged.CompareAndSwap(false, true) {
		s.log.Error("the database file is damaged and no longer written to; stop the service, then run check or restore a backup",
			"file", s.path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	}
	return fmt.Errorf("%w: %v", ErrDamaged, p)
}

// giveUp has nobody ask bbolt for anything any more. It is called with beginMu held, once.
func (s *Store) markDead(why any) error {
	defer close(s.dead) // when the log has said why
	return s.markDamaged(why)
}

func (s *Store) isDead() bool {
	select {
	case <-s.dead:
		return true
	default:
		return false
	}
}
