package e2e

// These tests serve corrupt files. The program must either refuse the file with a clear error and
// leave it unchanged, or serve it without wrong responses.

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"

	"go.etcd.io/bbolt"
)

// pageSize is the size of the pages in a new bbolt file, in bytes.
var pageSize = os.Getpagesize()

// someContracts is the number of contracts in a servedFile beside the demo data. They take
// several pages.
const someContracts = 200

// someDocument returns the document of contract i of a servedFile.
func someDocument(i int) string {
	return fmt.Sprintf(`{"energy_contract_type":null,"energy_prices":[],"id":"%s","building":null,"meter_id":"%d","supplier":"%s","currency_energy_price":null,"energy_price_includes_external_components":null}`,
		key(i).Contract, i, strings.Repeat(fmt.Sprint(i%10), 20))
}

// servedFile returns the content of a file with the demo data and someContracts of the demo user,
// and a token that is stored in it.
func servedFile(t testing.TB) (file []byte, bearer string) {
	t.Helper()
	db := shortPath(t)
	p := startProcess(t, nil, "--demo", "--db", db)
	bearer = token(t, p.URL, "demo", "demo-secret")
	if err := p.Terminate(t); err != nil {
		t.Fatal(err)
	}
	var lines strings.Builder
	for i := range someContracts {
		lines.WriteString(key(i).line(someDocument(i)))
	}
	ok(t, db, "import", writeFile(t, []byte(lines.String())))
	ok(t, db, "compact") // otherwise most pages would be free
	// If one of the two meta pages is corrupt, the other is used, which lacks the last commit.
	// So the last two commits write nothing that the tests read.
	for range 2 {
		ok(t, db, "client", "add", "--org", demoOtherOrg)
	}
	return trimmed(t, db), bearer
}

// trimmed returns the content of a database without the pages that bbolt has allocated in advance
// and not used yet.
func trimmed(t testing.TB, path string) []byte {
	t.Helper()
	db, err := bbolt.Open(path, 0, &bbolt.Options{ReadOnly: true, Timeout: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	var size int64
	_ = db.View(func(tx *bbolt.Tx) error {
		size = tx.Size()
		return nil
	})
	return []byte(readFile(t, path))[:size]
}

// changed returns a copy of a file with other bytes at an offset.
func changed(file []byte, at int, with []byte) []byte {
	c := bytes.Clone(file)
	copy(c[at:], with)
	return c
}

// serveBroken runs "serve" on a file. If the program refuses the file, serveBroken returns nil and
// the content of stderr.
func serveBroken(t testing.TB, db string) (*process, string) {
	t.Helper()
	p := servicetest.Launch(t, serve(t, nil, "--db", db))
	if p.URL != "" {
		return p, ""
	}
	<-p.Ended
	if code := p.Cmd.ProcessState.ExitCode(); code != 1 {
		t.Fatalf("%v ended with %v, want exit status 1\n%s", p.Cmd.Args, p.Cmd.ProcessState, p.Stderr)
	}
	return nil, p.Stderr.String()
}

// rightResponses are the responses of the service on a sound file.
type rightResponses struct {
	bearer string
	urls   []string          // without scheme and host
	right  map[string]string // bodies by URL
}

// askForAll requests each contract of a servedFile and the lists, and returns the responses.
func askForAll(t testing.TB, file []byte, bearer string) *rightResponses {
	t.Helper()
	a := &rightResponses{bearer: bearer, right: map[string]string{}}
	list := contractsURL("", demoOrg, demoUser)
	a.urls = []string{list, list + "?limit=50", list + "/" + demoContract}
	for i := range someContracts {
		a.urls = append(a.urls, list+"/"+key(i).Contract)
	}
	p := startProcess(t, nil, "--db", writeFile(t, file))
	for _, url := range a.urls {
		resp, got := do(t, http.DefaultClient, "GET", p.URL+url, a.header(), "")
		if resp.StatusCode != 200 {
			t.Fatalf("GET %s of the sound file: %s\n%s", url, resp.Status, got)
		}
		a.right[url] = got
	}
	if err := p.Terminate(t); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *rightResponses) header() http.Header {
	return http.Header{"Authorization": {"Bearer " + a.bearer}, "Content-Type": {"application/json"}}
}

// wantRightOrError requests the lists and some contracts from a process, more of them once a request has
// failed. The test fails if a response is neither right nor a 500. wantRightOrError returns the number
// of responses that are not 200.
func (a *rightResponses) wantRightOrError(t testing.TB, p *process, db string) (failed int) {
	t.Helper()
	impatient := &http.Client{Timeout: 20 * time.Second}
	for i, url := range a.urls {
		step := 20
		if failed > 0 {
			step = servicetest.Amount(4, 1)
		}
		if i > 1 && i%step != 0 {
			continue
		}
		resp, got := do(t, impatient, "GET", p.URL+url, a.header(), "")
		if resp.StatusCode == 200 {
			if got != a.right[url] {
				t.Errorf("GET %s: %s\nwant %s", url, got, a.right[url])
			}
			continue
		}
		failed++
		wantProblem(t, resp, got, 500)
		if strings.Contains(got, db) || strings.Contains(got, "goroutine") {
			t.Errorf("GET %s shows details that only the log may have: %s", url, got)
		}
	}
	return failed
}

func TestBrokenFileIsRefusedOrServedCorrectly(t *testing.T) {
	long(t)
	t.Parallel()
	file, bearer := servedFile(t)
	right := askForAll(t, file, bearer)
	type breakage struct {
		name    string
		content func() []byte
	}
	overwritten := func(at int, with []byte) func() []byte { return func() []byte { return changed(file, at, with) } }
	kinds := map[string][]breakage{}
	for at := pageSize; at < len(file); at += pageSize {
		kinds["cut off"] = append(kinds["cut off"], breakage{fmt.Sprintf("after %d pages", at/pageSize), func() []byte { return file[:at] }})
	}
	for at := 0; at < len(file); at += pageSize {
		kinds["zeroed"] = append(kinds["zeroed"], breakage{fmt.Sprintf("page %d", at/pageSize), overwritten(at, make([]byte, pageSize))})
	}
	seed := rand.Uint64()
	random := rand.New(rand.NewPCG(seed, 0))
	for range servicetest.Amount(300, 10_000) {
		bit := random.IntN(8 * len(file))
		kinds["flipped"] = append(kinds["flipped"], breakage{fmt.Sprintf("bit %d", bit), overwritten(bit/8, []byte{file[bit/8] ^ 1<<(bit%8)})})
	}
	for kind, breakages := range kinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			var refused, broken, unharmed atomic.Int32
			t.Run("in", func(t *testing.T) {
				for _, b := range breakages {
					t.Run(b.name, func(t *testing.T) {
						t.Parallel()
						content := b.content()
						db := writeFile(t, content)
						p, stderr := serveBroken(t, db)
						if p == nil {
							refused.Add(1)
							// The log may have the stack of bbolt's panic before the message.
							last := stderr[strings.LastIndex(strings.TrimSuffix(stderr, "\n"), "\n")+1:]
							if !strings.HasPrefix(last, "energy-contracts: ") || !strings.Contains(last, "database "+db) || !strings.Contains(last, "restore a backup") || strings.Contains(last, "goroutine") {
								t.Errorf("refused with %q, want a message with the name of the file and what to do", stderr)
							}
							if readFile(t, db) != string(content) {
								t.Error("the program refused the file but changed it")
							}
							return
						}
						if right.wantRightOrError(t, p, db) > 0 {
							broken.Add(1)
						} else {
							unharmed.Add(1)
						}
						if err := p.Terminate(t); err != nil || strings.Contains(p.Stderr.String(), "goroutine") {
							t.Errorf("SIGTERM: %v\n%s", err, p.Stderr)
						}
					})
				}
			})
			t.Logf("%d: %d refused, %d with error responses, %d without (seed of the flipped bits %d)", len(breakages), refused.Load(), broken.Load(), unharmed.Load(), seed)
			if refused.Load() == 0 || kind == "flipped" && broken.Load() == 0 {
				t.Error("no breakage had an effect, so the test proves nothing")
			}
		})
	}
}

