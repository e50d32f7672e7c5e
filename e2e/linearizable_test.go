package e2e

// Clients write, read and delete a few contracts at the same time. A library checks that the
// history is linearizable: that the same responses are possible one after the other, in an
// order in which no response comes before its request.

import (
	"encoding/json"
	"fmt"
	"math"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"

	"github.com/anishathalye/porcupine"
)

// fewUser is a user of the demo organization without contracts, and fewContracts are the ids
// of the contracts in a history, in their order.
const fewUser = "00000000-0000-4000-8000-000000000008"

var fewContracts = [...]string{
	"00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b", "00000000-0000-4000-8000-00000000000c",
}

// held is the state of a contract: the members that are written here, "" for null.
type held struct {
	there             bool
	supplier, meterID string
}

func (h held) document(contract int) string {
	quoted := func(s string) string {
		if s == "" {
			return "null"
		}
		return strconv.Quote(s)
	}
	return fmt.Sprintf(`{"energy_contract_type":null,"energy_prices":[],"id":%q,"building":null,"meter_id":%s,"supplier":%s,"currency_energy_price":null,"energy_price_includes_external_components":null}`,
		fewContracts[contract], quoted(h.meterID), quoted(h.supplier))
}

// few is the state of all contracts at one instant.
type few [len(fewContracts)]held

func (f few) list() string {
	var there []string
	for i, h := range f {
		if h.there {
			there = append(there, h.document(i))
		}
	}
	return "[" + strings.Join(there, ",") + "]"
}

// asked is a request. The method LIST stands for a GET of all contracts.
type asked struct {
	method               string
	contract             int
	members              map[string]string // of the content; "" is null
	ifMatch, ifNoneMatch string
}

func (q asked) String() string {
	s := q.method
	if q.method != "LIST" {
		s += " " + string(rune('a'+q.contract))
	}
	if q.members != nil {
		s += fmt.Sprint(" ", q.content())
	}
	if q.ifMatch != "" {
		s += " If-Match: " + q.ifMatch
	}
	if q.ifNoneMatch != "" {
		s += " If-None-Match: " + q.ifNoneMatch
	}
	return s
}

func (q asked) content() string {
	if q.members == nil {
		return ""
	}
	members := map[string]*string{}
	for name, value := range q.members {
		members[name] = nil
		if value != "" {
			members[name] = &value
		}
	}
	b, _ := json.Marshal(members) // of strings
	return string(b)
}

// answer returns the right status for the request to a contract with an entity tag, and the
// state of the contract after it.
func (q asked) answer(is held, tag string) (status int, then held) {
	switch {
	case q.ifMatch != "" && !(is.there && (q.ifMatch == "*" || q.ifMatch == tag)):
		return http.StatusPreconditionFailed, is
	case q.ifNoneMatch != "" && is.there && (q.ifNoneMatch == "*" || q.ifNoneMatch == tag):
		if q.method == "GET" {
			return http.StatusNotModified, is
		}
		return http.StatusPreconditionFailed, is
	case q.method == "PUT" && !is.there && q.ifNoneMatch == "*":
		return http.StatusCreated, held{true, q.members["supplier"], q.members["meter_id"]}
	case !is.there:
		return http.StatusNotFound, is
	case q.method == "PUT":
		return http.StatusOK, held{true, q.members["supplier"], q.members["meter_id"]}
	case q.method == "DELETE":
		return http.StatusNoContent, held{}
	case q.method == "PATCH":
		then = is
		if supplier, ok := q.members["supplier"]; ok {
			then.supplier = supplier
		}
		if meterID, ok := q.members["meter_id"]; ok {
			then.meterID = meterID
		}
		return http.StatusOK, then
	}
	return http.StatusOK, is // GET
}

// replied is a response. Its status is 0 if none came.
type replied struct {
	status    int
	tag, body string
}

func (r replied) String() string {
	if r.status == 0 {
		return "?"
	}
	return fmt.Sprintf("%d %s %s", r.status, r.tag, head(r.body))
}

// history is a list of requests and their responses. A request without a response never ends.
type history []porcupine.Operation

