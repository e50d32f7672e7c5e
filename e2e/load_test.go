package e2e

// The tools of the benchmarks: a file with many contracts, a client with little overhead, and
// the servers that the service is compared with.

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"

	"github.com/cespare/xxhash/v2"
	"github.com/go-playground/validator/v10"
	"github.com/julienschmidt/httprouter"
	"go.etcd.io/bbolt"
)

// contractsOfUser is the number of contracts of each user in a benchFile.
const contractsOfUser = 100

// benchKey returns the key of contract n of a benchFile. The keys sort by n.
func benchKey(n int) contractKey {
	return contractKey{demoOrg, fmt.Sprintf("00000000-0000-4000-8000-%012x", n/contractsOfUser), fmt.Sprintf("00000000-0000-7000-8000-%012x", n)}
}

// benchBody is a contract of a common size. Its document has 300 bytes.
const benchBody = `{"energy_contract_type":"monthly","energy_prices":[{"price":0.2134}],"meter_id":"735999102100010234","supplier":"Nordlys Energi AB","currency_energy_price":"EUR","energy_price_includes_external_components":true}`

// bench is the database that each benchFile begins with. The program made it; it has a client
// of demoOrg, a token and contract 0.
var bench struct {
	sync.Once
	file     string
	client   credentials
	token    string
	document []byte // of contract 0
}

// makeBench makes bench, once.
func makeBench(t testing.TB) {
	t.Helper()
	bench.Do(func() {
		db := filepath.Join(servicetest.BuildDir(), "bench.db")
		bench.client = addClient(t, db)
		p := startProcess(t, nil, "--db", db)
		bench.token = token(t, p.URL, bench.client.ID, bench.client.Secret)
		header := http.Header{"Authorization": {"Bearer " + bench.token}, "Content-Type": {"application/json"}, "If-None-Match": {"*"}}
		resp, document := do(t, http.DefaultClient, "PUT", p.URL+benchContract, header, benchBody)
		if resp.StatusCode != http.StatusCreated {
			t.Fatalf("%s\n%s", resp.Status, document)
		}
		if err := p.Terminate(t); err != nil {
			t.Fatal(err)
		}
		bench.file, bench.document = db, []byte(document)
	})
	if bench.file == "" {
		t.Fatal("there is no file for benchmarks, as another test said")
	}
}

// bucketContracts is the bucket of the contracts, each with its checksum.
var bucketContracts = []byte("contracts")

// storedContract returns a contract as the database stores it: the checksum of its key and its
// head, the head (a mark, the checksum of the document, 128 bits of its SHA-256), and the document.
func storedContract(key, doc []byte) []byte {
	version := sha256.Sum256(doc)
	head := binary.BigEndian.AppendUint64([]byte{2}, xxhash.Sum64(doc))
	head = append(head, version[:16]...)
	sum := xxhash.New()
	_, _ = sum.Write(key) // never fails
	_, _ = sum.Write(head)
	return slices.Concat(binary.BigEndian.AppendUint64(nil, sum.Sum64()), head, doc)
}

