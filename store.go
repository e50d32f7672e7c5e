package main

// The store: contracts, clients and tokens in one bbolt file, written by one
// committer. Nothing outside of this file knows of buckets or transactions.

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cespare/xxhash/v2"
	"github.com/go-json-experiment/json"
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
	// ErrDamaged: a page of the file is broken. The store goes on reading what
	// it can and writes no more.
	ErrDamaged = errors.New("the database file is damaged")
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

	buckets = [][]byte{bucketMeta, bucketContracts, bucketClients, bucketTokens, bucketIdempotency, bucketExpiry}
)

const (
	// initialMmapSize lets the file grow to 1 GiB before bbolt must map it anew,
	// for which it waits for every open read transaction. It is address space,
	// not memory.
	initialMmapSize = 1 << 30
	// readyInterval is how long the answer of Ready holds.
	readyInterval = time.Second
	// pageBytes is what a list copies in one transaction, give or take a document.
	pageBytes = 256 << 10
	// idempotencyLifetime is how long the first answer to a key is repeated.
	idempotencyLifetime = 24 * time.Hour
	// expiredKept is how long what has expired stays in the file. An expired token is
	// still known to have been one, and a clock that is set forward by as much, and back
	// again, takes nothing away before its time.
	expiredKept = time.Hour
	// recordInterval is how often it is written down when clients were last used.
	recordInterval = time.Minute
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
	memory  *memory
	// importing: there is an Import.
	importing atomic.Bool
	// decoy returns a sealed client that nobody is.
	decoy func() ([]byte, error)

	// gate is held for reading by every read transaction, and for writing while
	// db is closed and opened again.
	gate sync.RWMutex
	db   *bbolt.DB // nil while the file cannot be opened
	file *os.File  // db's own
	// wantGate: somebody waits to hold gate for writing.
	wantGate atomic.Bool
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
		memory:  newMemory(),
	}
	s.metrics = newStoreMetrics(s)
	s.decoy = sync.OnceValues(func() ([]byte, error) {
		return sealClient(Client{Org: newID(), Scopes: Scopes{true, true}, Created: now()})
	})
	surveyed := false
	look := func(f *os.File, m meta) (err error) {
		surveyed, err = surveyAtStart(f, m)
		return err
	}
	if _, err := s.open(look, true); err != nil {
		return nil, err
	}
	go s.commitLoop()
	go s.recordLoop()
	if !surveyed {
		go s.survey()
	}
	if err := s.settleImport(); err != nil {
		return nil, errors.Join(fmt.Errorf("an import that was cut short is still in %s: %w", path, err), s.Close())
	}
	return s, nil
}

// create makes the file, so that a start that is cut short leaves none, and two
// starts make one.
func create(path string) error {
	f, err := createAtomicDB(path)
	if err != nil {
		return err
	}
	defer f.discard()
	db, err := bbolt.Open(f.Name(), 0o600, &bbolt.Options{Timeout: lockTimeout})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		for _, name := range buckets {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		format := fmt.Sprintf("%s/%d", programName, formatVersion)
		b := tx.Bucket(bucketMeta)
		return errors.Join(b.Put([]byte(formatKey), []byte(format)), b.Put([]byte(programKey), []byte(readBuild().Version)))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	if err := f.link(); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}

// open opens the file, which openFile checks and, with resync, syncs first. It
// returns the id of the transaction that stands. When it fails, db is nil.
func (s *Store) open(look func(*os.File, meta) error, resync bool) (txid uint64, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil { // the freelist's page
			s.file.Close()
			err = fmt.Errorf("database %s: %w: %v; restore a backup", s.path, ErrDamaged, p)
		}
	}()
	s.db = nil
	db, err := bbolt.Open(s.path, 0o600, &bbolt.Options{
		Timeout:         lockTimeout,
		InitialMmapSize: initialMmapSize,
		OpenFile: func(path string, _ int, _ os.FileMode) (_ *os.File, err error) {
			var m meta
			if s.file, m, err = openFile(path, look, resync, s.log); err != nil {
				return nil, err
			}
			txid = m.txid
			list := make([]byte, pageHeaderSize+8)
			if _, err := s.file.ReadAt(list, int64(m.freelist)*m.pageSize); err == nil {
				s.freeAtOpen, _, _ = freeCount(list)
			}
			return s.file, nil
		},
	})
	if err != nil {
		return 0, err
	}
	s.db = db
	return txid, nil
}

