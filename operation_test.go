package main

// What every operation of openapi.json answers alike: the same wrong request, or
// the same fault of the service, with the whole of the answer.

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// operation is one of openapi.json's, with what is in a right request.
type operation struct {
	id, method, path string // of the demo user's first contract
	contract         bool   // for contracts, with a token; else public
	oauth            bool   // an OAuth endpoint, with a client's secret
	contentType      string // "": it has no content
	body             string
}

// demoNames puts the demo user's first contract in the place of a path's names.
var demoNames = strings.NewReplacer("{org_id}", demoOrg, "{user_id}", demoUser, "{energy_contract_id}", demoContract)

// operations are some of them, in the order of their names.
func operations(t testing.TB, some func(*operation) bool) (found []operation) {
	t.Helper()
	for path, item := range described().doc.Paths.Map() {
		for method, op := range item.Operations() {
			o := operation{id: op.OperationID, method: method, path: demoNames.Replace(path)}
			o.contract = op.Security != nil && strings.HasPrefix(path, "/api/partners/v2.0/org/") && len(*op.Security) > 0
			o.oauth = op.RequestBody != nil && strings.HasPrefix(path, "/oauth2/")
			switch {
			case o.oauth:
				o.contentType, o.body = "application/x-www-form-urlencoded", "grant_type=client_credentials&token=none"
			case op.RequestBody != nil:
				for contentType, media := range op.RequestBody.Value.Content {
					name := slices.Sorted(maps.Keys(media.Examples))[0]
					body, err := json.Marshal(media.Examples[name].Value.Value)
					if err != nil {
						t.Fatal(err)
					}
					o.contentType, o.body = contentType, string(body)
				}
			}
			if some(&o) {
				found = append(found, o)
			}
		}
	}
	slices.SortFunc(found, func(a, b operation) int { return strings.Compare(a.id, b.id) })
	return found
}

// header is a right request's.
func (o *operation) header(bearer string) http.Header {
	h := http.Header{}
	if o.contentType != "" {
		h.Set("Content-Type", o.contentType)
	}
	switch {
	case o.oauth:
		h.Set("Authorization", "Basic ZGVtbzpkZW1vLXNlY3JldA==")
	case o.contract:
		h.Set("Authorization", "Bearer "+bearer)
	}
	return h
}

// failure is an answer that is no success: a problem document, or OAuth's.
type failure struct {
	status int
	header http.Header // without those that each has
	detail string
	errors string // the problem document's, as JSON
	code   string // OAuth's error
}

// want compares a whole answer.
func (f failure) want(t testing.TB, resp *http.Response, got string) {
	t.Helper()
	request := resp.Header.Get("X-Request-ID")
	want := fmt.Sprintf(`{"type":"about:blank","title":%q,"status":%d,"detail":%q,"instance":%q%s}`,
		http.StatusText(f.status), f.status, f.detail, request, f.errors)
	header := http.Header{
		"Content-Type":           {"application/problem+json"},
		"X-Content-Type-Options": {"nosniff"}, "X-Request-Id": {request},
	}
	if f.code != "" {
		want = fmt.Sprintf(`{"error":%q,"error_description":%q}`, f.code, f.detail)
		header["Content-Type"], header["Cache-Control"], header["Pragma"] = []string{"application/json"}, []string{"no-store"}, []string{"no-cache"}
	}
	header.Set("Content-Length", fmt.Sprint(len(want)))
	maps.Copy(header, f.header)
	if resp.Request.Method == http.MethodHead {
		want = ""
	}
	resp.Header.Del("Date")
	if resp.StatusCode != f.status || got != want || !maps.EqualFunc(resp.Header, header, slices.Equal) {
		t.Errorf("got %s\n%v\n%s\nwant %d\n%v\n%s", resp.Status, resp.Header, got, f.status, header, want)
	}
}

// every asks each of some operations, and compares the answer.
func every(t *testing.T, base, bearer string, some func(*operation) bool, change func(*operation, http.Header), want func(*operation) failure) {
	t.Helper()
	for _, o := range operations(t, some) {
		t.Run(o.id, func(t *testing.T) {
			h := o.header(bearer)
			if change != nil {
				change(&o, h)
			}
			resp, got := do(t, http.DefaultClient, o.method, base+o.path, h, o.body)
			want(&o).want(t, resp, got)
		})
	}
}

