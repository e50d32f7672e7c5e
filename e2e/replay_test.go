//go:build linux

package e2e

// This test tries the states in which a power cut may leave the file. strace prints each write
// and sync of the running process and, in the same order, the responses that it sends. From the
// trace the test builds states that the disk could be in; each is checked as by the command
// check, and must contain all writes acknowledged before.
//
// The disk has the synced data. Of each later write, any subset of its sectors may be on the
// disk, in any order. A sync that fails guarantees nothing: the kernel marks its pages clean, so
// that no later sync needs to write them, and they may or may not be on the disk until they are
// written again and synced.
//
// It is enough to cut the power right before a sync ends. Each state of an earlier cut is also
// one of a cut at that moment, with none of the writes that had not begun, and at that moment at
// least as many writes are acknowledged.

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

// sectorSize is the unit that a disk writes atomically, in bytes.
const sectorSize = 512

// tracedFaults are the kinds of system calls that fail, each in its own recordings. Positions
// have the syntax of strace's when=; strace counts the calls of each thread separately.
var tracedFaults = []struct {
	name   string
	faults []string
	reopen bool // the store must reopen the file, since second syncs of commits fail
}{
	{"pwrite64", []string{"pwrite64:error=EIO:when=5+23"}, false},
	{"fdatasync", []string{"fdatasync:error=EIO:when=2+5", "fsync:error=EIO:when=2+3"}, true}, // fsync is called when the store reopens the file
	{"fsync", []string{"fsync:error=EIO:when=1..2"}, false},
	{"ftruncate", []string{"ftruncate:error=EIO:when=1..2"}, false},
}

func TestEveryCrashStateHasTheAcknowledgedWrites(t *testing.T) {
	long(t)
	needTool(t, "strace")
	t.Parallel()
	replays(t, "sound disk", servicetest.Amount(1, 10), servicetest.Amount(20_000, 1_000_000), func(t *testing.T, r *recording) {
		if r.calls.count(func(c call) bool { return c.name == "ftruncate" }) == 0 {
			t.Error("the file did not grow")
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
				t.Errorf("%d faults and %d refused writes, want some of each", r.calls.injected(), r.refused())
			}
			if kind.reopen {
				r.mustBreakWithout(t, "the reopening", r.isReopening)
			}
		}, kind.faults...)
	}
}

// replays makes recordings, checks each, and replays it, trying a number of states in total.
func replays(t *testing.T, name string, recordings, states int, check func(*testing.T, *recording), faults ...string) {
	for i := range recordings {
		t.Run(fmt.Sprint(name, " ", i), func(t *testing.T) {
			t.Parallel()
			r := record(t, faults...)
			check(t, r)
			tried, bad := r.replay(t, states/recordings)
			for _, state := range bad {
				t.Errorf("a state that a power cut can leave is bad: %s", state)
			}
			if tried < states/recordings && len(bad) == 0 {
				t.Errorf("there are only %d states, want %d", tried, states/recordings)
			}
			t.Logf("%d states of %d calls, with %d writes refused", tried, len(r.calls), r.refused())
		})
	}
}

// mustBreakWithout fails the test unless some states are bad when the calls for which omit is
// true are left out. This shows that the replay detects the errors that these calls prevent.
func (r *recording) mustBreakWithout(t testing.TB, name string, omit func(i int) bool) {
	t.Helper()
	broken := *r
	broken.calls = slices.Clone(r.calls)
	for i := range broken.calls {
		if omit(i) {
			broken.calls[i].name = "left out"
		}
	}
	tried, bad := broken.replay(t, 1000)
	if len(bad) == 0 {
		t.Errorf("without %s none of %d states is bad", name, tried)
	}
}

// isReopening reports whether a call belongs to a reopening, which writes both meta pages and
// syncs them with fsync.
func (r *recording) isReopening(i int) bool {
	for sync := i; sync < min(i+3, len(r.calls)); sync++ {
		if r.calls[sync].name == "fsync" && sync >= 2 && r.calls[sync-1].meta() && r.calls[sync-2].meta() {
			return true
		}
	}
	return false
}

// The size of a recording.
const (
	replayWriters = 8
	replayWrites  = 160 // number of committed writes of all writers together
	// retryInterval is the time that a writer waits after a refused write.
	retryInterval = 200 * time.Millisecond
)

