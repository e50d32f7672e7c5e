//go:build linux

package e2e

// Every state in which a power cut may leave the file. strace prints each write and sync
// of the running process, and in the same order the answers that leave it. From that the
// states are made that a disk could be in, and each is looked at as check does, and for
// what was acknowledged before.
//
// The disk has what was synced. Of each write since, any of its sectors may be there
// or not, in any order. A sync that fails makes a promise of nothing: the kernel holds
// its pages for clean, so that no later sync needs to bring them to the disk, and they
// are there or not until they are written again and synced.
//
// Only the ends of syncs are boundaries. A power cut before leaves nothing that one right
// before the end may not leave: it is a state in which none of the writes that had not
// begun is there. And right before the end at least as much is acknowledged.

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"

	"go.etcd.io/bbolt"
)

// sectorSize is what a disk writes wholly or not at all, in bytes.
const sectorSize = 512

// tracedFaults are the kinds of calls that fail, each in traces of its own, at positions
// as strace's when= takes them. It counts for each thread apart.
var tracedFaults = []struct {
	name   string
	faults []string
	remedy bool // it is needed, since second syncs of commits fail
}{
	{"pwrite64", []string{"pwrite64:error=EIO:when=5+23"}, false},
	{"fdatasync", []string{"fdatasync:error=EIO:when=2+5", "fsync:error=EIO:when=2+3"}, true}, // fsync is the remedy's
	{"fsync", []string{"fsync:error=EIO:when=1..2"}, false},
	{"ftruncate", []string{"ftruncate:error=EIO:when=1..2"}, false},
}

func TestEveryCrashStateHoldsWhatWasAcknowledged(t *testing.T) {
	long(t)
	needTool(t, "strace")
	t.Parallel()
	replays(t, "sound disk", servicetest.Amount(1, 10), servicetest.Amount(20_000, 1_000_000), func(t *testing.T, r *recording) {
		if r.calls.count(func(c call) bool { return c.name == "ftruncate" }) == 0 {
			t.Error("the file has not grown")
		}
		r.mustBreakWithout(t, "the first sync of each commit", func(i int) bool {
			return r.calls[i].name == "fdatasync" && !r.calls[i-1].meta()
		})
		r.mustBreakWithout(t, "the second sync of each commit", func(i int) bool {
			return r.calls[i].name == "fdatasync" && r.calls[i-1].meta()
		})
	})
	for _, kind := range tracedFaults {
		replays(t, "EIO at "+kind.name, servicetest.Amount(1, 10), servicetest.Amount(2_000, 100_000), func(t *testing.T, r *recording) {
			if r.calls.injected() == 0 || r.refused() == 0 {
				t.Errorf("%d faults, and %d writes refused", r.calls.injected(), r.refused())
			}
			if kind.remedy {
				r.mustBreakWithout(t, "the remedy", r.isRemedy)
			}
		}, kind.faults...)
	}
}

// replays makes so many states of so many recordings.
func replays(t *testing.T, name string, recordings, states int, check func(*testing.T, *recording), faults ...string) {
	for i := range recordings {
		t.Run(fmt.Sprint(name, " ", i), func(t *testing.T) {
			t.Parallel()
			r := record(t, faults...)
			check(t, r)
			made, bad := r.replay(t, states/recordings)
			for _, is := range bad {
				t.Errorf("a state that a power cut can leave is bad: %s", is)
			}
			if made < states/recordings && len(bad) == 0 {
				t.Errorf("there are only %d states, want %d", made, states/recordings)
			}
			t.Logf("%d states of %d calls, with %d writes refused", made, len(r.calls), r.refused())
		})
	}
}

// mustBreakWithout fails unless there are bad states where calls are left out, which
// shows that the replay finds what these calls are for.
func (r *recording) mustBreakWithout(t testing.TB, what string, left func(i int) bool) {
	t.Helper()
	broken := *r
	broken.calls = slices.Clone(r.calls)
	for i := range broken.calls {
		if left(i) {
			broken.calls[i].name = "left out"
		}
	}
	made, bad := broken.replay(t, 1000)
	if len(bad) == 0 {
		t.Errorf("without %s none of %d states is bad", what, made)
	}
}

