package main

// These tests cover the cases that a story cannot express: the files of the seed page,
// large bodies, concurrent requests, incomplete requests, and responses longer than a page.

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"mime"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf16"

	"energy-contracts/internal/servicetest"

	"go.etcd.io/bbolt"
	"golang.org/x/oauth2/clientcredentials"
)

func TestSeedPageRequestGetsItsResponse(t *testing.T) {
	s := start(t, "--demo")
	c := client(s.url, "demo", "demo-secret")
	url := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
	resp, got := do(t, c, "PUT", url, jsonBody, readFile(t, "testdata/seed.request.json"))
	// The seed page uses the same placeholder, and so the same id, for building and contract.
	want := compact(t, readFile(t, "testdata/seed.response.json"))
	if resp.StatusCode != 200 || got != want {
		t.Errorf("got %s\n%s\nwant 200\n%s", resp.Status, got, want)
	}
}

func TestDemoDataHasContractsThatClientsRelyOn(t *testing.T) {
	s := start(t, "--demo")
	_, list := do(t, client(s.url, "demo", "demo-secret"), "GET", contractsURL(s.url, demoOrg, demoUser), nil, "")
	var contracts []struct {
		Type     string `json:"energy_contract_type"`
		ID       string
		Building *string
		Currency string                    `json:"currency_energy_price"`
		Prices   []struct{ Price float64 } `json:"energy_prices"`
	}
	if err := json.Unmarshal([]byte(list), &contracts); err != nil {
		t.Fatal(err)
	}
	var yearly, monthly, day bool
	for _, c := range contracts {
		negative := 0
		for _, p := range c.Prices {
			if p.Price < 0 {
				negative++
			}
		}
		yearly = yearly || c.Type == "yearly" && len(c.Prices) == 1
		monthly = monthly || c.Type == "monthly"
		day = day || c.Type == "spot_hourly" && len(c.Prices) == 24 && negative == 2 && c.Currency == "EUR" && c.Building != nil
	}
	if contracts[0].ID != demoContract || len(contracts) < 4 || !yearly || !monthly || !day {
		t.Errorf("the first user's contracts: yearly %v, monthly %v, a day of spot prices %v\n%s", yearly, monthly, day, list)
	}
	resp, list := do(t, client(s.url, "demo", "demo-secret"), "GET", contractsURL(s.url, demoOrg, "7b1d9f0e-2c44-4d5a-8f3b-90ce51a7d6b2"), nil, "")
	if resp.StatusCode != 200 || strings.Count(list, `"id"`) != 1 {
		t.Errorf("the second user's contracts: %s\n%s", resp.Status, list)
	}
}

func TestYearOfHourlyPricesIsReturned(t *testing.T) {
	s := start(t, "--demo")
	c := client(s.url, "demo", "demo-secret")
	url := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
	resp, put := do(t, c, "PUT", url, jsonBody, year(8760))
	if resp.StatusCode != 200 {
		t.Fatalf("PUT: %s\n%.500s", resp.Status, put)
	}
	resp, got := do(t, c, "GET", url, nil, "")
	if resp.StatusCode != 200 || got != put || strings.Count(got, `"price"`) != 8760 {
		t.Errorf("GET: %s, %d bytes, %d prices; PUT returned %d bytes", resp.Status, len(got), strings.Count(got, `"price"`), len(put))
	}
}

func TestBodyTooLarge(t *testing.T) {
	s := start(t, "--demo", "--max-body", "1000")
	c := client(s.url, "demo", "demo-secret")
	url := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
	exact := `{"supplier":"a"` + strings.Repeat(" ", 1000-len(`{"supplier":"a"}`)) + "}"
	for _, tt := range []struct {
		name   string
		body   io.Reader
		status int
	}{
		{"at the limit", strings.NewReader(exact), 200},
		{"over the limit by Content-Length", strings.NewReader(exact + " "), 413},
		{"at the limit, in chunks", io.MultiReader(strings.NewReader(exact)), 200},
		{"over the limit, in chunks", io.MultiReader(strings.NewReader(exact), strings.NewReader(" ")), 413},
		{"before its JSON is parsed", strings.NewReader(strings.Repeat("?", 1001)), 413},
	} {
		t.Run(tt.name, func(t *testing.T) {
			req, err := http.NewRequest("PUT", url, tt.body)
			if err != nil {
				t.Fatal(err)
			}
			req.Header = jsonBody.Clone()
			resp, err := c.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			got, _ := io.ReadAll(resp.Body)
			if tt.status == 200 && resp.StatusCode == 200 {
				return
			}
			p := wantProblem(t, resp, string(got), tt.status)
			if want := "The content may have at most 1000 bytes; send fewer prices, or start the service with a larger --max-body."; p.Detail != want {
				t.Errorf("detail %q, want %q", p.Detail, want)
			}
		})
	}
}

