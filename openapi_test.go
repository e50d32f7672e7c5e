package main

// openapi.json describes exactly the routes, its examples are those of testdata, and every
// operation has the same response to the same wrong request and to the same fault of the
// service.

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"energy-contracts/internal/servicetest"
)

func TestEachRouteIsDescribedAndEachOperationIsARoute(t *testing.T) {
	a, err := newAPI(nil, time.Now, slog.New(slog.DiscardHandler), apiSettings{builtInTokens: true})
	if err != nil {
		t.Fatal(err)
	}
	routes := map[string]bool{}
	for _, r := range a.routes {
		path := regexp.MustCompile(`:(\w+)`).ReplaceAllString(r.pattern, "{$1}")
		if strings.HasPrefix(path, "/oauth2/") {
			path = strings.TrimSuffix(path, "/")
		}
		routes[r.method+" "+path] = true
		routes["OPTIONS "+path] = true // the router's own
	}
	for _, name := range servicetest.Undescribed {
		_, path, _ := strings.Cut(name, " ")
		delete(routes, name)
		delete(routes, "OPTIONS "+path)
	}
	operations := map[string]bool{}
	for path, item := range described().Doc.Paths.Map() {
		for method := range item.Operations() {
			operations[method+" "+path] = true
		}
	}
	if !maps.Equal(routes, operations) {
		t.Errorf("routes\n%q\noperations\n%q", slices.Sorted(maps.Keys(routes)), slices.Sorted(maps.Keys(operations)))
	}
}

// The described methods of a path are those in its Allow field.
func TestAllowIsWhatIsDescribed(t *testing.T) {
	s := start(t, "--demo")
	for path, item := range described().Doc.Paths.Map() {
		resp, _ := do(t, http.DefaultClient, "OPTIONS", s.url+servicetest.DemoNames.Replace(path), nil, "")
		want := strings.Join(slices.Sorted(maps.Keys(item.Operations())), ", ")
		if got := resp.Header.Get("Allow"); resp.StatusCode != 204 || got != want {
			t.Errorf("OPTIONS %s: %s, Allow: %q, want %q", path, resp.Status, got, want)
		}
	}
}

// testdataBodies returns patterns of the bodies of all requests and responses in testdata.
// {name} in a story stands for a value that differs in each run.
func testdataBodies(t testing.TB) (bodies []*regexp.Regexp) {
	t.Helper()
	add := func(text string) {
		var value any
		if json.Unmarshal([]byte(text), &value) != nil {
			return // a form, or malformed on purpose
		}
		pattern := regexp.QuoteMeta(canonical(t, value))
		pattern = regexp.MustCompile(`\\\{[a-z]+( [0-9]+)?\\\}`).ReplaceAllString(pattern, `[0-9A-Za-z_-]+`)
		bodies = append(bodies, regexp.MustCompile("^"+pattern+"$"))
	}
	add(readFile(t, "testdata/seed.request.json"))
	add(readFile(t, "testdata/seed.response.json"))
	demo, err := readDemo()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range demo.Contracts {
		add(string(c.Contract))
	}
	for _, file := range storyFiles(t) {
		for _, f := range readStory(t, file).Files {
			_, body, _ := strings.Cut(string(f.Data), "\n\n")
			add(body)
		}
	}
	return bodies
}

// canonical returns one text for equal JSON values.
func canonical(t testing.TB, value any) string {
	t.Helper()
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(value); err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(b.String())
}

// examples returns the values of all examples in a document, except references.
func examples(node any) (values []any) {
	switch node := node.(type) {
	case []any:
		for _, n := range node {
			values = append(values, examples(n)...)
		}
	case map[string]any:
		if _, ok := node["schema"]; ok && node["in"] == nil { // a media type
			if e, ok := node["example"]; ok {
				values = append(values, e)
			}
		}
		if named, ok := node["examples"].(map[string]any); ok { // its, or those of the components
			for _, e := range named {
				if value, ok := e.(map[string]any)["value"]; ok {
					values = append(values, value)
				}
			}
		}
		for _, n := range node {
			values = append(values, examples(n)...)
		}
	}
	return values
}

func TestExamplesAreThoseOfTestdata(t *testing.T) {
	var doc any
	if err := json.Unmarshal([]byte(readFile(t, "openapi.json")), &doc); err != nil {
		t.Fatal(err)
	}
	bodies, found := testdataBodies(t), examples(doc)
	if len(found) < 20 {
		t.Errorf("%d examples found", len(found))
	}
	for _, e := range found {
		text := canonical(t, e)
		if !slices.ContainsFunc(bodies, func(body *regexp.Regexp) bool { return body.MatchString(text) }) {
			t.Errorf("an example of openapi.json is nowhere in testdata:\n%s", text)
		}
	}
}