// model returns the model of a store that carries out one request after the other. It returns
// an error unless entity tags are equal exactly if documents are.
func (h history) model() (porcupine.Model, error) {
	tags, documents := map[string]string{}, map[string]string{} // each by the other
	for _, op := range h {
		r := op.Output.(replied)
		if r.tag == "" || r.body == "" {
			continue
		}
		if tag := tags[r.body]; tag != "" && tag != r.tag {
			return porcupine.Model{}, fmt.Errorf("%s and %s are both the entity tag of\n%s", tag, r.tag, r.body)
		}
		if document := documents[r.tag]; document != "" && document != r.body {
			return porcupine.Model{}, fmt.Errorf("%s is the entity tag of both\n%s\n%s", r.tag, document, r.body)
		}
		tags[r.body], documents[r.tag] = r.tag, r.body
	}
	return porcupine.Model{
		Partition: byContract,
		Init:      func() any { return few{} },
		Step: func(state, input, output any) (bool, any) {
			f, q, r := state.(few), input.(asked), output.(replied)
			if q.method == "LIST" {
				return r.status == http.StatusOK && r.body == f.list(), f
			}
			tag := tags[f[q.contract].document(q.contract)]
			status, then := q.answer(f[q.contract], tag)
			f[q.contract] = then
			switch {
			case r.status == 0: // whatever became of it
				return true, f
			case status == http.StatusOK || status == http.StatusCreated:
				return r.status == status && r.body == then.document(q.contract) && r.tag != "", f
			case status == http.StatusNotModified:
				return r.status == status && r.tag == tag, f
			}
			return r.status == status && r.tag == "", f
		},
		DescribeOperation: func(input, output any) string { return fmt.Sprint(input, " -> ", output) },
		DescribeState:     func(state any) string { return state.(few).list() },
	}, nil
}

// byContract splits a history in which no request concerns several contracts, so that the
// checker has fewer orders to try.
func byContract(h []porcupine.Operation) [][]porcupine.Operation {
	parts := make([][]porcupine.Operation, len(fewContracts))
	for _, op := range h {
		q := op.Input.(asked)
		if q.method == "LIST" {
			return [][]porcupine.Operation{h}
		}
		parts[q.contract] = append(parts[q.contract], op)
	}
	return parts
}

// checkLimit is the time limit of the checker, which usually takes milliseconds.
const checkLimit = 2 * time.Minute

func (h history) check(t testing.TB, seed uint64) {
	t.Helper()
	model, err := h.model()
	if err != nil {
		t.Fatalf("seed %d: %v", seed, err)
	}
	result, info := porcupine.CheckOperationsVerbose(model, h, checkLimit)
	if result == porcupine.Ok {
		return
	}
	path := filepath.Join(os.TempDir(), fmt.Sprintf("energy-contracts-history-%d.html", seed))
	if err := porcupine.VisualizePath(model, info, path); err != nil {
		t.Error(err)
	}
	t.Errorf("seed %d: that %d requests could have been answered so one after the other is %s; open %s in a browser", seed, len(h), result, path)
}