func TestFaultsBeyondAHundredAreCounted(t *testing.T) {
	s := start(t, "--demo")
	c := client(s.url, "demo", "demo-secret")
	url := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
	for _, tt := range []struct {
		name, entry string
		entries     int
		more        string
	}{
		{"exactly a hundred", `{"price":"1","timestamp":"2023-11-01T00:00:00Z"}`, 51, ""},
		{"faults of values", `{"price":"1","timestamp":1}`, 2000, "and 3900 more"},
		{"faults of types", `7`, 2000, "and 1900 more"},
		{"faults of both", `{"price":"1","timestamp":1,"x":1}`, 2000, "and 5900 more"},
		{"faults in more entries than are kept", `{}`, 10000, "and 19900 more"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			body := `{"energy_prices":[` + strings.Repeat(tt.entry+",", tt.entries-1) + tt.entry + "]}"
			resp, got := do(t, c, "PUT", url, jsonBody, body)
			p := wantProblem(t, resp, got, 422)
			switch {
			case tt.more == "" && len(p.Errors) > 101:
				t.Errorf("%d errors", len(p.Errors))
			case tt.more != "" && (len(p.Errors) != 101 || p.Errors[100].Detail != tt.more || p.Errors[100].Pointer != "#"):
				t.Errorf("%d errors, the last is %+v, want %q", len(p.Errors), p.Errors[len(p.Errors)-1], tt.more)
			}
		})
	}
}

// The shortest prices are those whose timestamps leave out what can be left out. The parser keeps
// all that fit into a body.
func TestShortestPricesAreAllStored(t *testing.T) {
	s := start(t, "--demo")
	c := client(s.url, "demo", "demo-secret")
	const prices = 20_000
	at := time.Date(2023, 11, 1, 0, 0, 0, 0, time.UTC)
	var body, want []string
	for i := range prices {
		text := at.Add(time.Duration(i) * time.Hour).Format("2006-01-02T15:04")
		body = append(body, `{"price":1,"timestamp":"`+text+`Z"}`)
		want = append(want, `{"price":1,"timestamp":"`+text+`:00Z"}`)
	}
	resp, got := do(t, c, "PUT", contractsURL(s.url, demoOrg, demoUser)+"/"+demoContract, jsonBody, `{"currency_energy_price":"EUR","energy_prices":[`+strings.Join(body, ",")+`]}`)
	if resp.StatusCode != 200 || !strings.Contains(got, `[`+strings.Join(want, ",")+`]`) {
		t.Errorf("%s, %d of %d prices\n%s", resp.Status, strings.Count(got, `"price"`), prices, head(got))
	}
}

// The names of an object are remembered while it is parsed, so that their number must be bounded.
func TestObjectWithMoreThanAThousandMembersIsRefused(t *testing.T) {
	s := start(t, "--demo")
	c := client(s.url, "demo", "demo-secret")
	members := func(n int) string {
		var b strings.Builder
		for i := range n {
			fmt.Fprintf(&b, `,"m%d":1`, i)
		}
		return b.String()[1:]
	}
	for _, tt := range []struct{ name, before, after, pointer string }{
		{"a contract", "{", "}", "#"},
		{"an unknown member", `{"x":{`, "}}", "#/x"},
		{"a price", `{"energy_prices":[{"price":1},{`, "}]}", "#/energy_prices/1"},
		{"an object in place of a price's number", `{"energy_prices":[{"price":{`, "}}]}", "#/energy_prices/0/price"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, got := do(t, c, "PUT", contractsURL(s.url, demoOrg, demoUser)+"/"+demoContract, jsonBody, tt.before+members(1000)+tt.after)
			wantProblem(t, resp, got, 422)
			body := tt.before + members(1001) + tt.after
			at := strings.Index(body, `"m1000"`) + len(`"m1000"`)
			resp, got = do(t, c, "PUT", contractsURL(s.url, demoOrg, demoUser)+"/"+demoContract, jsonBody, body)
			failure{
				Status: 400, Detail: "The request cannot be parsed; see errors.",
				Errors: fmt.Sprintf(`,"errors":[{"pointer":"%s/m1000","detail":"at byte %d: more members than an object of a contract ever has"}]`, tt.pointer, at),
			}.Want(t, resp, got)
		})
	}
}

// Long values are refused or stored without a copy of them for each look at them.
func TestLongValuesAreNamedByTheirBeginning(t *testing.T) {
	s := start(t, "--demo")
	c := client(s.url, "demo", "demo-secret")
	long := strings.Repeat("å1", 50_000)
	for _, tt := range []struct{ name, body, pointer, detail string }{
		{"a currency", `{"energy_prices":[{"price":1}],"currency_energy_price":"` + long + `"}`, "#/currency_energy_price", "must be at most 100 characters, has 100000"},
		{"a type", `{"energy_contract_type":"` + long + `"}`, "#/energy_contract_type", `must be spot_hourly, monthly, yearly or null, is \"å1å1å1å1å1å1å1å1å1å1å\"… (100000 characters)`},
		{"a timestamp", `{"energy_prices":[{"price":1,"timestamp":"2023-11-01 00:00` + long + `Z"}]}`, "#/energy_prices/0/timestamp", `must be an RFC 3339 time with an offset such as 2023-11-01T00:00:00+00:00, is \"2023-11-01 00:00å1å1å\"… (100017 characters)`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			resp, got := do(t, c, "PUT", contractsURL(s.url, demoOrg, demoUser)+"/"+demoContract, jsonBody, tt.body)
			failure{
				Status: 422, Detail: "The request breaks rules of the API; see errors.",
				Errors: `,"errors":[{"pointer":"` + tt.pointer + `","detail":"` + tt.detail + `"}]`,
			}.Want(t, resp, got)
		})
	}
}

