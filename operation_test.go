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
	ID, Method, Path string // of the demo user's first contract
	Contract         bool   // for contracts, with a token; else public
	OAuth            bool   // an OAuth endpoint, with a client's secret
	ContentType      string // "": it has no content
	Body             string
}

// demoNames puts the demo user's first contract in the place of a path's names.
var demoNames = strings.NewReplacer("{org_id}", demoOrg, "{user_id}", demoUser, "{energy_contract_id}", demoContract)

// operations are some of them, in the order of their names.
func operations(t testing.TB, some func(*operation) bool) (found []operation) {
	t.Helper()
	for path, item := range described().Doc.Paths.Map() {
		for method, op := range item.Operations() {
			o := operation{ID: op.OperationID, Method: method, Path: demoNames.Replace(path)}
			o.Contract = op.Security != nil && strings.HasPrefix(path, "/api/partners/v2.0/org/") && len(*op.Security) > 0
			o.OAuth = op.RequestBody != nil && strings.HasPrefix(path, "/oauth2/")
			switch {
			case o.OAuth:
				o.ContentType, o.Body = "application/x-www-form-urlencoded", "grant_type=client_credentials&token=none"
			case op.RequestBody != nil:
				for contentType, media := range op.RequestBody.Value.Content {
					name := slices.Sorted(maps.Keys(media.Examples))[0]
					body, err := json.Marshal(media.Examples[name].Value.Value)
					if err != nil {
						t.Fatal(err)
					}
					o.ContentType, o.Body = contentType, string(body)
				}
			}
			if some(&o) {
				found = append(found, o)
			}
		}
	}
	slices.SortFunc(found, func(a, b operation) int { return strings.Compare(a.ID, b.ID) })
	return found
}

// header is a right request's.
func (o *operation) Header(bearer string) http.Header {
	h := http.Header{}
	if o.ContentType != "" {
		h.Set("Content-Type", o.ContentType)
	}
	switch {
	case o.OAuth:
		h.Set("Authorization", "Basic ZGVtbzpkZW1vLXNlY3JldA==")
	case o.Contract:
		h.Set("Authorization", "Bearer "+bearer)
	}
	return h
}

// failure is an answer that is no success: a problem document, or OAuth's.
type failure struct {
	Status int
	Header http.Header // without those that each has
	Detail string
	Errors string // the problem document's, as JSON
	Code   string // OAuth's error
}

// want compares a whole answer.
func (f failure) Want(t testing.TB, resp *http.Response, got string) {
	t.Helper()
	request := resp.Header.Get("X-Request-ID")
	want := fmt.Sprintf(`{"type":"about:blank","title":%q,"status":%d,"detail":%q,"instance":%q%s}`,
		http.StatusText(f.Status), f.Status, f.Detail, request, f.Errors)
	header := http.Header{
		"Content-Type":           {"application/problem+json"},
		"X-Content-Type-Options": {"nosniff"}, "X-Request-Id": {request},
	}
	if f.Code != "" {
		want = fmt.Sprintf(`{"error":%q,"error_description":%q}`, f.Code, f.Detail)
		header["Content-Type"], header["Cache-Control"], header["Pragma"] = []string{"application/json"}, []string{"no-store"}, []string{"no-cache"}
	}
	header.Set("Content-Length", fmt.Sprint(len(want)))
	maps.Copy(header, f.Header)
	if resp.Request.Method == http.MethodHead {
		want = ""
	}
	resp.Header.Del("Date")
	if resp.StatusCode != f.Status || got != want || !maps.EqualFunc(resp.Header, header, slices.Equal) {
		t.Errorf("got %s\n%v\n%s\nwant %d\n%v\n%s", resp.Status, resp.Header, got, f.Status, header, want)
	}
}

