package main

// The parser: from the bytes of a request body to a Contract, member by member, so
// that one response reports every fault of the body and not only the first.

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/agnivade/levenshtein"
	"github.com/go-json-experiment/json/jsontext"
)

// maxDepth is how deeply a body may nest: a contract, its prices, one price, and one level
// more, so that an object in place of a number is reported as a wrong type.
const maxDepth = 4

// maxMembers is the most members of an object in a body, known or not. The decoder remembers each
// name, to find one that is repeated, and a million names would take twenty times their size.
const maxMembers = 1000

const (
	// minPriceBytes is the size of the shortest valid price beside another one:
	// {"price":1,"timestamp":"2023-11-01T00:00Z"}.
	minPriceBytes = 43
	// fewPrices is the number of entries that are always kept, valid or not, so that each
	// of their faults is reported.
	fewPrices = 1000
)

// maxNameShown is the longest member name that a response repeats, in bytes.
const maxNameShown = 100

// The errors for a body that nests more than maxDepth levels, or has an object with more than
// maxMembers members.
var (
	errTooDeep = errors.New("nested deeper than a contract ever is")
	errTooMany = errors.New("more members than an object of a contract ever has")
)

// form is a form in which a contract arrives.
type form int

const (
	// wholeContract is the body of a PUT or POST.
	wholeContract form = iota
	// mergePatch is the body of a PATCH. A null removes a member (RFC 7396 §2),
	// energy_prices included.
	mergePatch
	// exported is a line of an export: a contract as responses have it, with its
	// organization and user.
	exported
)

// parser parses one body. Its methods return an error only if the body is not JSON; they
// collect all other faults in faults.
type parser struct {
	dec    *jsontext.Decoder
	body   []byte // without a byte order mark
	mark   int    // the length of the mark in bytes
	form   form
	faults invalid
	// org, user and id are members of an exported line; nil if the line lacks them.
	org, user, id *string
}

// parseOver parses body and sets the members of c that it names. It returns the faults of
// the body's types and names, and a *malformed if it is not JSON. The rules for the values
// are in validate.go. c keeps slices of body.
//
// Since no member of a contract is an object, this is all that a merge patch does (RFC
// 7396 §2). The library evanphx/json-patch is less exact: it also removes nulls inside
// arrays.
func parseOver(c *Contract, body []byte, f form) (invalid, error) {
	p := newParser(body, f)
	err := p.all(c)
	return p.faults, err
}

// parseDocument returns the contract that a document was encoded from. The contract keeps
// slices of the document. The error is not a *malformed or an *invalid, since the fault is
// not in the request.
func parseDocument(doc []byte) (*Contract, error) {
	c := &Contract{}
	faults, err := parseOver(c, doc, exported)
	if err := errors.Join(err, faults.err()); err != nil {
		return nil, fmt.Errorf("decode stored contract: %v", faultsOf(err))
	}
	return c, nil
}

// newParser returns a parser of a body in form f.
func newParser(body []byte, f form) parser {
	text := withoutBOM(body)
	return parser{dec: jsontext.NewDecoder(bytes.NewBuffer(text)), body: text, mark: len(body) - len(text), form: f}
}

// withoutBOM returns a text without the byte order mark of UTF-8 that some editors and
// libraries write before it. A parser may ignore the mark (RFC 8259 §8.1).
func withoutBOM(text []byte) []byte { return bytes.TrimPrefix(text, []byte("\uFEFF")) }

// isUTF16 reports whether a text that should be JSON or a form in UTF-8 looks like UTF-16: it
// begins with that encoding's byte order mark, or one of its first two bytes is zero, as no such
// text in UTF-8 has it.
func isUTF16(text []byte) bool {
	if len(text) < 2 {
		return false
	}
	first := string(text[:2])
	return first == "\xff\xfe" || first == "\xfe\xff" || (first[0] == 0) != (first[1] == 0)
}

// all parses the whole body. It returns a *malformed.
func (p *parser) all(c *Contract) error {
	err := p.contract(c)
	if err == nil {
		err = p.end()
	}
	if err != nil {
		p.faults = invalid{}
		return p.malformed(err)
	}
	return nil
}

// contract parses the object and its members.
func (p *parser) contract(c *Contract) error {
	if k := p.dec.PeekKind(); k != jsontext.KindBeginObject {
		return p.wrong("", k, "an object")
	}
	if _, err := p.dec.ReadToken(); err != nil {
		return err
	}
	for p.dec.PeekKind() != jsontext.KindEndObject {
		name, err := p.name()
		if err != nil {
			return err
		}
		if err := p.member(c, name); err != nil {
			return err
		}
	}
	_, err := p.dec.ReadToken()
	return err
}