// isRemedy tells whether a call is one of those that mend makes: it writes both meta
// pages and syncs.
func (r *recording) isRemedy(i int) bool {
	for sync := i; sync < min(i+3, len(r.calls)); sync++ {
		if r.calls[sync].name == "fsync" && sync >= 2 && r.calls[sync-1].meta() && r.calls[sync-2].meta() {
			return true
		}
	}
	return false
}

// What a recording is of.
const (
	replayWriters = 8
	replayWrites  = 160 // that stand, of all writers together
	// retryInterval is how long a writer that was refused leaves the service alone.
	retryInterval = 200 * time.Millisecond
)

// recording is what a process did to its file, and what it answered.
type recording struct {
	before  string // the file
	calls   trace  // to the file
	writers []*replayWriter
}

// record has a process write under faults.
func record(t *testing.T, faults ...string) *recording {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	db := filepath.Join(dir, "test.db")
	p := startProcess(t, nil, "--demo", "--db", db)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	r := &recording{}
	auth := newLedger(t, p.URL).auth
	for i := range replayWriters {
		r.writers = append(r.writers, &replayWriter{
			ledger: ledger{base: p.URL, client: patientClient(t), auth: auth},
			number: i,
			random: rand.New(rand.NewPCG(seed, uint64(i))),
		})
	}
	tracer := attachAs(t, p, straceWithData, faults...)
	r.before = readFile(t, db) // idle, and so synced
	var stand atomic.Int64
	together(t, len(r.writers), func(i int) error { return r.writers[i].run(&stand) })
	if err := p.Terminate(t); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, p.Stderr)
	}
	tracer.detach()
	r.takeIn(t, tracer.trace(t), db)
	if readFile(t, db) != r.after() {
		t.Fatal("the file is not what it must be by the trace, which has not all")
	}
	return r
}

// refused is how many writes were.
func (r *recording) refused() (n int) {
	for _, w := range r.writers {
		for _, is := range w.writes {
			if is.refused {
				n++
			}
		}
	}
	return n
}

// straceWithData traces all calls that could change a file or send an answer.
func straceWithData(out string, faults ...string) []string {
	calls := "pwrite64,fdatasync,fsync,ftruncate,write,writev,pwritev,pwritev2,fallocate,copy_file_range,sendfile,splice"
	return straceOf(calls, []string{"-y", "-xx", "-s", strconv.Itoa(1 << 20)}, out, faults...)
}

// takeIn keeps the calls to the file, and finds when each write was answered.
func (r *recording) takeIn(t testing.TB, all trace, db string) {
	t.Helper()
	answered := map[string]int{}     // by request id: how many calls to the file had ended
	ended := make([]int, len(all)+1) // of the first calls, how many are to the file
	last := -1
	for i, c := range all {
		ended[i+1] = ended[i]
		switch _, id, _ := strings.Cut(c.data, "\r\nX-Request-Id: "); {
		case c.file == db:
			switch c.name {
			case "pwrite64", "ftruncate", "fdatasync", "fsync":
			default:
				t.Fatalf("the replay does not know %s on the file", c.name)
			}
			if c.began <= last {
				t.Fatalf("two calls to the file at once: %s, %s", all[last].name, c.name)
			}
			if c.name == "pwrite64" && (int64(len(c.data)) != c.size || c.size%sectorSize != 0) {
				t.Fatalf("strace has %d bytes of a write of %d, want whole sectors", len(c.data), c.size)
			}
			r.calls = append(r.calls, c)
			last = i
			ended[i+1]++
		case strings.HasPrefix(c.data, "HTTP/1.1 ") && len(id) > 36:
			answered[id[:36]] = ended[c.began]
		}
	}
	for _, w := range r.writers {
		for i := range w.writes {
			at, ok := answered[w.writes[i].request]
			if !ok {
				t.Fatalf("the trace has no answer to request %s", w.writes[i].request)
			}
			w.writes[i].answered = at
		}
	}
}