// benchFile makes a database with n contracts, as after an import.
func benchFile(t testing.TB, n int) string {
	t.Helper()
	makeBench(t)
	path := copyOf(t, bench.file)
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	at := bytes.Index(bench.document, []byte(benchKey(0).Contract))
	for from := 0; from < n; from += 20_000 {
		err := db.Update(func(tx *bbolt.Tx) error {
			b := tx.Bucket(bucketContracts)
			b.FillPercent = 0.9
			for i := from; i < min(from+20_000, n); i++ {
				k := benchKey(i)
				doc := bytes.Clone(bench.document)
				copy(doc[at:], k.Contract)
				if err := b.Put(k.bytes(), storedContract(k.bytes(), doc)); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := db.Sync(); err != nil {
		t.Fatal(err)
	}
	return path
}

// benchValue returns the stored value of a contract in a benchFile.
func benchValue(t testing.TB) []byte {
	t.Helper()
	makeBench(t)
	return storedContract(benchKey(0).bytes(), bench.document)
}

// copyOf returns the path of a copy of a file.
func copyOf(t testing.TB, path string) string {
	t.Helper()
	to := newPath(t)
	from, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	f, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, from); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		t.Fatal(err)
	}
	return to
}

// loaded is a server in another process that gets many requests.
type loaded struct {
	addr    string
	metrics string // where it tells of itself, or ""
	pid     int
}

// listeningLine and metricsLine match lines in the log of a server.
var (
	listeningLine = regexp.MustCompile(`"msg":"listening","addr":"([^"]+)"`)
	metricsLine   = regexp.MustCompile(`"msg":"serving metrics","addr":"([^"]+)"`)
)

// listens runs a server until the benchmark ends. Its log goes to a file, as in production, so
// that no other process has to read it.
func listens(t testing.TB, cmd *exec.Cmd) loaded {
	t.Helper()
	log := filepath.Join(t.TempDir(), "log")
	f, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = f
	if err := errors.Join(cmd.Start(), f.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: %v\n%.2000s", cmd.Args, err, readFile(t, log))
		}
		if _, isTest := t.(*testing.T); isTest { // a benchmark's would be gigabytes
			known.WantNone(t, "the log", readFile(t, log))
			known.WantNoneIn(t, servicetest.DatabaseOf(cmd.Args))
		}
	})
	s := loaded{pid: cmd.Process.Pid}
	waitFor(t, "the server listens", func() bool {
		text := readFile(t, log)
		if m := listeningLine.FindStringSubmatch(text); m != nil {
			s.addr = m[1]
		}
		if m := metricsLine.FindStringSubmatch(text); m != nil {
			s.metrics = "http://" + m[1] + "/metrics"
		}
		return s.addr != ""
	})
	return s
}

// served runs the service on a database.
func served(t testing.TB, db string) loaded {
	t.Helper()
	cmd := command(t, nil, "serve", "--addr", "127.0.0.1:0", "--metrics-addr", "127.0.0.1:0", "--db", db)
	return listens(t, cmd)
}

// bareEnv is the variable that makes the test binary run one of bareServers.
const bareEnv = "ENERGY_CONTRACTS_BARE"

// bare runs one of bareServers with an argument.
func bare(t testing.TB, name, argument string) loaded {
	t.Helper()
	cmd := exec.Command(os.Args[0], argument)
	cmd.Env = append(os.Environ(), bareEnv+"="+name)
	return listens(t, cmd)
}

// bareServers are the servers that the service is compared with.
var bareServers = map[string]func(argument string) error{
	"answer": serveAnswer,
	"put":    servePut,
	"update": serveUpdate,
	"dive":   serveDive,
}

// serveAnswer is the router alone. It responds to each request with the content of a file.
func serveAnswer(path string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	router := httprouter.New()
	answer := func(w http.ResponseWriter, _ *http.Request, _ httprouter.Params) { answerBare(w, content, nil) }
	router.GET(contractPath, answer)
	router.GET(contractsPath, answer)
	return serveBare(router)
}

// servePut is the router with a rawStore. It stores the content of each request and returns
// it.
func servePut(path string) error {
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	return serveWrites(startRawStore(db).put)
}

// serveUpdate is like servePut, with db.Update in place of the committer.
func serveUpdate(path string) error {
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	return serveWrites(func(key, value []byte) error { return updateOne(db, key, value) })
}

// updateOne writes one contract in a transaction of its own.
func updateOne(db *bbolt.DB, key, value []byte) error {
	return db.Update(func(tx *bbolt.Tx) error { return tx.Bucket(bucketContracts).Put(key, value) })
}

// keyOf returns the key of the contract that a path names.
func keyOf(ps httprouter.Params) []byte {
	return []byte(ps.ByName("org_id") + "/" + ps.ByName("user_id") + "/" + ps.ByName("energy_contract_id"))
}