// survey looks at the branch pages of a large file, and gives it up when one is broken: a
// search in it may have no end, which nothing but the end of the process would stop.
func (s *Store) survey() {
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
		return surveyBranches(s.file, pageSize, uint64(r.Size()/pageSize), roots, first.found, goOn)
	})
	if err != nil && !errors.Is(err, ErrClosed) {
		s.log.Warn("the branch pages of the database were not looked at", "err", err)
	}
	s.beginMu.Lock()
	defer s.beginMu.Unlock()
	if err := first.err(); err != nil && !s.isDead() {
		_ = s.giveUp(err) // which the log has
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
	s.gate.Lock()
	defer s.gate.Unlock()
	if s.db == nil {
		return nil
	}
	s.endReaders()
	return s.db.Close()
}

// Get appends the document of a contract to buf.
func (s *Store) Get(buf []byte, k Key) ([]byte, Version, error) {
	var version Version
	err := s.view(func(r *reader) error {
		r.key = k.append(r.key[:0])
		value, err := seek(r.contracts, r.key)
		if err != nil {
			return err
		}
		doc, sum, err := unseal(r.key, value)
		if err != nil {
			return fmt.Errorf("contract %s: %w", r.key, err)
		}
		buf, version = append(buf, doc...), sum
		return nil
	})
	return buf, version, err
}

// Range is a part of a user's contracts, in the order of their ids.
type Range struct {
	After   ID  // exclusive; "" is the start
	Through ID  // inclusive; "" is the end
	Limit   int // at most so many; 0 is no limit
}

// Page is as much of a Range as one transaction copies.
type Page struct {
	Documents []byte // separated by commas
	Rest      Range  // what of the range is not in this page, when More
	More      bool
	// Last is the last contract of the range, when contracts follow it that the
	// limit excludes; else "".
	Last ID
}

// List appends documents to buf, about pageBytes of them.
func (s *Store) List(buf []byte, o Owner, r Range) (page Page, err error) {
	prefix := o.prefix()
	start := slices.Concat(prefix, []byte(r.After))
	err = s.view(func(reader *reader) error {
		c := reader.contracts
		k, v, err := seekAfter(c, start)
		if err != nil {
			return err
		}
		var last, copied []byte
		empty := len(buf)
		for n := 0; bytes.HasPrefix(k, prefix); k, v = c.Next() {
			id := k[len(prefix):]
			if r.Through != "" && string(id) > string(r.Through) {
				break
			}
			if n++; r.Limit > 0 && n > r.Limit {
				page.Last = ID(last)
				break
			}
			last = id
			if len(buf)-empty >= pageBytes {
				page.More = true
				if r.Limit == 0 {
					break
				}
				continue // on to the last one, by the keys alone
			}
			doc, _, err := unseal(k, v)
			if err != nil {
				return fmt.Errorf("contract %s: %w", k, err)
			}
			if len(buf) > empty {
				buf = append(buf, ',')
			}
			buf, copied = append(buf, doc...), id
		}
		if err := intact(k, v); err != nil { // or it may be one of these
			return err
		}
		if page.More {
			page.Rest = Range{After: ID(copied), Through: r.Through}
			if r.Limit > 0 {
				page.Rest.Through = ID(last)
			}
		}
		return nil
	})
	page.Documents = buf
	return page, err
}

// Selection is a part of all contracts; an ID that is "" selects any.
type Selection struct {
	Org, User ID
}

// scanBytes is what a scan looks at in one transaction, give or take a document.
const scanBytes = 1 << 20

