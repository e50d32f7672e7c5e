package main

// What the benchmarks measure with: a file of many contracts, a client that adds as
// little as it can, and what the service is compared with.

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/go-playground/validator/v10"
	"github.com/julienschmidt/httprouter"
	"go.etcd.io/bbolt"
)

// benchToken is the text of a token that may do all in demoOrg. It is in each
// benchFile.
const benchToken = "benchmark-0123456789abcdef0123456789abcdef0"

// contractsOfUser is how many contracts each user of a benchFile has.
const contractsOfUser = 100

// benchKey is the key of a contract of a benchFile. Keys sort by n.
func benchKey(n int) Key {
	return Key{
		Owner{demoOrg, ID(fmt.Sprintf("00000000-0000-4000-8000-%012x", n/contractsOfUser))},
		ID(fmt.Sprintf("00000000-0000-7000-8000-%012x", n)),
	}
}

// benchBody is a contract of a common size: its document has 300 bytes.
const benchBody = `{"energy_contract_type":"monthly","energy_prices":[{"price":0.2134}],"meter_id":"735999102100010234","supplier":"Nordlys Energi AB","currency_energy_price":"EUR","energy_price_includes_external_components":true}`

func benchDocument(t testing.TB, body string, id ID) []byte {
	t.Helper()
	v, err := newValidator()
	if err != nil {
		t.Fatal(err)
	}
	c, err := v.Contract([]byte(body))
	if err != nil {
		t.Fatal(err)
	}
	doc, err := c.encode(id)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// yearBody is a contract with a price for each hour of a year.
var yearBody = sync.OnceValue(func() string {
	var b strings.Builder
	b.WriteString(`{"energy_contract_type":"spot_hourly","currency_energy_price":"EUR","energy_prices":[`)
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for hour := range 8760 {
		if hour > 0 {
			b.WriteByte(',')
		}
		fmt.Fprintf(&b, `{"price":%.4f,"timestamp":"%s"}`, 0.05+float64(hour*7919%3000)/1e4, at.Add(time.Duration(hour)*time.Hour).Format("2006-01-02T15:04:05-07:00"))
	}
	b.WriteString(`]}`)
	return b.String()
})

// benchFile makes a database with n contracts, as an import leaves it.
func benchFile(t testing.TB, n int) string {
	t.Helper()
	path := newPath(t)
	s, err := Open(path, time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	token := Token{Client: "bench", Org: demoOrg, Scopes: Scopes{true, true}, Expires: now.Add(24 * time.Hour), ClientCreated: now}
	err = errors.Join(
		s.AddClient(t.Context(), Client{ID: "bench", Org: demoOrg, Scopes: Scopes{true, true}, Created: now}),
		s.AddToken(t.Context(), hashOf(benchToken), token),
		s.Close())
	if err != nil {
		t.Fatal(err)
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	doc := benchDocument(t, benchBody, benchKey(0).Contract)
	at := bytes.Index(doc, []byte(benchKey(0).Contract))
	for from := 0; from < n; from += 20_000 {
		err := db.Update(func(tx *bbolt.Tx) error {
			tx.Bucket(bucketContracts).FillPercent = importFill
			for i := from; i < min(from+20_000, n); i++ {
				k := benchKey(i)
				doc := bytes.Clone(doc)
				copy(doc[at:], k.Contract)
				if err := put(tx, bucketContracts, k.bytes(), seal(k.bytes(), doc)); err != nil {
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

// copyOf is a copy of a file.
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

// target is a server in another process.
type loaded struct {
	addr    string
	metrics string // where it tells of itself, or ""
	pid     int
}

// listens runs a server until the benchmark ends. Its log goes to a file, as it does
// where it is in use, so that nobody but it has work with that.
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

// served is the service on a database.
func served(t testing.TB, db string) loaded {
	t.Helper()
	cmd := command(t, nil, "serve", "--addr", "127.0.0.1:0", "--metrics-addr", "127.0.0.1:0", "--db", db)
	return listens(t, cmd)
}

// bareEnv names the bare server that the test binary becomes.
const bareEnv = "ENERGY_CONTRACTS_BARE"

// bare is one of bareServers, with an argument.
func bare(t testing.TB, name, argument string) loaded {
	t.Helper()
	cmd := exec.Command(os.Args[0], argument)
	cmd.Env = append(os.Environ(), bareEnv+"="+name)
	return listens(t, cmd)
}

// bareServers are what the service is compared with.
var bareServers = map[string]func(argument string) error{
	"answer": serveAnswer,
	"dive":   serveDive,
}

// serveAnswer is the router alone: it answers each request with the content of a file.
func serveAnswer(path string) error {
	content, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	router := httprouter.New()
	answer := func(w http.ResponseWriter, _ *http.Request, _ httprouter.Params) {
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(content)))
		_, _ = w.Write(content)
	}
	router.GET(contractPath, answer)
	router.GET(contractsPath, answer)
	return serveBare(router)
}

// serveDive is how one writes the PUT with the standard library's JSON and the
// validator's dive, durable too.
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
			err = db.Update(func(tx *bbolt.Tx) error {
				return tx.Bucket(bucketContracts).Put([]byte(ps.ByName("org_id")+"/"+ps.ByName("user_id")+"/"+c.ID), doc)
			})
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.Header().Set("Content-Length", strconv.Itoa(len(doc)))
		_, _ = w.Write(doc)
	})
	return serveBare(router)
}

// serveBare serves until the process is told to end.
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

// prepare makes the bytes of a request, for a connection to send again and again, and
// a function that aims it at a contract.
func prepare(method, body string, list bool) (request []byte, aim func(n int)) {
	k := benchKey(0)
	path := strings.NewReplacer(":org_id", string(k.Org), ":user_id", string(k.User), ":energy_contract_id", string(k.Contract)).Replace(contractPath)
	if list {
		path = path[:strings.LastIndexByte(path, '/')]
	}
	head := method + " " + path + " HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + benchToken + "\r\n"
	if body != "" {
		head += "Content-Type: application/json\r\nContent-Length: " + strconv.Itoa(len(body)) + "\r\n"
	}
	request = []byte(head + "\r\n" + body)
	user := strings.Index(head, string(k.User)) + 24
	contract := strings.Index(head, string(k.Contract)) + 24
	return request, func(n int) {
		putHex(request[user:user+12], n/contractsOfUser)
		if !list {
			putHex(request[contract:contract+12], n)
		}
	}
}

// putHex fills b with the hexadecimal digits of n.
func putHex(b []byte, n int) {
	for i := len(b) - 1; i >= 0; i-- {
		b[i] = "0123456789abcdef"[n&15]
		n >>= 4
	}
}

// line is one connection, which sends one request at a time.
type line struct {
	net.Conn
	request []byte
	aim     func(n int)
	answer  []byte
	random  *rand.Rand
	took    []time.Duration
}

// lines opens connections to a server.
func (s loaded) lines(t testing.TB, n int, method, body string, list bool) []*line {
	t.Helper()
	var all []*line
	for i := range n {
		c, err := net.Dial("tcp", s.addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		l := &line{Conn: c, answer: make([]byte, 2<<20), random: rand.New(rand.NewPCG(1, uint64(i)))}
		l.request, l.aim = prepare(method, body, list)
		all = append(all, l)
	}
	return all
}

var contentLength = []byte("\r\nContent-Length: ")

// ask sends the request and reads the whole answer, which must be a 200.
func (l *line) ask() error {
	if _, err := l.Write(l.request); err != nil {
		return err
	}
	have, want := 0, -1
	for want < 0 || have < want {
		n, err := l.Read(l.answer[have:])
		if err != nil {
			return err
		}
		have += n
		if want >= 0 {
			continue
		}
		head := bytes.Index(l.answer[:have], []byte("\r\n\r\n"))
		if head < 0 {
			continue
		}
		want = head + 4
		if at := bytes.Index(l.answer[:head], contentLength); at >= 0 {
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
	if !bytes.HasPrefix(l.answer, []byte("HTTP/1.1 20")) {
		return fmt.Errorf("answer: %s", l.answer[:have])
	}
	return nil
}

// round is a number of requests on each of several connections, each to one of so many
// contracts. It returns the time from the first to the last.
func round(t testing.TB, lines []*line, each, contracts int) time.Duration {
	return together(t, len(lines), func(i int) error {
		l := lines[i]
		l.took = l.took[:0]
		for range each {
			l.aim(l.random.IntN(contracts))
			began := time.Now()
			if err := l.ask(); err != nil {
				return err
			}
			l.took = append(l.took, time.Since(began))
		}
		return nil
	})
}

// together runs n at once, and returns the time that all took.
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

// rawStore is bbolt behind the simplest committer that shares its syncs, and no HTTP.
type rawStore struct {
	db    *bbolt.DB
	queue chan *rawWrite
}

type rawWrite struct {
	key, value []byte
	done       chan error
}

func newRawStore(t testing.TB, path string) *rawStore {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	r := &rawStore{db: db, queue: make(chan *rawWrite, 1024)}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
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
			err := db.Update(func(tx *bbolt.Tx) error {
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
	}()
	t.Cleanup(func() {
		close(r.queue)
		<-ended
		db.Close()
	})
	return r
}

// round is that of a server.
func (r *rawStore) round(t testing.TB, writers, each, contracts int, value []byte) time.Duration {
	return together(t, writers, func(i int) error {
		random := rand.New(rand.NewPCG(rand.Uint64(), uint64(i)))
		for range each {
			w := &rawWrite{key: benchKey(random.IntN(contracts)).bytes(), value: value, done: make(chan error, 1)}
			r.queue <- w
			if err := <-w.done; err != nil {
				return err
			}
		}
		return nil
	})
}

// cpuTime is the processor time that a process has used.
func cpuTime(t testing.TB, pid int) time.Duration {
	t.Helper()
	stat := readFile(t, fmt.Sprintf("/proc/%d/stat", pid))
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	user, err1 := strconv.Atoi(fields[11])
	system, err2 := strconv.Atoi(fields[12])
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	return time.Duration(user+system) * 10 * time.Millisecond
}