func serveWrites(put func(key, value []byte) error) error {
	router := httprouter.New()
	router.PUT(contractPath, func(w http.ResponseWriter, r *http.Request, ps httprouter.Params) {
		content, err := io.ReadAll(r.Body)
		if err == nil {
			err = put(keyOf(ps), content)
		}
		answerBare(w, content, err)
	})
	return serveBare(router)
}

func answerBare(w http.ResponseWriter, content []byte, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(content)))
	_, _ = w.Write(content)
}

// serveDive is a durable PUT as one would write it with encoding/json and the validator's
// dive.
func serveDive(path string) error {
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	type price struct {
		Price     *float64   `json:"price" validate:"required"`
		Timestamp *time.Time `json:"timestamp" validate:"required"`
	}
	type contract struct {
		EnergyContractType  *string `json:"energy_contract_type" validate:"omitnil,oneof=spot_hourly monthly yearly"`
		EnergyPrices        []price `json:"energy_prices" validate:"dive"`
		ID                  string  `json:"id"`
		Building            *string `json:"building" validate:"omitnil,uuid"`
		MeterID             *string `json:"meter_id" validate:"omitnil,max=19"`
		Supplier            *string `json:"supplier" validate:"omitnil,max=100"`
		CurrencyEnergyPrice *string `json:"currency_energy_price" validate:"omitnil,iso4217"`
		Includes            *bool   `json:"energy_price_includes_external_components"`
	}
	validate := validator.New(validator.WithRequiredStructEnabled())
	router := httprouter.New()
	router.PUT(contractPath, func(w http.ResponseWriter, r *http.Request, ps httprouter.Params) {
		var c contract
		err := json.NewDecoder(r.Body).Decode(&c)
		if err == nil {
			err = validate.Struct(&c)
		}
		c.ID = ps.ByName("energy_contract_id")
		var doc []byte
		if err == nil {
			doc, err = json.Marshal(&c)
		}
		if err == nil {
			err = updateOne(db, keyOf(ps), doc)
		}
		answerBare(w, doc, err)
	})
	return serveBare(router)
}

// serveBare serves until a signal ends the process.
func serveBare(handler http.Handler) error {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, syscall.SIGTERM)
	go http.Serve(l, handler)
	fmt.Fprintf(os.Stderr, `{"msg":"listening","addr":"%s","scheme":"http"}`+"\n", l.Addr())
	<-ended
	return nil
}

// message is a request that is sent many times.
type message struct {
	method, path string
	header       string // lines more, each with its end
	body         string
}

// The paths of contract 0 and its user. In a message they are replaced by those of another
// contract before it is sent.
var (
	benchContract  = contractsURL("", demoOrg, benchKey(0).User) + "/" + benchKey(0).Contract
	benchContracts = benchContract[:strings.LastIndexByte(benchContract, '/')]
)

const jsonType = "Content-Type: application/json\r\n"

// bytes returns the bytes of the message and a function that changes them to contract n.
func (m message) bytes() (request []byte, aim func(n int)) {
	head := m.method + " " + m.path + " HTTP/1.1\r\nHost: localhost\r\n" + m.header
	if !strings.Contains(m.header, "Authorization: ") {
		head += "Authorization: Bearer " + bench.token + "\r\n"
	}
	if m.body != "" {
		head += "Content-Length: " + strconv.Itoa(len(m.body)) + "\r\n"
	}
	request = []byte(head + "\r\n" + m.body)
	digits := func(id string) []byte {
		at := strings.Index(head, id)
		if at < 0 {
			return nil
		}
		return request[at+24 : at+36]
	}
	user, contract := digits(benchKey(0).User), digits(benchKey(0).Contract)
	return request, func(n int) {
		putHex(user, n/contractsOfUser)
		putHex(contract, n)
	}
}

// putHex fills b with the hexadecimal digits of n.
func putHex(b []byte, n int) {
	for i := len(b) - 1; i >= 0; i-- {
		b[i] = "0123456789abcdef"[n&15]
		n >>= 4
	}
}