// Scan tells each those of the selected contracts that follow after, in the order of
// their keys, until it has looked at scanBytes. The document is the file's own, and gone
// with the call. It returns where to go on, or false at the end.
func (s *Store) Scan(sel Selection, after Key, each func(k Key, doc []byte)) (last Key, more bool, err error) {
	var prefix []byte
	switch {
	case sel.Org != "" && sel.User != "":
		prefix = Owner(sel).prefix()
	case sel.Org != "":
		prefix = []byte(sel.Org + "/")
	}
	err = s.view(func(r *reader) error {
		c, start := r.contracts, prefix
		if after != (Key{}) {
			start = after.bytes()
		}
		k, v, err := seekAfter(c, start)
		if err != nil {
			return err
		}
		for size := 0; bytes.HasPrefix(k, prefix) && k != nil; k, v = c.Next() {
			if size > scanBytes {
				more = true
				return nil
			}
			size += len(k) + len(v)
			doc, _, err := unseal(k, v)
			key, ok := parseKey(k)
			if err != nil || !ok {
				return fmt.Errorf("contract %s: %w", k, ErrCorrupt)
			}
			last = key
			if sel.User == "" || sel.User == key.User {
				each(key, doc)
			}
		}
		return intact(k, v)
	})
	return last, more, err
}

// seekAfter returns the first that follows on start, or ErrCorrupt where a broken one
// stands before it, that may be the first.
func seekAfter(c *bbolt.Cursor, start []byte) (key, value []byte, err error) {
	if key, _ = c.Seek(start); bytes.Equal(key, start) {
		key, value = c.Next()
		return key, value, nil
	}
	if err := intact(c.Prev()); err != nil {
		return nil, nil, err
	}
	key, value = c.Seek(start)
	return key, value, nil
}

// Check decides whether a change may be made to what the writes before it left.
// It is called on the committer, with exists false where there is no contract.
type Check func(current Version, exists bool) error

// Put replaces a contract, or makes it, if check returns nil.
func (s *Store) Put(ctx context.Context, k Key, doc []byte, check Check) (Version, error) {
	key := k.bytes()
	value := seal(key, doc)
	return versionOf(value), s.update(ctx, func(tx *bbolt.Tx) error {
		if err := checked(tx, key, check); err != nil {
			return err
		}
		return put(tx, bucketContracts, key, value)
	})
}

// Delete removes a contract, if check returns nil.
func (s *Store) Delete(ctx context.Context, k Key, check Check) error {
	key := k.bytes()
	return s.update(ctx, func(tx *bbolt.Tx) error {
		if err := checked(tx, key, check); err != nil {
			return err
		}
		return remove(tx, bucketContracts, key)
	})
}

// checked asks check about the contract under key. The sum is what the document
// should be, and suffices: what is about to be replaced need not be whole.
func checked(tx *bbolt.Tx, key []byte, check Check) error {
	value, err := seek(tx.Bucket(bucketContracts).Cursor(), key)
	switch {
	case errors.Is(err, ErrNotFound):
		return check(0, false)
	case err != nil:
		return err
	case len(value) < sumSize:
		return fmt.Errorf("contract %s: %w", key, ErrCorrupt)
	}
	return check(versionOf(value), true)
}

// Idempotency makes a Create happen once (draft-ietf-httpapi-idempotency-key-header).
type Idempotency struct {
	Client string
	Key    string
	Body   Hash
}

// Created is a contract as Create first made it.
type Created struct {
	ID       ID
	Document []byte
	Version  Version
}

