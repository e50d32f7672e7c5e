package main

// The rules of a contract: what each validate tag of model.go means, and what a
// person is told who breaks it. One entry of the table is one rule.

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/go-playground/validator/v10"
	"golang.org/x/text/currency"
)

// maxFaults is how many faults one answer lists; one more entry says how many
// there are beyond.
const maxFaults = 100

// fault is one thing that is wrong with a request, for a person to act on.
type fault struct {
	Pointer   string `json:"pointer,omitzero"`   // into the body, as a URI fragment
	Parameter string `json:"parameter,omitzero"` // or of the path, the query or the header
	Detail    string `json:"detail"`
}

func (f fault) String() string {
	if f.Pointer == "" {
		return f.Parameter + " " + f.Detail
	}
	return f.Pointer + " " + f.Detail
}

// malformed is the error of a request that cannot be read (400).
type malformed struct{ fault }

func (m *malformed) Error() string { return "malformed request: " + m.Detail }

// invalid is the error of a request that can be read but breaks rules (422).
type invalid struct {
	faults []fault // at most maxFaults
	more   int     // how many faults are not in the list
}

func (v *invalid) Error() string {
	return fmt.Sprintf("invalid request: %d faults", len(v.faults)+v.more)
}

func (v *invalid) add(pointer, detail string) {
	if !v.onlyCount() {
		v.faults = append(v.faults, fault{Pointer: pointer, Detail: detail})
	}
}

// addParameter is for the few of a path or a query.
func (v *invalid) addParameter(name, detail string) {
	v.faults = append(v.faults, fault{Parameter: name, Detail: detail})
}

// onlyCount counts a fault if the list is full, and tells so. To ask before a
// fault is put into words keeps a body of a million faults cheap.
func (v *invalid) onlyCount() bool {
	if len(v.faults) < maxFaults {
		return false
	}
	v.more++
	return true
}

// has tells whether there is a fault of what a pointer points to.
func (v *invalid) has(pointer string) bool {
	return slices.ContainsFunc(v.faults, func(f fault) bool { return f.Pointer == pointer })
}

// err is nil when there is no fault.
func (v *invalid) err() error {
	if len(v.faults) == 0 {
		return nil
	}
	return v
}

// list returns the faults as an answer lists them.
func (v *invalid) list() []fault {
	if v.more == 0 {
		return v.faults
	}
	return append(v.faults[:len(v.faults):len(v.faults)], fault{Pointer: "#", Detail: fmt.Sprintf("and %d more", v.more)})
}

// faultsOf is what is wrong with a body or a line, of which err is what was returned.
func faultsOf(err error) []fault {
	var bad *malformed
	var inv *invalid
	switch {
	case errors.As(err, &bad):
		return []fault{bad.fault}
	case errors.As(err, &inv):
		return inv.list()
	default:
		return []fault{{Pointer: "#", Detail: err.Error()}}
	}
}

// Validator turns request bodies into contracts that keep every rule.
type Validator struct{ v *validator.Validate }

func newValidator() (*Validator, error) {
	v := validator.New(validator.WithRequiredStructEnabled())
	v.RegisterTagNameFunc(func(f reflect.StructField) string {
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		return name
	})
	v.RegisterStructValidation(checkPrices, Contract{})
	for tag, r := range rules {
		if r.check == nil {
			continue
		}
		check := func(fl validator.FieldLevel) bool {
			s, ok := fl.Field().Interface().(string)
			c := contractOf(fl.Parent())
			return r.check(c, s, ok)
		}
		if err := v.RegisterValidation(tag, check, r.whenNil); err != nil {
			return nil, fmt.Errorf("register rule %s: %w", tag, err)
		}
	}
	return &Validator{v}, nil
}

// Contract reads a whole contract. It returns a *malformed or an *invalid.
func (v *Validator) Contract(body []byte) (*Contract, error) {
	return v.over(Contract{}, body, wholeContract)
}

// Patch tells whether body is a merge patch that could be applied to some contract.
// It returns a *malformed or an *invalid.
func (v *Validator) Patch(body []byte) error {
	// A rule is of one member, or of the currency that prices need. So what a patch does
	// wrong to this contract, it does to each.
	eur := "EUR"
	_, err := v.Patched(Contract{CurrencyEnergyPrice: &eur}, body)
	return err
}

// Patched applies a merge patch to a contract and validates the result as a
// whole. It returns a *malformed or an *invalid.
func (v *Validator) Patched(c Contract, patch []byte) (*Contract, error) {
	return v.over(c, patch, mergePatch)
}

func (v *Validator) over(c Contract, body []byte, f form) (*Contract, error) {
	faults, err := parseOver(&c, body, f)
	if err != nil {
		return nil, err
	}
	if err := v.rules(&c, faults); err != nil {
		return nil, err
	}
	return &c, nil
}