// line is a connection that sends one request at a time.
type line struct {
	net.Conn
	request   []byte
	aim       func(n int)
	answer    []byte
	head      []byte // of the answer
	content   []byte // of the answer
	headOnly  bool   // the answer has no content
	contracts int    // round aims at one of so many
	random    *rand.Rand
	took      []time.Duration
}

// lines opens connections to a server with this number of contracts.
func (s loaded) lines(t testing.TB, n int, m message, contracts int) []*line {
	t.Helper()
	var all []*line
	for i := range n {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		l := &line{Conn: c, answer: make([]byte, 2<<20), contracts: contracts, random: rand.New(rand.NewPCG(1, uint64(i)))}
		l.request, l.aim = m.bytes()
		l.headOnly = m.method == "HEAD"
		all = append(all, l)
	}
	return all
}

var contentLength = []byte("\r\nContent-Length: ")

// ask sends the request and reads the whole response, which must be a success or a 304.
func (l *line) ask() error {
	status, err := l.send()
	if err == nil && status/100 != 2 && status != http.StatusNotModified {
		err = fmt.Errorf("answered %d: %s", status, l.content)
	}
	return err
}

// send sends the request, reads the whole response and returns its status.
func (l *line) send() (status int, err error) {
	if _, err := l.Write(l.request); err != nil {
		return 0, err
	}
	have, head, want := 0, 0, -1
	for want < 0 || have < want {
		n, err := l.Read(l.answer[have:])
		if err != nil {
			return 0, err
		}
		have += n
		if want >= 0 {
			continue
		}
		head = bytes.Index(l.answer[:have], []byte("\r\n\r\n"))
		if head < 0 {
			continue
		}
		want = head + 4
		if at := bytes.Index(l.answer[:head], contentLength); at >= 0 && !l.headOnly {
			size := 0
			for _, c := range l.answer[at+len(contentLength) : head] {
				if c < '0' || c > '9' {
					break
				}
				size = size*10 + int(c-'0')
			}
			want += size
		}
	}
	l.head, l.content = l.answer[:head], l.answer[head+4:have]
	return strconv.Atoi(string(l.answer[len("HTTP/1.1 "):len("HTTP/1.1 200")]))
}

// round sends a number of requests on each connection, each to a random contract. It returns
// the time from the first request to the last response.
func round(t testing.TB, lines []*line, each int) time.Duration {
	return together(t, len(lines), func(i int) error {
		l := lines[i]
		l.took = l.took[:0]
		for range each {
			l.aim(l.random.IntN(l.contracts))
			began := time.Now()
			if err := l.ask(); err != nil {
				return err
			}
			l.took = append(l.took, time.Since(began))
		}
		return nil
	})
}

// together runs n functions at once and returns the time until all are done.
func together(t testing.TB, n int, do func(i int) error) time.Duration {
	t.Helper()
	errs := make([]error, n)
	var all sync.WaitGroup
	began := time.Now()
	for i := range n {
		all.Go(func() { errs[i] = do(i) })
	}
	all.Wait()
	took := time.Since(began)
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	return took
}

func median[T int | float64 | time.Duration](of []T) T {
	of = slices.Clone(of)
	slices.Sort(of)
	return of[len(of)/2]
}

// rawStore is bbolt behind the simplest committer that shares syncs, without HTTP.
type rawStore struct {
	db    *bbolt.DB
	queue chan *rawWrite
	ended chan struct{} // closed when the queue was closed, and is empty
}

type rawWrite struct {
	key, value []byte
	done       chan error
}

// newRawStore opens a rawStore until the benchmark ends.
func newRawStore(t testing.TB, path string) *rawStore {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	r := startRawStore(db)
	t.Cleanup(func() {
		close(r.queue)
		<-r.ended
		db.Close()
	})
	return r
}

func startRawStore(db *bbolt.DB) *rawStore {
	r := &rawStore{db: db, queue: make(chan *rawWrite, 1024), ended: make(chan struct{})}
	go r.commitLoop()
	return r
}