// Create makes a contract under a new id. With a key that made one in the last
// 24 hours it returns that one as it was, or ErrKeyReused if the body was
// another.
func (s *Store) Create(ctx context.Context, k Key, doc []byte, once *Idempotency) (Created, error) {
	key := k.bytes()
	value := seal(key, doc)
	created := Created{k.Contract, doc, versionOf(value)}
	err := s.update(ctx, func(tx *bbolt.Tx) error {
		if once != nil {
			record := slices.Concat(k.prefix(), []byte(once.Client), []byte{0}, []byte(once.Key))
			now := s.now()
			first, expires, err := getExpiring(tx, bucketIdempotency, record)
			switch {
			case err == nil && now.Before(expires):
				return created.replay(k.Owner, once, first)
			case err != nil && !errors.Is(err, ErrNotFound):
				return err
			}
			first = slices.Concat(once.Body[:], []byte(k.Contract), doc)
			if err := putExpiring(tx, bucketIdempotency, record, now.Add(idempotencyLifetime), first); err != nil {
				return err
			}
		}
		return put(tx, bucketContracts, key, value)
	})
	if err != nil {
		return Created{}, err // when the caller left, the committer may yet be at created
	}
	return created, nil
}

// replay turns c into what an idempotency record says was created first.
func (c *Created) replay(o Owner, once *Idempotency, record []byte) error {
	n := len(once.Body)
	if !bytes.Equal(record[:n], once.Body[:]) {
		return ErrKeyReused
	}
	c.ID, c.Document = ID(record[n:n+36]), bytes.Clone(record[n+36:])
	c.Version = Version(sum(Key{o, c.ID}.bytes(), c.Document))
	return nil
}

// Client returns ErrNotFound for an unknown id, after the same work as for a known
// one, so that the time tells nobody which ids there are.
func (s *Store) Client(id string) (c Client, err error) {
	err = s.view(func(r *reader) error {
		c, err = getClient(r.Tx, id)
		if errors.Is(err, ErrNotFound) {
			decoy, broken := s.decoy()
			if broken = errors.Join(broken, unsealJSON(nil, decoy, &c)); broken != nil {
				return broken
			}
			c = Client{}
		}
		return err
	})
	return c, err
}

// Clients returns all clients, in the order of their making.
func (s *Store) Clients() (clients []Client, err error) {
	err = s.view(func(r *reader) error {
		return r.Bucket(bucketClients).ForEach(func(k, _ []byte) error {
			c, err := getClient(r.Tx, string(k))
			clients = append(clients, c)
			return err
		})
	})
	for i, c := range clients {
		if at, ok := s.memory.lastUse(c.ID); ok {
			clients[i].LastUsed = at
		}
	}
	slices.SortStableFunc(clients, func(a, b Client) int { return a.Created.Compare(b.Created) })
	return clients, err
}

// HasClients tells whether there is a client at all.
func (s *Store) HasClients() (has bool, err error) {
	err = s.view(func(r *reader) error {
		k, _ := r.Bucket(bucketClients).Cursor().First()
		has = k != nil
		return nil
	})
	return has, err
}

// AddClient stores a client under its id, in place of the one there was.
func (s *Store) AddClient(ctx context.Context, c Client) error {
	return s.update(ctx, func(tx *bbolt.Tx) error {
		tx.OnCommit(func() { s.memory.forgetClient(c.ID) })
		return putClient(tx, c)
	})
}

// RotateClient gives a client a new secret. The one it had is good until graceEnds.
// It returns ErrNotFound for an unknown id.
func (s *Store) RotateClient(ctx context.Context, id string, secret Hash, graceEnds time.Time) error {
	return s.update(ctx, func(tx *bbolt.Tx) error {
		c, err := getClient(tx, id)
		if err != nil {
			return err
		}
		c.Previous, c.PreviousUntil = c.Secret, graceEnds
		if !s.now().Before(graceEnds) { // not to come back with a clock that is set back
			c.Previous, c.PreviousUntil = Hash{}, time.Time{}
		}
		c.Secret = secret
		return putClient(tx, c)
	})
}

// RemoveClient removes a client and with it all its tokens: they are not found any
// more, though they stay in the file until they expire. It returns ErrNotFound for
// an unknown id.
func (s *Store) RemoveClient(ctx context.Context, id string) error {
	return s.update(ctx, func(tx *bbolt.Tx) error {
		if tx.Bucket(bucketClients).Get([]byte(id)) == nil {
			return ErrNotFound
		}
		tx.OnCommit(func() { s.memory.forgetClient(id) })
		return remove(tx, bucketClients, []byte(id))
	})
}