func anyOperation(*operation) bool  { return true }
func ofContracts(o *operation) bool { return o.contract }
func ofOAuth(o *operation) bool     { return o.oauth }
func withContent(o *operation) bool { return o.contentType != "" }
func isWrite(o *operation) bool {
	return o.oauth || o.contract && o.method != "GET" && o.method != "HEAD"
}
func onOneContract(o *operation) bool { return o.contract && strings.HasSuffix(o.path, demoContract) }

func TestEveryOperationRefusesTwoAuthorizationFields(t *testing.T) {
	s := start(t, "--demo")
	every(t, s.url, "", anyOperation, func(_ *operation, h http.Header) {
		h["Authorization"] = []string{"Bearer a", "Bearer a"}
	}, func(*operation) failure {
		return failure{
			status: 400, detail: "The request cannot be parsed; see errors.",
			errors: `,"errors":[{"parameter":"Authorization","detail":"appears 2 times; send it once"}]`,
		}
	})
}

func TestEveryOperationNamesEachIDThatIsNone(t *testing.T) {
	s := start(t, "--demo")
	every(t, s.url, token(t, s.url, "demo", "demo-secret"), ofContracts, func(o *operation, _ http.Header) {
		o.path = strings.NewReplacer(demoUser, "me", demoContract, strings.Repeat("g", 36)).Replace(o.path)
	}, func(o *operation) failure {
		f := failure{
			status: 422, detail: "The request breaks rules of the API; see errors.",
			errors: `,"errors":[{"parameter":"user_id","detail":"must be a UUID of 36 characters, has 2"}`,
		}
		if strings.HasSuffix(o.path, "g") {
			f.errors += `,{"parameter":"energy_contract_id","detail":"must be a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a"}`
		}
		f.errors += "]"
		return f
	})
}

func TestEveryOperationOnOneContractKnowsIfMatch(t *testing.T) {
	s := start(t, "--demo")
	every(t, s.url, token(t, s.url, "demo", "demo-secret"), onOneContract, func(_ *operation, h http.Header) {
		h.Set("If-Match", `"0000000000000000"`)
	}, func(*operation) failure {
		return failure{status: 412, detail: "If-Match does not name the current version of the contract; nothing was changed. Get the contract and decide again."}
	})
}

func TestEveryOperationIsUnavailableWhileTheIssuerOfItsTokenIsDown(t *testing.T) {
	s := start(t, "--demo", "--issuer", "http://127.0.0.1:1", "--audience", "energy-contracts")
	jwt := "eyJhbGciOiJFUzI1NiIsInR5cCI6ImF0K2p3dCIsImtpZCI6ImEifQ.e30.AA" // {"alg":"ES256","typ":"at+jwt","kid":"a"}
	every(t, s.url, jwt, ofContracts, nil, func(*operation) failure {
		return failure{
			status: 503, header: http.Header{"Retry-After": {"1"}},
			detail: "The keys of the token's issuer cannot be fetched at the moment. Send the request again.",
		}
	})
}

func TestEveryOperationRefusesContentThatIsTooLarge(t *testing.T) {
	s := start(t, "--demo", "--max-body", "1000")
	every(t, s.url, token(t, s.url, "demo", "demo-secret"), withContent, func(o *operation, _ http.Header) {
		o.body += strings.Repeat(" ", 64<<10)
	}, func(o *operation) failure {
		if o.oauth {
			return failure{status: 413, code: "invalid_request", detail: "the body cannot be read, or has more than 64 KiB"}
		}
		return failure{status: 413, detail: "The content may have at most 1000 bytes; send fewer prices, or start the service with a larger --max-body."}
	})
}

// The real server has 30 seconds for it, as TestServerHasItsLimits says; this one does
// not have the test wait for that.
func TestEveryOperationRefusesContentThatTakesTooLong(t *testing.T) {
	t.Parallel() // all of it is to wait
	store, _ := openStore(t, newPath(t))
	if err := loadDemo(store, time.Now()); err != nil {
		t.Fatal(err)
	}
	a, err := newAPI(store, time.Now, slog.New(slog.DiscardHandler), apiSettings{maxBody: 1000, builtInTokens: true, tokenLifetime: tokenLifetime})
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewUnstartedServer(a)
	s.Config.ReadTimeout, s.Config.IdleTimeout = time.Second, time.Minute
	s.Start()
	defer s.Close()
	described().serves(t, s.URL)
	bearer := token(t, s.URL, "demo", "demo-secret")
	for _, o := range operations(t, withContent) {
		t.Run(o.id, func(t *testing.T) {
			content, half := io.Pipe()
			defer half.Close()
			go half.Write([]byte("{")) // and no more
			req, err := http.NewRequest(o.method, s.URL+o.path, content)
			if err != nil {
				t.Fatal(err)
			}
			req.Header = o.header(bearer)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			f := failure{status: 408, detail: "The content took too long to arrive; send it within 30 seconds."}
			if o.oauth {
				f = failure{status: 408, code: "invalid_request", detail: "the body cannot be read, or has more than 64 KiB"}
			}
			f.want(t, resp, string(got))
		})
	}
}