// recording has the system calls of a process on its file, and its responses to writes.
type recording struct {
	before  string // content of the file before the calls
	calls   trace  // on the file
	writers []*replayWriter
}

// record runs writers against a process with faults, and returns the recording.
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
	r.before = readFile(t, db) // the process is idle, so its writes are synced
	var committed atomic.Int64
	together(t, len(r.writers), func(i int) error { return r.writers[i].run(&committed) })
	if err := p.Terminate(t); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, p.Stderr)
	}
	tracer.detach()
	r.addTrace(t, tracer.trace(t), db)
	if readFile(t, db) != r.after() {
		t.Fatal("the file differs from the result of the calls in the trace, so the trace is incomplete")
	}
	return r
}

// refused returns the number of refused writes.
func (r *recording) refused() (n int) {
	for _, w := range r.writers {
		for _, write := range w.writes {
			if write.refused {
				n++
			}
		}
	}
	return n
}

// straceWithData returns a strace command line that traces all calls that could change a file or
// send a response, with their data.
func straceWithData(out string, faults ...string) []string {
	calls := "pwrite64,fdatasync,fsync,ftruncate,write,writev,pwritev,pwritev2,fallocate,copy_file_range,sendfile,splice"
	return straceOf(calls, []string{"-y", "-xx", "-s", strconv.Itoa(1 << 20)}, out, faults...)
}

// addTrace adds the calls on the file to the recording, and sets when each write was answered.
func (r *recording) addTrace(t testing.TB, all trace, db string) {
	t.Helper()
	answered := map[string]int{}     // by request id: number of calls on the file that had ended
	ended := make([]int, len(all)+1) // ended[i] is the number of calls on the file among all[:i]
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
				t.Fatalf("two concurrent calls on the file: %s, %s", all[last].name, c.name)
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
				t.Fatalf("the trace has no response to request %s", w.writes[i].request)
			}
			w.writes[i].answered = at
		}
	}
}

// after returns the content of the file in the page cache after the calls.
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

// cell is the bucket and key of a value in the file. The key is "" if it is unknown.
type cell struct{ bucket, key string }

func contractCell(id string) cell {
	return cell{"contracts", string(contractKey{demoOrg, demoUser, id}.bytes())}
}

// tracedWrite is a write request, which takes effect completely or not at all.
type tracedWrite struct {
	request  string          // id of the request
	answered int             // number of calls of the recording that had ended when the response began
	refused  bool            // with a 503
	makes    map[cell]string // substrings of the values if it is committed; "" for a deleted value
}

// replayWriter writes its own contracts and tokens, one write at a time.
type replayWriter struct {
	ledger
	number    int
	random    *rand.Rand
	contracts []string // ids of the contracts that exist
	tokens    []string
	writes    []tracedWrite
}

// run writes until the writers together have committed replayWrites writes.
func (w *replayWriter) run(committed *atomic.Int64) error {
	for committed.Load() < replayWrites {
		if err := w.write(); err != nil {
			return err
		}
		if w.writes[len(w.writes)-1].refused {
			time.Sleep(retryInterval)
			continue
		}
		committed.Add(1)
	}
	return nil
}

// write sends a random write of any kind.
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

// addWrite adds a write that was sent, and reports whether it was committed.
func (w *replayWriter) addWrite(a answered, success int, makes map[cell]string) (committed bool, err error) {
	refused := a.status == http.StatusServiceUnavailable && a.header.Get("Retry-After") == retryAfter
	if a.err != nil || a.status != success && !refused {
		return false, fmt.Errorf("writer %d, write %d: got %v\nwant %d, or 503", w.number, len(w.writes), a, success)
	}
	w.writes = append(w.writes, tracedWrite{request: a.header.Get("X-Request-Id"), refused: refused, makes: makes})
	return !refused, nil
}

// stored returns a substring of the contract's value if the write with that response is committed.
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
	committed, err := w.addWrite(a, http.StatusCreated, map[cell]string{contractCell(id): w.stored(a)})
	if committed {
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
	committed, err := w.addWrite(a, http.StatusOK, map[cell]string{contract: w.stored(a), record: w.stored(a)})
	if committed {
		w.contracts = append(w.contracts, id)
	}
	return err
}

