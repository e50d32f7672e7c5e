package main

// Fuzz targets for all that parses the bytes of strangers, but for the database file's,
// which is check_test.go's. What each target is told once and for all is in
// testdata/fuzz, where the hard cases have names; they run with every "go test".

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	stdjson "encoding/json"
	"energy-contracts/internal/servicetest"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"mime"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/MicahParks/jwkset"
	"github.com/MicahParks/keyfunc/v3"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/golang-jwt/jwt/v5"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

// TestEachFuzzTargetHolds is the long form of the targets, whose seeds every "go test"
// runs: it fuzzes each for a minute on a core of its own. That is in rounds which are
// counted and not timed, as Go before 1.27 fails now and then when a duration is over,
// without an input that failed (https://go.dev/issue/75804).
func TestEachFuzzTargetHolds(t *testing.T) {
	if servicetest.Amount(true, false) {
		t.Skipf("the seeds of each target are tests too; set %s to fuzz each for a minute", servicetest.LongEnv)
	}
	t.Parallel()
	instrumented := filepath.Join(t.TempDir(), "fuzz.test")
	servicetest.Succeeds(t, exec.Command("go", "test", "-c", "-fuzz", ".", "-o", instrumented, "."))
	cache := t.TempDir()
	targets := strings.Fields(servicetest.Succeeds(t, exec.Command(instrumented, "-test.list", "^Fuzz")))
	if len(targets) == 0 {
		t.Fatal("there are none")
	}
	for _, target := range targets {
		t.Run(target, func(t *testing.T) {
			t.Parallel()
			for began := time.Now(); time.Since(began) < time.Minute; {
				cmd := exec.Command(instrumented, "-test.run=^$", "-test.fuzz=^"+target+"$", "-test.fuzzcachedir="+cache, "-test.parallel=1", "-test.fuzzminimizetime=1s", "-test.fuzztime=20000x")
				cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Fatalf("%v: %v\n%s", cmd.Args, err, out)
				}
			}
		})
	}
}

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

// readJSON is a second reader, by the library that the service does not use, of what
// the specification takes for JSON: one value in UTF-8, no name twice in an object,
// nothing deeper than some levels. Its numbers are as they were sent.
func readJSON(text []byte, levels int) (value any, ok bool) {
	if !utf8.Valid(text) || !stdjson.Valid(text) || surrogate.Match(surrogatePairs.ReplaceAll(text, []byte(" "))) {
		return nil, false
	}
	d := stdjson.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	value, err := readValue(d, levels)
	return value, err == nil
}

// contractLevels is how deep a contract may nest.
const contractLevels = 4

// A surrogate that is no half of a pair stands for no character (RFC 8259 §8.2).
var (
	surrogate      = regexp.MustCompile(`\\u[dD][89a-fA-F]`)
	surrogatePairs = regexp.MustCompile(`\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}`)
)