func TestServerHasItsLimits(t *testing.T) {
	s := (&app{log: slog.New(slog.DiscardHandler)}).newServer(nil)
	if s.ReadHeaderTimeout != 5*time.Second || s.ReadTimeout != 30*time.Second || s.IdleTimeout != 2*time.Minute || s.WriteTimeout != 2*time.Minute || s.HTTP2.WriteByteTimeout != 30*time.Second {
		t.Errorf("header %v, request %v, idle %v, answer %v, HTTP/2 %+v", s.ReadHeaderTimeout, s.ReadTimeout, s.IdleTimeout, s.WriteTimeout, s.HTTP2)
	}
}

func TestEveryOAuthEndpointLimitsGuesses(t *testing.T) {
	for _, o := range operations(t, ofOAuth) {
		t.Run(o.id, func(t *testing.T) {
			s := start(t, "--demo")
			s.clock.stop(time.Now())
			h := o.header("")
			h.Set("Authorization", "Basic ZGVtbzp3cm9uZw==") // demo:wrong
			for range freeGuesses {
				resp, got := do(t, http.DefaultClient, o.method, s.url+o.path, h, o.body)
				refusedClient.want(t, resp, got)
			}
			resp, got := do(t, http.DefaultClient, o.method, s.url+o.path, h, o.body)
			limitedClient("6").want(t, resp, got)
		})
	}
}

const wentWrong = "Something is wrong with the service. Its log says more under this request id."

// A page of the file breaks, on which the demo user's contracts are: what needs
// it is a 500, and then all that writes is a 503. Each in a process of its own.
func TestEveryOperationOnABrokenPage(t *testing.T) {
	file, bearer := servedFile(t)
	var pages []int
	for at := 2 * pageSize; at < len(file); at += pageSize {
		if strings.Contains(string(file[at:at+pageSize]), demoUser+"/"+demoContract) {
			pages = append(pages, at)
		}
	}
	if len(pages) == 0 {
		t.Fatal("no page has the contract")
	}
	for _, o := range operations(t, ofContracts) {
		t.Run(o.id, func(t *testing.T) {
			t.Parallel()
			db := writeFile(t, file)
			p := startProcess(t, nil, "--db", db)
			for _, at := range pages {
				breakFile(t, db, at, make([]byte, pageSize))
			}
			resp, got := do(t, http.DefaultClient, o.method, p.url+o.path, o.header(bearer), o.body)
			failure{status: 500, detail: wentWrong}.want(t, resp, got)
			stopped := "The database file is damaged and writes are stopped; nothing was changed. The service's log says what to do."
			retry := http.Header{"Retry-After": {"1"}}
			every(t, p.url, bearer, isWrite, func(o *operation, _ http.Header) {
				if o.oauth {
					o.body = strings.Replace(o.body, "none", bearer, 1) // to revoke an unknown one needs no write
				}
				if o.method == "PATCH" {
					o.path = strings.Replace(o.path, demoContract, string(key(0).Contract), 1) // it is read first
				}
			}, func(o *operation) failure {
				if o.oauth {
					return failure{status: 503, code: "temporarily_unavailable", header: retry, detail: stopped}
				}
				return failure{status: 503, header: retry, detail: stopped}
			})
			for _, method := range []string{"GET", "HEAD"} {
				resp, got := do(t, http.DefaultClient, method, p.url+"/readyz", nil, "")
				failure{status: 503, header: retry, detail: stopped}.want(t, resp, got)
			}
		})
	}
}

func TestOAuthEndpointsOnAFileThatIsCutOff(t *testing.T) {
	for _, o := range operations(t, ofOAuth) {
		t.Run(o.id, func(t *testing.T) {
			t.Parallel()
			db := newPath(t)
			p := startProcess(t, nil, "--demo", "--db", db)
			if err := os.Truncate(db, int64(3*pageSize)); err != nil {
				t.Fatal(err)
			}
			resp, got := do(t, http.DefaultClient, o.method, p.url+o.path, o.header(""), o.body)
			failure{status: 500, code: "server_error", detail: wentWrong}.want(t, resp, got)
		})
	}
}
