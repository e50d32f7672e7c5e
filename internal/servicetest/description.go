package main

// openapi.json is true: a validator that is not ours holds every request of the
// tests, and every answer to it, to the description, and at the end each operation
// and each status that it describes must have been seen.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"
	"github.com/google/uuid"
)

// description is openapi.json, and what the tests have seen of it.
type description struct {
	Doc    *openapi3.T
	router routers.Router

	mu       sync.Mutex
	services map[string]bool // by host and port: those that run
	seen     map[string]bool // operation and status
	wrong    []string        // what is not as described
}

// described is what all tests add to.
var described = sync.OnceValue(func() *description {
	// The validator's own pattern is of RFC 4122 and knows no version 7.
	openapi3.DefineStringFormatValidator("uuid", openapi3.NewCallbackValidator(uuid.Validate))
	openapi3filter.RegisterBodyDecoder("text/html", openapi3filter.PlainBodyDecoder)
	doc, err := openapi3.NewLoader().LoadFromFile("openapi.json")
	if err != nil {
		panic(err)
	}
	if err := doc.Validate(context.Background()); err != nil {
		panic(err)
	}
	router, err := gorillamux.NewRouter(doc)
	if err != nil {
		panic(err)
	}
	return &description{Doc: doc, router: router, services: map[string]bool{}, seen: map[string]bool{}}
})

// serves has the requests to a service held to the description, until the test ends.
func (d *description) Serves(t testing.TB, base string) {
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	d.set(u.Host, true)
	t.Cleanup(func() { d.set(u.Host, false) })
}

func (d *description) set(host string, serves bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.services[host] = serves
}

func (d *description) isService(host string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.services[host]
}

// validated is a transport whose requests and answers are held to the description.
type validated struct{ *http.Transport }

func (v validated) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := v.Transport.RoundTrip(r)
	if err != nil || !described().isService(r.URL.Host) {
		return resp, err
	}
	content, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	resp.Body = io.NopCloser(io.MultiReader(bytes.NewReader(content), broken{err}))
	if err != nil {
		return resp, nil // it broke off, as some tests want it
	}
	if err := described().Hold(r, resp, content); err != nil {
		return nil, err
	}
	return resp, nil
}

// broken is the end of a content, or what came instead.
type broken struct{ err error }

func (b broken) Read([]byte) (int, error) {
	if b.err == nil {
		return 0, io.EOF
	}
	return 0, b.err
}

// hold tells, and remembers, what of an answer is not as described.
func (d *description) Hold(r *http.Request, resp *http.Response, content []byte) error {
	operation, err := d.Check(r, resp, content)
	if found := known.exchanged(r, resp, content); len(found) > 0 {
		err = errors.Join(err, fmt.Errorf("the answer has the secrets %q", found))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		err = fmt.Errorf("not as openapi.json has it: %s %s: %s: %w\n%v\n%.1000s", r.Method, r.URL, resp.Status, err, resp.Header, content)
		d.wrong = append(d.wrong, err.Error())
		return err
	}
	d.seen[operation+" "+strconv.Itoa(resp.StatusCode)] = true
	return nil
}

// read reads the answer to a request that a test has written to a connection itself,
// of which sent may lack the end.
func (d *description) Read(t testing.TB, conn io.Reader, sent string) (*http.Response, string, error) {
	t.Helper()
	r, err := http.ReadRequest(bufio.NewReader(strings.NewReader(sent)))
	if err != nil {
		t.Fatalf("%v\n%s", err, sent)
	}
	_, body, _ := strings.Cut(sent, "\r\n\r\n")
	r.GetBody = func() (io.ReadCloser, error) { return io.NopCloser(strings.NewReader(body)), nil }
	resp, err := http.ReadResponse(bufio.NewReader(conn), r)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	content, err := io.ReadAll(resp.Body)
	if err == nil {
		err = d.Hold(r, resp, content)
	}
	return resp, string(content), err
}

