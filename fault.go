package main

// Faults: what is wrong with a request, each with a pointer to its place and a text
// that a person can act on.

import (
	"errors"
	"fmt"
	"net/url"
	"slices"

	"github.com/go-json-experiment/json/jsontext"
)

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
	if !v.countIfFull() {
		v.faults = append(v.faults, fault{Pointer: pointer, Detail: detail})
	}
}

// addParameter is for the few of a path or a query.
func (v *invalid) addParameter(name, detail string) {
	v.faults = append(v.faults, fault{Parameter: name, Detail: detail})
}

// onlyCount counts a fault if the list is full, and tells so. To ask before a
// fault is put into words keeps a body of a million faults cheap.
func (v *invalid) countIfFull() bool {
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

// maxFaults is how many faults one answer lists; one more entry says how many
// there are beyond.
const maxFaults = 100

// shown quotes a value that a client sent, cut to a length that a line can hold.
func quoted(v any) string {
	const longest = 40 // characters
	r := []rune(fmt.Sprint(v))
	if len(r) > longest {
		return fmt.Sprintf("%q… (%d characters)", string(r[:longest]), len(r))
	}
	return fmt.Sprintf("%q", string(r))
}

// pointer writes a JSON Pointer as a URI fragment (RFC 6901 §6).
func pointer(p jsontext.Pointer) string {
	return "#" + (&url.URL{Fragment: string(p)}).EscapedFragment()
}