// Line reads a line of an export: a contract, and where it belongs. It returns a
// *malformed or an *invalid.
func (v *Validator) Line(line []byte) (k Key, c *Contract, err error) {
	p, c := newParser(line, exported), &Contract{}
	if err := p.all(c); err != nil {
		return k, nil, err
	}
	for _, m := range []struct {
		name string
		is   *string
		id   *ID
	}{{"org_id", p.org, &k.Org}, {"user_id", p.user, &k.User}, {"id", p.id, &k.Contract}} {
		switch pointer := "#/" + m.name; {
		case m.is != nil:
			if *m.id, err = parseID(*m.is); err != nil {
				p.faults.add(pointer, err.Error())
			}
		case !p.faults.has("#") && !p.faults.has(pointer):
			p.faults.add(pointer, "is required; send a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a")
		}
	}
	shape := len(p.faults.faults)
	if err := v.rules(c, p.faults); err != nil {
		var broken *invalid
		if errors.As(err, &broken) { // by the names of a request
			for i := range broken.faults[shape:] {
				if f := &broken.faults[shape+i]; f.Pointer == "#/building_id" {
					f.Pointer = "#/building"
				}
			}
		}
		return k, nil, err
	}
	return k, c, nil
}

// rules adds the rules that c breaks to the faults found so far. A member with a
// fault of its type is nil in c, and breaks none.
func (v *Validator) rules(c *Contract, faults invalid) error {
	if err := v.v.Struct(c); err != nil {
		var broken validator.ValidationErrors
		if !errors.As(err, &broken) {
			return fmt.Errorf("validate contract: %w", err)
		}
		for _, fe := range broken {
			if fe.Tag() == "more" {
				n, _ := strconv.Atoi(fe.Param())
				faults.more += n
				continue
			}
			faults.add("#/"+fe.Field(), rules[fe.Tag()].text(fe))
		}
	}
	return faults.err()
}

// rule is what a validate tag means.
type rule struct {
	// check tells whether the member keeps the rule; nil where the tag is the
	// library's own. set is false when the member is null.
	check func(c *Contract, member string, set bool) bool
	// whenNil: check is asked about null as well.
	whenNil bool
	// text says what is wrong and what would be right.
	text func(fe validator.FieldError) string
}

// rules has every tag that a validate tag of Contract or checkPrices names.
var rules = map[string]rule{
	"oneof": {text: func(fe validator.FieldError) string {
		return fmt.Sprintf("must be %s or null, is %s", strings.Join(strings.Fields(fe.Param()), ", "), shown(fe.Value()))
	}},
	"max": {text: func(fe validator.FieldError) string {
		s, _ := fe.Value().(string)
		return fmt.Sprintf("must be at most %s characters, has %d", fe.Param(), utf8.RuneCountInString(s))
	}},
	"uuid_rfc4122": {text: func(fe validator.FieldError) string {
		return "must be a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a or null, is " + shown(fe.Value())
	}},
	// Source: "required when providing hourly energy prices".
	"currency_required": {
		check: func(c *Contract, _ string, set bool) bool {
			hourly := c.EnergyContractType != nil && *c.EnergyContractType == "spot_hourly"
			return set || !hourly || len(c.EnergyPrices) == 0
		},
		whenNil: true,
		text: func(validator.FieldError) string {
			return "is required when energy_contract_type is spot_hourly and energy_prices has an entry; send an ISO 4217 code such as EUR"
		},
	},
	// Without prices it is free text, so that the source's own example passes.
	"currency": {
		check: func(c *Contract, code string, _ bool) bool {
			return len(c.EnergyPrices) == 0 || isCurrency(code)
		},
		text: func(fe validator.FieldError) string {
			return "must be an ISO 4217 code such as EUR as soon as energy_prices has an entry, is " + shown(fe.Value())
		},
	},
	"price_required": {text: func(validator.FieldError) string {
		return "is required; send a number in currency/kWh"
	}},
	"price_number": {text: func(fe validator.FieldError) string {
		return "must be a number in currency/kWh, is " + fe.Param()
	}},
	"price_finite": {text: func(fe validator.FieldError) string {
		return "must be a finite number (IEEE 754 double), is " + fe.Param()
	}},
	"timestamp_required": {text: func(validator.FieldError) string {
		return "is required when energy_prices has more than one entry; send the start of the interval such as 2023-11-01T00:00:00+00:00"
	}},
	"timestamp_string": {text: func(fe validator.FieldError) string {
		return "must be a string or null, is " + fe.Param()
	}},
	"timestamp_rfc3339": {text: func(fe validator.FieldError) string {
		return "must be an RFC 3339 time with an offset such as 2023-11-01T00:00:00+00:00, is " + fe.Param()
	}},
	"timestamp_unique": {text: func(fe validator.FieldError) string {
		return fmt.Sprintf("is the same instant as #/energy_prices/%s; an instant has one price", fe.Param())
	}},
}

// currencies is the library's list of today's ISO 4217 codes, as a validator of
// one value.
var currencies = validator.New()

