package servicetest

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// Operation is an operation of openapi.json with the parts of a valid request.
type Operation struct {
	ID, Method, Path string // of the demo user's first contract
	Contract         bool   // for contracts, with a token; else public
	OAuth            bool   // an OAuth endpoint, with a client's secret
	ContentType      string // "": it has no content
	Body             string
}

// DemoNames replaces the names in a path by the first contract of the demo user.
var DemoNames = strings.NewReplacer("{org_id}", DemoOrg, "{user_id}", DemoUser, "{energy_contract_id}", DemoContract)

// Operations returns some of the operations of openapi.json, in the order of their ids.
func Operations(t testing.TB, some func(*Operation) bool) (found []Operation) {
	t.Helper()
	for path, item := range Described().Doc.Paths.Map() {
		for method, op := range item.Operations() {
			o := Operation{ID: op.OperationID, Method: method, Path: DemoNames.Replace(path)}
			o.Contract = op.Security != nil && strings.HasPrefix(path, "/api/partners/v2.0/org/") && len(*op.Security) > 0
			o.OAuth = op.RequestBody != nil && strings.HasPrefix(path, "/oauth2/")
			switch {
			case o.OAuth:
				o.ContentType, o.Body = "application/x-www-form-urlencoded", "grant_type=client_credentials&token=none"
			case op.RequestBody != nil:
				for contentType, media := range op.RequestBody.Value.Content {
					if len(media.Examples) == 0 { // another media type for the same content
						continue
					}
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
	slices.SortFunc(found, func(a, b Operation) int { return strings.Compare(a.ID, b.ID) })
	return found
}

// Header returns the header of a valid request.
func (o *Operation) Header(bearer string) http.Header {
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

// Failure is an error response: a problem document or an OAuth error.
type Failure struct {
	Status int
	Header http.Header // without those that each has
	Detail string
	Errors string // the problem document's, as JSON
	Code   string // OAuth's error
}

// Want compares a whole response.
func (f Failure) Want(t testing.TB, resp *http.Response, got string) {
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
