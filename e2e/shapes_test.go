//go:build linux

package e2e

// Every JSON shape as the value of every member and as the whole of every body, as a generator
// of invalid requests would try first. The members and their types come from openapi.json. The
// whole responses are compared.

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/getkin/kin-openapi/openapi3"
)

// form is a form of body that contains a contract.
type form int

const (
	wholeContract form = iota // of a POST or a PUT
	mergePatch                // of a PATCH
	exported                  // a line of an export
)

// fault is one fault of a body, with its place.
type fault struct{ Pointer, Detail string }

func (f fault) String() string { return f.Pointer + " " + f.Detail }

// maxFaults is the most faults that a response lists.
const maxFaults = 100

var (
	uuidForm = regexp.MustCompile(`^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$`)
	timeForm = regexp.MustCompile(`^(\d{4})-(\d\d)-(\d\d)[Tt](\d\d):(\d\d):(\d\d)(?:\.(\d+))?(?:[Zz]|([+-])(\d\d):(\d\d))$`)
)

// quoted returns a value as a response quotes it.
func quoted(v any) string {
	const longest, shown = 42, 21 // characters
	r := []rune(fmt.Sprint(v))
	if len(r) > longest {
		return fmt.Sprintf("%q… (%d characters)", string(r[:shown]), len(r))
	}
	return fmt.Sprintf("%q", string(r))
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

// whereItBelongs returns the members that a line must have besides a contract.
func whereItBelongs(i int) string {
	k := key(i)
	return fmt.Sprintf(`"org_id":%q,"user_id":%q,"id":%q`, k.Org, k.User, k.Contract)
}

// shape is a text in place of a member's value.
type shape struct {
	name, value string
	// notJSON is the reason why the shape is not JSON, and at the byte of the value where the
	// error is found. {after} stands for the context of the value, {rest} for the text after
	// it, and {end} for its first byte.
	notJSON string
	at      int
	// below is the place of the error in the value; ".." is the place that contains the value.
	below string
}

// many is the number of repetitions in a huge shape.
const many = 100_000

// mostMembers is the most members that an object in a body may have.
const mostMembers = 1000

// deep returns a value with n levels.
func deep(open, innermost, end string, n int) string {
	return strings.Repeat(open, n) + innermost + strings.Repeat(end, n)
}

func repeated(n int, part func(i int) string) string {
	var b strings.Builder
	for i := range n {
		b.WriteString(part(i))
	}
	return b.String()
}

var shapes = []shape{
	{name: "null", value: `null`},
	{name: "true", value: `true`},
	{name: "false", value: `false`},
	{name: "zero", value: `0`},
	{name: "less than zero", value: `-1`},
	{name: "minus zero", value: `-0`},
	{name: "a fraction", value: `1.50`},
	{name: "an exponent", value: `1E+2`},
	{name: "no double", value: `1e400`},
	{name: "no double, less than zero", value: `-1e400`},
	{name: "next to nothing", value: `1e-400`},
	{name: "a thousand digits", value: strings.Repeat("9", 1000)},
	{name: "a thousand digits of a fraction", value: "0." + strings.Repeat("9", 1000)},
	{name: "an empty string", value: `""`},
	{name: "a space", value: `" "`},
	{name: "a word", value: `"spot"`},
	{name: "a number in a string", value: `"1"`},
	{name: "null in a string", value: `"null"`},
	{name: "an escape", value: `"\u0041\/"`},
	{name: "NUL", value: `"\u0000"`},
	{name: "an emoji", value: `"\ud83d\ude00"`},
	{name: "19 characters of more bytes", value: `"` + strings.Repeat("ä", 19) + `"`},
	{name: "20 characters", value: `"` + strings.Repeat("ä", 20) + `"`},
	{name: "101 characters", value: `"` + strings.Repeat("😀", 101) + `"`},
	{name: "a local time", value: `"2023-11-01T00:00:00"`},
	{name: "a huge string", value: `"` + strings.Repeat("a", 1<<20) + `"`},
	{name: "a huge string of escapes", value: `"` + strings.Repeat(`\u0000`, many) + `"`},
	{name: "an empty array", value: `[]`},
	{name: "an array of null", value: `[null]`},
	{name: "an array of an array", value: deep("[", "", "]", 2)},
	{name: "a huge array", value: "[0" + strings.Repeat(",0", many-1) + "]"},
	{name: "a deep array", value: deep("[", "", "]", 10_000)},
	{name: "a deeper array", value: deep("[", "", "]", many)},
	{name: "an empty object", value: `{}`},
	{name: "an object", value: `{"a":1}`},
	{name: "an object of an object", value: deep(`{"a":`, "{}", "}", 1)},
	{name: "an object of the most members", value: `{"a":1` + repeated(mostMembers-1, func(i int) string { return fmt.Sprintf(`,"a%06d":1`, i) }) + "}"},
	{name: "a huge object", value: `{"a":1` + repeated(many, func(i int) string { return fmt.Sprintf(`,"a%06d":1`, i) }) + "}",
		notJSON: "more members than an object of a contract ever has", at: len(`{"a":1,`) + len(`"a000000":1,`)*(mostMembers-1) + len(`"a000000"`), below: fmt.Sprintf("/a%06d", mostMembers-1)},
	{name: "a deep object", value: deep(`{"a":`, "{}", "}", 10_000)},
	{name: "a name twice", value: `{"a":1,"a":1}`, notJSON: "this member appears twice; send it once", at: 7, below: "/a"},
	{name: "a name twice, once in escapes", value: `{"a":1,"\u0061":2}`, notJSON: "this member appears twice; send it once", at: 7, below: "/a"},

	{name: "NaN", value: `NaN`, notJSON: "invalid character 'N' at start of value"},
	{name: "Infinity", value: `Infinity`, notJSON: "invalid character 'I' at start of value"},
	{name: "-Infinity", value: `-Infinity`, notJSON: "invalid character 'I' in number (expecting digit)", at: 1},
	{name: "a plus", value: `+1`, notJSON: "invalid character '+' at start of value"},
	{name: "a minus alone", value: `-`, notJSON: "invalid character '{end}' in number (expecting digit)", at: 1},
	{name: "a leading zero", value: `01`, notJSON: "invalid character '1' after {after}", at: 1, below: ".."},
	{name: "a leading point", value: `.5`, notJSON: "invalid character '.' at start of value"},
	{name: "a point at the end", value: `1.`, notJSON: "invalid character '{end}' in number (expecting digit)", at: 2},
	{name: "an exponent without digits", value: `1e`, notJSON: "invalid character '{end}' in number (expecting digit)", at: 2},
	{name: "hexadecimal", value: `0x10`, notJSON: "invalid character 'x' after {after}", at: 1, below: ".."},
	{name: "half a literal", value: `tru`, notJSON: "invalid character '{end}' in literal true (expecting 'e')", at: 3},
	{name: "a literal in another case", value: `True`, notJSON: "invalid character 'T' at start of value"},
	{name: "undefined", value: `undefined`, notJSON: "invalid character 'u' at start of value"},
	{name: "single quotes", value: `'a'`, notJSON: `invalid character '\'' at start of value`},
	{name: "an unknown escape", value: `"\x41"`, notJSON: "invalid escape sequence `\\x` in string", at: 1},
	{name: "half an escape", value: `"\u12"`, notJSON: "invalid escape sequence `\\u12\"{end}` in string", at: 1},
	{name: "half a pair", value: `"\ud800"`, notJSON: "invalid surrogate pair `\\ud800\"{rest}` in string", at: 1},
	{name: "a pair the wrong way round", value: `"\ude00\ud83d"`, notJSON: "invalid surrogate pair `\\ude00\\ud83d` in string", at: 1},
	{name: "a tab in a string", value: "\"\t\"", notJSON: `invalid character '\t' in string (expecting non-control character)`, at: 1},
	{name: "NUL as it is", value: "\"\x00\"", notJSON: `invalid character '\x00' in string (expecting non-control character)`, at: 1},
	{name: "no UTF-8", value: "\"\xff\"", notJSON: "invalid UTF-8; save the text as UTF-8", at: 1},
	{name: "overlong UTF-8", value: "\"\xc0\xaf\"", notJSON: "invalid UTF-8; save the text as UTF-8", at: 1},
	{name: "a surrogate in UTF-8", value: "\"\xed\xa0\x80\"", notJSON: "invalid UTF-8; save the text as UTF-8", at: 1},
	{name: "a byte order mark", value: "\ufeff1", notJSON: `invalid character '\ufeff' at start of value`},
	{name: "a comma at the end of an array", value: `[1,]`, notJSON: "invalid character ',' at start of value", at: 2},
	{name: "no comma in an array", value: `[1 2]`, notJSON: "invalid character '2' after array element (expecting ',' or ']')", at: 3},
	{name: "a comma alone", value: `[,]`, notJSON: "invalid character ',' at start of value", at: 1},
	{name: "a comma at the end of an object", value: `{"a":1,}`, notJSON: "invalid character ',' at start of value", at: 6},
	{name: "no colon", value: `{"a" 1}`, notJSON: "invalid character '1' after object name (expecting ':')", at: 5, below: "/a"},
	{name: "nothing", value: ``, notJSON: "{nothing}"},
	{name: "a name alone", value: `{"a"}`, notJSON: "invalid character '}' after object name (expecting ':')", at: 4, below: "/a"},
	{name: "a bare name", value: `{a:1}`, notJSON: "invalid character 'a' at start of value", at: 1},
	{name: "a comment", value: `/**/1`, notJSON: "invalid character '/' at start of value"},
	{name: "a comma more", value: `null,`, notJSON: "invalid character ',' at start of value", at: 4, below: ".."},
	{name: "another bracket", value: `[}`, notJSON: "invalid character '}' at start of value", at: 1, below: "/0"},
}

// slot is a place for a shape: a member or an element of an array.
type slot struct {
	pointer string
	schema  *openapi3.Schema
	depth   int // how many objects and arrays it stands in
	// before and after are the parts of a valid contract around the slot. inForm adds the
	// other members of the contract.
	before, after string
}

func (s slot) name() string { return s.pointer[strings.LastIndexByte(s.pointer, '/')+1:] }

// isElement reports whether the slot is an element of an array, which has no name.
func (s slot) isElement() bool { return s.name() == "0" }

// rightValues are the values of a valid contract, by pointer.
var rightValues = map[string]string{
	"/energy_contract_type":                      `"monthly"`,
	"/energy_prices":                             `[{"price":0.20,"timestamp":"2023-11-01T00:00:00+00:00"}]`,
	"/energy_prices/0":                           `{"price":0.20,"timestamp":"2023-11-01T00:00:00+00:00"}`,
	"/energy_prices/0/price":                     `0.20`,
	"/energy_prices/0/timestamp":                 `"2023-11-01T00:00:00+00:00"`,
	"/building_id":                               `"8d6f2f4a-51c6-4a0b-9d3e-6b1f0c7a2e94"`,
	"/meter_id":                                  `"735999102100010234"`,
	"/supplier":                                  `"Nordlys Energi AB"`,
	"/currency_energy_price":                     `"EUR"`,
	"/energy_price_includes_external_components": `true`,
}

// slots returns all members and elements of a contract in openapi.json, in order.
func slots(t testing.TB) (found []slot) {
	t.Helper()
	var walk func(s slot)
	walk = func(s slot) {
		if s.pointer != "" {
			if rightValues[s.pointer] == "" {
				t.Fatalf("openapi.json has %s, of which rightValues does not say what is right", s.pointer)
			}
			found = append(found, s)
		}
		if s.schema.Items != nil {
			walk(slot{s.pointer + "/0", s.schema.Items.Value, s.depth + 1, s.before + "[", "]" + s.after})
		}
		for name, member := range s.schema.Properties {
			others := ""
			if s.pointer != "" {
				for _, other := range slices.Sorted(maps.Keys(s.schema.Properties)) {
					if other != name {
						others += fmt.Sprintf("%q:%s,", other, rightValues[s.pointer+"/"+other])
					}
				}
			}
			walk(slot{s.pointer + "/" + name, member.Value, s.depth + 1, fmt.Sprintf("%s{%s%q:", s.before, others, name), "}" + s.after})
		}
	}
	walk(slot{schema: described().Doc.Components.Schemas["EnergyContractRequest"].Value})
	slices.SortFunc(found, func(a, b slot) int { return strings.Compare(a.pointer, b.pointer) })
	if len(found) != len(rightValues) {
		t.Fatalf("openapi.json has %d of the %d in rightValues", len(found), len(rightValues))
	}
	return found
}

// sent is one request, or one line of an import, with its expected result.
type sent struct {
	name, body string
	status     int     // of a request
	faults     []fault // of a 400 or a 422
	// changed is the member that differs from the valid contract in a 200, and its value.
	changed, to string
}

// placeMembers are the members that a line of an import has besides a contract.
var placeMembers = []string{"org_id", "user_id", "id"}

// inForm returns the slot in a form of body, with valid members around it.
func (s slot) inForm(f form, line int) slot {
	top := strings.Split(s.pointer, "/")[1]
	others := ""
	if f == exported {
		for i, member := range strings.Split(whereItBelongs(line), ",") {
			if placeMembers[i] != top {
				others += member + ","
			}
		}
	}
	for _, pointer := range slices.Sorted(maps.Keys(rightValues)) {
		if name := pointer[1:]; f != mergePatch && name != top && !strings.Contains(name, "/") {
			others += fmt.Sprintf("%q:%s,", name, rightValues[pointer])
		}
	}
	s.before = "{" + others + s.before[1:]
	if f == exported {
		building := strings.NewReplacer("building_id", "building")
		s.pointer, s.before = building.Replace(s.pointer), building.Replace(s.before)
	}
	return s
}

// generated returns each shape in each slot of a form of body, and each member twice, in
// another case, and missing. Each line is of another contract.
func generated(t testing.TB, f form) (all []sent) {
	t.Helper()
	places := slots(t)
	if f == exported {
		for _, name := range placeMembers {
			id := openapi3.NewUUIDSchema()
			places = append(places, slot{"/" + name, id, 1, fmt.Sprintf("{%q:", name), "}"})
		}
	}
	add := func(place slot, expect func(s slot, right string) sent) {
		right := rightValues[place.pointer]
		if i := slices.Index(placeMembers, place.name()); i >= 0 {
			k := key(len(all))
			right = strconv.Quote([]string{k.Org, k.User, k.Contract}[i])
		}
		all = append(all, expect(place.inForm(f, len(all)), right))
	}
	for _, sh := range shapes {
		value := readShape(sh.value)
		for _, place := range places {
			if sh.value == "" && place.isElement() {
				continue // which is an empty array
			}
			add(place, func(s slot, _ string) sent { return s.expect(t, f, sh, value) })
		}
	}
	for _, place := range places {
		add(place, func(s slot, right string) sent {
			return s.expect(t, f, shape{name: "what is right", value: right}, readShape(right))
		})
		if place.isElement() {
			continue
		}
		for _, null := range []bool{false, true} {
			add(place, func(s slot, right string) sent {
				twice := shape{name: "twice", notJSON: "this member appears twice; send it once", at: len(right) + 1}
				again := right
				if null {
					twice.name, again = "twice, to remove it", "null"
				}
				twice.value = fmt.Sprintf("%s,%q:%s", right, s.name(), again)
				return s.expect(t, f, twice, nil)
			})
		}
		add(place, func(s slot, right string) sent { return s.inAnotherCase(right) })
		add(place, func(s slot, _ string) sent { return s.missing(f) })
	}
	return all
}

// readShape returns the value of a shape that is JSON.
func readShape(text string) (value any) {
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	_ = d.Decode(&value) // what is not, and what is too deep, is told apart by its text
	return value
}

// expect returns a shape in this slot with its expected result.
func (s slot) expect(t testing.TB, f form, sh shape, value any) sent {
	x := sent{name: s.pointer + " is " + sh.name, body: s.before + sh.value + s.after, status: 400}
	parent := s.pointer[:strings.LastIndexByte(s.pointer, '/')]
	if sh.notJSON != "" {
		after := "object value (expecting ',' or '}')"
		if s.isElement() {
			after = "array element (expecting ',' or ']')"
		}
		nothing := "missing value after object name"
		if s.depth == 3 { // which is read as a value, not as a token
			nothing = "invalid character '}' at start of value"
		}
		detail := strings.NewReplacer("{after}", after, "{nothing}", nothing, "{end}", s.after[:1], "{rest}", s.after).Replace(sh.notJSON)
		pointer := s.pointer + sh.below
		if sh.below == ".." {
			pointer = parent
		}
		x.faults = []fault{{Pointer: "#" + pointer, Detail: fmt.Sprintf("at byte %d: %s", len(s.before)+sh.at, detail)}}
		return x
	}
	if at, below, is := tooDeep(sh.value, 4-s.depth); is {
		x.faults = []fault{{Pointer: "#" + s.pointer + below, Detail: fmt.Sprintf("at byte %d: nested deeper than a contract ever is", len(s.before)+at)}}
		return x
	}
	if x.faults = s.wrong(f, value); len(x.faults) > 0 {
		x.status = 422
		return x
	}
	x.status = 200
	x.changed, x.to = s.name(), sh.value
	if _, ok := value.(string); ok {
		x.to = canonical(t, value)
	}
	switch {
	case s.pointer == "/energy_prices" && value == nil:
		x.to = "[]"
	case s.isElement():
		x.changed, x.to = "energy_prices", "["+x.to+"]"
	case s.name() == "price", s.name() == "timestamp":
		x.changed, x.to = "energy_prices", priceWith(s.name(), x.to)
	}
	return x
}

// tooDeep finds the place where a value has more levels than are allowed for it. No shape has
// brackets in a string.
func tooDeep(value string, levels int) (at int, below string, is bool) {
	for i, c := range []byte(value) {
		switch c {
		case '[', '{':
			if levels == 0 {
				return i + 1, below, true
			}
			levels--
			below += map[byte]string{'[': "/0", '{': "/a"}[c]
		case ']', '}':
			levels++
			below = below[:len(below)-2]
		}
	}
	return 0, "", false
}

// wrong returns the faults of a JSON value in this slot, in the words of a response.
func (s slot) wrong(f form, value any) (faults []fault) {
	say := func(format string, args ...any) {
		faults = append(faults, fault{Pointer: "#" + s.pointer, Detail: fmt.Sprintf(format, args...)})
	}
	schema := s.schema
	if len(schema.AnyOf) > 0 { // or null
		schema = schema.AnyOf[0].Value
	}
	mayBeNull := len(s.schema.AnyOf) > 0 || s.schema.Type.Includes("null")
	isID := slices.Contains(placeMembers, s.name())
	must := "an object"
	switch {
	case schema.Type.Includes("array"):
		must = "an array"
	case schema.Type.Includes("number"):
		must = "a number in currency/kWh"
	case schema.Type.Includes("boolean"):
		must = "true, false or null"
	case isID:
		must = "a UUID"
	case schema.Type.Includes("string"):
		must = "a string or null"
	}
	switch value := value.(type) {
	case nil:
		switch {
		case mayBeNull, schema.Type.Includes("array") && f == mergePatch:
		case isID:
			say("is required; send a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a")
		case schema.Type.Includes("array"):
			say("must be an array, is null; leave it out or send []")
		default:
			say("must be %s, is null", must)
		}
		return faults
	case bool:
		if !schema.Type.Includes("boolean") {
			say("must be %s, is a boolean", must)
		}
	case json.Number:
		if !schema.Type.Includes("number") {
			say("must be %s, is a number", must)
		} else if _, err := value.Float64(); err != nil {
			say("must be a finite number (IEEE 754 double), is %s", quoted(value))
		}
	case []any:
		if !schema.Type.Includes("array") {
			say("must be %s, is an array", must)
			break
		}
		for i, element := range value {
			faults = append(faults, slot{pointer: fmt.Sprintf("%s/%d", s.pointer, i), schema: schema.Items.Value}.wrong(f, element)...)
		}
	case map[string]any:
		if !schema.Type.Includes("object") {
			say("must be %s, is an object", must)
			break
		}
		for _, name := range slices.Sorted(maps.Keys(value)) {
			if schema.Properties[name] == nil {
				known := strings.Join(slices.Sorted(maps.Keys(schema.Properties)), ", ")
				faults = append(faults, fault{Pointer: "#" + s.pointer + "/" + name, Detail: "unknown member; known are " + known})
			}
		}
		for _, name := range schema.Required {
			if _, ok := value[name]; !ok {
				faults = append(faults, slot{pointer: s.pointer + "/" + name}.required())
			}
		}
	case string:
		switch length := utf8.RuneCountInString(value); {
		case !schema.Type.Includes("string"):
			say("must be %s, is a string", must)
		case isID && len(value) != 36:
			say("must be a UUID of 36 characters, has %d", length)
		case isID && !uuidForm.MatchString(value):
			say("must be a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a")
		case isID:
		case schema.Format == "uuid" && !uuidForm.MatchString(value):
			say("must be a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a or null, is %s", quoted(value))
		case s.name() == "timestamp" && !timeForm.MatchString(value):
			say("must be an RFC 3339 time with an offset such as 2023-11-01T00:00:00+00:00, is %s", quoted(value))
		case len(schema.Enum) > 0 && !slices.Contains(schema.Enum, any(value)):
			say("must be %s or null, is %s", strings.Trim(strings.ReplaceAll(fmt.Sprint(schema.Enum), " ", ", "), "[]"), quoted(value))
		case schema.MaxLength != nil && length > int(*schema.MaxLength):
			say("must be at most %d characters, has %d", *schema.MaxLength, length)
		case s.name() == "currency_energy_price" && value != "EUR": // of all shapes the only code
			say("must be an ISO 4217 code such as EUR as soon as energy_prices has an entry, is %s", quoted(value))
		}
	}
	if over := len(faults) - maxFaults; over > 0 {
		faults = append(faults[:maxFaults], fault{Pointer: "#", Detail: fmt.Sprintf("and %d more", over)})
	}
	return faults
}

func (s slot) required() fault {
	is := "is required; send a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a"
	if s.name() == "price" {
		is = "is required; send a number in currency/kWh"
	}
	return fault{Pointer: "#" + s.pointer, Detail: is}
}

// members returns the text before the name of the member in this slot.
func (s slot) members() string { return strings.TrimSuffix(s.before, strconv.Quote(s.name())+":") }

// mustBe reports whether a contract or a line without the member is invalid.
func (s slot) mustBe() bool { return slices.Contains(placeMembers, s.name()) || s.name() == "price" }

// inAnotherCase is a valid contract except that the name of a member is in another case.
func (s slot) inAnotherCase(value string) sent {
	name := strings.ToUpper(s.name())
	pointer := "#" + strings.TrimSuffix(s.pointer, s.name()) + name
	x := sent{
		name: s.pointer + " is in another case", body: fmt.Sprintf("%s%q:%s%s", s.members(), name, value, s.after),
		status: 422, faults: []fault{{Pointer: pointer, Detail: fmt.Sprintf("unknown member; did you mean %s?", s.name())}},
	}
	if s.mustBe() {
		x.faults = append(x.faults, s.required())
	}
	return x
}

// missing is a valid contract except that a member is missing.
func (s slot) missing(f form) sent {
	x := sent{name: s.pointer + " is missing", body: strings.TrimSuffix(s.members(), ",") + s.after, status: 200}
	switch {
	case s.mustBe():
		x.status, x.faults = 422, []fault{s.required()}
	case f == mergePatch && s.depth == 1: // it stays
	case s.name() == "energy_prices":
		x.changed, x.to = s.name(), "[]"
	case s.name() == "timestamp":
		x.changed, x.to = "energy_prices", priceWith("timestamp", "null")
	default:
		x.changed, x.to = s.name(), "null"
	}
	return x
}

// priceWith returns prices that are valid except for one member.
func priceWith(name, value string) string {
	const p = "/energy_prices/0/"
	return strings.Replace(rightValues["/energy_prices"], fmt.Sprintf("%q:%s", name, rightValues[p+name]), fmt.Sprintf("%q:%s", name, value), 1)
}

// contract returns a valid contract with an id and one changed member.
func contract(id, changed, to string) string {
	var b strings.Builder
	for i, name := range []string{
		"energy_contract_type", "energy_prices", "id", "building", "meter_id", "supplier",
		"currency_energy_price", "energy_price_includes_external_components",
	} {
		value := rightValues["/"+name]
		switch {
		case name == "id":
			value = strconv.Quote(id)
		case name == changed, name == "building" && changed == "building_id":
			value = to
		case name == "building":
			value = rightValues["/building_id"]
		}
		fmt.Fprintf(&b, "%c%q:%s", "{,"[min(i, 1)], name, value)
	}
	b.WriteByte('}')
	return b.String()
}

// refusal returns a problem document with faults.
func refusal(t testing.TB, status int, faults []fault) failure {
	t.Helper()
	detail := "The request breaks rules of the API; see errors."
	if status == 400 {
		detail = "The request cannot be parsed; see errors."
	}
	var list []string
	for _, f := range faults {
		list = append(list, fmt.Sprintf(`{"pointer":%s,"detail":%s}`, canonical(t, f.Pointer), canonical(t, f.Detail)))
	}
	return failure{Status: status, Detail: detail, Errors: `,"errors":[` + strings.Join(list, ",") + "]"}
}

// shapesTimeout is the limit for any response on a busy machine.
const shapesTimeout = 20 * time.Second

func TestEachShapeAtEachMember(t *testing.T) {
	long(t)
	t.Parallel()
	p := startProcess(t, nil, "--demo", "--db", shortPath(t))
	bearer := token(t, p.URL, "demo", "demo-secret")
	t.Run("of", func(t *testing.T) {
		for n, method := range []string{"POST", "PUT", "PATCH"} {
			t.Run(method, func(t *testing.T) {
				t.Parallel()
				tryShapes(t, method, bearer, contractsURL(p.URL, demoOrg, fmt.Sprintf("00000000-0000-4000-8000-%012d", n)))
			})
		}
	})
	wantUnharmed(t, p)
}

// tryShapes sends each shape to a user without contracts, and fails the test if a refused
// request changed something.
func tryShapes(t *testing.T, method, bearer, collection string) {
	c := &http.Client{Timeout: shapesTimeout}
	whole := http.Header{"Authorization": {"Bearer " + bearer}, "Content-Type": {"application/json"}}
	header, f, url := whole, wholeContract, collection
	if method == "PATCH" {
		header, f = with(whole, "Content-Type", mergePatchType), mergePatch
	}
	var there []string // all contracts
	wantThere := func(t *testing.T) {
		t.Helper()
		if resp, got := do(t, c, "GET", collection, whole, ""); resp.StatusCode != 200 || got != "["+strings.Join(there, ",")+"]" {
			t.Fatalf("%s: there is\n%.5000s\nwant\n%.5000s", resp.Status, got, there)
		}
	}
	right := slots(t)[0].inForm(wholeContract, 0)
	rightBody := right.before + rightValues[right.pointer] + right.after
	if method != "POST" {
		url += "/" + demoContract
		if resp, got := do(t, c, "PUT", url, with(whole, "If-None-Match", "*"), rightBody); resp.StatusCode != 201 {
			t.Fatalf("%s\n%s", resp.Status, got)
		}
		there = []string{contract(demoContract, "", "")}
	}
	for _, x := range generated(t, f) {
		t.Run(x.name, func(t *testing.T) {
			if x.status == 200 && method != "POST" {
				wantThere(t)
			}
			if method == "PATCH" && there[0] != contract(demoContract, "", "") {
				if resp, got := do(t, c, "PUT", url, whole, rightBody); resp.StatusCode != 200 {
					t.Fatalf("%s\n%s", resp.Status, got)
				}
				there[0] = contract(demoContract, "", "")
			}
			resp, got := do(t, c, method, url, header, x.body)
			if x.status != 200 {
				refusal(t, x.status, x.faults).Want(t, resp, got)
				return
			}
			id, location := demoContract, http.Header{}
			if method == "POST" {
				id = path.Base(resp.Header.Get("Location"))
				location.Set("Location", "energy-contracts/"+id)
				there = append(there, contract(id, x.changed, x.to))
			} else {
				there[0] = contract(id, x.changed, x.to)
			}
			wantContract(t, resp, got, there[len(there)-1], location)
		})
	}
	wantThere(t)
}

// wantContract compares a whole response except its entity tag.
func wantContract(t testing.TB, resp *http.Response, got, want string, more http.Header) {
	t.Helper()
	header := http.Header{
		"Content-Type": {"application/json"}, "Content-Length": {strconv.Itoa(len(want))}, "Etag": resp.Header["Etag"],
		"X-Content-Type-Options": {"nosniff"}, "X-Request-Id": resp.Header["X-Request-Id"],
	}
	maps.Copy(header, more)
	resp.Header.Del("Date")
	if resp.StatusCode != 200 || got != want || !maps.EqualFunc(resp.Header, header, slices.Equal) {
		t.Errorf("got %s\n%v\n%s\nwant 200\n%v\n%s", resp.Status, resp.Header, got, header, want)
	}
}

// wantUnharmed fails the test unless the process still responds, has logged no error, and uses
// no more memory than allowed.
func wantUnharmed(t testing.TB, p *process) {
	t.Helper()
	const limit = 150 // MB; 20 to 52 were seen
	if resp, got := do(t, http.DefaultClient, "GET", p.URL+"/readyz", nil, ""); resp.StatusCode != 200 {
		t.Errorf("%s\n%s", resp.Status, got)
	}
	if mb := (loaded{pid: p.Cmd.Process.Pid}).memory(t, "RssAnon"); mb > limit {
		t.Errorf("it has %.0f MB", mb)
	}
	if err := p.Terminate(t); err != nil {
		t.Error(err)
	}
	if log := p.Stderr.String(); strings.Contains(log, `"level":"ERROR"`) {
		t.Errorf("its log has\n%s", log)
	}
}

func TestEachShapeAtEachMemberOfALine(t *testing.T) {
	long(t)
	t.Parallel()
	db := shortPath(t)
	p := startProcess(t, nil, "--db", db)
	file, err := os.Create(filepath.Join(t.TempDir(), "in.jsonl"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var report, lines strings.Builder
	imported, bad := 0, 0
	for i, x := range generated(t, exported) {
		if _, err := io.WriteString(file, x.body+"\n"); err != nil {
			t.Fatal(err)
		}
		for _, f := range x.faults {
			fmt.Fprintf(&report, "line %d: %s\n", i+1, f)
		}
		if x.status == 200 {
			imported++
			lines.WriteString(key(i).line(contract(key(i).Contract, x.changed, x.to)))
		} else {
			bad++
		}
	}
	fmt.Fprintf(&report, "imported %d contracts\n", imported)
	got := run(t, nil, "import", "--keep-going", file.Name(), "--db", db)
	if want := fmt.Sprintf("energy-contracts: skipped %d invalid lines out of %d\n", bad, imported+bad); got.status != 1 || got.stderr != want {
		t.Errorf("exit status %d, %q, want %q", got.status, got.stderr, want)
	}
	wantLines(t, got.stdout, report.String())
	wantLines(t, ok(t, db, "export"), export(lines.String()))
	wantUnharmed(t, p)
}

// wantLines reports the lines that differ.
func wantLines(t testing.TB, got, want string) {
	t.Helper()
	is, wanted := strings.Split(got, "\n"), strings.Split(want, "\n")
	for i := range min(len(is), len(wanted)) {
		if is[i] != wanted[i] {
			t.Fatalf("line %d is\n%.500s\nwant\n%.500s", i+1, is[i], wanted[i])
		}
	}
	if len(is) != len(wanted) {
		t.Fatalf("%d lines, want %d", len(is), len(wanted))
	}
}

// bodies are shapes of a whole content. at and below are the place where it is not JSON.
var bodies = []shape{
	{name: "nothing", value: ``},
	{name: "null", value: `null`},
	{name: "true", value: `true`},
	{name: "a number", value: `0`},
	{name: "a string", value: `"a"`},
	{name: "an array", value: `[]`},
	{name: "an array of objects", value: `[{}]`},
	{name: "space", value: " \t\r\n", notJSON: "{empty}"},
	{name: "as much space as there may be", value: strings.Repeat(" ", 4<<20), notJSON: "{empty}"},
	{name: "two objects", value: `{}{}`, at: 3, notJSON: "something follows the end of the JSON; send one JSON value"},
	{name: "two lines", value: "{}\n{}", at: 4, notJSON: "something follows the end of the JSON; send one JSON value"},
	{name: "an object and more", value: `{}]`, at: 2, notJSON: "invalid character ']' at start of value"},
	{name: "half an object", value: `{`, at: 1, notJSON: "the JSON is cut off"},
	{name: "the end of an object", value: `}`, notJSON: "invalid character '}' at start of value"},
	{name: "a form", value: `supplier=a`, notJSON: "invalid character 's' at start of value"},
	{name: "XML", value: `<a/>`, notJSON: "invalid character '<' at start of value"},
	{name: "NUL", value: "\x00", notJSON: `invalid character '\x00' at start of value`},
	{name: "two byte order marks", value: "\ufeff\ufeff{}", at: 3, notJSON: `invalid character '\ufeff' at start of value`},
	{name: "UTF-16", value: "\xff\xfe{\x00}\x00", notJSON: "{UTF-16}"},
	{name: "gzip", value: "\x1f\x8b\x08\x00", notJSON: `invalid character '\x1f' at start of value`},
	{name: "arrays without an end", value: strings.Repeat("[", 60_000)},
	{name: "objects without an end", value: strings.Repeat(`{"a":`, 12_000)},
	{name: "a million arrays without an end", value: strings.Repeat("[", 1_000_000)},
	{name: "objects without an end as large as may be", value: strings.Repeat(`{"a":`, 4<<20/5)},
	{name: "arrays larger than may be", value: strings.Repeat("[", 4<<20+1)},
	{name: "names without an end", value: `{"` + strings.Repeat("a", 60_000), at: 60_002, notJSON: "the JSON is cut off"},
}

func TestEachShapeAsABody(t *testing.T) {
	long(t)
	t.Parallel()
	p := startProcess(t, nil, "--demo", "--db", shortPath(t))
	c := &http.Client{Timeout: shapesTimeout}
	bearer := token(t, p.URL, "demo", "demo-secret")
	list := contractsURL(p.URL, demoOrg, demoUser)
	before := answerTo(t, c, list, bearer)
	for _, o := range operations(t, func(o *operation) bool { return o.ContentType != "" }) {
		header := o.Header(bearer)
		if o.OAuth {
			header.Set("Content-Type", "application/json")
		}
		for _, sh := range bodies {
			t.Run(o.ID+" "+sh.name, func(t *testing.T) {
				resp, got := do(t, c, o.Method, p.URL+o.Path, header, sh.value)
				if o.OAuth {
					oauthBody(o, sh.value).Want(t, resp, got)
				} else {
					contractBody(t, sh).Want(t, resp, got)
				}
			})
		}
	}
	if after := answerTo(t, c, list, bearer); after != before {
		t.Errorf("there is\n%s\nand was\n%s", after, before)
	}
	wantUnharmed(t, p)
}

func answerTo(t testing.TB, c *http.Client, url, bearer string) string {
	t.Helper()
	resp, got := do(t, c, "GET", url, http.Header{"Authorization": {"Bearer " + bearer}}, "")
	if resp.StatusCode != 200 {
		t.Fatalf("%s\n%s", resp.Status, got)
	}
	return got
}

// contractBody returns the expected response to a body that is not a contract.
func contractBody(t testing.TB, sh shape) failure {
	t.Helper()
	f := fault{Pointer: "#", Detail: "the body is empty; send a JSON object"}
	switch {
	case len(sh.value) > 4<<20:
		return failure{Status: 413, Detail: "The content may have at most 4194304 bytes; send fewer prices, or start the service with a larger --max-body."}
	case sh.value == "", sh.notJSON == "{empty}":
	case sh.notJSON == "{UTF-16}":
		f.Detail = "the text is in UTF-16; save it as UTF-8"
	case sh.notJSON != "":
		f.Detail = fmt.Sprintf("at byte %d: %s", sh.at, sh.notJSON)
	default:
		at, below, is := tooDeep(sh.value, 4)
		if !is {
			return refusal(t, 422, slot{schema: openapi3.NewObjectSchema()}.wrong(wholeContract, readShape(sh.value)))
		}
		f = fault{Pointer: "#" + below, Detail: fmt.Sprintf("at byte %d: nested deeper than a contract ever is", at)}
	}
	return refusal(t, 400, []fault{f})
}

// oauthBody returns the expected response of an OAuth endpoint to a body without parameters.
func oauthBody(o operation, body string) failure {
	f := failure{Status: 400, Code: "invalid_request", Detail: "the body must be a JSON object whose parameters are strings"}
	switch {
	case len(body) > 64<<10:
		f.Status, f.Detail = 413, "The body may have at most 64 KiB."
	case strings.HasPrefix(body, "\xff\xfe"):
		f.Detail = "the body is in UTF-16; save it as UTF-8"
	case strings.HasPrefix(body, "{"): // else it is a form
	case strings.Contains(o.Path, "revoke"):
		f.Detail = "token is missing; send the access token to revoke"
	default:
		f.Detail = "grant_type is missing; send grant_type=client_credentials as a form, or as a JSON object"
	}
	return f
}

// TestEachShapeAtEachOAuthParameter sends JSON, from a client that authenticates in the
// Authorization field.
func TestEachShapeAtEachOAuthParameter(t *testing.T) {
	long(t)
	t.Parallel()
	p := startProcess(t, nil, "--demo", "--db", shortPath(t))
	c := &http.Client{Timeout: shapesTimeout}
	for _, o := range operations(t, func(o *operation) bool { return o.OAuth }) {
		header := o.Header("")
		header.Set("Content-Type", "application/json")
		for _, name := range []string{"client_id", "client_secret", "grant_type", "scope", "token"} {
			for _, sh := range shapes {
				t.Run(o.ID+" "+name+" is "+sh.name, func(t *testing.T) {
					right := map[string]string{"grant_type": "client_credentials", "token": "none"}
					delete(right, name)
					others, _ := json.Marshal(right)
					body := fmt.Sprintf(`%s,%q:%s}`, strings.TrimSuffix(string(others), "}"), name, sh.value)
					resp, got := do(t, c, o.Method, p.URL+o.Path, header, body)
					if f := oauthParameter(o, name, body, sh); f.Status != 200 {
						f.Want(t, resp, got)
					} else if resp.StatusCode != 200 {
						t.Errorf("%s\n%s", resp.Status, got)
					}
				})
			}
		}
	}
	wantUnharmed(t, p)
}

// oauthParameter returns the expected response to a shape of one parameter.
func oauthParameter(o operation, name, body string, sh shape) failure {
	if len(body) > 64<<10 {
		return failure{Status: 413, Code: "invalid_request", Detail: "The body may have at most 64 KiB."}
	}
	f := failure{Status: 400, Code: "invalid_request"}
	text, isString := readShape(sh.value).(string)
	isToken := !strings.Contains(o.Path, "revoke")
	switch {
	case sh.notJSON != "", !isString && sh.value != "null":
		f.Detail = "the body must be a JSON object whose parameters are strings"
	case text == "" && name == "token" && !isToken:
		f.Detail = "token is missing; send the access token to revoke"
	case text == "" && name == "grant_type" && isToken:
		f.Detail = "grant_type is missing; send grant_type=client_credentials as a form, or as a JSON object"
	case text == "":
		f.Status = 200
	case name == "client_id", name == "client_secret":
		f.Detail = "the client authenticates twice, and differently; send its id and secret in the Authorization field or in the body"
	case name == "grant_type" && isToken:
		f.Code, f.Detail = "unsupported_grant_type", "grant_type must be client_credentials"
	case name == "scope" && isToken:
		f.Code, f.Detail = "invalid_scope", "this client may ask for: read write"
	default:
		f.Status = 200
	}
	return f
}