// after is the file as the calls left it in the page cache.
func (r *recording) after() string {
	file := []byte(r.before)
	resize := func(size int64) { file = append(file, make([]byte, max(0, size-int64(len(file))))...)[:size] }
	for _, c := range r.calls {
		switch {
		case c.failed:
		case c.name == "ftruncate":
			resize(c.size)
		case c.name == "pwrite64":
			resize(max(int64(len(file)), c.offset+c.size))
			copy(file[c.offset:], c.data)
		}
	}
	return string(file)
}

// cell is where a value is in the file. A key that nobody knows is "".
type cell struct{ bucket, key string }

func contractCell(id string) cell {
	return cell{"contracts", string(contractKey{demoOrg, demoUser, id}.bytes())}
}

// tracedWrite is a request that was made or refused as a whole.
type tracedWrite struct {
	request  string          // its id
	answered int             // how many calls of the recording had ended when its answer began
	refused  bool            // with a 503
	makes    map[cell]string // what the values have in them when it stands; "": they are gone
}

// replayWriter writes contracts and tokens that no other does, one write at a time.
type replayWriter struct {
	ledger
	number    int
	random    *rand.Rand
	contracts []string // the ids of those there are
	tokens    []string
	writes    []tracedWrite
}

// run writes until enough writes of all writers stand.
func (w *replayWriter) run(stand *atomic.Int64) error {
	for stand.Load() < replayWrites {
		if err := w.write(); err != nil {
			return err
		}
		if w.writes[len(w.writes)-1].refused {
			time.Sleep(retryInterval)
			continue
		}
		stand.Add(1)
	}
	return nil
}

// write sends one of all the writes there are.
func (w *replayWriter) write() error {
	prices := w.random.IntN(4)
	if w.random.IntN(10) == 0 {
		prices = w.random.IntN(150) // up to three pages
	}
	n, has := w.random.IntN(20), len(w.contracts)
	switch {
	case n < 2:
		return w.addToken()
	case n < 4 && len(w.tokens) > 0:
		return w.revokeToken()
	case has < 1 || has < 3 && n < 9:
		if n%2 == 0 {
			return w.post(prices)
		}
		return w.create(prices)
	case n < 12:
		return w.replace(prices)
	case n < 16:
		return w.patch()
	default:
		return w.remove()
	}
}

// took keeps a write that was sent, and tells whether it stands.
func (w *replayWriter) took(a answered, done int, makes map[cell]string) (stands bool, err error) {
	refused := a.status == http.StatusServiceUnavailable && a.header.Get("Retry-After") == retryAfter
	if a.err != nil || a.status != done && !refused {
		return false, fmt.Errorf("writer %d, write %d: got %v\nwant %d, or 503", w.number, len(w.writes), a, done)
	}
	w.writes = append(w.writes, tracedWrite{request: a.header.Get("X-Request-Id"), refused: refused, makes: makes})
	return !refused, nil
}

// stored is what a contract has in it if a write stands that was answered so.
func (w *replayWriter) stored(a answered) string {
	if a.status == http.StatusServiceUnavailable {
		return w.marker()
	}
	return a.body
}

func (w *replayWriter) create(prices int) error {
	var id string
	for n := 0; id == "" || slices.Contains(w.contracts, id); n++ {
		id = fmt.Sprintf("00000000-0000-4000-8000-%06d%06d", w.number, n)
	}
	a := w.send("PUT", id, w.document(prices), "If-None-Match", "*")
	stands, err := w.took(a, http.StatusCreated, map[cell]string{contractCell(id): w.stored(a)})
	if stands {
		w.contracts = append(w.contracts, id)
	}
	return err
}

func (w *replayWriter) post(prices int) error {
	doc := w.document(prices)
	key := fmt.Sprintf("%d-%d", w.number, w.written)
	a := w.ask("POST", w.collection(), doc, "Idempotency-Key", key)
	record := cell{"idempotency", demoOrg + "/" + demoUser + "/demo\x00" + key}
	contract := cell{bucket: "contracts"}
	id := filepath.Base(a.header.Get("Location"))
	if a.status == http.StatusOK {
		contract = contractCell(id)
	}
	stands, err := w.took(a, http.StatusOK, map[cell]string{contract: w.stored(a), record: w.stored(a)})
	if stands {
		w.contracts = append(w.contracts, id)
	}
	return err
}