// existing returns the id of a random contract that exists.
func (w *replayWriter) existing() string { return w.contracts[w.random.IntN(len(w.contracts))] }

func (w *replayWriter) replace(prices int) error {
	id := w.existing()
	a := w.send("PUT", id, w.document(prices))
	_, err := w.addWrite(a, http.StatusOK, map[cell]string{contractCell(id): w.stored(a)})
	return err
}

func (w *replayWriter) patch() error {
	id := w.existing()
	w.written++
	a := w.send("PATCH", id, "{"+w.marker()+"}", "Content-Type", mergePatchType)
	_, err := w.addWrite(a, http.StatusOK, map[cell]string{contractCell(id): w.stored(a)})
	return err
}

func (w *replayWriter) remove() error {
	id := w.existing()
	committed, err := w.addWrite(w.send("DELETE", id, ""), http.StatusNoContent, map[cell]string{contractCell(id): ""})
	if committed {
		w.contracts = slices.DeleteFunc(w.contracts, func(other string) bool { return other == id })
	}
	return err
}

// demoForm has the header fields of a request of the demo client to an OAuth endpoint.
var demoForm = []string{"Content-Type", "application/x-www-form-urlencoded", "Authorization", "Basic ZGVtbzpkZW1vLXNlY3JldA=="}

func tokenCell(token string) cell {
	h := sha256.Sum256([]byte(token))
	return cell{"tokens", string(h[:])}
}

func (w *replayWriter) addToken() error {
	a := w.ask("POST", w.base+tokenPath, "grant_type=client_credentials", demoForm...)
	stored := cell{bucket: "tokens"}
	_, token, _ := strings.Cut(a.body, `"access_token":"`)
	token, _, _ = strings.Cut(token, `"`)
	if a.status == http.StatusOK {
		stored = tokenCell(token)
	}
	committed, err := w.addWrite(a, http.StatusOK, map[cell]string{stored: `"demo"`})
	if committed {
		w.tokens = append(w.tokens, token)
	}
	return err
}

func (w *replayWriter) revokeToken() error {
	token := w.tokens[0]
	committed, err := w.addWrite(w.ask("POST", w.base+revocationPath, "token="+token, demoForm...), http.StatusOK, map[cell]string{tokenCell(token): ""})
	if committed {
		w.tokens = w.tokens[1:]
	}
	return err
}

// sizeAt is the pseudo-offset of the file's length among the sectors of a disk. Its content is
// the length in bytes, in decimal.
const sizeAt = -1

// blank is the content of a sector that was never written.
var blank = strings.Repeat("\x00", sectorSize)

// sectors are the contents of sectors by their offset in the file.
type sectors map[int64]string

func (s sectors) at(offset int64) string {
	if content, ok := s[offset]; ok {
		return content
	}
	return blank
}

// size returns the file's length in bytes.
func (s sectors) size() int64 { return parseSize(s[sizeAt]) }

func parseSize(content string) int64 {
	n, err := strconv.ParseInt(content, 10, 64)
	if err != nil {
		panic(err)
	}
	return n
}

func printSize(size int64) string { return strconv.FormatInt(size, 10) }

// piece is a sector that was written but not synced, and may be on the disk.
type piece struct {
	at      int64
	content string
	write   int  // number of the call that wrote it
	lost    bool // no later sync needs to write it to the disk
}

// disk models the states in which a power cut can leave a file.
type disk struct {
	synced  sectors
	pending []piece // in the order of writing

	file    *os.File // in one of the states
	content sectors  // of file
}