func TestIdempotencyKeyExpiresAfterADay(t *testing.T) {
	s := start(t, "--demo")
	url := contractsURL(s.url, demoOrg, demoUser)
	header := http.Header{"Content-Type": {"application/json"}, "Idempotency-Key": {`"a"`}}
	post := func() string {
		resp, got := do(t, http.DefaultClient, "POST", url, with(header, "Authorization", "Bearer "+token(t, s.url, "demo", "demo-secret")), `{}`)
		if resp.StatusCode != 200 {
			t.Fatalf("POST: %s\n%s", resp.Status, got)
		}
		return got
	}
	first := post()
	s.clock.move(24*time.Hour - time.Minute)
	if again := post(); again != first {
		t.Errorf("after 23 h 59 min: got a different response\n%s\nfirst\n%s", again, first)
	}
	s.clock.move(2 * time.Minute)
	if again := post(); again == first {
		t.Errorf("after 24 h 1 min: got the first response again\n%s", again)
	}
}

func TestIdempotencyKeyOfARequestInFlightConflicts(t *testing.T) {
	s := start(t, "--demo")
	url := contractsURL(s.url, demoOrg, demoUser)
	header := http.Header{
		"Content-Type": {"application/json"}, "Idempotency-Key": {`"a"`},
		"Authorization": {"Bearer " + token(t, s.url, "demo", "demo-secret")},
	}
	body, half := io.Pipe()
	first := make(chan *http.Response, 1)
	go func() {
		req, _ := http.NewRequest("POST", url, body)
		req.Header = header.Clone()
		// The server sends 100 Continue when the handler has locked the key and reads the body.
		req.Header.Set("Expect", "100-continue")
		resp, err := (&http.Client{Transport: validated{Transport: &http.Transport{ExpectContinueTimeout: time.Minute}}}).Do(req)
		if err != nil {
			t.Error(err)
		}
		first <- resp
	}()
	if _, err := half.Write([]byte("{")); err != nil { // returns when the client has begun to send the body
		t.Fatal(err)
	}
	resp, got := do(t, http.DefaultClient, "POST", url, header, `{}`)
	wantProblem(t, resp, got, 409)
	if resp.Header.Get("Retry-After") != "1" {
		t.Errorf("Retry-After: %q", resp.Header.Get("Retry-After"))
	}
	if _, err := half.Write([]byte("}")); err != nil {
		t.Fatal(err)
	}
	half.Close()
	r := <-first
	if r == nil {
		t.FailNow()
	}
	defer r.Body.Close()
	want, _ := io.ReadAll(r.Body)
	if resp, got := do(t, http.DefaultClient, "POST", url, header, `{}`); r.StatusCode != 200 || resp.StatusCode != 200 || got != string(want) {
		t.Errorf("first %s\n%s\nagain %s\n%s", r.Status, want, resp.Status, got)
	}
}

func TestListLongerThanAPage(t *testing.T) {
	slow(t)
	s := start(t, "--demo")
	c := client(s.url, "demo", "demo-secret")
	url := contractsURL(s.url, demoOrg, "00000000-0000-4000-8000-000000000001")
	body := year(500) // about 27 KB
	var want []string
	for range 40 {
		resp, got := do(t, c, "POST", url, jsonBody, body)
		if resp.StatusCode != 200 {
			t.Fatalf("POST: %s\n%.300s", resp.Status, got)
		}
		want = append(want, got)
	}
	for _, tt := range []struct {
		query string
		want  []string
		next  bool
	}{
		{"", want, false}, {"?limit=1000", want, false}, {"?limit=40", want, false}, {"?limit=39", want[:39], true}, {"?limit=1", want[:1], true},
	} {
		t.Run("list"+tt.query, func(t *testing.T) {
			resp, got := do(t, c, "GET", url+tt.query, nil, "")
			if resp.StatusCode != 200 || got != "["+strings.Join(tt.want, ",")+"]" || (resp.Header.Get("Link") != "") != tt.next {
				t.Errorf("%s, Link %q, %d bytes, want %d contracts", resp.Status, resp.Header.Get("Link"), len(got), len(tt.want))
			}
			head, _ := do(t, c, "HEAD", url+tt.query, nil, "")
			if head.StatusCode != 200 || head.Header.Get("Link") != resp.Header.Get("Link") {
				t.Errorf("HEAD: %s, Link %q", head.Status, head.Header.Get("Link"))
			}
		})
	}
	t.Run("following its links", func(t *testing.T) {
		var got []string
		for at := url + "?limit=7"; at != ""; {
			resp, page := do(t, c, "GET", at, nil, "")
			var docs []json.RawMessage
			if err := json.Unmarshal([]byte(page), &docs); err != nil || resp.StatusCode != 200 {
				t.Fatalf("%s: %s, %v", at, resp.Status, err)
			}
			for _, d := range docs {
				got = append(got, string(d))
			}
			at = servicetest.Next(t, resp)
		}
		if strings.Join(got, ",") != strings.Join(want, ",") {
			t.Errorf("got %d contracts, want %d", len(got), len(want))
		}
	})
}

func TestConcurrentPatchesOfDifferentMembersAreKept(t *testing.T) {
	s := start(t, "--demo")
	c := client(s.url, "demo", "demo-secret")
	url := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
	do(t, c, "PUT", url, jsonBody, `{}`)
	var wg sync.WaitGroup
	patch := http.Header{"Content-Type": {"application/merge-patch+json"}}
	for _, member := range []string{"supplier", "meter_id", "currency_energy_price"} {
		wg.Go(func() {
			for i := range 20 {
				body := fmt.Sprintf(`{"%s":"%d"}`, member, i)
				if resp, got := do(t, c, "PATCH", url, patch, body); resp.StatusCode != 200 || !strings.Contains(got, strings.Trim(body, "{}")) {
					t.Errorf("PATCH %s: %s\n%s", body, resp.Status, got)
				}
			}
		})
	}
	wg.Wait()
	_, got := do(t, c, "GET", url, nil, "")
	if !strings.Contains(got, `"meter_id":"19","supplier":"19","currency_energy_price":"19"`) {
		t.Errorf("a patch was lost\n%s", got)
	}
}