// Used tells that a client was used just now.
func (s *Store) Used(client string) { s.memory.used(client, s.now()) }

// recordLoop writes down when clients were last used, at most once in a
// recordInterval.
func (s *Store) recordLoop() {
	timer := time.NewTimer(recordInterval)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
			s.recordUses(0)
			timer.Reset(recordInterval)
		case <-s.closing:
			return
		}
	}
}

// errUnchanged: there is nothing to commit.
var errUnchanged = errors.New("nothing to write")

// recordUses writes down when clients were last used, if that is more than least away
// from what the file says: later, or earlier when the clock was set back.
func (s *Store) recordUses(least time.Duration) {
	uses := s.memory.unrecorded(least)
	if len(uses) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), queueTimeout)
	defer cancel()
	err := s.update(ctx, func(tx *bbolt.Tx) error {
		err := errUnchanged
		for id, at := range uses {
			c, broken := getClient(tx, id)
			if broken != nil || at.Sub(c.LastUsed).Abs() <= least { // or removed
				continue
			}
			c.LastUsed = at
			if err = putClient(tx, c); err != nil {
				return err
			}
		}
		return err
	})
	if err != nil && !errors.Is(err, errUnchanged) {
		s.log.Warn("when clients were last used is not written down", "err", err)
		return
	}
	s.memory.recorded(uses)
}

func getClient(tx *bbolt.Tx, id string) (c Client, err error) {
	key := []byte(id)
	value, err := seek(tx.Bucket(bucketClients).Cursor(), key)
	if err == nil {
		err = unsealJSON(key, value, &c)
	}
	c.ID = id
	return c, err
}

func putClient(tx *bbolt.Tx, c Client) error {
	value, err := sealClient(c)
	if err != nil {
		return err
	}
	return put(tx, bucketClients, []byte(c.ID), value)
}

func sealClient(c Client) ([]byte, error) {
	b, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("encode client: %w", err)
	}
	return seal([]byte(c.ID), b), nil
}

// AddToken stores a token under the hash of its text.
func (s *Store) AddToken(ctx context.Context, h Hash, t Token) error {
	b, err := json.Marshal(t)
	if err != nil {
		return fmt.Errorf("encode token: %w", err)
	}
	return s.update(ctx, func(tx *bbolt.Tx) error {
		return putExpiring(tx, bucketTokens, h[:], t.Expires, b)
	})
}

// Token returns a token, which counts as a use of its client. For one that is
// unknown, revoked or of a removed client it returns ErrNotFound, and for one that
// has expired ErrExpired, for at least an hour.
func (s *Store) Token(h Hash) (Token, error) {
	now := s.now()
	t, ok, changes := s.memory.token(h, now)
	if !ok {
		var err error
		if t, err = s.readToken(h); err != nil {
			return Token{}, err
		}
	}
	if !now.Before(t.Expires) {
		return Token{}, ErrExpired
	}
	if !ok {
		s.memory.learn(h, t, changes, now)
	}
	return t, nil
}

func (s *Store) readToken(h Hash) (t Token, err error) {
	err = s.view(func(r *reader) error {
		if t, _, err = getToken(r.Tx, h); err != nil {
			return err
		}
		c, err := getClient(r.Tx, t.Client)
		if err == nil && !c.Created.Equal(t.ClientCreated) {
			return ErrNotFound // of one that had its id before
		}
		return err
	})
	return t, err
}

// RevokeToken removes a token of a client. It returns ErrNotFound for an unknown
// token and ErrForeign for another client's.
func (s *Store) RevokeToken(ctx context.Context, h Hash, client string) error {
	return s.update(ctx, func(tx *bbolt.Tx) error {
		t, expiry, err := getToken(tx, h)
		switch {
		case err != nil:
			return err
		case t.Client != client:
			return ErrForeign
		}
		tx.OnCommit(func() { s.memory.forgetToken(h) })
		return removeExpiring(tx, bucketTokens, h[:], expiry)
	})
}

