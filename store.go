package main

// The store's type, its errors and its buckets: contracts, clients and tokens in one
// bbolt file. Its methods are in the other files named store_*.go, most of which read or
// write the buckets too.

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
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
	// failed or the file is damaged or displaced, and by a read when the file cannot be
	// opened, or that was long and in the way of a write (see giveWay).
	ErrUnavailable = errors.New("the store cannot write")
	// ErrDisplaced is returned, with ErrUnavailable, by a write that was not made because the
	// file at the path of the database is not the one that the store has open.
	ErrDisplaced = errors.New("the database file was moved, replaced or removed")
	// ErrBusy is returned by a write that was not made because its commit did not begin
	// within queueTimeout.
	ErrBusy = errors.New("the store was too slow to begin the write")
	// ErrUnknown is returned by a write whose commit did not end within commitTimeout: it may
	// have been made, or may still be made.
	ErrUnknown = errors.New("the disk does not answer, so the outcome of the write is not known")
	// ErrCorrupt is returned when a stored value does not match its checksum, or is not one
	// that this program stores.
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

// errPanic is wrapped by the error of a read or a write that panicked although no page is broken.
// The write was not made.
var errPanic = errors.New("panic")

// The buckets of the file. Store's comment describes their keys and values; buckets lists
// those that exist in every file.
var (
	bucketMeta        = []byte("meta")
	bucketContracts   = []byte("contracts")
	bucketClients     = []byte("clients")
	bucketTokens      = []byte("tokens")
	bucketIdempotency = []byte("idempotency")
	bucketExpiry      = []byte("expiry")
	bucketQuotas      = []byte("quotas") // does not exist in format 1
	bucketImport      = []byte("import") // exists only during an import
	buckets           = [][]byte{bucketMeta, bucketContracts, bucketClients, bucketTokens, bucketIdempotency, bucketExpiry, bucketQuotas}
)

// Store keeps contracts, clients and tokens in a bbolt file of format version 2. All its
// methods but Close may be called from any goroutine.
//
// These are the buckets of the file. Parts of a key or value follow each other without a
// separator, unless one is shown (␀ is a zero byte):
//
//	bucket       key                            value
//	meta         format                         energy-contracts/2
//	             program                        version of the program that gave the file its format
//	             demo                           loaded: the file has had the samples (see AddSamples)
//	             import                         progress of a committed import (see importKey)
//	contracts    org_id/user_id/contract_id     head, document
//	clients      client_id                      checksum, JSON of Client
//	tokens       SHA-256 of the token           checksum, expiry, JSON of Token
//	idempotency  org_id/user_id/client_id␀key   head (expiry, SHA-256 of the body, contract_id), document
//	expiry       expiry, bucket, ␀, key         empty (an index of the values that expire)
//	quotas       bucket, client                 checksum, total of the client's values (see quota)
//	             bucket, client, order, key     size of one of these values
//	import       org_id/user_id/contract_id     line number, head, document (see store_import.go)
//
// A document is the JSON of a contract, exactly as responses send it. Keys are canonical:
// UUIDs are in lower case. Numbers are 8 bytes, big-endian. An expiry is the Unix time in
// seconds when the value expires; once it is expiredKept in the past, a commit may remove
// the value (see purge).
//
// A checksum is the XXH64 of the key and all of the value that follows the checksum, so
// it detects a change in either. A head has a checksum of the key and itself, one of the
// document, and the version of the document (see withHead). In bucket import neither covers the
// line number. The values in buckets meta and expiry, and the sizes in quotas, have no checksum.
//
// A file of format 1 has no heads and no quotas. It becomes one of format 2 with the first commit
// (see upgrade). Its values stay as they are until they are replaced.
//
// Writes use group commit: a write is queued, and the committer goroutine runs the changes of
// all queued writes in one transaction and syncs once for all of them. A write that finds a
// commit in progress shares the next one. A write returns when its transaction is synced. A
// sync may take any time, so nothing but the committer waits for one: a write gives up after
// a time (see updateWithin), and reads wait for no commit.
//
// Reads run at any time, beside a commit. They copy the data that they need out of their
// transaction and end it at once. Like any read of bbolt's, they may see a commit whose
// last sync is still in progress.
//
// Locks are taken in this order: ready, reopenLock, beginMu, readers.mu. So no write is made
// inside view.
type Store struct {
	// path is the path of the database file.
	path string
	// file is the open file, which is locked. It does not change, also when db is opened again.
	file *os.File
	// opened describes file as it was when it was opened.
	opened fs.FileInfo
	// reserved is the address space, in bytes, that each db maps at least.
	reserved int64
	// now returns the current time, for expiry.
	now func() time.Time
	log *slog.Logger

	// queue holds the writes that wait for a commit.
	queue struct {
		sync.Mutex
		writes []*write
	}
	// wake wakes the committer goroutine; see wakeUp.
	wake chan struct{}
	// closing is closed by Close.
	closing chan struct{}
	// stopped is closed when nobody waits any longer for the outcome of a write: by the
	// committer goroutine after the last commit, or by Close when that hangs. Both call stop.
	stopped chan struct{}
	stop    func()

	metrics *storeMetrics
	// cache holds recently used tokens and when each client was last used.
	cache *tokenCache
	// importing is true while there is an Import.
	importing atomic.Bool
	// dummyClient returns an encoded client, with its checksum, that belongs to nobody.
	// It is decoded when a client id is unknown, so that this takes as long as for a
	// known one.
	dummyClient func() ([]byte, error)

	// reopenLock guards db, lent and freeAtOpen. It is held for reading during every read
	// transaction, and for writing while db is closed and opened again. The committer
	// goroutine, which alone does that, reads db without it.
	reopenLock sync.RWMutex
	// db is nil while the file cannot be opened.
	db *bbolt.DB
	// lent is the duplicate of file that db uses, and closes.
	lent *os.File
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
	// failing is the error of the last commit, or nil if it did not fail. Unlike damaged, it
	// may pass.
	failing atomic.Pointer[error]
	// busySince is when the committer goroutine began the commit or the reopening that it is
	// at, or nil while it waits for work.
	busySince atomic.Pointer[time.Time]

	// ready is the last result of Ready and when it was determined.
	ready struct {
		sync.Mutex
		at  time.Time
		err error
	}

	// committer is used by the committer goroutine only.
	committer committer
}