func newDisk(t testing.TB, before string) *disk {
	t.Helper()
	file, err := os.Create(newPath(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	d := &disk{synced: sectors{sizeAt: "0"}, content: sectors{sizeAt: "0"}, file: file}
	d.write(0, call{name: "pwrite64", data: before})
	if err := d.sync(true); err != nil {
		t.Fatal(err)
	}
	return d
}

// write applies call n, which changes the file.
func (d *disk) write(n int, c call) {
	p := piece{at: sizeAt, content: printSize(c.size), write: n}
	if c.name == "ftruncate" && !c.failed {
		d.pending = append(d.pending, p)
	}
	// A write that fails may have written a part of its data. But after a failed write of a meta
	// page the store reads the page to see whether it was written, and here it never was, since
	// strace does not execute a call that it makes fail.
	if c.name != "pwrite64" || c.failed && c.meta() {
		return
	}
	p.lost = c.failed
	for data := c.data; data != ""; data = data[sectorSize:] {
		p.at, p.content = c.offset+int64(len(c.data)-len(data)), data[:sectorSize]
		d.pending = append(d.pending, p)
	}
}

// sync moves the pending sectors to the disk or, if the sync fails, marks them as lost.
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

// put writes a sector of the file, or sets the length, unless it has that content already.
func (d *disk) put(at int64, content string) error {
	if d.content.at(at) == content {
		return nil
	}
	d.content[at] = content
	if at == sizeAt {
		size := d.content.size()
		maps.DeleteFunc(d.content, func(at int64, _ string) bool { return at >= size })
		return d.file.Truncate(size)
	}
	if end := at + sectorSize; end > d.content.size() {
		d.content[sizeAt] = printSize(end)
	}
	_, err := d.file.WriteAt([]byte(content), at)
	return err
}

// cut is a power cut, with all states that it can leave.
type cut struct {
	at      []int64    // offsets: that of the length, and of the written sectors
	options [][]string // possible contents of each, the synced content first
	pieces  []option   // pieces of sectors with more than one option, in the order of writing
}

// option is a possible content of a sector, with the number of the call that wrote it.
type option struct{ sector, number, write int }

// state is the number of the option of each sector.
type state []byte

// cut returns the states that a power cut can leave now.
func (d *disk) cut() *cut {
	c := &cut{at: []int64{sizeAt}, options: [][]string{{d.synced[sizeAt]}}}
	index := map[int64]int{sizeAt: 0}
	for _, p := range d.pending {
		if p.at == sizeAt && parseSize(p.content) <= d.synced.size() {
			continue // the synced file is longer already
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

// possible returns the number of states, but at most 1<<30.
func (c *cut) possible() int {
	n := 1
	for _, options := range c.options {
		if n *= len(options); n > 1<<30 {
			return 1 << 30
		}
	}
	return n
}

// states returns n states, or all if there are at most n.
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
	// take adds the state that has the pieces for which written is true.
	take := func(written func(i int) bool) {
		s := bytes.Clone(none)
		for i, p := range c.pieces {
			if written(i) {
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
		case 2: // each write completely or not at all
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

// enter changes the file to a state.
func (d *disk) enter(c *cut, s state) error {
	for i, at := range c.at {
		if err := d.put(at, c.options[i][s[i]]); err != nil {
			return err
		}
	}
	return nil
}

// describe returns how many of its sectors are on the disk, for each write.
func (c *cut) describe(s state) string {
	written, of := map[int]int{}, map[int]int{}
	for _, p := range c.pieces {
		of[p.write]++
		if int(s[p.sector]) == p.number {
			written[p.write]++
		}
	}
	var b strings.Builder
	for _, write := range slices.Sorted(maps.Keys(of)) {
		fmt.Fprintf(&b, " %d/%d of call %d", written[write], of[write], write)
	}
	return b.String()
}

// walk applies the calls of a recording to a disk. It calls boundary with the number of the call
// before each sync, and at the end.
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

// shares divides a number of states among the boundaries: evenly, except that a boundary with
// fewer possible states gets only those.
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

// enoughBad is the number of bad states after which a replay stops.
const enoughBad = 3

// replay tries a number of states, or all if there are fewer, until enoughBad are bad. It returns
// the number of states that it tried, and descriptions of the bad ones.
func (r *recording) replay(t testing.TB, states int) (tried int, bad []string) {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed of the states %d", seed)
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
			tried++
			if faults := j.faults(); len(faults) > 0 {
				bad = append(bad, fmt.Sprintf("before call %d of %d, with these sectors:%s\n%s", at, len(r.calls), c.describe(s), head(strings.Join(faults, "\n"))))
			}
		}
		return d.enter(c, make(state, len(c.at)))
	})
	if err != nil {
		t.Fatal(err)
	}
	return tried, bad
}

// checker is a process that checks databases as the command "check" does.
type checker struct {
	paths   io.Writer
	results *json.Decoder
	stderr  *lockedBuffer
}

// checkerProgram builds, on its first call, the program that checks many databases.
var checkerProgram = sync.OnceValues(func() (string, error) {
	return buildWith("checker", map[string]string{"manychecks.go": "testdata/check/check.go"})
})

// startChecker starts a checker, which ends with the test.
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

// faults returns the faults of a database.
func (c *checker) faults(path string) (faults []string) {
	_, err := fmt.Fprintln(c.paths, path)
	if err == nil {
		err = c.results.Decode(&faults)
	}
	if err != nil {
		faults = append(faults, fmt.Sprintf("the check failed: %v\n%s", err, c.stderr))
	}
	return faults
}

// judge decides whether a file has the acknowledged writes.
type judge struct {
	path    string
	checker *checker
	writers []*replayWriter
	next    []int           // by writer: index of its first write without a response
	stored  map[cell]string // substrings of the acknowledged values
	flying  []tracedWrite   // writes in flight, at most one of each writer
	may     map[cell]string // substrings of the values that they write
}

// newJudge returns a judge for which the present content of a file is acknowledged.
func newJudge(t testing.TB, r *recording, path string) *judge {
	t.Helper()
	j := &judge{path: path, checker: startChecker(t), writers: r.writers, next: make([]int, len(r.writers)), stored: map[cell]string{}}
	if faults := j.checker.faults(path); len(faults) > 0 {
		t.Fatal(strings.Join(faults, "\n"))
	}
	err := cells(path, func(found map[cell][]byte) {
		for c, value := range found {
			j.stored[c] = string(value)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return j
}

// advance applies the writes whose responses were sent before the end of a call. A response
// counts from the moment when the process begins to send it: strace prints the end of a sync
// before the process continues, and so before the beginning of a response that waited for it.
func (j *judge) advance(at int) {
	j.flying, j.may = nil, map[cell]string{}
	for i, w := range j.writers {
		for ; j.next[i] < len(w.writes) && w.writes[j.next[i]].answered <= at; j.next[i]++ {
			if write := w.writes[j.next[i]]; !write.refused {
				set(j.stored, write.makes)
			}
		}
		if j.next[i] < len(w.writes) {
			j.flying = append(j.flying, w.writes[j.next[i]])
			maps.Copy(j.may, w.writes[j.next[i]].makes)
		}
	}
}

// set applies a write to the stored values.
func set(stored, makes map[cell]string) {
	for c, part := range makes {
		stored[c] = part
		if part == "" {
			delete(stored, c)
		}
	}
}

// cells calls visit with the values of the buckets that the writers write to. The values are
// valid only during the call.
func cells(path string, visit func(found map[cell][]byte)) error {
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
		visit(found)
		return nil
	})
}

// faults returns the faults of the file.
func (j *judge) faults() (faults []string) {
	if faults = j.checker.faults(j.path); len(faults) > 0 {
		return faults
	}
	if err := cells(j.path, func(found map[cell][]byte) { faults = j.compare(found) }); err != nil {
		faults = append(faults, err.Error())
	}
	return faults
}

// compare returns a fault for each acknowledged value that is missing or different, and for each
// other value that no write in flight explains.
func (j *judge) compare(found map[cell][]byte) (faults []string) {
	fault := func(format string, args ...any) { faults = append(faults, fmt.Sprintf(format, args...)) }
	for c, part := range j.stored {
		value, exists := found[c]
		may, flying := j.may[c]
		if !(exists && has(value, part)) && !(flying && exists == (may != "") && has(value, may)) {
			fault("%q of %s is %q, want the acknowledged %q", c.key, c.bucket, head(string(value)), head(part))
		}
	}
	unmatched := slices.Clone(j.flying)
	for c, value := range found {
		if _, known := j.stored[c]; known {
			continue
		}
		if may := j.may[c]; may != "" && has(value, may) {
			continue
		}
		i := slices.IndexFunc(unmatched, func(w tracedWrite) bool {
			part, unnamed := w.makes[cell{bucket: c.bucket}]
			return unnamed && has(value, part)
		})
		if i < 0 {
			fault("%q of %s was deleted or refused, and is %q", c.key, c.bucket, head(string(value)))
			continue
		}
		unmatched = slices.Delete(unmatched, i, i+1)
	}
	return faults
}

func has(value []byte, part string) bool { return bytes.Contains(value, []byte(part)) }