// getToken returns a token and the expiry that it is stored with.
func getToken(tx *bbolt.Tx, h Hash) (t Token, expiry time.Time, err error) {
	b, expiry, err := getExpiring(tx, bucketTokens, h[:])
	if err != nil {
		return t, expiry, err
	}
	if err := json.Unmarshal(b, &t); err != nil {
		return t, expiry, fmt.Errorf("decode token: %w", err)
	}
	return t, expiry, nil
}

// Samples are clients and documents to start with.
type Samples struct {
	Clients   []Client
	Documents map[Key][]byte
}

// AddSamples stores the samples in one transaction, unless the first of their
// clients is there already.
func (s *Store) AddSamples(ctx context.Context, samples Samples) error {
	return s.update(ctx, func(tx *bbolt.Tx) error {
		if tx.Bucket(bucketClients).Get([]byte(samples.Clients[0].ID)) != nil {
			return nil
		}
		for _, c := range samples.Clients {
			if err := putClient(tx, c); err != nil {
				return err
			}
		}
		for k, doc := range samples.Documents {
			key := k.bytes()
			if err := put(tx, bucketContracts, key, seal(key, doc)); err != nil {
				return err
			}
		}
		return nil
	})
}

// Ready tells whether the file can be written: it cannot if the last commit failed,
// and one without changes is tried here, at most once in a readyInterval. Its error
// wraps ErrUnavailable or ErrBusy.
func (s *Store) Ready(ctx context.Context) error {
	s.ready.Lock()
	defer s.ready.Unlock()
	if time.Since(s.ready.at) < readyInterval {
		if s.ready.err == nil && s.failing.Load() {
			return ErrUnavailable
		}
		return s.ready.err
	}
	// The answer is not only for the one who asked.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), queueTimeout)
	defer cancel()
	err := s.update(ctx, func(*bbolt.Tx) error { return nil })
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
	if !s.gate.TryRLock() { // who watches is not to wait for a disk that hangs
		return Stats{}, false
	}
	defer s.gate.RUnlock()
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

// take returns a reader that is not in use, or nil and the generation of a new one.
func (rs *readers) take() (r *reader, generation uint64) {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if n := len(rs.idle); n > 0 {
		r, rs.idle = rs.idle[n-1], rs.idle[:n-1]
	}
	return r, rs.generation
}

// keep keeps a reader for the next view, or returns false if it is to be ended.
func (rs *readers) keep(r *reader) bool {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	if rs.closed || r.generation != rs.generation {
		return false
	}
	rs.idle = append(rs.idle, r)
	return true
}

// count is how many are kept.
func (rs *readers) count() int {
	rs.mu.Lock()
	defer rs.mu.Unlock()
	return len(rs.idle)
}

// view runs fn in a read transaction. fn copies what it needs: bbolt's bytes are
// the mapped file, and gone with the transaction.
func (s *Store) view(fn func(*reader) error) (err error) {
	s.gate.RLock()
	defer s.gate.RUnlock()
	// A file that was cut off while it is mapped is a fault, not a panic.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	r, err := s.begin()
	if err != nil {
		return err
	}
	defer func() {
		p := recover()
		if p != nil {
			err = s.damage(p)
		}
		if p != nil || !s.readers.keep(r) {
			s.rollback(r)
		}
	}()
	if r.contracts == nil {
		r.contracts = r.Bucket(bucketContracts).Cursor()
	}
	return fn(r)
}

func (s *Store) begin() (*reader, error) {
	if s.isDead() {
		return nil, ErrDamaged
	}
	r, generation := s.readers.take()
	if r != nil {
		return r, nil
	}
	tx, err := s.beginTx()
	if err != nil {
		return nil, err
	}
	return &reader{Tx: tx, generation: generation}, nil
}

func (s *Store) beginTx() (tx *bbolt.Tx, err error) {
	s.beginMu.Lock()
	defer s.beginMu.Unlock()
	if s.isDead() {
		return nil, ErrDamaged
	}
	if s.db == nil {
		return nil, ErrUnavailable
	}
	defer func() {
		if p := recover(); p != nil {
			err = s.giveUp(p)
		}
	}()
	tx, err = s.db.Begin(false)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrUnavailable, err)
	}
	return tx, nil
}

