package main

// One price of a contract: the check of its number and its timestamp, and the forms in which a
// timestamp may arrive.

import (
	"bytes"
	"strconv"
	"strings"
	"time"

	"github.com/go-json-experiment/json/jsontext"
)

// checkPrice checks one entry and calls report for each rule that it breaks. A timestamp is
// required if there are several entries. It returns the instant of the entry, if it has one.
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
		report("price", "price_finite", quoted(string(p.Price)))
	}
	switch k := p.Timestamp.Kind(); k {
	case jsontext.KindInvalid, jsontext.KindNull:
		if several {
			report("timestamp", "timestamp_required", "")
		}
	case jsontext.KindString:
		if t, ok = instant(p.Timestamp); !ok {
			report("timestamp", "timestamp_rfc3339", quoted(unquoted(p.Timestamp)))
		}
	default:
		report("timestamp", "timestamp_string", kindName(k))
	}
	return t, ok
}

// finite reports whether a JSON number is finite as an IEEE 754 double.
func finite(number jsontext.Value) bool {
	if len(number) < 300 && !bytes.ContainsAny(number, "eE") {
		return true // below 1e300
	}
	_, err := strconv.ParseFloat(string(number), 64)
	return err == nil
}

// The places of parts in a JSON string with an RFC 3339 time, "2023-11-01T00:00:00+01:00".
const (
	timeAt    = len(`"2023-11-01`)          // of the T
	secondsAt = len(`"2023-11-01T00:00`)    // of the colon before the seconds
	offsetAt  = len(`"2023-11-01T00:00:00`) // of the offset, if the seconds have no fraction
)

// completed returns the RFC 3339 form of a timestamp that lacks a part of it, as common
// libraries print one: the seconds (Java leaves out :00), the T (Python prints a space), the
// colon in the offset (strftime) or its minutes (PostgreSQL). It returns any other text
// unchanged, for the rules to judge.
func completed(timestamp jsontext.Value) jsontext.Value {
	n := len(timestamp)
	if n > offsetAt && timestamp[timeAt] == 'T' && timestamp[secondsAt] == ':' && (timestamp[n-2] == 'Z' || timestamp[n-4] == ':') {
		return timestamp // the usual case, for which there may be a million prices to look at
	}
	if timestamp.Kind() != jsontext.KindString || n > maxIncomplete {
		return timestamp
	}
	text := unquoted(timestamp)
	if len(text) < len("2023-11-01T00:00Z") {
		return timestamp
	}
	date, clock := text[:timeAt-1], text[timeAt:]
	separator := strings.Replace(text[timeAt-1:timeAt], " ", "T", 1)
	at := strings.LastIndexAny(clock, "+-Zz")
	if at < 0 {
		return timestamp
	}
	clock, offset := clock[:at], clock[at:]
	if len(clock) == len("00:00") {
		clock += ":00"
	}
	switch len(offset) {
	case len("+01"):
		offset += ":00"
	case len("+0100"):
		offset = offset[:3] + ":" + offset[3:]
	}
	whole, err := jsontext.AppendQuote(nil, date+separator+clock+offset)
	if _, ok := instant(whole); err != nil || !ok {
		return timestamp
	}
	return whole
}

// maxIncomplete is the length in bytes above which a timestamp is not completed: no library prints
// one that long, and its copies would take many times the memory of the body.
const maxIncomplete = 100

// instant parses a JSON string as an RFC 3339 time. The result is in UTC, so that equal
// instants are equal values.
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

// isRFC3339 reports whether a text that package time accepts is valid under RFC 3339 §5.6.
// Package time also accepts an hour of one digit, a comma before the fraction, and an
// offset of 24 hours or 60 minutes (go.dev/issue/54580).
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