func TestTokensRequestedByAThirdPartyLibrary(t *testing.T) {
	s := start(t, "--demo")
	for _, tt := range []struct {
		name           string
		id, secret     string
		scopes         []string
		get, put       int
		tokenErrorCode string
	}{
		{"all scopes", "demo", "demo-secret", nil, 200, 200, ""},
		{"read only", "demo", "demo-secret", []string{"read"}, 200, 403, ""},
		{"write only", "demo", "demo-secret", []string{"write"}, 403, 200, ""},
		{"another organization", "demo-other", "demo-other-secret", nil, 403, 403, ""},
		{"wrong secret", "demo", "demo-other-secret", nil, 0, 0, "invalid_client"},
		{"unknown scope", "demo", "demo-secret", []string{"read", "admin"}, 0, 0, "invalid_scope"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := clientcredentials.Config{ClientID: tt.id, ClientSecret: tt.secret, Scopes: tt.scopes, TokenURL: s.url + "/oauth2/token/"}
			_, err := c.Token(context.Background())
			if tt.tokenErrorCode != "" {
				if err == nil || !strings.Contains(err.Error(), `"`+tt.tokenErrorCode+`"`) {
					t.Errorf("got error %v, want %s", err, tt.tokenErrorCode)
				}
				return
			}
			url := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
			if resp, got := do(t, c.Client(context.Background()), "GET", url, nil, ""); resp.StatusCode != tt.get {
				t.Errorf("GET: %s, want %d\n%s", resp.Status, tt.get, got)
			}
			if resp, got := do(t, c.Client(context.Background()), "PUT", url, jsonBody, "{}"); resp.StatusCode != tt.put {
				t.Errorf("PUT: %s, want %d\n%s", resp.Status, tt.put, got)
			}
		})
	}
}

func TestTokenRequestTooLarge(t *testing.T) {
	s := start(t, "--demo")
	resp, got := do(t, http.DefaultClient, "POST", s.url+"/oauth2/token/", http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}, strings.Repeat("a", 64<<10+1))
	if want := `{"error":"invalid_request","error_description":"The body may have at most 64 KiB."}`; resp.StatusCode != 413 || got != want {
		t.Errorf("got %s\n%s\nwant 413\n%s", resp.Status, got, want)
	}
}

func TestHeaderOfMoreThan16KiBIsRefused(t *testing.T) {
	s := start(t, "--demo")
	for size, status := range map[int]int{12 << 10: 200, 21 << 10: 431} {
		resp, _ := do(t, http.DefaultClient, "GET", s.url+"/healthz", http.Header{"X-Long": {strings.Repeat("a", size)}}, "")
		if resp.StatusCode != status {
			t.Errorf("a field of %d bytes: %s, want %d", size, resp.Status, status)
		}
	}
}

// PowerShell and some editors write UTF-16.
func TestTextInUTF16IsToldToBeSavedAsUTF8(t *testing.T) {
	s := start(t, "--demo")
	c := client(s.url, "demo", "demo-secret")
	contract := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
	for name, order := range map[string]binary.AppendByteOrder{"little": binary.LittleEndian, "big": binary.BigEndian} {
		for _, mark := range []string{"", "\uFEFF"} {
			encoded := func(text string) string {
				var b []byte
				for _, unit := range utf16.Encode([]rune(mark + text)) {
					b = order.AppendUint16(b, unit)
				}
				return string(b)
			}
			t.Run(fmt.Sprintf("%s endian, %d bytes of mark", name, 2*len([]rune(mark))), func(t *testing.T) {
				for _, method := range []string{"PUT", "PATCH"} {
					resp, got := do(t, c, method, contract, jsonBody, encoded(`{"supplier":"Helios Sähkö Oy"}`))
					failure{
						Status: 400, Detail: "The request cannot be parsed; see errors.",
						Errors: `,"errors":[{"pointer":"#","detail":"the text is in UTF-16; save it as UTF-8"}]`,
					}.Want(t, resp, got)
				}
				form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}}
				for _, body := range []string{"grant_type=client_credentials", `{"grant_type":"client_credentials"}`} {
					resp, got := do(t, http.DefaultClient, "POST", s.url+"/oauth2/token/", form, encoded(body))
					failure{Status: 400, Code: "invalid_request", Detail: "the body is in UTF-16; save it as UTF-8"}.Want(t, resp, got)
				}
			})
		}
	}
}