// rollback ends a read transaction. It does not take beginMu: bbolt may be about to map
// the file anew, which waits for this transaction, and begin for that.
func (s *Store) rollback(r *reader) {
	if !s.isDead() {
		_ = r.Rollback() // cannot fail
	}
}

// endReaders ends the readers that are not in use, and has none kept until keepReaders.
func (s *Store) endReaders() {
	s.readers.mu.Lock()
	idle := s.readers.idle
	s.readers.idle, s.readers.closed = nil, true
	s.readers.generation++
	s.readers.mu.Unlock()
	for _, r := range idle {
		s.rollback(r)
	}
}

func (s *Store) keepReaders() {
	s.readers.mu.Lock()
	defer s.readers.mu.Unlock()
	s.readers.closed = false
	s.readers.generation++
}

func (s *Store) isDead() bool {
	select {
	case <-s.dead:
		return true
	default:
		return false
	}
}

// giveUp has nobody ask bbolt for anything any more. It is called with beginMu held, once.
func (s *Store) giveUp(why any) error {
	defer close(s.dead) // when the log has said why
	return s.damage(why)
}

// damage turns bbolt's panic on a broken page into an error, and stops writes.
func (s *Store) damage(p any) error {
	if s.damaged.CompareAndSwap(false, true) {
		s.log.Error("the database file is damaged and no longer written to; stop the service, then run check or restore a backup",
			"file", s.path, "panic", fmt.Sprint(p), "stack", string(debug.Stack()))
	}
	return fmt.Errorf("%w: %v", ErrDamaged, p)
}

// purge removes what expired until a time, at most n values. A value says itself when
// it expires; the index only says where to look.
func purge(tx *bbolt.Tx, until time.Time, n int) error {
	c := tx.Bucket(bucketExpiry).Cursor()
	for k, _ := c.First(); k != nil && n > 0; k, _ = c.First() {
		if until.Before(expiryOf(k)) {
			return nil
		}
		bucket, key, _ := bytes.Cut(k[expirySize:], []byte{0})
		if tx.Bucket(bucket) != nil {
			_, expires, err := getExpiring(tx, bucket, key)
			if err == nil && !until.Before(expires) || errors.Is(err, ErrCorrupt) {
				if err := remove(tx, bucket, key); err != nil {
					return err
				}
			}
		}
		if err := remove(tx, bucketExpiry, bytes.Clone(k)); err != nil {
			return err
		}
		n--
	}
	return nil
}

const (
	sumSize    = 8
	expirySize = 8
)

// putExpiring stores a value that expires, at the next whole second, and that purge
// removes some time later.
func putExpiring(tx *bbolt.Tx, bucket, key []byte, expires time.Time, value []byte) error {
	stamp := binary.BigEndian.AppendUint64(nil, uint64(expires.Add(time.Second-1).Unix()))
	if err := put(tx, bucket, key, seal(key, append(stamp, value...))); err != nil {
		return err
	}
	return put(tx, bucketExpiry, slices.Concat(stamp, bucket, []byte{0}, key), nil)
}

// removeExpiring removes a value before its time.
func removeExpiring(tx *bbolt.Tx, bucket, key []byte, expires time.Time) error {
	if err := remove(tx, bucket, key); err != nil {
		return err
	}
	stamp := binary.BigEndian.AppendUint64(nil, uint64(expires.Unix()))
	return remove(tx, bucketExpiry, slices.Concat(stamp, bucket, []byte{0}, key))
}

