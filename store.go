package main

// The store's type, its errors and its buckets: contracts, clients and tokens in one
// bbolt file. Its methods are in the other files named store_*.go, most of which read or
// write the buckets too.

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

// Errors that callers of the store's methods tell apart. They may be wrapped.
var (
	// ErrNotFound is returned when there is no such contract, client or token.
	ErrNotFound = errors.New("not found")
	// ErrKeyReused is returned when the idempotency key was used for another request.
	ErrKeyReused = errors.New("idempotency key used for another request")
	// ErrUnavailable is returned by a write that was not made because the last commit
	// failed or the file is damaged, and by a read when the file cannot be opened.
	ErrUnavailable = errors.New("the store cannot write")
	// ErrBusy is returned by a write that was not made because the queue stayed full for
	// queueTimeout.
	ErrBusy = errors.New("the store has too many writes waiting")
	// ErrCorrupt is returned when a stored value does not match its checksum.
	ErrCorrupt = errors.New("stored value fails its checksum")
	// ErrExpired is returned for a token that was valid and has expired.
	ErrExpired = errors.New("expired")
	// ErrForeign is returned for a token that belongs to another client.
	ErrForeign = errors.New("belongs to another client")
	// ErrHadSamples is returned when the file has, or has had, the samples.
	ErrHadSamples = errors.New("the file has had the samples")
	// ErrClosed is returned when the store was closed before the outcome of the operation
	// was known.
	ErrClosed = errors.New("the store is closed")
)

// errTx wraps an error of bbolt itself inside a transaction. The whole transaction is
// then rolled back.
var errTx = errors.New("transaction failed")

// The buckets of the file. Store's comment describes their keys and values; buckets lists
// those that exist in every file.
var (
	bucketMeta        = []byte("meta")
	bucketContracts   = []byte("contracts")
	bucketClients     = []byte("clients")
	bucketTokens      = []byte("tokens")
	bucketIdempotency = []byte("idempotency")
	bucketExpiry      = []byte("expiry")
	bucketImport      = []byte("import") // exists only during an import
	buckets           = [][]byte{bucketMeta, bucketContracts, bucketClients, bucketTokens, bucketIdempotency, bucketExpiry}
)

// Store keeps contracts, clients and tokens in a bbolt file of format version 1. All its
// methods but Close may be called from any goroutine.
//
// These are the buckets of the file. Parts of a key or value follow each other without a
// separator, unless one is shown (␀ is a zero byte):
//
//	bucket       key                            value
//	meta         format                         energy-contracts/1
//	             program                        version of the program that created the file
//	             demo                           loaded: the file has had the samples (see AddSamples)
//	             import                         progress of a committed import (see importKey)
//	contracts    org_id/user_id/contract_id     checksum, document
//	clients      client_id                      checksum, JSON of Client
//	tokens       SHA-256 of the token           checksum, expiry, JSON of Token
//	idempotency  org_id/user_id/client_id␀key   checksum, expiry, SHA-256 of the body, contract_id, document
//	expiry       expiry, bucket, ␀, key         empty (an index of the values that expire)
//	import       org_id/user_id/contract_id     line number, checksum, document (see store_import.go)
//
// A document is the JSON of a contract, exactly as responses send it. Keys are canonical:
// UUIDs are in lower case. Numbers are 8 bytes, big-endian. An expiry is the Unix time in
// seconds when the value expires; once it is expiredKept in the past, a commit may remove
// the value (see purge).
//
// A checksum is the XXH64 of the key and all of the value that follows the checksum, so
// it detects a change in either. In bucket import it does not cover the line number. The
// values in buckets meta and expiry have no checksum.
//
// Writes use group commit: a write that finds no commit in progress leads one, on the
// goroutine that called the method. It runs its change and those of the queued writes in
// one transaction and syncs once for all of them. A write that finds a commit in progress
// is queued and shares the next one. A write returns when its transaction is synced.
//
// Reads run at any time, beside a commit. They copy the data that they need out of their
// transaction and end it at once. Like any read of bbolt's, they may see a commit whose
// last sync is still in progress.
//
// Locks are taken in this order: ready, committing, reopenLock, beginMu, readers.mu. So no
// write is made inside view.
type Store struct {
	// path is the path of the database file.
	path string
	// now returns the current time, for expiry.
	now func() time.Time
	log *slog.Logger

	// queue holds the writes that wait for a commit.
	queue chan *write
	// wake wakes the committer goroutine; see wakeUp.
	wake chan struct{}
	// closing is closed by Close.
	closing chan struct{}
	// stopped is closed by the committer goroutine when it ends, after the last commit.
	stopped chan struct{}

	metrics *storeMetrics
	// cache holds recently used tokens and when each client was last used.
	cache *tokenCache
	// importing is true while there is an Import.
	importing atomic.Bool
	// dummyClient returns an encoded client, with its checksum, that belongs to nobody.
	// It is decoded when a client id is unknown, so that this takes as long as for a
	// known one.
	dummyClient func() ([]byte, error)

	// reopenLock guards db, file and freeAtOpen. It is held for reading during every read
	// transaction, and for writing while db is closed and reopened. A commit holds
	// committing instead, which reopening needs too.
	reopenLock sync.RWMutex
	// db is nil while the file cannot be opened.
	db *bbolt.DB
	// file is db's own open file. Closing db closes it.
	file *os.File
	// reopenWanted is true while a goroutine waits for reopenLock to reopen the file. A
	// long read transaction, such as a backup's, must then end.
	reopenWanted atomic.Bool
	// freeAtOpen is the number of free pages in the file when it was opened. bbolt counts
	// them only from its first commit on.
	freeAtOpen uint64

	// readers holds the idle read transactions.
	readers readers

	// beginMu is held while a read transaction begins. If bbolt panics there, on a meta
	// page that is gone, it keeps a lock of its own and the next call would deadlock; so
	// dead is closed before beginMu is released.
	beginMu sync.Mutex
	// dead is closed when db must never be used again: a call could deadlock, as described
	// at beginMu, or a lookup could loop forever because a branch page is broken. Reads and
	// writes then fail with ErrDamaged until the process ends.
	dead chan struct{}

	// damaged is set when a broken page is found, and never cleared: writes are refused,
	// since they could break more pages. Reads continue until the store is dead.
	damaged atomic.Bool
	// failing is true from a failed commit to the next successful one. Unlike damaged, it
	// means that the disk refuses writes, which may pass.
	failing atomic.Bool

	// ready is the last result of Ready and when it was determined.
	ready struct {
		sync.Mutex
		at  time.Time
		err error
	}

	// committing is held by the goroutine that commits or reopens the file. When the store
	// is closed, the committer goroutine takes it and keeps it.
	committing sync.Mutex
	// committer is guarded by committing.
	committer committer
}