// existing is one of the contracts there are.
func (w *replayWriter) existing() string { return w.contracts[w.random.IntN(len(w.contracts))] }

func (w *replayWriter) replace(prices int) error {
	id := w.existing()
	a := w.send("PUT", id, w.document(prices))
	_, err := w.took(a, http.StatusOK, map[cell]string{contractCell(id): w.stored(a)})
	return err
}

func (w *replayWriter) patch() error {
	id := w.existing()
	w.written++
	a := w.send("PATCH", id, "{"+w.marker()+"}", "Content-Type", mergePatchType)
	_, err := w.took(a, http.StatusOK, map[cell]string{contractCell(id): w.stored(a)})
	return err
}

func (w *replayWriter) remove() error {
	id := w.existing()
	stands, err := w.took(w.send("DELETE", id, ""), http.StatusNoContent, map[cell]string{contractCell(id): ""})
	if stands {
		w.contracts = slices.DeleteFunc(w.contracts, func(is string) bool { return is == id })
	}
	return err
}

// demoForm is the fields of a request to an OAuth endpoint.
var demoForm = []string{"Content-Type", "application/x-www-form-urlencoded", "Authorization", "Basic ZGVtbzpkZW1vLXNlY3JldA=="}

func tokenCell(token string) cell {
	h := sha256.Sum256([]byte(token))
	return cell{"tokens", string(h[:])}
}

func (w *replayWriter) addToken() error {
	a := w.ask("POST", w.base+tokenPath, "grant_type=client_credentials", demoForm...)
	is := cell{bucket: "tokens"}
	_, token, _ := strings.Cut(a.body, `"access_token":"`)
	token, _, _ = strings.Cut(token, `"`)
	if a.status == http.StatusOK {
		is = tokenCell(token)
	}
	stands, err := w.took(a, http.StatusOK, map[cell]string{is: `"demo"`})
	if stands {
		w.tokens = append(w.tokens, token)
	}
	return err
}

func (w *replayWriter) revokeToken() error {
	token := w.tokens[0]
	stands, err := w.took(w.ask("POST", w.base+revocationPath, "token="+token, demoForm...), http.StatusOK, map[cell]string{tokenCell(token): ""})
	if stands {
		w.tokens = w.tokens[1:]
	}
	return err
}

// sizeAt stands for the file's length among the sectors of a disk. Its content is a
// number of bytes.
const sizeAt = -1

// blank is a sector that was never written.
var blank = strings.Repeat("\x00", sectorSize)

// sectors are contents by their offset in the file.
type sectors map[int64]string

func (s sectors) at(offset int64) string {
	if content, ok := s[offset]; ok {
		return content
	}
	return blank
}

// size is the file's length.
func (s sectors) size() int64 { return parseSize(s[sizeAt]) }

func parseSize(content string) int64 {
	n, err := strconv.ParseInt(content, 10, 64)
	if err != nil {
		panic(err)
	}
	return n
}

func printSize(size int64) string { return strconv.FormatInt(size, 10) }

// piece is a sector that was written, and may be on the disk.
type piece struct {
	at      int64
	content string
	write   int  // the call
	lost    bool // no sync needs to bring it to the disk
}

// disk is what a power cut can leave of a file.
type disk struct {
	synced  sectors
	pending []piece // in the order of writing

	file  *os.File // is in one of the states
	there sectors  // which is this
}

