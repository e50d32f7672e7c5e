package main

// The rules of a contract: what each validate tag of model.go means, and the text for
// a member that breaks it. One entry of the table is one rule.

import (
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/go-playground/validator/v10"
	"golang.org/x/text/currency"
)

// Validator parses request bodies into contracts that keep every rule.
type Validator struct{ v *validator.Validate }

// newValidator returns a Validator. Its error means that the rules themselves are wrong.
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

// Contract parses a whole contract. It returns a *malformed or an *invalid.
func (v *Validator) Contract(body []byte) (*Contract, error) {
	return v.over(Contract{}, body, wholeContract)
}

// Patch returns a *malformed or an *invalid if body is a merge patch that no contract could
// take.
func (v *Validator) Patch(body []byte) error {
	// Each rule concerns a single member, except that prices require a currency. So a patch
	// that is invalid for a contract with a currency is invalid for every contract.
	eur := "EUR"
	_, err := v.Patched(Contract{CurrencyEnergyPrice: &eur}, body)
	return err
}

// Patched applies a merge patch to a contract and validates the result as a whole. It
// returns a *malformed or an *invalid.
func (v *Validator) Patched(c Contract, patch []byte) (*Contract, error) {
	return v.over(c, patch, mergePatch)
}

// over parses body over c and validates the result.
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

// Line parses a line of an export: a contract and its key. It returns a *malformed or an
// *invalid.
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
				p.faults.add(pointer, "uuid", err.Error())
			}
		case !p.faults.has("#") && !p.faults.has(pointer):
			p.faults.add(pointer, "required", "is required; send a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a")
		}
	}
	shape := len(p.faults.faults)
	if err := v.rules(c, p.faults); err != nil {
		var broken *invalid
		if errors.As(err, &broken) { // the rules use the names of a request
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

// rules adds the rules that c breaks to the faults of the parser, and returns them all, or
// nil. A member of the wrong type is nil in c and so breaks no rule.
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
			faults.add("#/"+fe.Field(), fe.Tag(), rules[fe.Tag()].text(fe))
		}
	}
	return faults.err()
}

// rule is the meaning of a validate tag.
type rule struct {
	// check reports whether the member keeps the rule. It is nil if the library implements
	// the tag. set is false if the member is null.
	check func(c *Contract, member string, set bool) bool
	// whenNil makes the library call check for null too.
	whenNil bool
	// text returns the detail of the fault: the error and the values that are allowed.
	text func(fe validator.FieldError) string
}

// rules has a rule for every tag of Contract's fields and of checkPrices.
var rules = map[string]rule{
	"oneof": {text: func(fe validator.FieldError) string {
		return fmt.Sprintf("must be %s or null, is %s", strings.Join(strings.Fields(fe.Param()), ", "), quoted(fe.Value()))
	}},
	"max": {text: func(fe validator.FieldError) string {
		s, _ := fe.Value().(string)
		return fmt.Sprintf("must be at most %s characters, has %d", fe.Param(), utf8.RuneCountInString(s))
	}},
	"uuid_rfc4122": {text: func(fe validator.FieldError) string {
		return "must be a UUID such as 3c90c3cc-0d44-4b50-8888-8dd25736052a or null, is " + quoted(fe.Value())
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
	// Without prices the currency is free text, so that the source's own example passes.
	"currency": {
		check: func(c *Contract, code string, _ bool) bool {
			return len(c.EnergyPrices) == 0 || isCurrency(code)
		},
		text: func(fe validator.FieldError) string {
			return "must be an ISO 4217 code such as EUR as soon as energy_prices has an entry, is " + quoted(fe.Value())
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

// currencies validates a single value against the library's list of current ISO 4217 codes.
var currencies = validator.New()

// isCurrency reports whether code is an ISO 4217 code. Withdrawn codes such as HRK count,
// since a contract may have prices from before the withdrawal.
func isCurrency(code string) bool {
	if currencies.Var(code, "iso4217") == nil {
		return true
	}
	unit, err := currency.ParseISO(code)
	return err == nil && unit.String() == code
}

// checkPrices checks energy_prices in one loop. The library's dive would take longer than
// parsing the prices.
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
	if !ascending { // ascending instants are distinct
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

// contractOf returns the Contract that the library passes as a reflect.Value.
func contractOf(v reflect.Value) *Contract {
	if v.CanAddr() {
		return v.Addr().Interface().(*Contract)
	}
	c := v.Interface().(Contract)
	return &c
}

// stored returns the faults of a document that is stored under k. A document without fault
// is the one that an import of its line would store.
func (v *Validator) stored(k Key, doc []byte) []string {
	if len(doc) == 0 {
		return []string{"is empty"}
	}
	is, c, err := v.Line(appendLine(nil, k, doc))
	if err != nil {
		var faults []string
		for _, f := range faultsOf(err) {
			faults = append(faults, f.String())
		}
		return faults
	}
	if is != k {
		return []string{fmt.Sprintf("says that it is contract %s", is.bytes())}
	}
	if again, err := c.encode(k.Contract); err != nil || string(again) != string(doc) {
		return []string{"is not in the form in which contracts are stored"}
	}
	return nil
}