// undescribed is what is for browsers and no part of the API.
var undescribed = []string{
	"GET /", "HEAD /",
	"GET /api/partners/v2.0/docs/favicon.png", "HEAD /api/partners/v2.0/docs/favicon.png",
	"GET /api/partners/v2.0/docs/page.css", "HEAD /api/partners/v2.0/docs/page.css",
	"GET /api/partners/v2.0/docs/page.js", "HEAD /api/partners/v2.0/docs/page.js",
	"GET /api/partners/v2.0/docs/swagger-ui-bundle.js", "HEAD /api/partners/v2.0/docs/swagger-ui-bundle.js",
	"GET /api/partners/v2.0/docs/swagger-ui.css", "HEAD /api/partners/v2.0/docs/swagger-ui.css",
}

// check returns the operation that was asked for, or "" where there is none.
func (d *description) Check(r *http.Request, resp *http.Response, content []byte) (operation string, err error) {
	switch {
	case resp.Header.Get("X-Request-ID") == "": // net/http answered before the service saw it
		if resp.StatusCode != http.StatusBadRequest && resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			return "", errors.New("no X-Request-ID")
		}
		return "", nil
	case r.Header.Get("Access-Control-Request-Method") != "" && resp.StatusCode == http.StatusNoContent, // the Fetch standard's
		slices.Contains(undescribed, r.Method+" "+r.URL.Path):
		return "", nil
	}
	asked := r.Clone(context.Background())
	asked.Body = http.NoBody                           // it was sent
	if strings.HasPrefix(asked.URL.Path, "/oauth2/") { // with a slash at the end or without
		asked.URL.Path = strings.TrimSuffix(asked.URL.Path, "/")
	}
	route, params, err := d.router.FindRoute(asked)
	switch {
	case errors.Is(err, routers.ErrPathNotFound):
		if resp.StatusCode != http.StatusNotFound && resp.StatusCode != http.StatusBadRequest {
			return "", errors.New("the path is not described")
		}
		return "", d.problem(r, resp, content)
	case errors.Is(err, routers.ErrMethodNotAllowed):
		if resp.StatusCode != http.StatusMethodNotAllowed && resp.StatusCode != http.StatusNotFound && resp.StatusCode != http.StatusBadRequest {
			return "", errors.New("the method is not described")
		}
		return "", d.problem(r, resp, content)
	case err != nil:
		return "", err
	}
	for name, value := range params { // as they stand in the path
		if params[name], err = url.PathUnescape(value); err != nil {
			return "", err
		}
	}
	as := route.Operation.Responses.Status(resp.StatusCode)
	if as == nil {
		return "", errors.New("the status is not described")
	}
	if err := checkHeader(r, resp, as.Value); err != nil {
		return "", err
	}
	input := &openapi3filter.RequestValidationInput{
		Request: asked, PathParams: params, Route: route,
		Options: &openapi3filter.Options{
			AuthenticationFunc: openapi3filter.NoopAuthenticationFunc, MultiError: true, SkipSettingDefaults: true,
			ExcludeRequestBody: r.GetBody == nil,
		},
	}
	if resp.StatusCode < 400 { // then the request was right, too
		if r.GetBody != nil {
			if asked.Body, err = r.GetBody(); err != nil {
				return "", err
			}
		}
		if err := openapi3filter.ValidateRequest(context.Background(), input); err != nil {
			return "", fmt.Errorf("the service takes a request that is not described: %w", err)
		}
	}
	return route.Operation.OperationID, openapi3filter.ValidateResponse(context.Background(), &openapi3filter.ResponseValidationInput{
		RequestValidationInput: input, Status: resp.StatusCode, Header: resp.Header,
		Body:    io.NopCloser(bytes.NewReader(content)),
		Options: &openapi3filter.Options{IncludeResponseStatus: true, MultiError: true},
	})
}