// isCurrency also takes codes that were withdrawn (HRK), since a contract may
// have prices from before.
func isCurrency(code string) bool {
	if currencies.Var(code, "iso4217") == nil {
		return true
	}
	unit, err := currency.ParseISO(code)
	return err == nil && unit.String() == code
}

// checkPrices holds the rules of energy_prices in one loop: the library's dive
// would cost more than reading the prices does.
func checkPrices(sl validator.StructLevel) {
	prices := contractOf(sl.Current()).EnergyPrices
	var found, more int
	report := func(i int, member, tag, param string) {
		if found++; found > maxFaults {
			more++
			return
		}
		sl.ReportError(nil, fmt.Sprintf("energy_prices/%d/%s", i, member), "", tag, param)
	}
	var last time.Time
	ascending := true
	for i, p := range prices {
		t, ok := checkPrice(p, len(prices) > 1, func(member, tag, param string) { report(i, member, tag, param) })
		if ok {
			ascending = ascending && t.After(last)
			last = t
		}
	}
	if !ascending { // only then can one stand twice
		first := make(map[time.Time]int, len(prices))
		for i, p := range prices {
			t, ok := instant(p.Timestamp)
			if !ok {
				continue
			}
			if j, seen := first[t]; seen {
				report(i, "timestamp", "timestamp_unique", strconv.Itoa(j))
				continue
			}
			first[t] = i
		}
	}
	if more > 0 {
		sl.ReportError(nil, "energy_prices", "", "more", strconv.Itoa(more))
	}
}

// checkPrice holds the rules of one entry, which several more may stand beside.
// It returns the instant, if there is one.
func checkPrice(p Price, several bool, report func(member, tag, param string)) (t time.Time, ok bool) {
	if p.notObject {
		return t, false
	}
	switch k := p.Price.Kind(); {
	case k == jsontext.KindInvalid:
		report("price", "price_required", "")
	case k != jsontext.KindNumber:
		report("price", "price_number", kindName(k))
	case !finite(p.Price):
		report("price", "price_finite", shown(string(p.Price)))
	}
	switch k := p.Timestamp.Kind(); k {
	case jsontext.KindInvalid, jsontext.KindNull:
		if several {
			report("timestamp", "timestamp_required", "")
		}
	case jsontext.KindString:
		if t, ok = instant(p.Timestamp); !ok {
			report("timestamp", "timestamp_rfc3339", shown(unquoted(p.Timestamp)))
		}
	default:
		report("timestamp", "timestamp_string", kindName(k))
	}
	return t, ok
}

// finite tells whether a JSON number is one that a double can hold.
func finite(number jsontext.Value) bool {
	if len(number) < 300 && !bytes.ContainsAny(number, "eE") {
		return true // below 1e300
	}
	_, err := strconv.ParseFloat(string(number), 64)
	return err == nil
}

// instant reads a JSON string as an RFC 3339 time, in UTC so that equal instants
// are equal values.
func instant(timestamp jsontext.Value) (time.Time, bool) {
	if timestamp.Kind() != jsontext.KindString {
		return time.Time{}, false
	}
	text := []byte(timestamp[1 : len(timestamp)-1])
	if bytes.ContainsAny(text, `\tz`) { // rare: an escape, or lower case (RFC 3339 §5.6)
		text = bytes.ToUpper([]byte(unquoted(timestamp)))
	}
	var t time.Time
	if err := t.UnmarshalText(text); err != nil || !isRFC3339(text) {
		return time.Time{}, false
	}
	return t.UTC(), true
}

// isRFC3339 refuses what package time takes beside RFC 3339 §5.6 (go.dev/issue/54580):
// an hour of one digit, a comma before the fraction, an offset of 24 hours or of
// 60 minutes.
func isRFC3339(text []byte) bool {
	const seconds = len("2006-01-02T15:04:05")
	if len(text) <= seconds || text[13] != ':' || text[16] != ':' || text[seconds] == ',' {
		return false
	}
	if text[len(text)-1] == 'Z' {
		return true
	}
	offset := text[len(text)-len("+24:00"):]
	return (offset[1] != '2' || offset[2] < '4') && offset[4] < '6'
}

func unquoted(s jsontext.Value) string {
	b, err := jsontext.AppendUnquote(nil, s)
	if err != nil {
		return string(s)
	}
	return string(b)
}

// shown quotes a value that a client sent, cut to a length that a line can hold.
func shown(v any) string {
	const longest = 40 // characters
	r := []rune(fmt.Sprint(v))
	if len(r) > longest {
		return fmt.Sprintf("%q… (%d characters)", string(r[:longest]), len(r))
	}
	return fmt.Sprintf("%q", string(r))
}

func contractOf(v reflect.Value) *Contract {
	if v.CanAddr() {
		return v.Addr().Interface().(*Contract)
	}
	c := v.Interface().(Contract)
	return &c
}