// The usual advice, to get the contract and decide again, would never end behind such a proxy.
func TestIfMatchThatACompressingProxyChangedIsNamed(t *testing.T) {
	s := start(t, "--demo")
	c := client(s.url, "demo", "demo-secret")
	contract := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
	resp, _ := do(t, c, "GET", contract, nil, "")
	tag := strings.Trim(resp.Header.Get("ETag"), `"`)
	const (
		changed = "If-Match does not name the current version of the contract; nothing was changed. Get the contract and decide again."
		altered = "If-Match has an entity tag that a compressing proxy has changed: it is weak (W/…) or has a suffix such as -gzip, and so never matches; nothing was changed. " +
			"Send the tag without W/ and the suffix, or configure the proxy not to compress the responses of this service."
	)
	for _, tt := range []struct{ ifMatch, detail string }{
		{`W/"` + tag + `"`, altered},    // nginx
		{`"` + tag + `-gzip"`, altered}, // Apache
		{`"` + tag + `-br"`, altered},
		{`"` + tag + `--gzip"`, altered}, // Jetty
		{`"` + tag + `;gzip"`, altered},
		{`W/"00000000000000000000000000000000"`, altered}, // it would not match either
		{`"00000000000000000000000000000000", "00000000000000000000000000000000-gzip"`, altered},
		{`"00000000000000000000000000000000"`, changed},
		{`"of-another-service"`, changed},
		{`"-gzip"`, changed},
	} {
		for _, method := range []string{"PUT", "PATCH", "DELETE", "GET"} {
			resp, got := do(t, c, method, contract, with(jsonBody, "If-Match", tt.ifMatch), "{}")
			failure{Status: 412, Detail: tt.detail}.Want(t, resp, got)
		}
	}
	if resp, got := do(t, c, "PUT", contract, with(jsonBody, "If-Match", `W/"`+tag+`", "`+tag+`"`), "{}"); resp.StatusCode != 200 {
		t.Errorf("with the unchanged tag beside it: %s\n%s", resp.Status, got)
	}
}