// problem checks an answer that is the same wherever there is no operation.
func (d *description) problem(r *http.Request, resp *http.Response, content []byte) error {
	if r.Method == http.MethodHead {
		return nil
	}
	if is := resp.Header.Get("Content-Type"); is != "application/problem+json" {
		return fmt.Errorf("Content-Type is %q", is)
	}
	var value any
	if err := json.Unmarshal(content, &value); err != nil {
		return err
	}
	return d.Doc.Components.Schemas["Problem"].Value.VisitJSON(value, openapi3.EnableJSONSchema2020())
}

// checkHeader is for what the validator passes over: fields that are not described,
// and answers to HEAD and 304.
func checkHeader(r *http.Request, resp *http.Response, as *openapi3.Response) error {
	for name := range resp.Header {
		switch name {
		case "Connection", "Content-Length", "Content-Type", "Date", "Transfer-Encoding": // HTTP's own
			continue
		case "Vary", "Access-Control-Allow-Origin", "Access-Control-Expose-Headers": // the Fetch standard's
			continue
		}
		if !slices.ContainsFunc(slices.Collect(maps.Keys(as.Headers)), func(is string) bool { return strings.EqualFold(is, name) }) {
			return fmt.Errorf("the field %s is not described", name)
		}
	}
	for name, h := range as.Headers {
		if h.Value.Required && resp.Header.Get(name) == "" {
			return fmt.Errorf("the field %s is missing", name)
		}
	}
	if is := resp.Header.Get("Content-Type"); is != "" && r.Method != http.MethodHead && as.Content.Get(is) == nil {
		return fmt.Errorf("Content-Type %s is not described", is)
	}
	return nil
}

// unexercised is what the description has and no test has seen.
func (d *description) unexercised() (missing []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, item := range d.Doc.Paths.Map() {
		for _, op := range item.Operations() {
			for status := range op.Responses.Map() {
				if key := op.OperationID + " " + status; !d.seen[key] {
					missing = append(missing, key)
				}
			}
		}
	}
	slices.Sort(missing)
	return missing
}

// verdict fails a run of all tests in which the description was not true, or not
// exercised as a whole.
func (d *description) Verdict(code int) int {
	for _, wrong := range d.wrong {
		fmt.Println(wrong)
		code = 1
	}
	for _, name := range []string{"test.run", "test.skip", "test.list", "test.fuzz"} {
		if flag.Lookup(name).Value.String() != "" {
			return code
		}
	}
	if missing := d.unexercised(); code == 0 && len(missing) > 0 {
		fmt.Printf("openapi.json describes what no test has seen:\n%s\n", strings.Join(missing, "\n"))
		return 1
	}
	return code
}

