package servicetest

// The check that openapi.json is true: a library compares every request of the tests and every
// response with the description. At the end each operation and each status in it must have
// been seen.

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/getkin/kin-openapi/openapi3filter"
	"github.com/getkin/kin-openapi/routers"
	"github.com/getkin/kin-openapi/routers/gorillamux"
	"github.com/google/uuid"
)

// Description is openapi.json, and which of its operations and statuses the tests have
// seen.
type Description struct {
	Doc    *openapi3.T
	router routers.Router

	mu       sync.Mutex
	services map[string]bool // by host and port: those that run
	seen     map[string]bool // operation and status
	wrong    []string        // what is not as described
}

// Described returns the one Description that all tests of a package add to.
var Described = sync.OnceValue(func() *Description {
	// The validator's own pattern is of RFC 4122 and knows no version 7.
	openapi3.DefineStringFormatValidator("uuid", openapi3.NewCallbackValidator(uuid.Validate))
	openapi3filter.RegisterBodyDecoder("text/html", openapi3filter.PlainBodyDecoder)
	file, err := os.ReadFile(InModule("openapi.json"))
	if err != nil {
		panic(err)
	}
	doc, err := openapi3.NewLoader().LoadFromData(file)
	if err != nil {
		panic(err)
	}
	if err := doc.Validate(context.Background()); err != nil {
		panic(err)
	}
	doc.Servers = nil // the services of the tests have other addresses
	router, err := gorillamux.NewRouter(doc)
	if err != nil {
		panic(err)
	}
	return &Description{Doc: doc, router: router, services: map[string]bool{}, seen: map[string]bool{}}
})

// Serves makes the requests to a service be compared with the description until the test ends.
func (d *Description) Serves(t testing.TB, base string) {
	u, err := url.Parse(base)
	if err != nil {
		t.Fatal(err)
	}
	d.set(u.Host, true)
	t.Cleanup(func() { d.set(u.Host, false) })
}

func (d *Description) set(host string, serves bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.services[host] = serves
}

func (d *Description) isService(host string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.services[host]
}

// Validated is a transport whose requests and responses are compared with the description.
type Validated struct{ *http.Transport }

// RoundTrip sends a request. It returns an error if the response is not as described.
func (v Validated) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := v.Transport.RoundTrip(r)
	if err != nil || !Described().isService(r.URL.Host) {
		return resp, err
	}
	content, err := io.ReadAll(resp.Body)
	resp.Body.Close()
	resp.Body = io.NopCloser(io.MultiReader(bytes.NewReader(content), broken{err}))
	if err != nil {
		return resp, nil // it broke off, as some tests want it
	}
	if err := Described().Hold(r, resp, content); err != nil {
		return nil, err
	}
	return resp, nil
}

// broken is the rest of a content that ended with an error.
type broken struct{ err error }

func (b broken) Read([]byte) (int, error) {
	if b.err == nil {
		return 0, io.EOF
	}
	return 0, b.err
}

// Hold returns an error if a response is not as described. Then the run of all tests fails
// too.
func (d *Description) Hold(r *http.Request, resp *http.Response, content []byte) error {
	operation, err := d.check(r, resp, content)
	if found := Known.exchanged(r, resp, content); len(found) > 0 {
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

// Read reads the response to a request that a test wrote to a connection directly, and
// compares it with the description. sent may lack its end.
func (d *Description) Read(t testing.TB, conn io.Reader, sent string) (*http.Response, string, error) {
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

// Undescribed are the requests of browsers that are not part of the API.
var Undescribed = []string{
	"GET /", "HEAD /",
	"GET /api/partners/v2.0/docs/favicon.png", "HEAD /api/partners/v2.0/docs/favicon.png",
	"GET /api/partners/v2.0/docs/page.css", "HEAD /api/partners/v2.0/docs/page.css",
	"GET /api/partners/v2.0/docs/page.js", "HEAD /api/partners/v2.0/docs/page.js",
	"GET /api/partners/v2.0/docs/swagger-ui-bundle.js", "HEAD /api/partners/v2.0/docs/swagger-ui-bundle.js",
	"GET /api/partners/v2.0/docs/swagger-ui.css", "HEAD /api/partners/v2.0/docs/swagger-ui.css",
}

// check returns the operation of a request, or "" if there is none.
func (d *Description) check(r *http.Request, resp *http.Response, content []byte) (operation string, err error) {
	switch {
	case resp.Header.Get("X-Request-ID") == "": // net/http answered before the service saw it
		if resp.StatusCode != http.StatusBadRequest && resp.StatusCode != http.StatusRequestHeaderFieldsTooLarge {
			return "", errors.New("no X-Request-ID")
		}
		return "", nil
	case r.Header.Get("Access-Control-Request-Method") != "" && resp.StatusCode == http.StatusNoContent, // the Fetch standard's
		slices.Contains(Undescribed, r.Method+" "+r.URL.Path):
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
			if err := setContent(asked, r); err != nil {
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

// setContent gives asked the content of r, in the form that the description has. The byte order
// mark that may precede JSON is no part of it. In OAuth requests the media type is not what tells
// a form from JSON, and a null counts as missing, which a form cannot express.
func setContent(asked, r *http.Request) error {
	body, err := r.GetBody()
	if err != nil {
		return err
	}
	content, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	content = bytes.TrimPrefix(content, []byte("\uFEFF"))
	if strings.HasPrefix(asked.URL.Path, "/oauth2/") {
		content = bytes.TrimSpace(content)
		asked.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		if bytes.HasPrefix(content, []byte("{")) {
			asked.Header.Set("Content-Type", "application/json")
			if content, err = withoutNulls(content); err != nil {
				return err
			}
		}
	}
	asked.Body, asked.GetBody = io.NopCloser(bytes.NewReader(content)), nil
	return nil
}

// withoutNulls returns a JSON object without the members that are null.
func withoutNulls(object []byte) ([]byte, error) {
	var members map[string]any
	if err := json.Unmarshal(object, &members); err != nil {
		return nil, err
	}
	maps.DeleteFunc(members, func(_ string, value any) bool { return value == nil })
	return json.Marshal(members)
}

// problem checks a response that belongs to no operation.
func (d *Description) problem(r *http.Request, resp *http.Response, content []byte) error {
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

// checkHeader checks header fields that the library ignores: undescribed ones, and those of
// responses to HEAD and of 304.
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

// unexercised returns the operations, each with a status, that the description has and no
// test has seen.
func (d *Description) unexercised() (missing []string) {
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

// verdict returns the exit code of a run of tests: the code of the tests, or 1 if a response
// was not as described, or if whole is set and a run of all tests has not seen all of the
// description.
func (d *Description) verdict(code int, whole bool) int {
	for _, wrong := range d.wrong {
		fmt.Println(wrong)
		code = 1
	}
	for _, name := range []string{"test.run", "test.skip", "test.list", "test.fuzz"} {
		whole = whole && flag.Lookup(name).Value.String() == ""
	}
	if !whole || code != 0 || testing.Short() {
		return code
	}
	if missing := d.unexercised(); len(missing) > 0 {
		fmt.Printf("openapi.json describes what no test has seen:\n%s\n", strings.Join(missing, "\n"))
		return 1
	}
	return 0
}