// readValue reads a value in which objects and arrays nest no deeper than levels.
func readValue(d *stdjson.Decoder, levels int) (any, error) {
	token, err := d.Token()
	begin, nested := token.(stdjson.Delim)
	if err != nil || !nested {
		return token, err
	}
	if levels == 0 {
		return nil, errors.New("too deep")
	}
	array, object := []any{}, map[string]any{}
	for d.More() {
		if begin == '[' {
			element, err := readValue(d, levels-1)
			if err != nil {
				return nil, err
			}
			array = append(array, element)
			continue
		}
		name, err := d.Token()
		if err != nil {
			return nil, err
		}
		if _, twice := object[name.(string)]; twice {
			return nil, errors.New("a name twice")
		}
		if object[name.(string)], err = readValue(d, levels-1); err != nil {
			return nil, err
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	if begin == '[' {
		return array, nil
	}
	return object, nil
}

// tree is what a text is that must be JSON.
func tree(t testing.TB, text []byte) any {
	t.Helper()
	value, ok := readJSON(text, contractLevels)
	if !ok {
		t.Fatalf("not JSON: %s", text)
	}
	return value
}

// text is the reverse.
func text(t testing.TB, tree any) []byte {
	t.Helper()
	b, err := stdjson.Marshal(tree)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func fuzzValidator(f *testing.F) *Validator {
	f.Helper()
	v, err := newValidator()
	if err != nil {
		f.Fatal(err)
	}
	return v
}

// contractSchema is openapi.json's, of a request.
func contractSchema(f *testing.F) *jsonschema.Schema {
	f.Helper()
	doc, err := jsonschema.UnmarshalJSON(strings.NewReader(readFile(f, "openapi.json")))
	if err != nil {
		f.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	c.AssertFormat()
	if err := c.AddResource("openapi.json", doc); err != nil {
		f.Fatal(err)
	}
	schema, err := c.Compile("openapi.json#/components/schemas/EnergyContractRequest")
	if err != nil {
		f.Fatal(err)
	}
	return schema
}

// beyondSchema matches what is said of a fault that openapi.json cannot say.
var beyondSchema = regexp.MustCompile(`^(is the same instant as|must be a UUID|must be an ISO 4217 code|must be an RFC 3339 time|must be a finite number|and \d+ more)`)

// document is a contract as a response has it, for package json to encode.
type document struct {
	EnergyContractType                    *string `json:"energy_contract_type"`
	EnergyPrices                          []Price `json:"energy_prices"`
	ID                                    ID      `json:"id"`
	Building                              *ID     `json:"building"`
	MeterID                               *string `json:"meter_id"`
	Supplier                              *string `json:"supplier"`
	CurrencyEnergyPrice                   *string `json:"currency_energy_price"`
	EnergyPriceIncludesExternalComponents *bool   `json:"energy_price_includes_external_components"`
}

// FuzzBody: what is not JSON is a 400, what is not a contract a 422, as another reader
// and openapi.json have it, and says why, and where. What is accepted re-encodes,
// decodes to the same, and passes validation.
func FuzzBody(f *testing.F) {
	_, bodies := storyRequests(f)
	for _, b := range bodies {
		f.Add([]byte(b))
	}
	f.Add([]byte(year(30)))
	v := fuzzValidator(f)
	schema := contractSchema(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		value, isJSON := readJSON(body, contractLevels)
		c, err := v.Contract(body)
		wantRefused(t, isJSON, err)
		if isJSON {
			inSchema := schema.Validate(value)
			more := err != nil && slices.ContainsFunc(faultsOf(err), func(f fault) bool { return beyondSchema.MatchString(f.Detail) })
			if (inSchema == nil) != (err == nil) && !more {
				t.Fatalf("%v: %s; but by openapi.json: %v", err, wrongs(err), inSchema)
			}
		}
		if err != nil {
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
		decoded, err := parseDocument(doc)
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

// wantRefused fails unless what is no JSON, and nothing else, is refused as such, and each
// refusal explained.
func wantRefused(t *testing.T, isJSON bool, err error) {
	t.Helper()
	if bad := new(malformed); errors.As(err, &bad) == isJSON {
		t.Fatalf("JSON: %v, and %v", isJSON, err)
	}
	if err != nil {
		wantExplained(t, err)
	}
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

// wantOfParameter fails if an error is not that a parameter is malformed.
func wantOfParameter(t *testing.T, parameter string, err error) {
	t.Helper()
	if bad := new(malformed); err != nil && (!errors.As(err, &bad) || bad.Parameter != parameter) {
		t.Fatalf("refused with %v", err)
	}
}

// FuzzPatch: a patch makes of a contract what the pseudo code of RFC 7396 §2 makes of
// its JSON, or breaks the same rules.
func FuzzPatch(f *testing.F) {
	heads, bodies := storyRequests(f)
	demo, err := readDemo()
	if err != nil {
		f.Fatal(err)
	}
	for i, head := range heads {
		if strings.HasPrefix(head, "PATCH ") {
			f.Add([]byte(demo.Contracts[0].Contract), []byte(bodies[i]))
		}
	}
	v := fuzzValidator(f)
	f.Fuzz(func(t *testing.T, body, patch []byte) {
		c, err := v.Contract(body)
		if err != nil {
			c = &Contract{}
		}
		before, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		got, err := v.Patched(*c, patch)
		if alone := v.Patch(patch); alone != nil && err == nil {
			t.Fatalf("is no patch: %v, but can be applied", alone)
		}
		value, isJSON := readJSON(patch, contractLevels)
		wantRefused(t, isJSON, err)
		if !isJSON {
			return
		}
		target := tree(t, before)
		if members, ok := value.(map[string]any); ok {
			for name, member := range members {
				if _, known := target.(map[string]any)[name]; !known && member == nil {
					// To remove what no contract has is taken for a misspelling.
					if err == nil {
						t.Fatalf("%q is accepted", name)
					}
					return
				}
			}
		}
		merged := text(t, mergePatched(target, value))
		want, wantErr := v.Contract(merged)
		if err != nil || wantErr != nil {
			if is, want := wrongs(err), wrongs(wantErr); is != want {
				t.Fatalf("patched\n%s\nmerged it is %s\n%s", is, merged, want)
			}
			return
		}
		is, err := got.encode(demoContract)
		wanted, wantErr := want.encode(demoContract)
		if err != nil || wantErr != nil || string(is) != string(wanted) {
			t.Fatalf("patched\n%s, %v\nmerged\n%s, %v", is, err, wanted, wantErr)
		}
	})
}

// mergePatched is RFC 7396 §2's MergePatch.
func mergePatched(target, patch any) any {
	members, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	object, ok := target.(map[string]any)
	if !ok {
		object = map[string]any{}
	}
	for name, value := range members {
		if value == nil {
			delete(object, name)
		} else {
			object[name] = mergePatched(object[name], value)
		}
	}
	return object
}

// wrongs is all that is wrong, in any order; of more than are listed, that it is.
func wrongs(err error) string {
	if err == nil {
		return ""
	}
	faults := faultsOf(err)
	if len(faults) > maxFaults {
		return faults[maxFaults].String()
	}
	var lines []string
	for _, f := range faults {
		lines = append(lines, f.String())
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

var uuidForm = regexp.MustCompile(`^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$`)

// FuzzLine: a line of an import is a contract that has one member by another name, and
// three that say where it belongs. What is accepted is exported as a line that is
// imported as the same.
func FuzzLine(f *testing.F) {
	for _, line := range exportedLines(f) {
		f.Add([]byte(line))
	}
	for _, bad := range badLines {
		f.Add([]byte(bad.line))
	}
	v := fuzzValidator(f)
	f.Fuzz(func(t *testing.T, line []byte) {
		k, c, err := v.Line(line)
		value, isJSON := readJSON(line, contractLevels)
		wantRefused(t, isJSON, err)
		if !isJSON {
			return
		}
		members, good := value.(map[string]any)
		for name, is := range map[string]ID{"org_id": k.Org, "user_id": k.User, "id": k.Contract} {
			id, _ := members[name].(string)
			good = good && uuidForm.MatchString(id) && (err != nil || string(is) == strings.ToLower(id))
			delete(members, name)
		}
		if _, ok := members["building_id"]; ok {
			good = false
		}
		if building, ok := members["building"]; ok {
			members["building_id"] = building
			delete(members, "building")
		}
		want, wantErr := v.Contract(text(t, members))
		if (err == nil) != (good && wantErr == nil) {
			t.Fatalf("%v, but its ids are right: %v, and without them it is a contract: %v", err, good, wantErr)
		}
		if err != nil {
			return
		}
		doc, err := c.encode(k.Contract)
		if wanted, wantErr := want.encode(k.Contract); err != nil || wantErr != nil || string(doc) != string(wanted) {
			t.Fatalf("is\n%s, %v\nwithout its ids\n%s, %v", doc, err, wanted, wantErr)
		}
		written := appendLine(nil, k, doc)
		if bytes.IndexByte(written, '\n') != len(written)-1 {
			t.Fatalf("is exported as no line: %q", written)
		}
		k2, c, err := v.Line(written)
		if err != nil || k2 != k {
			t.Fatalf("%v is exported as\n%s\nand imported as %v, %v", k, written, k2, err)
		}
		if again, err := c.encode(k.Contract); err != nil || string(again) != string(doc) {
			t.Fatalf("is exported as\n%s\nand imported as\n%s, %v", written, again, err)
		}
	})
}

// FuzzLineReader: what is read are the pieces between the ends of lines.
func FuzzLineReader(f *testing.F) {
	f.Add([]byte("a\n\n" + strings.Repeat("x", 40) + "\nlast"))
	f.Fuzz(func(t *testing.T, in []byte) {
		want := bytes.Split(in, []byte("\n"))
		if last := len(want) - 1; len(want[last]) == 0 { // after the last end there is no line
			want = want[:last]
		}
		l := lineReader{r: bufio.NewReaderSize(bytes.NewReader(in), 16)}
		for i, line := range want {
			if got, err := l.next(); err != nil || !bytes.Equal(got, line) {
				t.Fatalf("line %d is %q, %v, want %q", i+1, got, err, line)
			}
		}
		if got, err := l.next(); err != io.EOF || l.read != int64(len(in)) {
			t.Fatalf("%q, %v after %d bytes, want the end after %d", got, err, l.read, len(in))
		}
	})
}

// The grammar of RFC 9110 §8.8.3 and §5.6.1.2.
var (
	entityTagForm  = `(?:W/)?"[^\x00-\x20"\x7F]*"`
	entityTagInAny = regexp.MustCompile(entityTagForm)
	entityTagList  = regexp.MustCompile(`^[ \t,]*` + entityTagForm + `(?:[ \t]*,[ \t,]*` + entityTagForm + `)*[ \t,]*$`)
	anyEntityTag   = regexp.MustCompile(`^[ \t]*\*[ \t]*$`)
)

// FuzzEntityTags: what is accepted is what the grammar has, and nothing else.
func FuzzEntityTags(f *testing.F) {
	heads, _ := storyRequests(f)
	for _, head := range heads {
		for line := range strings.Lines(head) {
			if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ": "); ok && strings.HasSuffix(name, "-Match") {
				f.Add(value)
			}
		}
	}
	f.Fuzz(func(t *testing.T, value string) {
		want := entityTags{present: true, any: anyEntityTag.MatchString(value)}
		good := want.any
		if entityTagList.MatchString(value) {
			good = true
			for _, tag := range entityTagInAny.FindAllString(value, -1) {
				opaque, weak := strings.CutPrefix(tag, "W/")
				want.tags = append(want.tags, entityTag{weak, opaque})
			}
		}
		for _, lines := range [][]string{{value}, strings.SplitN(value, ",", 2)} { // lines are one list (§5.3)
			got, err := parseEntityTags("If-Match", lines)
			wantOfParameter(t, "If-Match", err)
			if good != (err == nil) || good && !reflect.DeepEqual(got, want) {
				t.Fatalf("%q is %+v, %v, want %v: %+v", lines, got, err, good, want)
			}
		}
	})
}

// The two forms of a key: RFC 9651 §3.3.3's, and bare.
var (
	quotedKey = regexp.MustCompile(`^"(?:[ !#-\[\]-~]|\\["\\])*"$`)
	bareKey   = regexp.MustCompile(`^[ !#-~][ -~]*$`)
)

// FuzzIdempotencyKey: a key is 1 to 255 printable ASCII characters, the same quoted and
// bare.
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
			t.Fatalf("%s is %q, %v, want %q", quoted, again, err, key)
		}
		if _, err := parse(value, value); err == nil {
			t.Fatal("two fields are accepted")
		}
	})
}

// FuzzRange: what is accepted is a page of 1 to 1000 and a UUID, and the same when it is
// written anew; what is refused names what is wrong.
func FuzzRange(f *testing.F) {
	heads, _ := storyRequests(f)
	for _, head := range heads {
		if _, query, ok := strings.Cut(head, "?"); ok {
			query, _, _ = strings.Cut(query, "\n")
			f.Add(query)
		}
	}
	limit := regexp.MustCompile(`^\+?0*([1-9][0-9]{0,2}|1000)$`)
	f.Fuzz(func(t *testing.T, query string) {
		values, malformedQuery := url.ParseQuery(query)
		r, err := parseRange(query)
		if bad := new(malformed); errors.As(err, &bad) != (malformedQuery != nil) {
			t.Fatalf("%v, but as a query %v", err, malformedQuery)
		}
		if malformedQuery != nil {
			return
		}
		var wrong []string
		if v := values["limit"]; len(v) > 1 || len(v) == 1 && !limit.MatchString(v[0]) {
			wrong = append(wrong, "limit")
		} else if len(v) == 1 && limit.FindStringSubmatch(v[0])[1] != strconv.Itoa(r.Limit) {
			t.Fatalf("limit is %d", r.Limit)
		}
		if v := values["after"]; len(v) > 1 || len(v) == 1 && !uuidForm.MatchString(v[0]) {
			wrong = append(wrong, "after")
		} else if len(v) == 1 && strings.ToLower(v[0]) != string(r.After) {
			t.Fatalf("after is %s", r.After)
		}
		var said []string
		if err != nil {
			for _, f := range faultsOf(err) {
				said = append(said, f.Parameter)
			}
		}
		if !slices.Equal(said, wrong) {
			t.Fatalf("wrong are %q, and it says %v", wrong, err)
		}
		if err != nil {
			return
		}
		anew := url.Values{}
		if r.Limit != 0 {
			anew.Set("limit", strconv.Itoa(r.Limit))
		}
		if r.After != "" {
			anew.Set("after", string(r.After))
		}
		if again, err := parseRange(anew.Encode()); err != nil || again != r {
			t.Fatalf("%s is %+v, %v, want %+v", anew.Encode(), again, err, r)
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
		sent, good := oauthParameters(form, body)
		if good != (err == nil) {
			t.Fatalf("refused with %v, but it can be read: %v", err, good)
		}
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
			if is := sent[name]; (value != nil) != (is != "") || value != nil && *value != is {
				t.Fatalf("%s is %v, want %q", name, value, is)
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

// oauthParameters is a second reader of a form or of JSON.
func oauthParameters(form bool, body []byte) (sent map[string]string, good bool) {
	sent = map[string]string{}
	if len(body) == 0 {
		return sent, true
	}
	if form {
		values, err := url.ParseQuery(string(body))
		for name, v := range values {
			if len(v) > 1 {
				return nil, false
			}
			sent[name] = v[0]
		}
		return sent, err == nil
	}
	value, ok := readJSON(body, 10_000)
	members, isObject := value.(map[string]any)
	if !ok || !isObject && value != nil {
		return nil, false
	}
	for _, name := range []string{"client_id", "client_secret", "grant_type", "scope", "token"} {
		if member, there := members[name]; there {
			if sent[name], ok = member.(string); !ok {
				return nil, false
			}
		}
	}
	return sent, true
}

// FuzzAuthorization: of all that can stand in the field, one token lets read, and one
// id and secret are the client's.
func FuzzAuthorization(f *testing.F) {
	heads, _ := storyRequests(f)
	for _, head := range heads {
		if _, value, ok := strings.Cut(head, "Authorization: "); ok {
			value, _, _ = strings.Cut(value, "\n")
			f.Add(value)
		}
	}
	const good = "0123456789-ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcde"
	f.Add("Bearer " + good)
	a := fuzzAPI(f)
	token := Token{Client: "demo", Org: demoOrg, Scopes: Scopes{Read: true}, Expires: time.Now().Add(time.Hour)}
	clients, err := a.store.Clients()
	if err != nil {
		f.Fatal(err)
	}
	token.ClientCreated = clients[slices.IndexFunc(clients, func(c Client) bool { return c.ID == "demo" })].Created
	if err := a.store.AddToken(hashOf(good), token); err != nil {
		f.Fatal(err)
	}
	bearer := regexp.MustCompile(`(?i)^bearer +` + good + ` *$`)
	basic := regexp.MustCompile(`(?i)^basic (.*)$`)
	f.Fuzz(func(t *testing.T, field string) {
		isClient := false
		if m := basic.FindStringSubmatch(field); m != nil {
			pair, err := base64.StdEncoding.DecodeString(m[1])
			id, secret, _ := strings.Cut(string(pair), ":")
			id, err1 := url.QueryUnescape(id)
			secret, err2 := url.QueryUnescape(secret)
			isClient = errors.Join(err, err1, err2) == nil && id == "demo" && secret == "demo-secret"
		}
		for _, tt := range []struct {
			method, path, body, challenge string
			good                          bool
		}{
			{"GET", contractsURL("", demoOrg, demoUser) + "/" + demoContract, "", "Bearer ", bearer.MatchString(field)},
			{"POST", revocationPath, "token=none", "Basic ", isClient},
		} {
			r := httptest.NewRequest(tt.method, tt.path, strings.NewReader(tt.body))
			r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
			r.Header["Authorization"] = []string{field}
			w := httptest.NewRecorder()
			a.ServeHTTP(w, r)
			challenged := strings.HasPrefix(w.Header().Get("WWW-Authenticate"), tt.challenge)
			if tt.good != (w.Code == 200) || !tt.good && w.Code != 400 && (w.Code != 401 || !challenged) {
				t.Fatalf("%s: %d %v\n%s\nwant it good: %v", tt.path, w.Code, w.Header(), w.Body, tt.good)
			}
			if strings.Contains(w.Body.String(), good) {
				t.Fatalf("the answer has the token\n%s", w.Body)
			}
		}
	})
}

// fuzzAPI is the API with the demo data, without the program around it. Its clock goes
// on an hour with each look, so that a wrong guess is forgiven by the next.
func fuzzAPI(f *testing.F) *api {
	f.Helper()
	store, _ := openStore(f, newPath(f))
	if err := loadDemo(store, time.Now()); err != nil {
		f.Fatal(err)
	}
	now := time.Now()
	a, err := newAPI(store, func() time.Time { now = now.Add(time.Hour); return now }, slog.New(slog.DiscardHandler), apiSettings{maxBody: 1000, builtInTokens: true, tokenLifetime: tokenLifetime})
	if err != nil {
		f.Fatal(err)
	}
	return a
}

// FuzzMediaType: what is accepted is JSON in UTF-8, with whatever other parameters.
func FuzzMediaType(f *testing.F) {
	heads, _ := storyRequests(f)
	for _, head := range heads {
		if _, value, ok := strings.Cut(head, "Content-Type: "); ok {
			value, _, _ = strings.Cut(value, "\n")
			f.Add(value)
		}
	}
	isJSON := regexp.MustCompile(`(?i)^\s*application/json\s*(;|$)`)
	alone := regexp.MustCompile(`(?i)^[ \t]*application/json[ \t]*(;[ \t]*charset=("utf-8"|utf-8)[ \t]*)?$`)
	f.Fuzz(func(t *testing.T, value string) {
		err := checkMediaType(http.Header{"Content-Type": {value}}, "application/json")
		if err != nil {
			if p := problemOf(err); p.Status != http.StatusUnsupportedMediaType || len(p.Detail) > 1000 || alone.MatchString(value) {
				t.Fatalf("refused with %v", err)
			}
			return
		}
		media, params, err := mime.ParseMediaType(value)
		if err != nil || !isJSON.MatchString(value) || params["charset"] != "" && !strings.EqualFold(params["charset"], "utf-8") {
			t.Fatalf("accepted, and is %s with %q, %v", media, params, err)
		}
		if anew := mime.FormatMediaType(media, params); checkMediaType(http.Header{"Content-Type": {anew}}, "application/json") != nil {
			t.Fatalf("accepted, but not as %s", anew)
		}
	})
}

// FuzzID: a UUID is its 36 characters in either case.
func FuzzID(f *testing.F) {
	for _, id := range []string{demoOrg, strings.ToUpper(demoUser), "{" + demoContract + "}", "urn:uuid:" + demoContract} {
		f.Add(id)
	}
	f.Fuzz(func(t *testing.T, text string) {
		id, err := parseID(text)
		if good := uuidForm.MatchString(text); good != (err == nil) || good && string(id) != strings.ToLower(text) || !good && id != "" {
			t.Fatalf("%q is %q, %v", text, id, err)
		}
	})
}

// FuzzScopes: what is accepted is written in one form, and reads the same in a JWT.
func FuzzScopes(f *testing.F) {
	for _, scopes := range []string{"read", "write", "write read", " read  read ", "read\twrite", "read,write", "READ", "admin", ""} {
		f.Add(scopes)
	}
	form := regexp.MustCompile(`^ *(read|write)( +(read|write))* *$`)
	f.Fuzz(func(t *testing.T, text string) {
		var s Scopes
		err := s.UnmarshalText([]byte(text))
		if want := (Scopes{strings.Contains(text, "read"), strings.Contains(text, "write")}); form.MatchString(text) {
			if err != nil || s != want || scopesOf(jwt.MapClaims{"scope": text}) != want {
				t.Fatalf("%+v, %v, in a JWT %+v, want %+v", s, err, scopesOf(jwt.MapClaims{"scope": text}), want)
			}
			var again Scopes
			if err := again.UnmarshalText([]byte(s.String())); err != nil || again != s {
				t.Fatalf("%+v is written %q, which is %+v, %v", s, s, again, err)
			}
		} else if err == nil || s != (Scopes{}) {
			t.Fatalf("accepted as %+v", s)
		}
	})
}

// FuzzJWT: of all headers and claims that the issuer's key has signed, a token is what is
// for this service, at this time, by its issuer; and no other signature will do.
func FuzzJWT(f *testing.F) {
	const url, audience, header = "http://127.0.0.1:1", "energy-contracts", `{"alg":"EdDSA","typ":"at+jwt","kid":"a"}`
	now := time.Date(2026, 11, 23, 0, 0, 0, 0, time.UTC) // 1795392000
	i, err := newIssuer(f.Context(), url, audience, "org_id", func() time.Time { return now }, slog.New(slog.DiscardHandler))
	if err != nil {
		f.Fatal(err)
	}
	key := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	jwk, err := jwkset.NewJWKFromKey(key.Public(), jwkset.JWKOptions{Metadata: jwkset.JWKMetadataOptions{KID: "a"}})
	if err != nil {
		f.Fatal(err)
	}
	storage := jwkset.NewMemoryStorage()
	if err := storage.KeyWrite(f.Context(), jwk); err != nil {
		f.Fatal(err)
	}
	keys, err := keyfunc.New(keyfunc.Options{Storage: storage})
	if err != nil {
		f.Fatal(err)
	}
	i.keys.Store(&keySet{storage, keys})
	f.Add([]byte(header), []byte(`{"iss":"http://127.0.0.1:1","aud":"energy-contracts","exp":1795392060,"scope":"read","org_id":"`+demoOrg+`","client_id":"a"}`))
	encoded := base64.RawURLEncoding.EncodeToString
	f.Fuzz(func(t *testing.T, header, claims []byte) {
		var h, c map[string]any
		if stdjson.Unmarshal(header, &h) != nil || h["kid"] != "a" {
			t.Skip("of another key, for which the issuer would be asked")
		}
		isObject := stdjson.Unmarshal(claims, &c) == nil
		content := encoded(header) + "." + encoded(claims)
		signature := ed25519.Sign(key, []byte(content))
		got, err := i.token(content + "." + encoded(signature))
		if bad := badToken(""); err != nil && !errors.As(err, &bad) {
			t.Fatalf("refused with %v", err)
		}
		signature[0] ^= 1
		if forged, err := i.token(content + "." + encoded(signature)); err == nil {
			t.Fatalf("a forged one is %+v", forged)
		}
		if err != nil {
			return
		}
		_, critical := h["crit"]
		typ, _ := h["typ"].(string)
		if !isObject || h["alg"] != "EdDSA" || critical || !regexp.MustCompile(`(?i)^(application/)?(at\+)?jwt$`).MatchString(typ) {
			t.Fatalf("accepted as %+v", got)
		}
		exp, _ := c["exp"].(float64)
		nbf, _ := c["nbf"].(float64)
		at := float64(now.Unix())
		forUs := c["aud"] == audience
		if list, ok := c["aud"].([]any); ok {
			forUs = slices.Contains(list, any(audience))
		}
		if c["iss"] != url || !forUs || exp <= at-10 || nbf > at+10 {
			t.Fatalf("accepted as %+v", got)
		}
		org, _ := c["org_id"].(string)
		if string(got.Org) != strings.ToLower(org) && got.Org != "" || (got.Org != "") != uuidForm.MatchString(org) {
			t.Fatalf("accepted as %+v", got)
		}
	})
}

// FuzzSelection: what is exported is what was asked for, and nothing is for what is no id.
func FuzzSelection(f *testing.F) {
	for _, query := range []string{"", "org_id=" + demoOrg, "user_id=" + strings.ToUpper(demoUser), "org_id=" + demoOtherOrg + "&user_id=" + demoUser, "org_id=x", "org_id="} {
		f.Add(query)
	}
	a := fuzzAPI(f)
	control := newControl(a.store, time.Now, slog.New(slog.DiscardHandler))
	ask := func(query string) *httptest.ResponseRecorder {
		r := httptest.NewRequest("GET", "/contracts", nil)
		r.URL.RawQuery = query
		w := httptest.NewRecorder()
		control.ServeHTTP(w, r)
		return w
	}
	everything := ask("").Body.String()
	f.Fuzz(func(t *testing.T, query string) {
		values, err := url.ParseQuery(query)
		if err != nil {
			t.Skip("no query, which no command sends")
		}
		status, want := 200, everything
		for _, name := range []string{"org_id", "user_id"} {
			id := values.Get(name)
			switch {
			case !values.Has(name):
			case !uuidForm.MatchString(id):
				status = 422
			default:
				var kept string
				for line := range strings.Lines(want) {
					if strings.Contains(line, fmt.Sprintf(`"%s":%q`, name, strings.ToLower(id))) {
						kept += line
					}
				}
				want = kept
			}
		}
		if got := ask(query); got.Code != status || status == 200 && got.Body.String() != want {
			t.Fatalf("%d\n%s\nwant %d\n%s", got.Code, got.Body, status, want)
		}
	})
}

// RFC 3339 §5.6.
var timeForm = regexp.MustCompile(`^(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:[Zz]|([+-])(\d\d):(\d\d))$`)

// FuzzTimestamp: a time is what the grammar has, on a day that there is.
func FuzzTimestamp(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		value, err := jsontext.AppendQuote(nil, text)
		if err != nil {
			t.Skip("no UTF-8, which the parser has refused")
		}
		var want time.Time
		m := timeForm.FindStringSubmatch(text)
		good := m != nil
		if good {
			var n [11]int
			for i, digits := range m {
				n[i], _ = strconv.Atoi(digits)
			}
			nanoseconds, _ := strconv.Atoi((m[7] + "000000000")[:9])
			offset := time.Duration(n[9])*time.Hour + time.Duration(n[10])*time.Minute
			if m[8] == "-" {
				offset = -offset
			}
			local := time.Date(n[1], time.Month(n[2]), n[3], n[4], n[5], n[6], nanoseconds, time.UTC)
			good = local.Format("2006-01-02T15:04:05") == strings.ToUpper(text[:19]) && n[9] < 24 && n[10] < 60
			want = local.Add(-offset)
		}
		got, ok := instant(value)
		if ok != good || good && !got.Equal(want) {
			t.Fatalf("%s is %v, %v, want %v, %v", value, got, ok, want, good)
		}
	})
}

// FuzzPrice: a price is a JSON number that a double can hold.
func FuzzPrice(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		value := jsontext.Value(strings.TrimSpace(text)) // as the parser cuts it out
		if !value.IsValid() || value.Kind() != jsontext.KindNumber {
			t.Skip("no number, which the parser has refused")
		}
		var double float64
		if err := stdjson.Unmarshal(value, &double); finite(value) != (err == nil) {
			t.Fatalf("finite: %v, but read it is %v, %v", finite(value), double, err)
		}
	})
}

// FuzzOrigin: a path can be put behind what is accepted, and leads nowhere else. What
// pages may be named by is what browsers send.
func FuzzOrigin(f *testing.F) {
	f.Fuzz(func(t *testing.T, text string) {
		u, err := parseOrigin(text)
		if err != nil {
			if text != "*" && checkCORSOrigin(text) == nil {
				t.Fatal("no origin, but pages of it may use the API")
			}
			return
		}
		with, err := url.Parse(text + tokenPath)
		if err != nil || with.Scheme+"://"+with.Host != text || with.Host != u.Host || with.Path != tokenPath || with.User != nil || with.RawQuery != "" || with.Fragment != "" {
			t.Fatalf("with a path it is %+v, %v", with, err)
		}
		if err := checkCORSOrigin(text); err == nil && (strings.Contains(text, "*") || strings.HasSuffix(text, map[string]string{"http": ":80", "https": ":443"}[u.Scheme])) {
			t.Fatal("pages of it may use the API, but no browser sends it")
		}
	})
}