func (r *rawStore) commitLoop() {
	defer close(r.ended)
	for w := range r.queue {
		batch := []*rawWrite{w}
		for more := true; more; {
			select {
			case w := <-r.queue:
				batch = append(batch, w)
			default:
				more = false
			}
		}
		err := r.db.Update(func(tx *bbolt.Tx) error {
			b := tx.Bucket(bucketContracts)
			for _, w := range batch {
				if err := b.Put(w.key, w.value); err != nil {
					return err
				}
			}
			return nil
		})
		for _, w := range batch {
			w.done <- err
		}
	}
}

func (r *rawStore) put(key, value []byte) error {
	w := &rawWrite{key: key, value: value, done: make(chan error, 1)}
	r.queue <- w
	return <-w.done
}

// round is like the round of a server.
func (r *rawStore) round(t testing.TB, writers, each, contracts int) time.Duration {
	value := benchValue(t)
	return together(t, writers, func(i int) error {
		random := rand.New(rand.NewPCG(rand.Uint64(), uint64(i)))
		for range each {
			if err := r.put(benchKey(random.IntN(contracts)).bytes(), value); err != nil {
				return err
			}
		}
		return nil
	})
}

// allocationRequests is the number of requests in an average of allocations.
const allocationRequests = 200

// allocations returns the average number and size of allocations for a request in the process
// of the server. The requests go to one contract after the other.
func (s loaded) allocations(t testing.TB, m message, from int) (objects, bytes float64) {
	t.Helper()
	l := s.lines(t, 1, m, 1)[0]
	ask := func(from, to int) {
		for i := from; i < to; i++ {
			l.aim(i)
			if err := l.ask(); err != nil {
				t.Fatal(err)
			}
		}
	}
	const first = 10 // have more to do
	ask(from, from+first)
	var scrapes [3]string // nothing is between the first two: what a scrape itself allocates
	scrapes[0], scrapes[1] = s.scrape(t), s.scrape(t)
	ask(from+first, from+allocationRequests)
	scrapes[2] = s.scrape(t)
	per := func(series string) float64 {
		var at [3]float64
		for i, text := range scrapes {
			at[i] = value(t, text, series)
		}
		return (at[2] - at[1] - (at[1] - at[0])) / (allocationRequests - first)
	}
	return per("go_memstats_mallocs_total"), per("go_memstats_alloc_bytes_total")
}

// scrape returns the metrics of the server.
func (s loaded) scrape(t testing.TB) string {
	t.Helper()
	_, text := do(t, http.DefaultClient, "GET", s.metrics, nil, "")
	return text
}

// value returns the value of a series in scraped metrics.
func value(t testing.TB, scraped, series string) float64 {
	t.Helper()
	for line := range strings.Lines(scraped) {
		if text, ok := strings.CutPrefix(line, series+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(text), 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("there is no %s in\n%s", series, scraped)
	return 0
}

// memory returns a figure of the kernel for the memory of a server, in MB: RssAnon is its
// private memory, VmHWM the most that it ever had, mapped file included.
func (s loaded) memory(t testing.TB, name string) float64 {
	t.Helper()
	for line := range strings.Lines(readFile(t, fmt.Sprintf("/proc/%d/status", s.pid))) {
		if kb, ok := strings.CutPrefix(line, name+":"); ok {
			n, err := strconv.Atoi(strings.TrimSuffix(strings.TrimSpace(kb), " kB"))
			if err != nil {
				t.Fatal(err)
			}
			return float64(n) / 1000
		}
	}
	t.Fatalf("no %s; this needs Linux", name)
	return 0
}

// timeToReady returns the time from the start of the process until /readyz is 200.
func timeToReady(t testing.TB, db string) time.Duration {
	t.Helper()
	began := time.Now()
	p := startProcess(t, nil, "--db", db)
	s := loaded{addr: strings.TrimPrefix(p.URL, "http://")}
	err := s.lines(t, 1, message{method: "GET", path: "/readyz"}, 1)[0].ask()
	took := time.Since(began)
	if err := errors.Join(err, p.Terminate(t)); err != nil {
		t.Fatal(err)
	}
	return took
}
