package main

// Fuzz targets for the parsers of requests. Other targets are beside the files that they test.
// The corpus of each target is in testdata/fuzz, where the hard cases have names; every "go
// test" runs it.

import (
	"bytes"
	stdjson "encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
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

	"energy-contracts/internal/servicetest"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

// TestEachFuzzTargetHolds is the long form of the targets: it fuzzes each one for about a
// minute on one core. The number of inputs is limited and not the time, since Go before 1.27
// sometimes fails at the end of a duration without a failing input
// (https://go.dev/issue/75804).
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

// storyRequests returns the heads and the bodies of the requests of all stories.
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

// readJSON is an independent parser, with a library that the service does not use, of JSON as
// the specification accepts it: one value in UTF-8, without duplicate names and nested no
// deeper than levels. It keeps numbers as they were sent.
func readJSON(text []byte, levels int) (value any, ok bool) {
	text = bytes.TrimPrefix(text, []byte{0xEF, 0xBB, 0xBF}) // RFC 8259 §8.1 allows to ignore it
	if !utf8.Valid(text) || !stdjson.Valid(text) || surrogate.Match(surrogatePairs.ReplaceAll(text, []byte(" "))) {
		return nil, false
	}
	d := stdjson.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	value, err := readValue(d, levels)
	return value, err == nil
}

// contractLevels is how deeply a contract may nest.
const contractLevels = 4

// A surrogate without its pair stands for no character (RFC 8259 §8.2).
var (
	surrogate      = regexp.MustCompile(`\\u[dD][89a-fA-F]`)
	surrogatePairs = regexp.MustCompile(`\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}`)
)

// readValue reads a value whose objects and arrays nest no deeper than levels.
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

// tree returns the value of a JSON text.
func tree(t testing.TB, text []byte) any {
	t.Helper()
	value, ok := readJSON(text, contractLevels)
	if !ok {
		t.Fatalf("not JSON: %s", text)
	}
	return value
}

// text returns the JSON text of a value.
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

// contractSchema returns the schema of a request for a contract in openapi.json.
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

// beyondSchema matches the details of faults that a schema cannot express.
var beyondSchema = regexp.MustCompile(`^(is the same instant as|must be a UUID|must be an ISO 4217 code|must be an RFC 3339 time with an offset such as [^,]+, is "\d{4}-(02-(29|3\d)|(0[469]|11)-31)|must be a finite number|and \d+ more)`)

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

// FuzzBody checks, against an independent parser and openapi.json, that a body that is not
// JSON is a 400, that one that is not a contract is a 422, and that both say why and where. An
// accepted body must survive encoding and decoding and pass the validation again.
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
		// A contract without nulls is a merge patch that makes itself.
		if patched, err := v.Patched(Contract{}, request); err != nil {
			t.Fatalf("accepted, but not as a patch of nothing\n%s\n%v", request, err)
		} else if again, err := patched.encode(demoContract); err != nil || string(again) != string(doc) {
			t.Fatalf("%s\nis another as a patch of nothing, %v\n%s", doc, err, again)
		}
	})
}

// wantRefused fails the test unless exactly the bodies that are not JSON are malformed, and
// each error is explained.
func wantRefused(t *testing.T, isJSON bool, err error) {
	t.Helper()
	if bad := new(malformed); errors.As(err, &bad) == isJSON {
		t.Fatalf("JSON: %v, and %v", isJSON, err)
	}
	if err != nil {
		wantExplained(t, err)
	}
}

// wantExplained fails the test unless a person could act on the error.
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

// wantOfParameter fails the test unless an error is nil or about this malformed parameter.
func wantOfParameter(t *testing.T, parameter string, err error) {
	t.Helper()
	if bad := new(malformed); err != nil && (!errors.As(err, &bad) || bad.Parameter != parameter) {
		t.Fatalf("refused with %v", err)
	}
}

// FuzzPatch checks that a patch has the same result as the pseudocode of RFC 7396 §2, or
// breaks the same rules.
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
					// The removal of a member that no contract has counts as a misspelling.
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

// mergePatched is the function MergePatch of RFC 7396 §2.
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

// wrongs returns all faults of an error, sorted, or only that there are more than are listed.
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