func TestHistoryIsWhatTheModelSays(t *testing.T) {
	t.Parallel()
	const a, b = 0, 1
	x, y := map[string]string{"supplier": "x"}, map[string]string{"supplier": "y"}
	meter := map[string]string{"meter_id": "1"}
	heldX, heldY := held{true, "x", ""}, held{true, "y", ""}
	tag := func(contract int, h held) string { return "tag of " + h.document(contract) }
	is := func(status, contract int, h held) replied {
		return replied{status, tag(contract, h), h.document(contract)}
	}
	type op struct {
		from, to int64
		asked
		replied
	}
	made := op{1, 2, asked{method: "PUT", members: x, ifNoneMatch: "*"}, is(201, a, heldX)}
	get := func(from, to int64, r replied) op { return op{from, to, asked{method: "GET"}, r} }
	put := func(from, to int64, members map[string]string, ifMatch string, r replied) op {
		return op{from, to, asked{method: "PUT", members: members, ifMatch: ifMatch}, r}
	}
	patch := func(from, to int64, members map[string]string, r replied) op {
		return op{from, to, asked{method: "PATCH", members: members}, r}
	}
	deleted := func(from, to int64, r replied) op { return op{from, to, asked{method: "DELETE"}, r} }
	const never = math.MaxInt64
	gone, failed, unchanged := replied{status: 204}, replied{status: 412}, replied{304, tag(a, heldX), ""}
	for _, tt := range []struct {
		name  string
		right bool
		ops   []op
	}{
		{"what is made is read", true, []op{made, get(3, 4, is(200, a, heldX))}},
		{"a read at the same time as a write is of before", true, []op{made, put(3, 6, y, "", is(200, a, heldY)), get(4, 5, is(200, a, heldX))}},
		{"a read at the same time as a write is of after", true, []op{made, put(3, 6, y, "", is(200, a, heldY)), get(4, 5, is(200, a, heldY))}},
		{"a read is of before a write that was answered", false, []op{made, put(3, 4, y, "", is(200, a, heldY)), get(5, 6, is(200, a, heldX))}},
		{"a read is of after a write, and then one of before", false, []op{made, put(3, 9, y, "", is(200, a, heldY)), get(4, 5, is(200, a, heldY)), get(6, 7, is(200, a, heldX))}},
		{"a read is of what nobody wrote", false, []op{made, get(3, 4, is(200, a, heldY))}},

		{"of two writes with one tag one fails", true, []op{made, put(3, 6, y, tag(a, heldX), is(200, a, heldY)), put(4, 5, meter, tag(a, heldX), failed)}},
		{"of two writes with one tag none fails: a lost update", false, []op{made, put(3, 6, y, tag(a, heldX), is(200, a, heldY)), put(4, 5, meter, tag(a, heldX), is(200, a, held{true, "", "1"}))}},
		{"a write fails though its tag stands", false, []op{made, put(3, 4, y, tag(a, heldX), failed)}},
		{"a tag stands again when the document is again the same", true, []op{made, put(3, 4, y, "", is(200, a, heldY)), put(5, 6, x, "", is(200, a, heldX)), put(7, 8, y, tag(a, heldX), is(200, a, heldY))}},
		{"a tag stands no more when the document is another", false, []op{made, put(3, 4, y, "", is(200, a, heldY)), put(5, 6, x, tag(a, heldX), is(200, a, heldX))}},
		{"one document has two tags", false, []op{made, get(3, 4, replied{200, "another", heldX.document(a)})}},
		{"two documents have one tag", false, []op{made, put(3, 4, y, "", replied{200, tag(a, heldX), heldY.document(a)})}},

		{"patches at the same time are both there", true, []op{made, patch(3, 6, y, is(200, a, heldY)), patch(4, 5, meter, is(200, a, held{true, "y", "1"}))}},
		{"patches at the same time do not see each other: a lost update", false, []op{made, patch(3, 6, y, is(200, a, heldY)), patch(4, 5, meter, is(200, a, held{true, "x", "1"}))}},
		{"a patch with null removes", true, []op{made, patch(3, 4, map[string]string{"supplier": ""}, is(200, a, held{true, "", ""}))}},
		{"a patch changes what it does not name", false, []op{made, patch(3, 4, meter, is(200, a, held{true, "", "1"}))}},

		{"what is deleted is gone", true, []op{made, deleted(3, 4, gone), get(5, 6, replied{status: 404}), deleted(7, 8, replied{status: 404})}},
		{"what is deleted is there again", false, []op{made, deleted(3, 4, gone), get(5, 6, is(200, a, heldX))}},
		{"one contract is deleted twice", false, []op{made, deleted(3, 6, gone), deleted(4, 5, gone)}},
		{"what is there is not found", false, []op{made, get(3, 4, replied{status: 404})}},
		{"a replacement makes what is not there", false, []op{put(1, 2, x, "", is(201, a, heldX))}},
		{"a replacement of nothing is answered as one", false, []op{put(1, 2, x, "", is(200, a, heldX))}},
		{"one contract is made twice", false, []op{made, {1, 2, made.asked, made.replied}}},
		{"one contract is made, and not again", true, []op{made, {1, 2, made.asked, failed}}},

		{"what is known has not changed", true, []op{made, {3, 4, asked{method: "GET", ifNoneMatch: tag(a, heldX)}, unchanged}}},
		{"what is known has changed, and is said not to", false, []op{made, put(3, 4, y, "", is(200, a, heldY)), {5, 6, asked{method: "GET", ifNoneMatch: tag(a, heldX)}, unchanged}}},
		{"what is known has not changed, and is sent", false, []op{made, {3, 4, asked{method: "GET", ifNoneMatch: tag(a, heldX)}, is(200, a, heldX)}}},

		{"what was not answered happened", true, []op{made, put(3, never, y, "", replied{}), get(4, 5, is(200, a, heldX)), get(6, 7, is(200, a, heldY))}},
		{"what was not answered did not happen", true, []op{made, put(3, never, y, "", replied{}), get(4, 5, is(200, a, heldX))}},
		{"what was not answered happened, and then did not", false, []op{made, put(3, never, y, "", replied{}), get(4, 5, is(200, a, heldY)), get(6, 7, is(200, a, heldX))}},
		{"what was not answered happened before it was sent", false, []op{made, get(3, 4, is(200, a, heldY)), put(5, never, y, "", replied{})}},

		{"a list is of one instant", true, []op{made, {3, 4, asked{method: "PUT", contract: b, members: x, ifNoneMatch: "*"}, is(201, b, heldX)},
			{5, 6, asked{method: "LIST"}, replied{200, "", few{heldX, heldX}.list()}}}},
		{"a list is of two instants", false, []op{made, put(3, 4, y, "", is(200, a, heldY)), {5, 6, asked{method: "PUT", contract: b, members: x, ifNoneMatch: "*"}, is(201, b, heldX)},
			{1, 7, asked{method: "LIST"}, replied{200, "", few{heldX, heldX}.list()}}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var h history
			for i, op := range tt.ops {
				h = append(h, porcupine.Operation{ClientId: i, Input: op.asked, Call: op.from, Output: op.replied, Return: op.to})
			}
			model, err := h.model()
			if right := err == nil && porcupine.CheckOperations(model, h); right != tt.right {
				t.Errorf("it is %v that this can be, want %v: %v", right, tt.right, err)
			}
		})
	}
}