func newDisk(t testing.TB, before string) *disk {
	t.Helper()
	file, err := os.Create(newPath(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	d := &disk{synced: sectors{sizeAt: "0"}, there: sectors{sizeAt: "0"}, file: file}
	d.write(0, call{name: "pwrite64", data: before})
	if err := d.sync(true); err != nil {
		t.Fatal(err)
	}
	return d
}

// write takes in a call that changes the file.
func (d *disk) write(n int, c call) {
	p := piece{at: sizeAt, content: printSize(c.size), write: n}
	if c.name == "ftruncate" && !c.failed {
		d.pending = append(d.pending, p)
	}
	// A write that fails may have written a part. But after that of a meta page the store
	// looks whether it is there, and here it is not, since strace lets none of it happen.
	if c.name != "pwrite64" || c.failed && c.meta() {
		return
	}
	p.lost = c.failed
	for data := c.data; data != ""; data = data[sectorSize:] {
		p.at, p.content = c.offset+int64(len(c.data)-len(data)), data[:sectorSize]
		d.pending = append(d.pending, p)
	}
}

// sync has what is pending on the disk, or if it fails, for ever in doubt.
func (d *disk) sync(succeeds bool) error {
	var doubtful []piece
	for _, p := range d.pending {
		if p.lost || !succeeds {
			p.lost = true
			doubtful = append(doubtful, p)
			continue
		}
		doubtful = slices.DeleteFunc(doubtful, func(earlier piece) bool { return earlier.at == p.at })
		if end := p.at + sectorSize; p.at != sizeAt && end > d.synced.size() {
			d.synced[sizeAt] = printSize(end)
		}
		d.synced[p.at] = p.content
		if err := d.put(p.at, p.content); err != nil {
			return err
		}
	}
	d.pending = doubtful
	return d.put(sizeAt, d.synced[sizeAt])
}

// put brings a sector of the file into a state.
func (d *disk) put(at int64, content string) error {
	if d.there.at(at) == content {
		return nil
	}
	d.there[at] = content
	if at == sizeAt {
		size := d.there.size()
		maps.DeleteFunc(d.there, func(at int64, _ string) bool { return at >= size })
		return d.file.Truncate(size)
	}
	if end := at + sectorSize; end > d.there.size() {
		d.there[sizeAt] = printSize(end)
	}
	_, err := d.file.WriteAt([]byte(content), at)
	return err
}

// cut is a power cut, and all the states that it can leave.
type cut struct {
	at      []int64    // the length, and the sectors that were written
	options [][]string // what each may have, first what was synced
	pieces  []option   // those that make a difference, in the order of writing
}

// option is one of a sector's, and the call that wrote it.
type option struct{ sector, number, write int }

// state is the number of the option of each sector.
type state []byte

func (d *disk) cut() *cut {
	c := &cut{at: []int64{sizeAt}, options: [][]string{{d.synced[sizeAt]}}}
	index := map[int64]int{sizeAt: 0}
	for _, p := range d.pending {
		if p.at == sizeAt && parseSize(p.content) <= d.synced.size() {
			continue // the file was synced beyond
		}
		i, known := index[p.at]
		if !known {
			i = len(c.at)
			index[p.at] = i
			c.at, c.options = append(c.at, p.at), append(c.options, []string{d.synced.at(p.at)})
		}
		n := slices.Index(c.options[i], p.content)
		if n < 0 {
			n = len(c.options[i])
			c.options[i] = append(c.options[i], p.content)
		}
		c.pieces = append(c.pieces, option{i, n, p.write})
	}
	c.pieces = slices.DeleteFunc(c.pieces, func(o option) bool { return len(c.options[o.sector]) == 1 })
	return c
}

// possible is how many states there are, if they can be counted.
func (c *cut) possible() int {
	n := 1
	for _, options := range c.options {
		if n *= len(options); n > 1<<30 {
			return 1 << 30
		}
	}
	return n
}

// states are n of all, or all.
func (c *cut) states(n int, random *rand.Rand) (states []state) {
	none := make(state, len(c.at))
	if c.possible() <= n {
		states = []state{none}
		for i, options := range c.options {
			for _, s := range states {
				for number := 1; number < len(options); number++ {
					s = bytes.Clone(s)
					s[i] = byte(number)
					states = append(states, s)
				}
			}
		}
		return states
	}
	known := map[string]bool{}
	// take takes the state that has the pieces which there says.
	take := func(there func(i int) bool) {
		s := bytes.Clone(none)
		for i, p := range c.pieces {
			if there(i) {
				s[p.sector] = byte(p.number)
			}
		}
		if !known[string(s)] {
			known[string(s)] = true
			states = append(states, s)
		}
	}
	take(func(int) bool { return false })
	take(func(int) bool { return true })
	for len(states) < n {
		at, other := random.IntN(len(c.pieces)), random.IntN(2) == 0
		switch random.IntN(6) {
		case 0: // the first ones, or the last ones
			take(func(i int) bool { return (i <= at) != other })
		case 1: // one, or all but one
			take(func(i int) bool { return (i == at) != other })
		case 2: // each write wholly or not at all
			writes := map[int]bool{}
			for _, p := range c.pieces {
				writes[p.write] = random.IntN(2) == 0
			}
			take(func(i int) bool { return writes[c.pieces[i].write] })
		default:
			share := random.Float64()
			take(func(int) bool { return random.Float64() < share })
		}
	}
	return states
}

// enter brings the file into a state.
func (d *disk) enter(c *cut, s state) error {
	for i, at := range c.at {
		if err := d.put(at, c.options[i][s[i]]); err != nil {
			return err
		}
	}
	return nil
}

// describe says which writes are there.
func (c *cut) describe(s state) string {
	there, of := map[int]int{}, map[int]int{}
	for _, p := range c.pieces {
		of[p.write]++
		if int(s[p.sector]) == p.number {
			there[p.write]++
		}
	}
	var b strings.Builder
	for _, write := range slices.Sorted(maps.Keys(of)) {
		fmt.Fprintf(&b, " %d/%d of call %d", there[write], of[write], write)
	}
	return b.String()
}

// walk does what a recording did to a disk, and calls boundary before each sync, and at
// the end, with the number of the call.
func (r *recording) walk(d *disk, boundary func(at int) error) error {
	for i, c := range r.calls {
		if c.name != "fdatasync" && c.name != "fsync" {
			d.write(i, c)
			continue
		}
		if err := boundary(i); err != nil {
			return err
		}
		if err := d.sync(!c.failed); err != nil {
			return err
		}
	}
	return boundary(len(r.calls))
}

// shares divides a number of states among the boundaries, evenly but for those that
// have fewer.
func shares(states int, possible []int) []int {
	order := make([]int, len(possible))
	for i := range order {
		order[i] = i
	}
	slices.SortFunc(order, func(a, b int) int { return possible[a] - possible[b] })
	share := make([]int, len(possible))
	for n, i := range order {
		share[i] = min(possible[i], states/(len(order)-n))
		states -= share[i]
	}
	return share
}

// enoughBad is how many bad states tell what is wrong.
const enoughBad = 3

// replay makes so many states, or all there are, and returns how many it made before it
// had enoughBad ones.
func (r *recording) replay(t testing.TB, states int) (made int, bad []string) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("states by seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	var possible []int
	d := newDisk(t, r.before)
	err := r.walk(d, func(int) error {
		possible = append(possible, d.cut().possible())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	share := shares(states, possible)
	d = newDisk(t, r.before)
	j := newJudge(t, r, d.file.Name())
	err = r.walk(d, func(at int) error {
		j.advance(at)
		n := share[0]
		share = share[1:]
		c := d.cut()
		for _, s := range c.states(n, random) {
			if len(bad) == enoughBad {
				return nil
			}
			if err := d.enter(c, s); err != nil {
				return err
			}
			made++
			if faults := j.faults(); len(faults) > 0 {
				bad = append(bad, fmt.Sprintf("before call %d of %d, there:%s\n%s", at, len(r.calls), c.describe(s), head(strings.Join(faults, "\n"))))
			}
		}
		return d.enter(c, make(state, len(c.at)))
	})
	if err != nil {
		t.Fatal(err)
	}
	return made, bad
}

// checker is a process that looks at databases as "check" does.
type checker struct {
	paths   io.Writer
	results *json.Decoder
	stderr  *lockedBuffer
}

// checkerProgram builds the program with many checks in a process, once.
var checkerProgram = sync.OnceValues(func() (string, error) {
	return buildWith("checker", map[string]string{"manychecks.go": "testdata/check/check.go"})
})

func startChecker(t testing.TB) *checker {
	t.Helper()
	path, err := checkerProgram()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path)
	cmd.Env = append(os.Environ(), "MANY_CHECKS=1")
	c := &checker{stderr: &lockedBuffer{}}
	cmd.Stderr = c.stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v\n%s", err, c.stderr)
		}
	})
	c.paths, c.results = in, json.NewDecoder(out)
	return c
}

