package main

// Conditional requests: If-Match and If-None-Match (RFC 9110 §13).

import (
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

var (
	// errPreconditionFailed is returned when a precondition of a request is false. The response
	// is a 412.
	errPreconditionFailed = errors.New("precondition failed")
	// errNoneMatch is returned when If-None-Match is false, since it matches the contract. The
	// response to a GET or HEAD is a 304 then (RFC 9110 §13.1.2), to other methods a 412.
	errNoneMatch = fmt.Errorf("%w: If-None-Match", errPreconditionFailed)
	// errAlteredTag is returned when If-Match is false and has an entity tag that a proxy made of
	// one of this service. The response is a 412.
	errAlteredTag = fmt.Errorf("%w: an altered entity tag", errPreconditionFailed)
)

// preconditions are the If-Match and If-None-Match fields of a request.
type preconditions struct {
	ifMatch, ifNoneMatch entityTags
}

// entityTags is the value of one of these fields.
type entityTags struct {
	present bool // the request has the field
	any     bool // the value is "*", which matches every version
	tags    []entityTag
}

// entityTag is an entity tag of RFC 9110 §8.8.3.
type entityTag struct {
	weak   bool
	opaque string // with its quotes
}

// etag returns the entity tag of a version. It is a strong one: the tags of two documents of a
// contract are equal exactly when the documents are, byte for byte.
func etag(v Version) string {
	var b [2 + 2*len(v)]byte
	b[0], b[len(b)-1] = '"', '"'
	hex.Encode(b[1:], v[:])
	return string(b[:])
}

// parsePreconditions reads the preconditions of a request. It returns a *malformed for a field
// that is not valid. Ignoring such a field could overwrite a change that the client wanted to
// protect with it.
func parsePreconditions(h http.Header) (p preconditions, err error) {
	if p.ifMatch, err = parseEntityTags("If-Match", h["If-Match"]); err != nil {
		return p, err
	}
	p.ifNoneMatch, err = parseEntityTags("If-None-Match", h["If-None-Match"])
	return p, err
}

// parseEntityTags reads the lines of a field as one list (RFC 9110 §5.3), which is "*" or entity
// tags separated by commas.
func parseEntityTags(field string, lines []string) (entityTags, error) {
	if len(lines) == 0 {
		return entityTags{}, nil
	}
	wrong := &malformed{fault{Parameter: field, rule: "entity_tags", Detail: `must be * or a list of entity tags in quotes, such as "3a0f5bd1e995c7a3f2e0c41d76b28e95"`}}
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

// isEtagc reports whether c may be inside an entity tag (etagc of RFC 9110 §8.8.3).
func isEtagc(c byte) bool { return c == 0x21 || c >= 0x23 && c != 0x7f }

// trimSpace removes leading and trailing optional whitespace (RFC 9110 §5.6.3).
func trimSpace(s string) string { return strings.Trim(s, " \t") }

// check evaluates the preconditions against the current version of a contract, in the order of
// RFC 9110 §13.2.2. It returns errPreconditionFailed, errAlteredTag, errNoneMatch or nil. If the
// contract does not exist, If-Match is false with any value, "*" too (§13.1.1), and If-None-Match
// is true.
func (p preconditions) check(current Version, exists bool) error {
	if p.ifMatch.present && !(exists && p.ifMatch.matchStrong(current)) {
		if exists && slices.ContainsFunc(p.ifMatch.tags, entityTag.altered) {
			return errAlteredTag
		}
		return errPreconditionFailed
	}
	if p.ifNoneMatch.present && exists && p.ifNoneMatch.matchWeak(current) {
		return errNoneMatch
	}
	return nil
}

// altered reports whether a proxy that compresses responses probably made the tag of one of this
// service: nginx makes it weak, and others add a suffix such as -gzip before the last quote.
func (t entityTag) altered() bool {
	if t.weak {
		return true
	}
	ours := len(etag(Version{}))
	if len(t.opaque) <= ours {
		return false
	}
	_, err := hex.DecodeString(t.opaque[1 : ours-1]) // between the quotes that ours has
	return err == nil
}

// matchStrong reports whether a version matches by the strong comparison (RFC 9110 §8.8.3.2),
// which If-Match requires: a weak tag never matches.
func (t entityTags) matchStrong(v Version) bool {
	return t.any || slices.Contains(t.tags, entityTag{opaque: etag(v)})
}

// matchWeak reports whether a version matches by the weak comparison (RFC 9110 §8.8.3.2), which
// If-None-Match requires: it is irrelevant whether a tag is weak.
func (t entityTags) matchWeak(v Version) bool {
	current := etag(v)
	return t.any || slices.ContainsFunc(t.tags, func(tag entityTag) bool { return tag.opaque == current })
}