// historyKind says how the clients of a history behave.
type historyKind struct {
	name          string
	clients, each int  // that ask at the same time, and how often
	lists         bool // some ask for the list, for which all contracts must be looked at together
	killed        bool // the service is, and started again
}

// historian is a number of concurrent clients and the history of their requests.
type historian struct {
	historyKind
	bearer    string
	base      atomic.Pointer[string] // of the service
	restarted chan struct{}          // closed when it has been killed and started again
	began     time.Time
	answered  atomic.Int64

	mu sync.Mutex
	history
}

func TestAnswersAreThoseOfOneThingAfterTheOther(t *testing.T) {
	long(t)
	t.Parallel()
	for _, kind := range []historyKind{
		{name: "of single contracts", clients: 12, each: 25},
		{name: "of lists too", clients: 8, each: 25, lists: true},
		{name: "with a kill in the midst", clients: 12, each: 25, killed: true},
	} {
		t.Run(kind.name, func(t *testing.T) {
			t.Parallel()
			for range servicetest.Amount(2, 200) {
				checkHistory(t, kind)
			}
		})
	}
}

// checkHistory runs the clients of a kind and checks their history.
func checkHistory(t *testing.T, kind historyKind) {
	t.Helper()
	seed := rand.Uint64()
	db := shortPath(t)
	p := startProcess(t, nil, "--demo", "--db", db)
	h := &historian{historyKind: kind, bearer: "Bearer " + token(t, p.URL, "demo", "demo-secret"), restarted: make(chan struct{}), began: time.Now()}
	h.base.Store(&p.URL)
	var wg sync.WaitGroup
	for client := range h.clients {
		random := rand.New(rand.NewPCG(seed, uint64(client)))
		wg.Go(func() { h.client(t, client, random) })
	}
	if h.killed {
		waitUntil(t, answerTimeout, "the service is in the midst of it", func() error {
			if n := int(h.answered.Load()); n < h.clients*h.each/3 {
				return fmt.Errorf("%d answers", n)
			}
			return nil
		})
		p.Kill(t)
		p = startProcess(t, nil, "--demo", "--db", db)
		h.base.Store(&p.URL)
		close(h.restarted)
	}
	wg.Wait()
	h.check(t, seed)
	if err := p.Terminate(t); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, p.Stderr)
	}
}

// client sends random requests.
func (h *historian) client(t testing.TB, id int, random *rand.Rand) {
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	c := &http.Client{Transport: transport, Timeout: answerTimeout}
	var known [len(fewContracts)]string // the last entity tags that it saw
	lost := false                       // it had no answer, once
	for n := range h.each {
		q := h.choose(random, known, fmt.Sprintf("%d.%d", id, n))
		r, err := h.ask(c, id, q)
		switch {
		case err != nil:
			t.Error(err)
			return
		case r.status == 0 && (!h.killed || lost):
			t.Errorf("%v has no answer", q)
			return
		case r.status == 0:
			<-h.restarted
			lost = true
			id += h.clients // this one is busy for ever
		case r.tag != "":
			known[q.contract] = r.tag
		}
	}
}