// every asks each of some operations, and compares the answer.
func every(t *testing.T, base, bearer string, some func(*operation) bool, change func(*operation, http.Header), want func(*operation) failure) {
	t.Helper()
	for _, o := range operations(t, some) {
		t.Run(o.ID, func(t *testing.T) {
			h := o.Header(bearer)
			if change != nil {
				change(&o, h)
			}
			resp, got := do(t, http.DefaultClient, o.Method, base+o.Path, h, o.Body)
			want(&o).Want(t, resp, got)
		})
	}
}

func anyOperation(*operation) bool  { return true }
func ofContracts(o *operation) bool { return o.Contract }
func ofOAuth(o *operation) bool     { return o.OAuth }
func withContent(o *operation) bool { return o.ContentType != "" }
func isWrite(o *operation) bool {
	return o.OAuth || o.Contract && o.Method != "GET" && o.Method != "HEAD"
}
func onOneContract(o *operation) bool { return o.Contract && strings.HasSuffix(o.Path, demoContract) }

func TestEveryOperationRefusesTwoAuthorizationFields(t *testing.T) {
	s := start(t, "--demo")
	every(t, s.url, "", anyOperation, func(_ *operation, h http.Header) {
		h["Authorization"] = []string{"Bearer a", "Bearer a"}
	}, func(*operation) failure {
		return failure{
			Status: 400, Detail: "The request cannot be read; errors says where.",
			Errors: `,"errors":[{"parameter":"Authorization","detail":"appears 2 times; send it once"}]`,
		}
	})
}

func TestEveryOperationNamesEachIDThatIsNone(t *testing.T) {
	s := start(t, "--demo")
	every(t, s.url, token(t, s.url, "demo", "demo-secret"), ofContracts, func(o *operation, _ http.Header) {
		o.Path = strings.NewReplacer(demoUser, "me", demoContract, strings.Repeat("g", 36)).Replace(o.Path)
	}, func(o *operation) failure {
		f := failure{
			Status: 422, Detail: "The request breaks rules; errors lists them.",
			Errors: `,"errors":[{"parameter":"user_id","detail":"must be a UUID of 36 characters, has 2"}`,
		}
		if strings.HasSuffix(o.Path, "g") {
			f.Errors += `,{"parameter":"energy_contract_id","detail":"must be a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a"}`
		}
		f.Errors += "]"
		return f
	})
}

func TestEveryOperationOnOneContractKnowsIfMatch(t *testing.T) {
	s := start(t, "--demo")
	every(t, s.url, token(t, s.url, "demo", "demo-secret"), onOneContract, func(_ *operation, h http.Header) {
		h.Set("If-Match", `"0000000000000000"`)
	}, func(*operation) failure {
		return failure{Status: 412, Detail: "The contract is not the one that If-Match names; nothing was changed. Get it again and decide anew."}
	})
}

func TestEveryOperationIsUnavailableWhileTheIssuerOfItsTokenIsDown(t *testing.T) {
	s := start(t, "--demo", "--issuer", "http://127.0.0.1:1", "--audience", "energy-contracts")
	jwt := "eyJhbGciOiJFUzI1NiIsInR5cCI6ImF0K2p3dCIsImtpZCI6ImEifQ.e30.AA" // {"alg":"ES256","typ":"at+jwt","kid":"a"}
	every(t, s.url, jwt, ofContracts, nil, func(*operation) failure {
		return failure{
			Status: 503, Header: http.Header{"Retry-After": {"1"}},
			Detail: "The issuer of the token cannot be asked for its keys at the moment. Send the request again.",
		}
	})
}

func TestEveryOperationRefusesContentThatIsTooLarge(t *testing.T) {
	s := start(t, "--demo", "--max-body", "1000")
	every(t, s.url, token(t, s.url, "demo", "demo-secret"), withContent, func(o *operation, _ http.Header) {
		o.Body += strings.Repeat(" ", 64<<10)
	}, func(o *operation) failure {
		if o.OAuth {
			return failure{Status: 413, Code: "invalid_request", Detail: "the body cannot be read, or has more than 64 KiB"}
		}
		return failure{Status: 413, Detail: "The content may have at most 1000 bytes; send fewer prices, or start the service with a larger --max-body."}
	})
}