// change makes the changes of one write in a transaction. If it returns an error, it must
// have changed nothing, because the transaction is still committed for the other writes
// of the batch; only after an errTx is it rolled back. It may be called again in another
// transaction, if another write of the batch panics, so it sets all of its results each time.
type change func(*bbolt.Tx) error

// write is a change that waits for its commit.
type write struct {
	do    change        // nil once it has panicked
	size  int           // of what it stores, in bytes, and leastWrite at least
	since time.Time     // when it began to wait
	err   error         // the outcome, valid once done is closed
	done  chan struct{} // closed when the outcome is known
}

// committer is what one commit leaves for the next.
type committer struct {
	// displaced is true while the file at the path is not the open one.
	displaced bool
	// failures is the number of commits that have failed in a row.
	failures int
	// reopenNeeded is true from a failed commit until the file has been reopened.
	reopenNeeded bool
	// purgeFailed is true once purge has panicked. It is not tried again, since all writes would
	// fail.
	purgeFailed bool
	// pausedUntil is the time until which writes are refused without an attempt.
	pausedUntil time.Time
	// inDoubt are the writes of a failed commit whose meta page was, or may have been,
	// written to the file but perhaps not to disk. Only a sync decides whether they were made;
	// until then they have no outcome. inDoubtTx is their transaction's id.
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

// run runs do in tx, and recovers from a panic of this program's own: it then rolls tx back, so
// that nothing of do is committed, and returns an error that wraps errPanic. After a panic on a
// broken page it panics too, for apply to mark the file damaged.
func (s *Store) run(tx *bbolt.Tx, do change) (err error) {
	defer func() {
		p := recover()
		switch {
		case p == nil:
		case onBrokenPage(p):
			panic(p)
		default:
			err = errors.Join(s.logPanic(p), tx.Rollback())
		}
	}()
	return do(tx)
}

// panicked turns a panic while the file was read into an error, which wraps ErrDamaged if the
// panic was on a broken page. It must be called by the deferred function that recovers.
func (s *Store) panicked(p any) error {
	if onBrokenPage(p) {
		return s.markDamaged(p)
	}
	return s.logPanic(p)
}

// logPanic logs a panic of this program's own and returns an error that wraps errPanic.
func (s *Store) logPanic(p any) error {
	s.log.Error("a read or write of the database failed because of a mistake in this program, and changed nothing; please report it",
		"panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	return fmt.Errorf("%w: %v", errPanic, p)
}

// onBrokenPage reports whether a panic with the value p means that a page of the file is broken
// or cannot be read: it is a memory fault, or bbolt panicked and not a function of this program
// that bbolt called. Any other panic is a mistake in this program, and the file is as good as
// before. onBrokenPage must be called by the deferred function that recovers, or by a function
// that it calls, so that the stack still has the panic.
func onBrokenPage(p any) bool {
	var fault interface{ Addr() uintptr } // see debug.SetPanicOnFault
	if err, ok := p.(error); ok && errors.As(err, &fault) {
		return true
	}
	var pcs [64]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs[:])])
	f, more := frames.Next()
	own, _, _ := strings.Cut(f.Function, ".") // the package, which tests call by another name
	for f.Function != "runtime.gopanic" && more {
		f, more = frames.Next()
	}
	// Between the panic and the function that did it may be functions of Go's library.
	for ; more; f, more = frames.Next() {
		if strings.HasPrefix(f.Function, own+".") {
			return false
		}
		if strings.HasPrefix(f.Function, "go.etcd.io/bbolt") {
			break
		}
	}
	return true
}

// markDamaged turns a panic on a broken page into an error that wraps ErrDamaged, and refuses
// all later writes. The first call logs the panic.
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