// member parses the value of the member called name.
func (p *parser) member(c *Contract, name []byte) error {
	for _, m := range members {
		if m.field != nil && p.nameOf(m) == string(name) {
			switch field := m.field(c).(type) {
			case *[]Price:
				return p.prices(field)
			case **string:
				return p.string(field)
			case **bool:
				return p.bool(field)
			}
		}
	}
	if p.form == exported {
		switch string(name) {
		case "org_id":
			return p.uuid(&p.org)
		case "user_id":
			return p.uuid(&p.user)
		case "id":
			return p.uuid(&p.id)
		}
	}
	return p.unknown(string(name), p.known)
}

// nameOf returns the name of a member in the form that is parsed, or "" if it has none.
func (p *parser) nameOf(m member) string {
	if p.form == exported {
		return m.response
	}
	return m.request
}

// known returns the names of all members in the form that is parsed.
func (p *parser) known() (names []string) {
	if p.form == exported {
		names = append(names, "org_id", "user_id")
	}
	for _, m := range members {
		if name := p.nameOf(m); name != "" {
			names = append(names, name)
		}
	}
	return names
}

// prices parses the value of energy_prices.
func (p *parser) prices(into *[]Price) error {
	*into = nil
	switch k := p.dec.PeekKind(); {
	case k == jsontext.KindNull && p.form == mergePatch:
		return p.skip()
	case k == jsontext.KindNull:
		p.faults.add(pointer(p.dec.StackPointer()), "type", "must be an array, is null; leave it out or send []")
		return p.skip()
	case k != jsontext.KindBeginArray:
		return p.wrong(p.dec.StackPointer(), k, "an array")
	}
	if _, err := p.dec.ReadToken(); err != nil {
		return err
	}
	// Entries beyond the number of valid ones that fit in a body of this size are checked
	// and not kept, so that a flood of invalid entries costs no multiple of its size.
	most := max(fewPrices, len(p.body)/minPriceBytes)
	*into = make([]Price, 0, min(bytes.Count(p.body, []byte("{")), most))
	for n := 0; p.dec.PeekKind() != jsontext.KindEndArray; n++ {
		price, err := p.price(n)
		if err != nil {
			return err
		}
		if n < most {
			*into = append(*into, price)
			continue
		}
		checkPrice(price, true, func(string, string, string) { p.faults.more++ })
	}
	_, err := p.dec.ReadToken()
	return err
}

// price parses the entry at index i. The values of its members may have any type; the
// rules check them later.
func (p *parser) price(i int) (price Price, err error) {
	if k := p.dec.PeekKind(); k != jsontext.KindBeginObject {
		price.notObject = true
		return price, p.wrong(jsontext.Pointer("/energy_prices/"+strconv.Itoa(i)), k, "an object")
	}
	if _, err := p.dec.ReadToken(); err != nil {
		return price, err
	}
	for p.dec.PeekKind() != jsontext.KindEndObject {
		name, err := p.name()
		if err != nil {
			return price, err
		}
		switch string(name) {
		case "price":
			price.Price, err = p.raw()
		case "timestamp":
			price.Timestamp, err = p.raw()
			price.Timestamp = completed(price.Timestamp)
		default:
			err = p.unknown(string(name), func() []string { return []string{"price", "timestamp"} })
		}
		if err != nil {
			return price, err
		}
	}
	_, err = p.dec.ReadToken()
	return price, err
}

// name parses a member's name, which is valid until the next read.
func (p *parser) name() ([]byte, error) {
	raw, err := p.dec.ReadValue()
	if err == nil && p.tooMany() {
		err = errTooMany
	}
	if err != nil {
		return nil, err
	}
	if bytes.IndexByte(raw, '\\') < 0 {
		return raw[1 : len(raw)-1], nil
	}
	return jsontext.AppendUnquote(nil, raw)
}

// string parses a string or null.
func (p *parser) string(into **string) error {
	*into = nil
	switch k := p.dec.PeekKind(); k {
	case jsontext.KindNull:
		return p.skip()
	case jsontext.KindString:
		t, err := p.dec.ReadToken()
		if err != nil {
			return err
		}
		s := t.String()
		*into = &s
		return nil
	default:
		return p.wrong(p.dec.StackPointer(), k, "a string or null")
	}
}

// uuid parses a string that an exported line requires. A null counts as a missing member.
func (p *parser) uuid(into **string) error {
	if k := p.dec.PeekKind(); k != jsontext.KindString && k != jsontext.KindNull {
		return p.wrong(p.dec.StackPointer(), k, "a UUID")
	}
	return p.string(into)
}

// bool parses a boolean or null.
func (p *parser) bool(into **bool) error {
	*into = nil
	switch k := p.dec.PeekKind(); k {
	case jsontext.KindNull:
		return p.skip()
	case jsontext.KindTrue, jsontext.KindFalse:
		t, err := p.dec.ReadToken()
		if err != nil {
			return err
		}
		b := t.Bool()
		*into = &b
		return nil
	default:
		return p.wrong(p.dec.StackPointer(), k, "true, false or null")
	}
}

