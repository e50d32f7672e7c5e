//go:build linux

package e2e

// Hours of use in a short time: every kind of request on many connections at once, and then
// the size of the process and its file.

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path"
	"strings"
	"sync"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

const (
	enduringLines = 256
	// contractsOfLine is the number of contracts that only one connection writes to, so that
	// it knows the expected state of each.
	contractsOfLine = 8
	// fileOfLive is how many times the size of the live documents the file may have. Pages and
	// the last page of a large document may be half full, and a commit writes its changes to
	// free pages, which at this load are nearly as many.
	fileOfLive = 2 * 2
	// fileConstant is the step, in bytes, by which bbolt grows a file.
	fileConstant = 16 << 20
	// memoryGrowth is how much more memory, in MB, the process may have in the last third of
	// the time than in the second, besides a quarter of that. It allows for garbage that is
	// not collected yet.
	memoryGrowth = 16
)

// user is one connection with the expected state of its contracts.
type user struct {
	*line
	first   int                     // of its contracts
	live    [contractsOfLine][]byte // their documents; nil: there is none
	prepare map[string]prepared
}

// prepared is the bytes of a message.
type prepared struct {
	request []byte
	aim     func(n int)
}

// sizes are the numbers of prices in a document, which then has 200 bytes to 60 KB.
var sizes = []int{0, 1, 5, 24, 168, 1000}

func messages() map[string]message {
	const patchType = "Content-Type: " + mergePatchType + "\r\n"
	all := map[string]message{
		"get":              getOne,
		"get its version":  {method: "GET", path: benchContract, header: "If-None-Match: *\r\n"},
		"list":             {method: "GET", path: benchContracts + "?limit=4"}, // no more than a page, which says its length
		"delete":           {method: "DELETE", path: benchContract},
		"patch":            {method: "PATCH", path: benchContract, header: patchType, body: `{"supplier":"Fjord Kraft"}`},
		"post":             {method: "POST", path: benchContracts, header: jsonType, body: benchBody},
		"broken":           {method: "PUT", path: benchContract, header: jsonType, body: `{"energy_prices":[`},
		"unknown token":    {method: "GET", path: benchContract, header: "Authorization: Bearer " + strings.Repeat("a", 43) + "\r\n"},
		"another's":        {method: "GET", path: strings.Replace(benchContract, demoOrg, demoOtherOrg, 1)},
		"nowhere":          {method: "GET", path: benchContract + "/prices"},
		"no such method":   {method: "POST", path: benchContract, header: jsonType, body: benchBody},
		"another version":  {method: "PUT", path: benchContract, header: jsonType + "If-Match: \"00000000000000000000000000000000\"\r\n", body: benchBody},
		"no media type":    {method: "PUT", path: benchContract, body: benchBody},
		"no contract":      {method: "PUT", path: benchContract, header: jsonType, body: `{"meter_id":7,"price":[]}`},
		"a limit too high": {method: "GET", path: benchContracts + "?limit=1001"},
	}
	for _, n := range sizes {
		all[fmt.Sprint("put ", n)] = message{method: "PUT", path: benchContract, header: jsonType, body: year(n)}
		all[fmt.Sprint("make ", n)] = message{method: "PUT", path: benchContract, header: jsonType + "If-None-Match: *\r\n", body: year(n)}
	}
	return all
}

// alwaysRefused are the statuses of requests that are refused whether the contract exists or
// not.
var alwaysRefused = map[string]int{
	"broken": 400, "unknown token": 401, "another's": 403, "nowhere": 404, "no such method": 405,
	"another version": 412, "no media type": 415, "no contract": 422, "a limit too high": 422,
}