// change makes the changes of one write in a transaction. If it returns an error, it must
// have changed nothing, because the transaction is still committed for the other writes
// of the batch; only after an errTx is it rolled back.
type change func(*bbolt.Tx) error

// write is a change that waits for its commit.
type write struct {
	do    change
	since time.Time     // when it began to wait
	err   error         // the outcome, valid once done is closed
	done  chan struct{} // closed when the outcome is known
}

// committer is the state that a failed commit leaves for the next one.
type committer struct {
	// failures is the number of commits that have failed in a row.
	failures int
	// reopenNeeded is true from a failed commit until the file has been reopened.
	reopenNeeded bool
	// pausedUntil is the time until which writes are refused without an attempt.
	pausedUntil time.Time
	// inDoubt are the writes of a failed commit whose meta page was, or may have been,
	// written to the file but perhaps not to disk. Only reopening the file decides whether
	// they were made; until then their callers wait. inDoubtTx is their transaction's id.
	inDoubt   []*write
	inDoubtTx uint64
}

// reader is a read transaction. An idle one is kept for the next view until a write
// begins, because beginning and ending a transaction takes longer than a Get.
type reader struct {
	*bbolt.Tx
	contracts *bbolt.Cursor // in bucketContracts; nil until the first use
	key       []byte        // buffer for the key in Get

	generation uint64 // the value of readers.generation when the transaction began
}

// readers holds the idle read transactions, all of which show the last commit. They are
// ended before each write, for two reasons: bbolt does not reuse a page that an open
// transaction may read, so the file would grow; and when bbolt must map a larger file, it
// waits for all open transactions, so an idle one would block it forever.
type readers struct {
	mu   sync.Mutex
	idle []*reader
	// closed is true during a write: no reader is kept.
	closed bool
	// generation changes when a write begins and when it ends. A reader that began
	// before the last change may show an older commit and is not kept.
	generation uint64
}

// markDamaged turns a panic of bbolt's on a broken page into an error that wraps
// ErrDamaged, and refuses all later writes. The first call logs the panic.
func (s *Store) markDamaged(p any) error {
	if s.damaged.CompareAndSwap(false, true) {
		s.log.Error("the database file is damaged; writes are refused; stop the service, then run check or restore a backup",
			"file", s.path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	}
	return fmt.Errorf("%w: %v", ErrDamaged, p)
}

// markDead marks the store damaged and dead, so that no later call uses bbolt. It must be
// called only once, with beginMu held.
func (s *Store) markDead(cause any) error {
	defer close(s.dead) // after the cause is logged
	return s.markDamaged(cause)
}

// isDead reports whether db must never be used again.
func (s *Store) isDead() bool {
	select {
	case <-s.dead:
		return true
	default:
		return false
	}
}