// raw returns the bytes of a value. For an object or an array it returns an empty one,
// since the rules look only at its kind.
func (p *parser) raw() (jsontext.Value, error) {
	switch p.dec.PeekKind() {
	case jsontext.KindBeginObject:
		return jsontext.Value("{}"), p.skip()
	case jsontext.KindBeginArray:
		return jsontext.Value("[]"), p.skip()
	}
	v, err := p.dec.ReadValue()
	if err != nil {
		return nil, err
	}
	// v is valid only until the next read, so return the same bytes of the body.
	end := p.dec.InputOffset()
	return p.body[end-int64(len(v)) : end : end], nil
}

// skip reads a value of any size and discards it, but checks its grammar and depth.
func (p *parser) skip() error {
	base := p.dec.StackDepth()
	for {
		if _, err := p.dec.ReadToken(); err != nil {
			return err
		}
		switch depth := p.dec.StackDepth(); {
		case depth > maxDepth:
			return errTooDeep
		case p.tooMany():
			return errTooMany
		case depth == base:
			return nil
		}
	}
}

// tooMany reports whether the innermost object has more than maxMembers members so far.
func (p *parser) tooMany() bool {
	kind, n := p.dec.StackIndex(p.dec.StackDepth()) // of names and values
	return kind == jsontext.KindBeginObject && n > 2*maxMembers
}

// wrong reports a value of the wrong type and skips it.
func (p *parser) wrong(at jsontext.Pointer, is jsontext.Kind, want string) error {
	if is != jsontext.KindInvalid && !p.faults.countIfFull() { // an invalid kind is no JSON, which skip reports
		p.faults.add(pointer(at), "type", "must be "+want+", is "+kindName(is))
	}
	return p.skip()
}

// unknown reports a member that does not exist, with a suggestion, and skips its value.
func (p *parser) unknown(name string, names func() []string) error {
	if p.faults.countIfFull() {
		return p.skip()
	}
	known := names()
	at := p.dec.StackPointer()
	if len(name) > maxNameShown {
		p.faults.add(pointer(at.Parent()), "unknown_member", fmt.Sprintf("unknown member, with a name of %d bytes; known are %s", len(name), strings.Join(known, ", ")))
		return p.skip()
	}
	detail := "unknown member; known are " + strings.Join(known, ", ")
	if near := nearest(name, known); near != "" {
		detail = "unknown member; did you mean " + near + "?"
	} else if name == "id" {
		detail = "unknown member; the id is in the path, or given by the server"
	}
	p.faults.add(pointer(at), "unknown_member", detail)
	return p.skip()
}

// end returns an error if anything follows the contract.
func (p *parser) end() error {
	_, err := p.dec.ReadToken()
	switch {
	case errors.Is(err, io.EOF):
		return nil
	case err != nil:
		return err
	}
	return errors.New("something follows the end of the JSON; send one JSON value")
}

// malformed returns the place and the reason of an error of the decoder or of skip.
func (p *parser) malformed(err error) error {
	at, offset := p.dec.StackPointer(), p.dec.InputOffset()
	var syntax *jsontext.SyntacticError
	if errors.As(err, &syntax) {
		at, offset, err = syntax.JSONPointer, syntax.ByteOffset, syntax.Err
	}
	if len(at) > maxNameShown {
		at = ""
	}
	rule, detail := "json", err.Error()
	switch {
	case isUTF16(p.body):
		return &malformed{fault{Pointer: "#", Detail: "the text is in UTF-16; save it as UTF-8", rule: "utf8"}}
	case errors.Is(err, io.EOF):
		return &malformed{fault{Pointer: "#", Detail: "the body is empty; send a JSON object", rule: "empty"}}
	case errors.Is(err, io.ErrUnexpectedEOF):
		rule, detail = "cut_off", "the JSON is cut off"
	case errors.Is(err, jsontext.ErrDuplicateName):
		rule, detail = "duplicate_member", "this member appears twice; send it once"
	case errors.Is(err, errTooDeep):
		rule = "depth"
	case errors.Is(err, errTooMany):
		rule = "members"
	case detail == "invalid UTF-8":
		rule, detail = "utf8", "invalid UTF-8; save the text as UTF-8"
	}
	return &malformed{fault{Pointer: pointer(at), Detail: fmt.Sprintf("at byte %d: %s", int64(p.mark)+offset, detail), rule: rule}}
}

// nearest returns the known name that name probably misspells, or "".
func nearest(name string, known []string) string {
	best, bestDistance := "", 0
	for _, k := range known {
		d := levenshtein.ComputeDistance(strings.ToLower(name), k)
		if d <= len(k)/3 && (best == "" || d < bestDistance) {
			best, bestDistance = k, d
		}
	}
	return best
}