// TestPageThatBreaksWhileItIsServed runs the service in another process, since a fault could end
// the process.
func TestPageThatBreaksWhileItIsServed(t *testing.T) {
	long(t)
	t.Parallel()
	file, bearer := servedFile(t)
	right := askForAll(t, file, bearer)
	var broken, unharmed atomic.Int32
	t.Run("zeroed", func(t *testing.T) {
		for at := 2 * pageSize; at < len(file); at += pageSize {
			t.Run(fmt.Sprintf("page %d", at/pageSize), func(t *testing.T) {
				t.Parallel()
				path := writeFile(t, file)
				p := startProcess(t, nil, "--db", path)
				servicetest.BreakFile(t, path, at, make([]byte, pageSize))
				failed := right.wantRightOrError(t, p, path)
				if failed > 0 {
					broken.Add(1)
					resp, got := do(t, http.DefaultClient, "PUT", p.URL+contractsURL("", demoOrg, demoUser)+"/"+demoContract, right.header(), `{}`)
					if resp.StatusCode == 500 { // the token cannot be read either
						wantProblem(t, resp, got, 500)
					} else {
						wantUnavailable(t, resp, got)
					}
					resp, got = do(t, http.DefaultClient, "GET", p.URL+"/readyz", nil, "")
					wantProblem(t, resp, got, 503)
				} else {
					unharmed.Add(1) // the page is free
				}
				if err := p.Terminate(t); err != nil {
					t.Errorf("SIGTERM: %v\n%s", err, p.Stderr)
				}
				log := p.Stderr.String()
				if logged := strings.Contains(log, "run check or restore a backup") && strings.Contains(log, path); failed > 0 && !logged {
					t.Errorf("%d requests failed, and the log does not say what to do\n%s", failed, log)
				}
			})
		}
	})
	t.Logf("%d pages: %d with error responses, %d without", len(file)/pageSize-2, broken.Load(), unharmed.Load())
	if broken.Load() == 0 {
		t.Error("no zeroed page had an effect, so the test proves nothing")
	}
}