func TestBodyThatEndsEarlyChangesNothing(t *testing.T) {
	s := start(t, "--demo")
	conn, err := net.Dial("tcp", strings.TrimPrefix(s.url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	sent := fmt.Sprintf("PUT %s/%s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{}",
		contractsURL("", demoOrg, demoUser), demoContract, token(t, s.url, "demo", "demo-secret"))
	if _, err := io.WriteString(conn, sent); err != nil {
		t.Fatal(err)
	}
	if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	resp, got, err := described().Read(t, conn, sent)
	if err == nil { // net/http may also close the connection without a response
		wantProblem(t, resp, got, 400)
	}
	_, got = do(t, client(s.url, "demo", "demo-secret"), "GET", contractsURL(s.url, demoOrg, demoUser)+"/"+demoContract, nil, "")
	if !strings.Contains(got, "Nordlys") {
		t.Errorf("the contract changed\n%s", got)
	}
}

func TestCorruptDocumentIsA500ThatTheLogExplains(t *testing.T) {
	s := start(t, "--demo")
	s.stop()
	key := demoOrg + "/" + demoUser + "/" + demoContract
	db, err := bbolt.Open(s.db, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bbolt.Tx) error {
		b := tx.Bucket(bucketContracts)
		corrupt := bytes.Replace(b.Get([]byte(key)), []byte("0.1523"), []byte("0.1522"), 1)
		return b.Put([]byte(key), corrupt)
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	again := startOn(t, s.db, "--demo")
	c := client(again.url, "demo", "demo-secret")
	for _, path := range []string{"", "/" + demoContract} {
		resp, got := do(t, c, "GET", contractsURL(again.url, demoOrg, demoUser)+path, nil, "")
		p := wantProblem(t, resp, got, 500)
		if strings.Contains(got, again.db) || strings.Contains(got, key) {
			t.Errorf("the response has details that belong only in the log\n%s", got)
		}
		line := regexp.MustCompile(`(?m)^.*request=` + p.Instance + `.*$`).FindString(again.log.String())
		if !strings.Contains(line, key) || !strings.Contains(line, "level=ERROR") {
			t.Errorf("no ERROR line of the log has both the request id and the key\n%s", again.log)
		}
	}
	resp, got := do(t, c, "PUT", contractsURL(again.url, demoOrg, demoUser)+"/"+demoContract, jsonBody, "{}")
	if resp.StatusCode != 200 {
		t.Errorf("PUT that replaces it: %s\n%s", resp.Status, got)
	}
}

func TestLogHasOneLinePerRequestAndNoSecret(t *testing.T) {
	s := start(t, "--demo")
	text := token(t, s.url, "demo", "demo-secret")
	url := contractsURL(s.url, demoOrg, demoUser) + "/" + demoContract
	header := http.Header{"Content-Type": {"application/json"}, "Authorization": {"Bearer " + text}}
	before := strings.Count(s.log.String(), "msg=request")
	do(t, http.DefaultClient, "PUT", url+"?access_token="+text, header, `{"supplier":"In Confidence AB"}`)
	do(t, http.DefaultClient, "PUT", url, header, `{"supplier":7,"In Confidence AB":1}`)
	do(t, http.DefaultClient, "GET", s.url+"/"+text, nil, "")
	resp, _ := do(t, http.DefaultClient, "GET", url, header, "")
	s.stop()
	log := s.log.String()
	if n := strings.Count(log, "msg=request") - before; n != 4 {
		t.Errorf("%d lines for 4 requests", n)
	}
	want := regexp.MustCompile(`msg=request method=GET route=` + regexp.QuoteMeta(contractPath) + ` status=200 bytes=\d+ duration=\S+ request=` + resp.Header.Get("X-Request-ID") + ` client=demo\n`)
	if !want.MatchString(log) {
		t.Errorf("no log line matches %s", want)
	}
	for _, secret := range []string{text, "demo-secret", "In Confidence", "ZGVtbzpkZW1vLXNlY3JldA"} {
		if strings.Contains(log, secret) {
			t.Errorf("the log contains %q", secret)
		}
	}
	file := readFile(t, s.db)
	for _, secret := range []string{text, "demo-secret"} {
		if strings.Contains(file, secret) {
			t.Errorf("the database contains %q", secret)
		}
	}
}

// The level debug is for those who develop a client. At level info a line has nothing of this.
func TestLogAtDebugSaysWhyARequestWasRefused(t *testing.T) {
	contract := contractsURL("", demoOrg, demoUser) + "/" + demoContract
	const form = "application/x-www-form-urlencoded"
	for _, tt := range []struct {
		name, method, path string
		header             http.Header
		body               string
		status             int
		want               string // at the end of the line
	}{
		{"a path that is not there", "GET", "/energy-contracts/Secret?q=Secret", nil, "", 404,
			`path=/energy-contracts/Secret reason="There is nothing under this path; contracts are under /api/partners/v2.0/org/{org_id}/users/{user_id}/energy-contracts, and /api/partners/v2.0/docs describes the API."`},
		{"a token in the path", "GET", "/4bQ1yY6pUfLk7dW0nXvJc3sZt8rHa5mEoGi2wKqBz9N/x", nil, "", 404,
			`path=/…/x reason="There is nothing under this path; contracts are under /api/partners/v2.0/org/{org_id}/users/{user_id}/energy-contracts, and /api/partners/v2.0/docs describes the API."`},
		{"a contract that is not there", "DELETE", strings.Replace(contract, "3c90c3cc", "00000000", 1), nil, "", 404,
			`path=` + strings.Replace(contract, "3c90c3cc", "00000000", 1) + ` reason="This user has no energy contract with this id."`},
		{"several faults", "PUT", contract, jsonBody, `{"supplier":7,"meter_id":"Secret-Secret-Secret","energy_prices":[{"price":"Secret"},{"timestamp":"Secret"}],"building":"Secret"}`, 422,
			`path=` + contract + ` reason="The request breaks rules of the API; see errors." faults="[type #/supplier unknown_member #/building max #/meter_id price_number #/energy_prices/0/price timestamp_required #/energy_prices/0/timestamp price_required #/energy_prices/1/price timestamp_rfc3339 #/energy_prices/1/timestamp]"`},
		{"a token as a member", "PUT", contract, jsonBody, `{"4bQ1yY6pUfLk7dW0nXvJc3sZt8rHa5mEoGi2wKqBz9N":1}`, 422,
			`path=` + contract + ` reason="The request breaks rules of the API; see errors." faults="[unknown_member #/…]"`},
		{"ids and parameters", "GET", "/api/partners/v2.0/org/" + demoOrg + "/users/Secret/energy-contracts?limit=Secret", nil, "", 422,
			`path=/api/partners/v2.0/org/` + demoOrg + `/users/Secret/energy-contracts reason="The request breaks rules of the API; see errors." faults="[uuid user_id]"`},
		{"no JSON", "PUT", contract, jsonBody, `{"meter_id":Secret}`, 400,
			`path=` + contract + ` reason="The request cannot be parsed; see errors." faults="[json #/meter_id]"`},
		{"JSON that is cut off", "PUT", contract, jsonBody, `{"meter_id":"Secret`, 400,
			`path=` + contract + ` reason="The request cannot be parsed; see errors." faults="[cut_off #/meter_id]"`},
		{"a token as a media type", "PUT", contract, http.Header{"Content-Type": {"4bQ1yY6pUfLk7dW0nXvJc3sZt8rHa5mEoGi2wKqBz9N"}}, "{}", 415,
			`path=` + contract + ` reason="Content-Type must be application/json in UTF-8, is \"4bQ1yY6pUfLk7dW0nXvJc\"… (43 characters)."`},
		{"no token", "GET", contract, http.Header{"Authorization": {""}}, "", 401,
			`path=` + contract + ` reason="Send a token as Authorization: Bearer …; POST /oauth2/token/ issues one."`},
		{"another organization", "GET", strings.Replace(contract, demoOrg, demoOtherOrg, 1), nil, "", 403,
			`path=` + strings.Replace(contract, demoOrg, demoOtherOrg, 1) + ` reason="The token does not belong to the organization in the path."`},
		{"a wrong secret", "POST", "/oauth2/token/", http.Header{"Content-Type": {form}}, "client_id=demo&client_secret=Secret", 401,
			`path=/oauth2/token/ reason="invalid_client: the client is unknown, or its secret is wrong"`},
		{"a success", "GET", contract, nil, "", 200, `path=` + contract},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, level := range []string{"debug", "info"} {
				s := start(t, "--demo", "--log-level", level)
				header := http.Header{"Authorization": {"Bearer " + token(t, s.url, "demo", "demo-secret")}}
				if strings.HasPrefix(tt.path, "/oauth2/") {
					delete(header, "Authorization")
				}
				maps.Copy(header, tt.header)
				resp, got := do(t, http.DefaultClient, tt.method, s.url+tt.path, header, tt.body)
				if resp.StatusCode != tt.status {
					t.Errorf("got %s\n%s", resp.Status, got)
				}
				s.stop()
				line := regexp.MustCompile(`(?m)^.* request=` + resp.Header.Get("X-Request-ID") + `.*$`).FindString(s.log.String())
				_, rest, _ := strings.Cut(line, " path=")
				if level == "debug" && "path="+rest != tt.want || level == "info" && (line == "" || rest != "") {
					t.Errorf("at level %s the line is\n%s\nwant at level debug\n%s", level, line, tt.want)
				}
				if strings.Contains(strings.ReplaceAll(s.log.String(), "path="+strings.Split(tt.path, "?")[0], ""), "Secret") {
					t.Errorf("the log has a value of the request\n%s", s.log)
				}
			}
		})
	}
}

func TestHandlerPanicIsA500ThatTheLogExplains(t *testing.T) {
	store, err := Open(filepath.Join(t.TempDir(), "test.db"), time.Now, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	log := &lockedBuffer{}
	a, err := newAPI(store, time.Now, slog.New(slog.NewTextHandler(log, nil)), apiSettings{})
	if err != nil {
		t.Fatal(err)
	}
	a.public(http.MethodGet, "/panic", func(*exchange) (response, error) { panic("for the log only") })
	server := httptest.NewServer(a)
	defer server.Close()
	resp, got := do(t, http.DefaultClient, "GET", server.URL+"/panic", nil, "")
	p := wantProblem(t, resp, got, 500)
	if want := "Something is wrong with the service. Its log says more under this request id."; p.Detail != want {
		t.Errorf("detail %q, want %q", p.Detail, want)
	}
	line := regexp.MustCompile(`(?m)^.*request=` + p.Instance + `.*$`).FindString(log.String())
	if !strings.Contains(line, "for the log only") || !strings.Contains(line, "handler_test.go") {
		t.Errorf("the log line does not have the panic value and its stack trace\n%s", log)
	}
	if resp, got := do(t, http.DefaultClient, "GET", server.URL+"/healthz", nil, ""); resp.StatusCode != 200 {
		t.Errorf("the next request: %s\n%s", resp.Status, got)
	}
}

// countingWriter counts the bytes of a response, as a middleware does. It hides the optional
// methods of the ResponseWriter that it wraps.
type countingWriter struct {
	http.ResponseWriter
	status, bytes int
}

func (w *countingWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *countingWriter) Write(b []byte) (int, error) {
	w.bytes += len(b)
	return w.ResponseWriter.Write(b)
}

func TestMiddlewareSeesTheWholeResponse(t *testing.T) {
	store, _ := openStore(t, newPath(t))
	a, err := newAPI(store, time.Now, slog.New(slog.DiscardHandler), apiSettings{builtInTokens: true})
	if err != nil {
		t.Fatal(err)
	}
	seen := make(chan countingWriter, 1)
	next := a.handler
	a.handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		counting := &countingWriter{ResponseWriter: w}
		next.ServeHTTP(counting, r)
		seen <- *counting
	})
	server := httptest.NewServer(a)
	defer server.Close()
	for _, tt := range []struct {
		method, path string
		status       int
	}{
		{http.MethodGet, "/healthz", http.StatusOK},
		{http.MethodGet, openAPIPath, http.StatusOK},
		{http.MethodGet, "/nothing", http.StatusNotFound},
		{http.MethodPut, "/healthz", http.StatusMethodNotAllowed},
		{http.MethodOptions, "/healthz", http.StatusNoContent},
	} {
		resp, body := do(t, http.DefaultClient, tt.method, server.URL+tt.path, nil, "")
		got := <-seen
		if resp.StatusCode != tt.status || got.status != tt.status || got.bytes != len(body) {
			t.Errorf("%s %s: status %d and %d bytes, but the middleware saw status %d and %d bytes", tt.method, tt.path, resp.StatusCode, len(body), got.status, got.bytes)
		}
	}
}