// asks sends one of the messages to contract n and returns an error unless the response has
// the status.
func (u *user) asks(what string, n, want int) error {
	p := u.prepare[what]
	p.aim(n)
	u.request = p.request
	status, err := u.send()
	if err == nil && status != want {
		err = fmt.Errorf("%d, want %d\n%s", status, want, head(string(u.content)))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// step sends a random request and checks its response.
func (u *user) step() error {
	i := u.random.IntN(contractsOfLine)
	n, there := u.first+i, u.live[i] != nil
	or := func(live, none int) int {
		if there {
			return live
		}
		return none
	}
	size := sizes[u.random.IntN(len(sizes))]
	keep := func(err error) error {
		if err == nil {
			u.live[i] = bytes.Clone(u.content)
		}
		return err
	}
	switch k := u.random.IntN(20); {
	case k < 7:
		err := u.asks("get", n, or(200, 404))
		if err == nil && there && !bytes.Equal(u.content, u.live[i]) {
			err = fmt.Errorf("contract %d is %s, want %s", n, head(string(u.content)), head(string(u.live[i])))
		}
		return err
	case k == 7:
		return u.asks("get its version", n, or(304, 404))
	case k < 10:
		return u.asks("list", n, 200)
	case k < 12 && there:
		return keep(u.asks(fmt.Sprint("put ", size), n, 200))
	case k < 12:
		return u.asks(fmt.Sprint("put ", size), n, 404)
	case k < 15 && there:
		return u.asks(fmt.Sprint("make ", size), n, 412)
	case k < 15:
		return keep(u.asks(fmt.Sprint("make ", size), n, 201))
	case k == 15 && there:
		return keep(u.asks("patch", n, 200))
	case k == 15:
		return u.asks("patch", n, 404)
	case k == 16:
		err := u.asks("delete", n, or(204, 404))
		if err == nil {
			u.live[i] = nil
		}
		return err
	case k == 17:
		return u.postAndDelete(n)
	default:
		for what, status := range alwaysRefused { // in an order of chance
			return u.asks(what, n, status)
		}
		return nil
	}
}

// postAndDelete creates a contract with POST and deletes it.
func (u *user) postAndDelete(n int) error {
	if err := u.asks("post", n, 200); err != nil {
		return err
	}
	_, rest, _ := strings.Cut(string(u.head), "\r\nLocation: ")
	location, _, _ := strings.Cut(rest, "\r\n")
	path := path.Join(path.Dir(strings.Fields(string(u.request))[1]), location)
	u.request, _ = message{method: "DELETE", path: path}.bytes()
	if status, err := u.send(); err != nil || status != http.StatusNoContent {
		return fmt.Errorf("DELETE %s: %d, %w", path, status, err)
	}
	return nil
}

func TestLoadLeavesMemoryLevelAndTheFileBounded(t *testing.T) {
	long(t)
	t.Parallel()
	db := benchFile(t, enduringLines*contractsOfLine)
	s := served(t, db)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	all := messages()
	var users []*user
	for i, l := range s.lines(t, enduringLines, getOne, 1) {
		u := &user{line: l, first: i * contractsOfLine, prepare: map[string]prepared{}}
		u.random = rand.New(rand.NewPCG(seed, uint64(i)))
		for what, m := range all {
			request, aim := m.bytes()
			u.prepare[what] = prepared{request, aim}
		}
		for i := range u.live {
			if err := u.asks("get", u.first+i, 200); err != nil {
				t.Fatal(err)
			}
			u.live[i] = bytes.Clone(u.content)
		}
		users = append(users, u)
	}

	end := time.Now().Add(servicetest.Amount(20*time.Second, 10*time.Minute))
	errs, requests := make([]error, len(users)), make([]int, len(users))
	var running sync.WaitGroup
	for i, u := range users {
		running.Go(func() {
			for errs[i] == nil && time.Now().Before(end) {
				errs[i] = u.step()
				requests[i]++
			}
		})
	}
	var memory []float64 // MB, four times a second
	for tick := time.Tick(time.Second / 4); time.Now().Before(end); <-tick {
		memory = append(memory, s.memory(t, "RssAnon"))
	}
	running.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}

	sum, live, liveBytes := 0, 0, 0
	for i, u := range users {
		sum += requests[i]
		for _, doc := range u.live {
			if doc != nil {
				live++
				liveBytes += len(doc) + len(benchKey(0).bytes())
			}
		}
	}
	third := len(memory) / 3
	before, after := median(memory[third:2*third]), median(memory[2*third:])
	info, err := os.Stat(db)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d requests; %d contracts of %d bytes in a file of %d; %.0f MB of memory, then %.0f", sum, live, liveBytes, info.Size(), before, after)
	if after > before*5/4+memoryGrowth {
		t.Errorf("memory grew from %.0f MB to %.0f", before, after)
	}
	if bound := int64(fileOfLive*liveBytes + fileConstant); info.Size() > bound {
		t.Errorf("the file has %d bytes, more than %d", info.Size(), bound)
	}
}