// every sends a request to each of some operations and compares the responses.
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
			Status: 400, Detail: "The request cannot be parsed; see errors.",
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
			Status: 422, Detail: "The request breaks rules of the API; see errors.",
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
		h.Set("If-Match", `"00000000000000000000000000000000"`)
	}, func(*operation) failure {
		return failure{Status: 412, Detail: "If-Match does not name the current version of the contract; nothing was changed. Get the contract and decide again."}
	})
}

func TestEveryOperationIsUnavailableWhileTheIssuerOfItsTokenIsDown(t *testing.T) {
	s := start(t, "--demo", "--issuer", "http://127.0.0.1:1", "--audience", "energy-contracts")
	jwt := "eyJhbGciOiJFUzI1NiIsInR5cCI6ImF0K2p3dCIsImtpZCI6ImEifQ.e30.AA" // {"alg":"ES256","typ":"at+jwt","kid":"a"}
	every(t, s.url, jwt, ofContracts, nil, func(*operation) failure {
		return failure{
			Status: 503, Header: http.Header{"Retry-After": {"1"}},
			Detail: "The keys of the token's issuer cannot be fetched at the moment. Send the request again.",
		}
	})
}

func TestEveryOperationRefusesContentThatIsTooLarge(t *testing.T) {
	s := start(t, "--demo", "--max-body", "1000")
	every(t, s.url, token(t, s.url, "demo", "demo-secret"), withContent, func(o *operation, _ http.Header) {
		o.Body += strings.Repeat(" ", 64<<10)
	}, func(o *operation) failure {
		if o.OAuth {
			return failure{Status: 413, Code: "invalid_request", Detail: "The body may have at most 64 KiB."}
		}
		return failure{Status: 413, Detail: "The content may have at most 1000 bytes; send fewer prices, or start the service with a larger --max-body."}
	})
}

func TestEveryOperationRefusesContentThatTakesTooLong(t *testing.T) {
	slow(t)
	t.Parallel() // all of it is to wait
	s := start(t, "--demo")
	bearer := token(t, s.url, "demo", "demo-secret")
	var all sync.WaitGroup // not parallel subtests, of which few run at once
	for _, o := range operations(t, withContent) {
		all.Go(func() {
			content, half := io.Pipe()
			defer half.Close()
			go half.Write([]byte("{")) // and no more
			req, err := http.NewRequest(o.Method, s.url+o.Path, content)
			if err != nil {
				t.Error(err)
				return
			}
			req.Header = o.Header(bearer)
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Error(err)
				return
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Error(err)
				return
			}
			f := failure{Status: 408, Detail: "The content arrived too slowly; send at least 64 KiB every 30 seconds."}
			if o.OAuth {
				f.Code = "invalid_request"
			}
			f.Want(t, resp, string(got))
		})
	}
	all.Wait()
}

func TestServerHasItsLimits(t *testing.T) {
	s := (&app{log: slog.New(slog.DiscardHandler)}).newServer(nil)
	if s.ReadHeaderTimeout != 5*time.Second || s.ReadTimeout != 30*time.Second || s.IdleTimeout != 2*time.Minute || s.WriteTimeout != 2*time.Minute || s.HTTP2.MaxConcurrentStreams != 100 || s.HTTP2.WriteByteTimeout != 30*time.Second {
		t.Errorf("header %v, request %v, idle %v, answer %v, HTTP/2 %+v", s.ReadHeaderTimeout, s.ReadTimeout, s.IdleTimeout, s.WriteTimeout, s.HTTP2)
	}
}

func TestEveryOAuthEndpointLimitsFailedLogins(t *testing.T) {
	for _, o := range operations(t, ofOAuth) {
		t.Run(o.ID, func(t *testing.T) {
			s := start(t, "--demo")
			s.clock.stop(time.Now())
			h := o.Header("")
			h.Set("Authorization", "Basic ZGVtbzp3cm9uZw==") // demo:wrong
			for range freeFailures {
				resp, got := do(t, http.DefaultClient, o.Method, s.url+o.Path, h, o.Body)
				refusedClient.Want(t, resp, got)
			}
			resp, got := do(t, http.DefaultClient, o.Method, s.url+o.Path, h, o.Body)
			limitedClient("6").Want(t, resp, got)
		})
	}
}

const wentWrong = "Something is wrong with the service. Its log says more under this request id."

// A page with the contracts of the demo user breaks. A request that needs it is a 500, and
// from then on every write is a 503. Each case runs in a process of its own.
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
				servicetest.BreakFile(t, db, at, make([]byte, pageSize))
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