// What is not as described is found: each of these is a right answer but for one thing.
func TestAnswerThatIsNotAsDescribedIsFound(t *testing.T) {
	contract := contractsURL("", demoOrg, demoUser) + "/" + demoContract
	const right = `{"energy_contract_type":null,"energy_prices":[],"id":"3c90c3cc-0d44-4b50-8888-8dd25736052a","building":null,"meter_id":null,"supplier":null,"currency_energy_price":null,"energy_price_includes_external_components":null}`
	for _, tt := range []struct {
		name         string
		method, path string
		sent         string
		status       int
		header       [2]string // one that is other
		content      string
		want         string // "" is right
	}{
		{"nothing", "PUT", contract, `{}`, 200, [2]string{}, right, ""},
		{"the path", "PUT", contract + "/prices", `{}`, 200, [2]string{}, right, "the path is not described"},
		{"the method", "POST", contract, `{}`, 200, [2]string{}, right, "the method is not described"},
		{"the status", "PUT", contract, `{}`, 202, [2]string{}, right, "the status is not described"},
		{"a field more", "PUT", contract, `{}`, 200, [2]string{"X-Powered-By", "Go"}, right, "the field X-Powered-By is not described"},
		{"a field less", "PUT", contract, `{}`, 200, [2]string{"ETag", ""}, right, "the field ETag is missing"},
		{"a field less of a HEAD", "HEAD", contract, "", 200, [2]string{"ETag", ""}, "", "the field ETag is missing"},
		{"a field less of a 304", "GET", contract, "", 304, [2]string{"ETag", ""}, "", "the field ETag is missing"},
		{"a field's value", "PUT", contract, `{}`, 200, [2]string{"ETag", "weak"}, right, `"ETag" doesn't match schema`},
		{"the media type", "PUT", contract, `{}`, 200, [2]string{"Content-Type", "text/plain"}, right, "Content-Type text/plain is not described"},
		{"a member more", "PUT", contract, `{}`, 200, [2]string{}, strings.Replace(right, "{", `{"version":1,`, 1), `property "version" is unsupported`},
		{"a member less", "PUT", contract, `{}`, 200, [2]string{}, strings.Replace(right, `"meter_id":null,`, "", 1), `property "meter_id" is missing`},
		{"a member's type", "PUT", contract, `{}`, 200, [2]string{}, strings.Replace(right, `[]`, "null", 1), "energy_prices"},
		{"an id that is none", "PUT", contract, `{}`, 200, [2]string{}, strings.Replace(right, `"id":"3`, `"id":"`, 1), "uuid"},
		{"a request that should be refused", "PUT", contract, `{"meter_id":"12345678901234567890"}`, 200, [2]string{}, right, "the service takes a request that is not described"},
		{"a price without its currency", "PUT", contract, `{"energy_contract_type":"spot_hourly","energy_prices":[{"price":1}]}`, 200, [2]string{}, right, "the service takes a request that is not described"},
		{"prices without their time", "PUT", contract, `{"energy_prices":[{"price":1},{"price":2}]}`, 200, [2]string{}, right, "the service takes a request that is not described"},
		{"a refusal that is no problem document", "GET", contract, "", 404, [2]string{"Content-Type", "application/problem+json"}, `{"error":"not found"}`, "doesn't match schema"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := http.NewRequest(tt.method, "http://service.example"+tt.path, strings.NewReader(tt.sent))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Content-Type", "application/json")
			resp := &http.Response{StatusCode: tt.status, Header: http.Header{
				"X-Request-Id": {"0b5c1f6e-9d3a-4c1e-8f27-5a6d4b3c2e10"}, "X-Content-Type-Options": {"nosniff"},
			}}
			if tt.status < 400 {
				resp.Header["Content-Type"], resp.Header["Etag"] = []string{"application/json"}, []string{`"0123456789abcdef"`}
			}
			switch name, value := tt.header[0], tt.header[1]; {
			case value != "":
				resp.Header.Set(name, value)
			case name != "":
				resp.Header.Del(name)
			}
			if tt.status == 304 {
				resp.Header.Del("Content-Type")
			}
			_, err = described().Check(r, resp, []byte(tt.content))
			if is := fmt.Sprint(err); tt.want == "" && err != nil || !strings.Contains(is, tt.want) {
				t.Errorf("got %v\nwant %s", err, tt.want)
			}
		})
	}
}

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
	for _, name := range undescribed {
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

// The methods that a path is described with are those that its Allow has.
func TestAllowIsWhatIsDescribed(t *testing.T) {
	s := start(t, "--demo")
	for path, item := range described().Doc.Paths.Map() {
		resp, _ := do(t, http.DefaultClient, "OPTIONS", s.url+demoNames.Replace(path), nil, "")
		want := strings.Join(slices.Sorted(maps.Keys(item.Operations())), ", ")
		if got := resp.Header.Get("Allow"); resp.StatusCode != 204 || got != want {
			t.Errorf("OPTIONS %s: %s, Allow: %q, want %q", path, resp.Status, got, want)
		}
	}
}

// testdataBodies are the contents of requests and answers in testdata, as patterns:
// {name} in a story stands for what is another at each run.
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
	add(readFile(t, "testdata/seed.answer.json"))
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

// canonical is the one text of a JSON value.
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

// examples are the values of all examples of contents in a document, but for those
// that a reference stands for.
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