// An idempotency key is either a quoted string as in RFC 9651 §3.3.3, or bare.
var (
	quotedKey = regexp.MustCompile(`^"(?:[ !#-\[\]-~]|\\["\\])*"$`)
	bareKey   = regexp.MustCompile(`^[ !#-~][ -~]*$`)
)

// FuzzIdempotencyKey checks that a key has 1 to 255 printable ASCII characters, and that it
// is the same key whether quoted or bare.
func FuzzIdempotencyKey(f *testing.F) {
	heads, _ := storyRequests(f)
	for _, head := range heads {
		if _, value, ok := strings.Cut(head, "Idempotency-Key: "); ok {
			value, _, _ = strings.Cut(value, "\n")
			f.Add(value)
		}
	}
	parse := func(lines ...string) (string, error) {
		return parseIdempotencyKey(http.Header{"Idempotency-Key": lines})
	}
	f.Fuzz(func(t *testing.T, value string) {
		want := ""
		switch {
		case quotedKey.MatchString(value):
			want = regexp.MustCompile(`\\(.)`).ReplaceAllString(value[1:len(value)-1], "$1")
		case bareKey.MatchString(value):
			want = value
		}
		if len(want) > 255 {
			want = ""
		}
		key, err := parse(value)
		wantOfParameter(t, "Idempotency-Key", err)
		if key != want || (err == nil) != (want != "") {
			t.Fatalf("%q, %v, want %q", key, err, want)
		}
		if err != nil {
			return
		}
		quoted := `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(key) + `"`
		if again, err := parse(quoted); again != key || err != nil {
			t.Fatalf("%s is parsed as %q, %v, want %q", quoted, again, err, key)
		}
		if _, err := parse(value, value); err == nil {
			t.Fatal("two Idempotency-Key fields are accepted")
		}
	})
}