// choose returns a random request. Its entity tag, if it has one, is a known one. Its content
// often equals an earlier one, so that documents repeat; otherwise it is unique.
func (h *historian) choose(random *rand.Rand, known [len(fewContracts)]string, name string) (q asked) {
	q.contract = random.IntN(len(fewContracts))
	tag := known[q.contract]
	if tag == "" {
		tag = `"0000000000000000"`
	}
	if h.lists && random.IntN(4) == 0 {
		return asked{method: "LIST"}
	}
	switch n := random.IntN(100); {
	case n < 30:
		q.method = "GET"
	case n < 55:
		q.method = "PUT"
	case n < 90:
		q.method = "PATCH"
	default:
		q.method = "DELETE"
	}
	switch n := random.IntN(100); {
	case n < 40:
		q.ifMatch = tag
	case n < 45:
		q.ifMatch = "*"
	case n < 55:
		q.ifNoneMatch = tag
	case n < 60 || q.method == "PUT" && n < 80:
		q.ifNoneMatch = "*"
	}
	if q.method == "PUT" || q.method == "PATCH" {
		q.members = map[string]string{}
		for _, member := range []string{"supplier", "meter_id"} {
			if random.IntN(2) > 0 {
				q.members[member] = []string{"", "a", "b", name, name}[random.IntN(5)]
			}
		}
	}
	return q
}

// ask sends a request and records the response. It returns an error if the response is not as
// openapi.json describes it.
func (h *historian) ask(c *http.Client, id int, q asked) (r replied, err error) {
	method, url := q.method, contractsURL(*h.base.Load(), demoOrg, fewUser)
	if q.method == "LIST" {
		method = "GET"
	} else {
		url += "/" + fewContracts[q.contract]
	}
	req, err := http.NewRequest(method, url, strings.NewReader(q.content()))
	if err != nil {
		return r, err
	}
	req.Header.Set("Authorization", h.bearer)
	for name, value := range map[string]string{"If-Match": q.ifMatch, "If-None-Match": q.ifNoneMatch} {
		if value != "" {
			req.Header.Set(name, value)
		}
	}
	switch q.method {
	case "PUT":
		req.Header.Set("Content-Type", "application/json")
	case "PATCH":
		req.Header.Set("Content-Type", mergePatchType)
	}
	op := porcupine.Operation{ClientId: id, Input: q, Call: int64(time.Since(h.began)), Return: math.MaxInt64}
	if resp, body, broken := answerOf(c, req); broken == nil {
		op.Return = int64(time.Since(h.began)) // and only then is it looked at
		r = replied{resp.StatusCode, resp.Header.Get("ETag"), body}
		err = described().Hold(req, resp, []byte(body))
		h.answered.Add(1)
	}
	op.Output = r
	if r.status != 0 || method != "GET" { // a read that was not answered is as if it were not
		h.mu.Lock()
		defer h.mu.Unlock()
		h.history = append(h.history, op)
	}
	return r, err
}

func TestNoUpdateOfClientsThatUseETagsIsLost(t *testing.T) {
	long(t)
	t.Parallel()
	const clients = 10
	each := servicetest.Amount(5, 200)
	p := startProcess(t, nil, "--demo", "--db", shortPath(t))
	c := client(p.URL, "demo", "demo-secret")
	url := contractsURL(p.URL, demoOrg, demoUser) + "/" + demoContract
	counter := func(content string) int {
		var doc struct {
			N int `json:"supplier,string"`
		}
		if err := json.Unmarshal([]byte(content), &doc); err != nil {
			t.Errorf("%v: %s", err, content)
		}
		return doc.N
	}
	do(t, c, "PUT", url, jsonBody, `{"supplier":"0"}`)
	var counted, refused atomic.Int64
	var wg sync.WaitGroup
	for i := range clients {
		method, contentType := "PUT", "application/json"
		if i%2 > 0 {
			method, contentType = "PATCH", mergePatchType
		}
		wg.Go(func() {
			for done := 0; done < each; {
				was, content := do(t, c, "GET", url, nil, "")
				n := counter(content) + 1
				header := http.Header{"Content-Type": {contentType}, "If-Match": {was.Header.Get("ETag")}}
				resp, got := do(t, c, method, url, header, fmt.Sprintf(`{"supplier":"%d"}`, n))
				switch {
				case resp.StatusCode == http.StatusPreconditionFailed:
					refused.Add(1)
				case resp.StatusCode == http.StatusOK && counter(got) == n:
					counted.Add(1)
					done++
				default:
					t.Errorf("%s of %d: %s\n%s", method, n, resp.Status, got)
					return
				}
			}
		})
	}
	wg.Wait()
	_, content := do(t, c, "GET", url, nil, "")
	if n := counter(content); n != int(counted.Load()) || n != clients*each {
		t.Errorf("%d times the counter was counted up, %d were answered 200: it is %d", clients*each, counted.Load(), n)
	}
	if refused.Load() == 0 {
		t.Error("no client was ever refused, so none came between another's read and write")
	}
}