// The real server has 30 seconds for it, as TestServerHasItsLimits says; this one does
// not have the test wait for that.
func TestEveryOperationRefusesContentThatTakesTooLong(t *testing.T) {
	t.Parallel() // all of it is to wait
	store, _ := openStore(t, newPath(t))
	if err := loadDemo(t.Context(), store, time.Now()); err != nil {
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
	described().Serves(t, s.URL)
	bearer := token(t, s.URL, "demo", "demo-secret")
	for _, o := range operations(t, withContent) {
		t.Run(o.ID, func(t *testing.T) {
			content, half := io.Pipe()
			defer half.Close()
			go half.Write([]byte("{")) // and no more
			req, err := http.NewRequest(o.Method, s.URL+o.Path, content)
			if err != nil {
				t.Fatal(err)
			}
			req.Header = o.Header(bearer)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			f := failure{Status: 408, Detail: "The content took too long to arrive; send it within 30 seconds."}
			if o.OAuth {
				f = failure{Status: 408, Code: "invalid_request", Detail: "the body cannot be read, or has more than 64 KiB"}
			}
			f.Want(t, resp, string(got))
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
		t.Run(o.ID, func(t *testing.T) {
			s := start(t, "--demo")
			s.clock.stop(time.Now())
			h := o.Header("")
			h.Set("Authorization", "Basic ZGVtbzp3cm9uZw==") // demo:wrong
			for range freeGuesses {
				resp, got := do(t, http.DefaultClient, o.Method, s.url+o.Path, h, o.Body)
				refusedClient.Want(t, resp, got)
			}
			resp, got := do(t, http.DefaultClient, o.Method, s.url+o.Path, h, o.Body)
			limitedClient("6").Want(t, resp, got)
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
		t.Run(o.ID, func(t *testing.T) {
			t.Parallel()
			db := writeFile(t, file)
			p := startProcess(t, nil, "--db", db)
			for _, at := range pages {
				breakFile(t, db, at, make([]byte, pageSize))
			}
			resp, got := do(t, http.DefaultClient, o.Method, p.URL+o.Path, o.Header(bearer), o.Body)
			failure{Status: 500, Detail: wentWrong}.Want(t, resp, got)
			stopped := "The database file is damaged and writes are stopped; nothing was changed. The service's log says what to do."
			retry := http.Header{"Retry-After": {"1"}}
			every(t, p.URL, bearer, isWrite, func(o *operation, _ http.Header) {
				if o.OAuth {
					o.Body = strings.Replace(o.Body, "none", bearer, 1) // to revoke an unknown one needs no write
				}
				if o.Method == "PATCH" {
					o.Path = strings.Replace(o.Path, demoContract, string(key(0).Contract), 1) // it is read first
				}
			}, func(o *operation) failure {
				if o.OAuth {
					return failure{Status: 503, Code: "temporarily_unavailable", Header: retry, Detail: stopped}
				}
				return failure{Status: 503, Header: retry, Detail: stopped}
			})
			for _, method := range []string{"GET", "HEAD"} {
				resp, got := do(t, http.DefaultClient, method, p.URL+"/readyz", nil, "")
				failure{Status: 503, Header: retry, Detail: stopped}.Want(t, resp, got)
			}
		})
	}
}

func TestOAuthEndpointsOnAFileThatIsCutOff(t *testing.T) {
	for _, o := range operations(t, ofOAuth) {
		t.Run(o.ID, func(t *testing.T) {
			t.Parallel()
			db := newPath(t)
			p := startProcess(t, nil, "--demo", "--db", db)
			if err := os.Truncate(db, int64(3*pageSize)); err != nil {
				t.Fatal(err)
			}
			resp, got := do(t, http.DefaultClient, o.Method, p.URL+o.Path, o.Header(""), o.Body)
			failure{Status: 500, Code: "server_error", Detail: wentWrong}.Want(t, resp, got)
		})
	}
}