// FuzzRange checks that every accepted query has a limit of 1 to 1000 and a UUID, if any,
// and that encoding and parsing the result again changes nothing. The error of a rejected
// query must name each invalid parameter.
func FuzzRange(f *testing.F) {
	heads, _ := storyRequests(f)
	for _, head := range heads {
		if _, query, ok := strings.Cut(head, "?"); ok {
			query, _, _ = strings.Cut(query, "\n")
			f.Add(query)
		}
	}
	limit := regexp.MustCompile(`^([1-9][0-9]{0,2}|1000)$`)
	f.Fuzz(func(t *testing.T, query string) {
		values, malformedQuery := url.ParseQuery(query)
		r, err := parseRange(query)
		if bad := new(malformed); errors.As(err, &bad) != (malformedQuery != nil) {
			t.Fatalf("parseRange: %v, but url.ParseQuery: %v", err, malformedQuery)
		}
		if malformedQuery != nil {
			return
		}
		var invalid []string
		if v := values["limit"]; len(v) > 1 || len(v) == 1 && !limit.MatchString(v[0]) {
			invalid = append(invalid, "limit")
		} else if len(v) == 1 && limit.FindStringSubmatch(v[0])[1] != strconv.Itoa(r.Limit) {
			t.Fatalf("limit is %d", r.Limit)
		}
		if v := values["after"]; len(v) > 1 || len(v) == 1 && !uuidForm.MatchString(v[0]) {
			invalid = append(invalid, "after")
		} else if len(v) == 1 && strings.ToLower(v[0]) != string(r.After) {
			t.Fatalf("after is %s", r.After)
		}
		var reported []string
		if err != nil {
			for _, f := range faultsOf(err) {
				reported = append(reported, f.Parameter)
			}
		}
		if !slices.Equal(reported, invalid) {
			t.Fatalf("the invalid parameters are %q, but the error is %v", invalid, err)
		}
		if err != nil {
			return
		}
		encoded := url.Values{}
		if r.Limit != 0 {
			encoded.Set("limit", strconv.Itoa(r.Limit))
		}
		if r.After != "" {
			encoded.Set("after", string(r.After))
		}
		if again, err := parseRange(encoded.Encode()); err != nil || again != r {
			t.Fatalf("%s is parsed as %+v, %v, want %+v", encoded.Encode(), again, err, r)
		}
	})
}

// FuzzMediaType checks that an accepted media type is JSON in UTF-8; it may have any other
// parameters.
func FuzzMediaType(f *testing.F) {
	heads, _ := storyRequests(f)
	for _, head := range heads {
		if _, value, ok := strings.Cut(head, "Content-Type: "); ok {
			value, _, _ = strings.Cut(value, "\n")
			f.Add(value)
		}
	}
	charset := regexp.MustCompile(`(?i)^(utf-?8|us-ascii)?$`)
	isJSON := regexp.MustCompile(`(?i)^\s*application/json\s*(;|$)`)
	plain := regexp.MustCompile(`(?i)^[ \t]*application/json[ \t]*(;[ \t]*charset=("utf-8"|utf-8|utf8|us-ascii)[ \t]*)?$`)
	f.Fuzz(func(t *testing.T, value string) {
		err := checkMediaType(http.Header{"Content-Type": {value}}, "application/json")
		if err != nil {
			if p := problemOf(err); p.Status != http.StatusUnsupportedMediaType || len(p.Detail) > 1000 || plain.MatchString(value) {
				t.Fatalf("rejected with %v", err)
			}
			return
		}
		media, params, err := mime.ParseMediaType(value)
		if err != nil || !isJSON.MatchString(value) || !charset.MatchString(params["charset"]) {
			t.Fatalf("accepted, but parsed as %s with %q, %v", media, params, err)
		}
		if formatted := mime.FormatMediaType(media, params); checkMediaType(http.Header{"Content-Type": {formatted}}, "application/json") != nil {
			t.Fatalf("accepted, but not when formatted as %s", formatted)
		}
	})
}

// The checksum of the document is right, so that only its content is at fault, and not the
// client's request.
func TestPatchOfAStoredDocumentThatIsNoContractIsA500(t *testing.T) {
	for name, doc := range map[string]string{
		"not JSON":        `{"supplier":`,
		"an unknown name": `{"price_zone":"SE3"}`,
		"a wrong type":    `{"supplier":5}`,
	} {
		t.Run(name, func(t *testing.T) {
			db := newPath(t)
			start := startOn(t, db, "--demo")
			start.stop()
			k := Key{Owner{demoOrg, demoUser}, demoContract}
			edit(t, db, func(tx *bbolt.Tx) error {
				return tx.Bucket(bucketContracts).Put(k.bytes(), withChecksum(k.bytes(), []byte(doc)))
			})
			s := startOn(t, db)
			header := http.Header{
				"Authorization": {"Bearer " + token(t, s.url, "demo", "demo-secret")},
				"Content-Type":  {"application/merge-patch+json"},
			}
			resp, got := do(t, http.DefaultClient, http.MethodPatch, contractsURL(s.url, demoOrg, demoUser)+"/"+demoContract, header, `{"supplier":"Jämtkraft"}`)
			if p := wantProblem(t, resp, got, 500); p.Detail != wentWrong || strings.Contains(got, `"errors"`) {
				t.Errorf("got %s, want the detail %q and no faults", got, wentWrong)
			}
		})
	}
}
