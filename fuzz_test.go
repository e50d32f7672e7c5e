package main

// Fuzz targets for what parses the bytes of strangers.

import (
	"errors"
	"net/url"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// storyRequests are the requests of all stories, as heads and bodies.
func storyRequests(t testing.TB) (heads, bodies []string) {
	t.Helper()
	for _, file := range storyFiles(t) {
		for _, f := range readStory(t, file).Files {
			if head, body, ok := strings.Cut(string(f.Data), "\n\n"); ok && strings.HasSuffix(f.Name, "request") {
				heads, bodies = append(heads, head), append(bodies, strings.TrimSuffix(body, "\n"))
			}
		}
	}
	return heads, bodies
}

// FuzzBody: what is accepted re-encodes, decodes to the same, and passes
// validation; what is not says why, and where.
func FuzzBody(f *testing.F) {
	_, bodies := storyRequests(f)
	for _, b := range bodies {
		f.Add([]byte(b))
	}
	f.Add([]byte(year(30)))
	v, err := newValidator()
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		c, err := v.Contract(body)
		if err != nil {
			wantExplained(t, err)
			if err := v.Patch(body); err != nil {
				wantExplained(t, err)
			}
			return
		}
		doc, err := c.encode(demoContract)
		if err != nil || !jsontext.Value(doc).IsValid() {
			t.Fatalf("accepted, but encodes to %q, %v", doc, err)
		}
		var d document
		if err := json.Unmarshal(doc, &d); err != nil {
			t.Fatalf("%s: %v", doc, err)
		}
		if library, err := json.Marshal(&d); err != nil || string(library) != string(doc) {
			t.Fatalf("%s\nis another when package json encodes it, %v\n%s", doc, err, library)
		}
		decoded, err := decodeDocument(doc)
		if err != nil {
			t.Fatalf("%s does not decode: %v", doc, err)
		}
		if again, err := decoded.encode(demoContract); err != nil || string(again) != string(doc) {
			t.Fatalf("%s\nis another when decoded and encoded, %v\n%s", doc, err, again)
		}
		request, err := json.Marshal(decoded)
		if err != nil {
			t.Fatal(err)
		}
		sent, err := v.Contract(request)
		if err != nil {
			t.Fatalf("accepted, but not again as\n%s\n%v", request, err)
		}
		if again, err := sent.encode(demoContract); err != nil || string(again) != string(doc) {
			t.Fatalf("%s\nis another when sent again, %v\n%s", doc, err, again)
		}
		// A contract without nulls is a merge patch to itself.
		if patched, err := v.Patched(Contract{}, request); err != nil {
			t.Fatalf("accepted, but not as a patch of nothing\n%s\n%v", request, err)
		} else if again, err := patched.encode(demoContract); err != nil || string(again) != string(doc) {
			t.Fatalf("%s\nis another as a patch of nothing, %v\n%s", doc, err, again)
		}
	})
}

// wantExplained fails unless a person could act on the error.
func wantExplained(t *testing.T, err error) {
	t.Helper()
	var (
		bad    *malformed
		inv    *invalid
		faults []fault
	)
	switch {
	case errors.As(err, &bad):
		faults = []fault{bad.fault}
	case errors.As(err, &inv):
		faults = inv.list()
	default:
		t.Fatalf("refused with %v", err)
	}
	if len(faults) == 0 || len(faults) > maxFaults+1 {
		t.Fatalf("%d faults", len(faults))
	}
	for _, f := range faults {
		if !strings.HasPrefix(f.Pointer, "#") || f.Detail == "" || len(f.Pointer)+len(f.Detail) > 1000 {
			t.Fatalf("fault %+v", f)
		}
	}
}

// FuzzEntityTags: what is accepted is written as a list that reads the same.
func FuzzEntityTags(f *testing.F) {
	heads, _ := storyRequests(f)
	for _, head := range heads {
		for line := range strings.Lines(head) {
			if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); ok && strings.HasSuffix(name, "-Match") {
				f.Add(value)
			}
		}
	}
	f.Add(`"a", W/"b" ,, "\"`)
	f.Fuzz(func(t *testing.T, value string) {
		tags, err := parseEntityTags("If-Match", []string{value})
		if err != nil {
			var bad *malformed
			if !errors.As(err, &bad) || bad.Parameter != "If-Match" {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		if !tags.present || tags.any == (len(tags.tags) > 0) {
			t.Fatalf("%q is %+v", value, tags)
		}
		lines := []string{"*"}
		if !tags.any {
			lines = nil
			for _, tag := range tags.tags {
				line := tag.opaque
				if tag.weak {
					line = "W/" + line
				}
				lines = append(lines, line)
			}
		}
		again, err := parseEntityTags("If-Match", lines)
		if err != nil || !reflect.DeepEqual(again, tags) {
			t.Fatalf("%q is %+v, but %q is %+v, %v", value, tags, lines, again, err)
		}
	})
}

// FuzzOAuthRequest: what is accepted reads the same as a form that is written anew,
// and as JSON.
func FuzzOAuthRequest(f *testing.F) {
	heads, bodies := storyRequests(f)
	for i, head := range heads {
		if strings.Contains(head, " /oauth2/") {
			f.Add(!strings.Contains(head, "json"), []byte(bodies[i]))
		}
	}
	f.Fuzz(func(t *testing.T, form bool, body []byte) {
		const formType, jsonType = "application/x-www-form-urlencoded", "application/json"
		contentType := jsonType
		if form {
			contentType = formType
		}
		req, err := parseOAuthRequest(contentType, body)
		if err != nil {
			var bad *oauthError
			if !errors.As(err, &bad) || bad.status != 400 || bad.Code != "invalid_request" || req != (oauthRequest{}) {
				t.Fatalf("refused with %v and %+v", err, req)
			}
			return
		}
		values, members := url.Values{}, map[string]string{}
		for name, value := range map[string]*string{
			"client_id": req.ClientID, "client_secret": req.ClientSecret, "grant_type": req.GrantType, "scope": req.Scope, "token": req.Token,
		} {
			if value != nil && *value == "" {
				t.Fatalf("%s is there and empty", name)
			}
			if value != nil && utf8.ValidString(*value) { // JSON can say no other
				values.Set(name, *value)
				members[name] = *value
			} else if value != nil {
				return
			}
		}
		inJSON, err := json.Marshal(members)
		if err != nil {
			t.Fatal(err)
		}
		for contentType, body := range map[string]string{formType: values.Encode(), jsonType: string(inJSON)} {
			if again, err := parseOAuthRequest(contentType, []byte(body)); err != nil || !reflect.DeepEqual(again, req) {
				t.Fatalf("%s is %+v, %v, want %+v", body, again, err, req)
			}
		}
	})
}