// The grammar of RFC 9110 §8.8.3 and §5.6.1.2.
var (
	entityTagForm  = `(?:W/)?"[^\x00-\x20"\x7F]*"`
	entityTagInAny = regexp.MustCompile(entityTagForm)
	entityTagList  = regexp.MustCompile(`^[ \t,]*` + entityTagForm + `(?:[ \t]*,[ \t,]*` + entityTagForm + `)*[ \t,]*$`)
	anyEntityTag   = regexp.MustCompile(`^[ \t]*\*[ \t]*$`)
)

// FuzzEntityTags checks that exactly the values of the grammar are accepted.
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

// fuzzAPI returns the API with the demo data, without a server. Its clock advances by an hour
// with each call, so that no client has to wait after a failed login.
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

// FuzzID checks that only the form of 36 characters is a UUID, in either case.
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

// FuzzSelection checks that an export has exactly the selected contracts between its first and its
// last line, that a selection must be a UUID, and that nothing else is taken for one.
func FuzzSelection(f *testing.F) {
	for _, query := range []string{"", "org_id=" + demoOrg, "user_id=" + strings.ToUpper(demoUser), "org_id=" + demoOtherOrg + "&user_id=" + demoUser, "org_id=x", "org_id="} {
		f.Add(query)
	}
	a := fuzzAPI(f)
	control := newControl(f.Context(), a.store, time.Now, slog.New(slog.DiscardHandler), defaultMaxBody)
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
		status, want := 200, everything
		for name, ids := range values {
			if len(ids) > 1 || name != "org_id" && name != "user_id" {
				err = errUnreadable
			}
		}
		for _, name := range []string{"org_id", "user_id"} {
			id := values.Get(name)
			switch {
			case err != nil:
				status = 400
			case !values.Has(name):
			case !uuidForm.MatchString(id):
				status = 422
			default:
				var kept string
				for line := range strings.Lines(want) {
					if strings.Contains(line, fmt.Sprintf(`"%s":%q`, name, strings.ToLower(id))) || strings.HasPrefix(line, `{"export":`) {
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

// FuzzClientRequest checks that whatever is sent to make a client, to rotate it or to remove it,
// all clients can be listed, and the file can be backed up and has no fault.
func FuzzClientRequest(f *testing.F) {
	store, _ := openStore(f, newPath(f))
	control := newControl(f.Context(), store, time.Now, slog.New(slog.DiscardHandler), defaultMaxBody)
	ask := func(t testing.TB, method, path, body string) (status int, got string) {
		t.Helper()
		r := httptest.NewRequest(method, "/", strings.NewReader(body))
		r.URL.Path = path
		w := httptest.NewRecorder()
		control.ServeHTTP(w, r)
		if w.Code >= 500 {
			t.Fatalf("%s %q %q: %d %s", method, path, body, w.Code, w.Body)
		}
		return w.Code, w.Body.String()
	}
	f.Fuzz(func(t *testing.T, add, id, rotate string) {
		var made credentials
		if status, got := ask(t, "POST", "/clients", add); status == 200 {
			if err := json.Unmarshal([]byte(got), &made); err != nil {
				t.Fatalf("%v\n%s", err, got)
			}
			ask(t, "POST", "/clients/"+made.ID+"/secret", rotate)
		}
		ask(t, "POST", "/clients/"+id+"/secret", rotate)
		ask(t, "DELETE", "/clients/"+id, "")
		var listed []listedClient
		if _, got := ask(t, "GET", "/clients", ""); json.Unmarshal([]byte(got), &listed) != nil || made.ID != id && (len(listed) > 0) != (made.ID != "") {
			t.Fatalf("listed are %s", got)
		}
		if made.ID == "" {
			return
		}
		copied, _, err := store.Snapshot(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer copied.Close()
		path := filepath.Join(t.TempDir(), "copy")
		content, err := io.ReadAll(copied)
		if err != nil {
			t.Fatal(err)
		}
		writeTo(t, path, content)
		a := &app{log: slog.New(slog.DiscardHandler)}
		if err := a.verifyDatabase(t.Context(), path, "the copy"); err != nil {
			t.Fatal(err)
		}
		ask(t, "DELETE", "/clients/"+made.ID, "")
	})
}

// The grammar of RFC 3339 §5.6.
var timeForm = regexp.MustCompile(`^(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:[Zz]|([+-])(\d\d):(\d\d))$`)

// FuzzTimestamp checks that a time is accepted exactly if the grammar has it and its day
// exists.
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

// FuzzPrice checks that a price is a JSON number that a double can hold.
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