// faults is what is wrong with a database.
func (c *checker) faults(path string) (faults []string) {
	_, err := fmt.Fprintln(c.paths, path)
	if err == nil {
		err = c.results.Decode(&faults)
	}
	if err != nil {
		faults = append(faults, fmt.Sprintf("the check did not end in order: %v\n%s", err, c.stderr))
	}
	return faults
}

// judge knows what must be in the file.
type judge struct {
	path    string
	checker *checker
	writers []*replayWriter
	next    []int // by writer, its first write that is not answered yet
	stands  map[cell]string
	flying  []tracedWrite   // not answered yet, one of each writer
	may     map[cell]string // what they make
}

// newJudge takes what is in a file for what stands.
func newJudge(t testing.TB, r *recording, path string) *judge {
	t.Helper()
	j := &judge{path: path, checker: startChecker(t), writers: r.writers, next: make([]int, len(r.writers)), stands: map[cell]string{}}
	if faults := j.checker.faults(path); len(faults) > 0 {
		t.Fatal(strings.Join(faults, "\n"))
	}
	err := cells(path, func(found map[cell][]byte) {
		for c, value := range found {
			j.stands[c] = string(value)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// advance takes in what was answered before the end of a call. An answer counts from the
// moment it begins to leave the process: strace prints the end of a sync before the
// process learns of it, and so before the beginning of an answer that waited for it.
func (j *judge) advance(at int) {
	j.flying, j.may = nil, map[cell]string{}
	for i, w := range j.writers {
		for ; j.next[i] < len(w.writes) && w.writes[j.next[i]].answered <= at; j.next[i]++ {
			if is := w.writes[j.next[i]]; !is.refused {
				set(j.stands, is.makes)
			}
		}
		if j.next[i] < len(w.writes) {
			j.flying = append(j.flying, w.writes[j.next[i]])
			maps.Copy(j.may, w.writes[j.next[i]].makes)
		}
	}
}

// set changes what stands.
func set(stands, makes map[cell]string) {
	for c, part := range makes {
		stands[c] = part
		if part == "" {
			delete(stands, c)
		}
	}
}

// cells calls look with what is in the buckets that the writers write to.
func cells(path string, look func(found map[cell][]byte)) error {
	db, err := bbolt.Open(path, 0, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		return err
	}
	defer db.Close()
	return db.View(func(tx *bbolt.Tx) error {
		found := map[cell][]byte{}
		for _, bucket := range []string{"contracts", "tokens", "idempotency"} {
			c := tx.Bucket([]byte(bucket)).Cursor()
			for k, v := c.First(); k != nil; k, v = c.Next() {
				found[cell{bucket, string(k)}] = v
			}
		}
		look(found)
		return nil
	})
}

// faults is what is wrong with the file.
func (j *judge) faults() (faults []string) {
	if faults = j.checker.faults(j.path); len(faults) > 0 {
		return faults
	}
	if err := cells(j.path, func(found map[cell][]byte) { faults = j.compare(found) }); err != nil {
		faults = append(faults, err.Error())
	}
	return faults
}

// compare returns what is lost, and what is there without having been acknowledged and
// is not on its way.
func (j *judge) compare(found map[cell][]byte) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	for c, part := range j.stands {
		value, there := found[c]
		may, flying := j.may[c]
		if !(there && has(value, part)) && !(flying && there == (may != "") && has(value, may)) {
			fault("%q of %s is %q, and acknowledged was %q", c.key, c.bucket, head(string(value)), head(part))
		}
	}
	strangers := slices.Clone(j.flying)
	for c, value := range found {
		if _, stands := j.stands[c]; stands {
			continue
		}
		if may := j.may[c]; may != "" && has(value, may) {
			continue
		}
		i := slices.IndexFunc(strangers, func(w tracedWrite) bool {
			part, unnamed := w.makes[cell{bucket: c.bucket}]
			return unnamed && has(value, part)
		})
		if i < 0 {
			fault("%q of %s was deleted or refused, and is %q", c.key, c.bucket, head(string(value)))
			continue
		}
		strangers = slices.Delete(strangers, i, i+1)
	}
	return faults
}

func has(value []byte, part string) bool { return bytes.Contains(value, []byte(part)) }
