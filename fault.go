package main

// Faults: the errors in a request, each with a pointer to its place and a text that a
// person can act on.

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// maxFaults is the most faults that one response lists. One more entry says how many
// faults there are beyond them.
const maxFaults = 100

// fault is one error in a request. Either Pointer or Parameter is set.
type fault struct {
	// Pointer is the JSON Pointer of the faulty value in the body, as a URI fragment.
	Pointer string `json:"pointer,omitzero"`
	// Parameter is the name of a path or query parameter, or of a header field.
	Parameter string `json:"parameter,omitzero"`
	// Detail describes the error and the values that are allowed.
	Detail string `json:"detail"`

	// rule is the name of the rule that the value breaks. The log has it in place of Detail, which
	// may have the value.
	rule string
}

// String returns the place and the detail in one line, for commands and logs.
func (f fault) String() string {
	if f.Pointer == "" {
		return f.Parameter + " " + f.Detail
	}
	return f.Pointer + " " + f.Detail
}

// broken returns the rule and the place, without any value, for the log.
func (f fault) broken() string {
	return f.rule + " " + f.Pointer + f.Parameter
}

// malformed is the error for a request that cannot be parsed (400).
type malformed struct{ fault }

// Error returns the fault for the log; the response has it in full.
func (m *malformed) Error() string { return "malformed request: " + m.Detail }

// invalid is the error for a request that can be parsed but breaks rules (422).
type invalid struct {
	faults []fault // at most maxFaults
	more   int     // the number of further faults
}

// Error returns the number of faults for the log; the response lists them.
func (v *invalid) Error() string {
	return fmt.Sprintf("invalid request: %d faults", len(v.faults)+v.more)
}

// add adds a fault of the body, or counts it if the list is full.
func (v *invalid) add(pointer, rule, detail string) {
	if !v.countIfFull() {
		v.faults = append(v.faults, fault{Pointer: pointer, Detail: detail, rule: rule})
	}
}

// addParameter adds a fault of a path or query parameter. There are few, so the list
// cannot overflow.
func (v *invalid) addParameter(name, rule, detail string) {
	v.faults = append(v.faults, fault{Parameter: name, Detail: detail, rule: rule})
}

// countIfFull counts a fault if the list is full, and reports whether it did. Callers ask
// before they format a detail, which keeps a body with a million faults cheap.
func (v *invalid) countIfFull() bool {
	if len(v.faults) < maxFaults {
		return false
	}
	v.more++
	return true
}

// has reports whether the list has a fault at pointer.
func (v *invalid) has(pointer string) bool {
	return slices.ContainsFunc(v.faults, func(f fault) bool { return f.Pointer == pointer })
}

// err returns v as an error, or nil if there are no faults.
func (v *invalid) err() error {
	if len(v.faults) == 0 {
		return nil
	}
	return v
}

// list returns the faults as a response lists them.
func (v *invalid) list() []fault {
	if v.more == 0 {
		return v.faults
	}
	return append(v.faults[:len(v.faults):len(v.faults)], fault{Pointer: "#", Detail: fmt.Sprintf("and %d more", v.more), rule: "more"})
}

// faultsOf returns the faults that err, the error of a parser or a validator, stands for.
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

// quoted returns the value of a client in quotes, for responses and the log. Of a long value it
// has only the beginning: a mistaken client may have put a token there, of which no more than
// half may be shown.
func quoted(v any) string {
	const longest, shown = secretLength - 1, secretLength / 2 // characters
	text := fmt.Sprint(v)
	n := utf8.RuneCountInString(text)
	if n > longest {
		begin := []rune(text[:min(len(text), shown*utf8.UTFMax)])
		return fmt.Sprintf("%q… (%d characters)", string(begin[:shown]), n)
	}
	return fmt.Sprintf("%q", text)
}

// kindName returns the name of a kind of JSON value in a sentence.
func kindName(k jsontext.Kind) string {
	switch k {
	case jsontext.KindNull:
		return "null"
	case jsontext.KindTrue, jsontext.KindFalse:
		return "a boolean"
	case jsontext.KindString:
		return "a string"
	case jsontext.KindNumber:
		return "a number"
	case jsontext.KindBeginObject:
		return "an object"
	default:
		return "an array"
	}
}

// pointer returns a JSON Pointer as a URI fragment (RFC 6901 §6).
func pointer(p jsontext.Pointer) string {
	return "#" + (&url.URL{Fragment: string(p)}).EscapedFragment()
}