// getExpiring returns a value and when it expires, which may be long ago, or
// ErrNotFound. The value dies with the transaction.
func getExpiring(tx *bbolt.Tx, bucket, key []byte) ([]byte, time.Time, error) {
	value, err := seek(tx.Bucket(bucket).Cursor(), key)
	if err != nil {
		return nil, time.Time{}, err
	}
	b, _, err := unseal(key, value)
	if err == nil && len(b) < expirySize {
		err = ErrCorrupt
	}
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("%s %x: %w", bucket, key, err)
	}
	return b[expirySize:], expiryOf(b), nil
}

func expiryOf(b []byte) time.Time {
	return time.Unix(int64(binary.BigEndian.Uint64(b)), 0)
}

// seek returns the sealed value of a key, or ErrNotFound. A bit that flipped in a key
// hides it: then one of its neighbors fails its checksum, and that is ErrCorrupt.
func seek(c *bbolt.Cursor, key []byte) ([]byte, error) {
	k, v := c.Seek(key)
	if bytes.Equal(k, key) {
		return v, nil
	}
	if err := intact(k, v); err != nil {
		return nil, err
	}
	if err := intact(c.Prev()); err != nil {
		return nil, err
	}
	return nil, ErrNotFound
}

// intact is nil for what has its checksum, and where there is nothing.
func intact(key, sealed []byte) error {
	if key == nil {
		return nil
	}
	if _, _, err := unseal(key, sealed); err != nil {
		return fmt.Errorf("%q: %w", key, err)
	}
	return nil
}

func put(tx *bbolt.Tx, bucket, key, value []byte) error {
	if err := tx.Bucket(bucket).Put(key, value); err != nil {
		return fmt.Errorf("%w: put %s: %w", errTx, bucket, err)
	}
	return nil
}

func remove(tx *bbolt.Tx, bucket, key []byte) error {
	if err := tx.Bucket(bucket).Delete(key); err != nil {
		return fmt.Errorf("%w: delete %s: %w", errTx, bucket, err)
	}
	return nil
}

// seal puts the checksum of key and value before the value.
func seal(key, value []byte) []byte {
	sealed := make([]byte, sumSize, sumSize+len(value))
	binary.BigEndian.PutUint64(sealed, sum(key, value))
	return append(sealed, value...)
}

// unseal returns what was sealed, where it stands, or ErrCorrupt when it is not
// what it was.
func unseal(key, sealed []byte) ([]byte, Version, error) {
	if len(sealed) < sumSize || sum(key, sealed[sumSize:]) != uint64(versionOf(sealed)) {
		return nil, 0, ErrCorrupt
	}
	return sealed[sumSize:], versionOf(sealed), nil
}

func unsealJSON(key, sealed []byte, into any) error {
	b, _, err := unseal(key, sealed)
	if err == nil {
		err = json.Unmarshal(b, into)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	return nil
}

func versionOf(sealed []byte) Version { return Version(binary.BigEndian.Uint64(sealed)) }

func sum(key, value []byte) uint64 {
	var d xxhash.Digest
	d.Reset()
	_, _ = d.Write(key) // a hash's Write cannot fail
	_, _ = d.Write(value)
	return d.Sum64()
}

func (o Owner) prefix() []byte { return []byte(o.Org + "/" + o.User + "/") }

func (k Key) bytes() []byte {
	return k.append(make([]byte, 0, len(k.Org)+len(k.User)+len(k.Contract)+2))
}

func (k Key) append(b []byte) []byte {
	b = append(append(b, k.Org...), '/')
	b = append(append(b, k.User...), '/')
	return append(b, k.Contract...)
}

// parseKey is the reverse of bytes.
func parseKey(b []byte) (k Key, ok bool) {
	parts := strings.Split(string(b), "/")
	if len(parts) != 3 {
		return k, false
	}
	for i, id := range []*ID{&k.Org, &k.User, &k.Contract} {
		var err error
		if *id, err = parseID(parts[i]); err != nil || string(*id) != parts[i] {
			return k, false
		}
	}
	return k, true
}
