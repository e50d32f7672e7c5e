package main

// Conditional requests: If-Match and If-None-Match (RFC 9110 §13).

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

var (
	// errPreconditionFailed: a condition of the request does not hold (412).
	errPreconditionFailed = errors.New("precondition failed")
	// errMatched: If-None-Match names what is there; for GET that is a 304.
	errNoneMatch = fmt.Errorf("%w: If-None-Match", errPreconditionFailed)
)

// preconditions are those of one request.
type preconditions struct {
	ifMatch, ifNoneMatch entityTags
}

// entityTags is the value of one of the two fields.
type entityTags struct {
	present bool
	any     bool // "*"
	tags    []entityTag
}

// entityTag is RFC 9110 §8.8.3's.
type entityTag struct {
	weak   bool
	opaque string // with its quotes
}

// etag is a strong entity tag: equal exactly when the documents are.
func etag(v Version) string {
	var b [18]byte
	b[0], b[17] = '"', '"'
	hex.Encode(b[1:17], binary.BigEndian.AppendUint64(nil, uint64(v)))
	return string(b[:])
}

// parsePreconditions returns a *malformed. A field that cannot be read is not
// passed over: the client meant to be stopped by it.
func parsePreconditions(h http.Header) (p preconditions, err error) {
	if p.ifMatch, err = parseEntityTags("If-Match", h["If-Match"]); err != nil {
		return p, err
	}
	p.ifNoneMatch, err = parseEntityTags("If-None-Match", h["If-None-Match"])
	return p, err
}

// parseEntityTags reads a field's lines as one list (RFC 9110 §5.3): "*", or
// entity tags separated by commas.
func parseEntityTags(field string, lines []string) (entityTags, error) {
	if len(lines) == 0 {
		return entityTags{}, nil
	}
	wrong := &malformed{fault{Parameter: field, Detail: `must be * or a list of entity tags such as "5bd1e995c7a3f2e0"`}}
	rest := trimSpace(strings.Join(lines, ","))
	if rest == "*" {
		return entityTags{present: true, any: true}, nil
	}
	t := entityTags{present: true}
	for rest != "" {
		if rest[0] == ',' { // empty elements are allowed (§5.6.1.2)
			rest = trimSpace(rest[1:])
			continue
		}
		var tag entityTag
		rest, tag.weak = strings.CutPrefix(rest, "W/")
		if rest == "" || rest[0] != '"' {
			return entityTags{}, wrong
		}
		end := 1
		for end < len(rest) && isEtagc(rest[end]) {
			end++
		}
		if end == len(rest) || rest[end] != '"' {
			return entityTags{}, wrong
		}
		tag.opaque, rest = rest[:end+1], trimSpace(rest[end+1:])
		if rest != "" && rest[0] != ',' {
			return entityTags{}, wrong
		}
		t.tags = append(t.tags, tag)
	}
	if len(t.tags) == 0 {
		return entityTags{}, wrong
	}
	return t, nil
}

// isEtagc is RFC 9110 §8.8.3's etagc.
func isEtagc(c byte) bool { return c == 0x21 || c >= 0x23 && c != 0x7f }

func trimSpace(s string) string { return strings.Trim(s, " \t") }

// check evaluates the conditions against a contract, in the order of RFC 9110
// §13.2.2. A contract that does not exist has no entity tag, so any If-Match
// fails (§13.1.1).
func (p preconditions) check(current Version, exists bool) error {
	if p.ifMatch.present && !(exists && p.ifMatch.strong(current)) {
		return errPreconditionFailed
	}
	if p.ifNoneMatch.present && exists && p.ifNoneMatch.weak(current) {
		return errNoneMatch
	}
	return nil
}

// strong is the comparison for If-Match: weak tags never match (§8.8.3.2).
func (t entityTags) strong(v Version) bool {
	return t.any || slices.Contains(t.tags, entityTag{opaque: etag(v)})
}

// weak is the comparison for If-None-Match.
func (t entityTags) weak(v Version) bool {
	is := etag(v)
	return t.any || slices.ContainsFunc(t.tags, func(tag entityTag) bool { return tag.opaque == is })
}
