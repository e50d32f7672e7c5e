package main

// The control endpoint that imports contracts: JSON Lines come in while the result of
// each line goes out, in pieces of bounded size.

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"

	"github.com/go-json-experiment/json"
)

// importEvent is what the server tells of an import, in the order of events.
type importEvent struct {
	// Line is the number of a bad line, from 1; Faults are what is wrong with it.
	Line   int64   `json:"line,omitzero"`
	Faults []fault `json:"faults,omitempty"`
	// Read is how many bytes more were read.
	Read int64 `json:"read,omitzero"`
	// Stored is how many contracts more were stored, Of how many there are to store.
	Stored int64 `json:"stored,omitzero"`
	Of     int64 `json:"of,omitzero"`
	// Problem is why the import ended early.
	Problem string `json:"problem,omitzero"`
	// End is the last one of an import that did not.
	End *importEnd `json:"end,omitzero"`
}

type importEnd struct {
	Lines    int `json:"lines"`
	Bad      int `json:"bad"`
	Imported int `json:"imported"`
}

// importControl is the other end.
type importControl struct{ store *Store }

func (c importControl) post(x *exchange) (response, error) {
	connection := http.NewResponseController(x.w)
	if err := connection.EnableFullDuplex(); err != nil {
		return response{}, err
	}
	validator, err := newValidator()
	if err != nil {
		return response{}, err
	}
	i, err := c.store.StartImport()
	if errors.Is(err, ErrImporting) {
		return response{}, newProblem(http.StatusConflict, "Another import is running; start this one when that has ended.")
	}
	if err != nil {
		return response{}, err
	}
	x.onEnd = i.Close
	run := &importRun{
		x: x, validator: validator, to: i, lines: lineReader{r: bufio.NewReaderSize(x.r.Body, importReadBytes)},
		keepGoing: x.r.URL.Query().Get("keep_going") == "true",
	}
	return response{status: http.StatusOK, contentType: jsonLinesType, more: func(buf []byte) ([]byte, error) {
		if err := connection.Flush(); err != nil {
			return nil, fmt.Errorf("%w: %w", errClientGone, err)
		}
		return run.next(buf)
	}}, nil
}

// importReadBytes is the buffer between the connection and the lines.
const importReadBytes = 64 << 10

// importRun is an import from its first line to its end.
type importRun struct {
	x         *exchange
	validator *Validator
	to        *Import
	lines     lineReader
	keepGoing bool

	staged  []ImportLine  // what is about to be
	events  []importEvent // what is about to be told
	end     importEnd
	decided bool
	over    bool
}

// next goes on by a piece and returns what there is to tell; nothing is the end.
func (r *importRun) next(buf []byte) ([]byte, error) {
	if r.over {
		return nil, nil
	}
	r.events = r.events[:0]
	step := r.stage
	if r.decided {
		step = r.apply
	}
	if err := step(); err != nil {
		// Half of an answer does not tell what is wrong.
		r.x.err, r.over = err, true
		r.events = append(r.events, importEvent{Problem: err.Error()})
	}
	for _, e := range r.events {
		line, err := json.Marshal(e)
		if err != nil {
			return nil, fmt.Errorf("encode event: %w", err)
		}
		buf = append(append(buf, line...), '\n')
	}
	return buf, nil
}

// stage reads, checks and stages some lines.
func (r *importRun) stage() error {
	r.staged = r.staged[:0]
	size := 0
	ended := false
	read := r.lines.read
	for !ended && size < importBytes && r.lines.read-read < importBytes && len(r.staged)+len(r.events) < importContracts {
		line, err := r.lines.next()
		switch {
		case err == io.EOF:
			ended = true
			continue
		case err != nil && !errors.Is(err, errLongLine):
			return fmt.Errorf("line %d cannot be read: %w; nothing was imported", r.end.Lines+1, err)
		}
		r.end.Lines++
		var l ImportLine
		if err == nil {
			l, err = r.parse(line)
		}
		if err != nil {
			r.bad(int64(r.end.Lines), err)
			continue
		}
		r.staged = append(r.staged, l)
		size += len(l.Document)
	}
	before, err := r.to.Stage(r.staged)
	if err != nil {
		return fmt.Errorf("%w, as the log says; nothing was imported", err)
	}
	for n, first := range before {
		if first > 0 {
			r.bad(r.staged[n].Line, &malformed{fault{Pointer: "#/id", Detail: fmt.Sprintf("is the same contract as line %d", first)}})
		}
	}
	slices.SortStableFunc(r.events, func(a, b importEvent) int { return cmp.Compare(a.Line, b.Line) })
	r.events = append(r.events, importEvent{Read: r.lines.read - read})
	if !ended {
		return nil
	}
	if r.end.Bad > 0 && !r.keepGoing {
		r.over = true
		r.events = append(r.events, importEvent{End: &r.end})
		return nil
	}
	switch err := r.to.Decide(); {
	case errors.Is(err, ErrClosed), errors.Is(err, ErrDamaged):
		return fmt.Errorf("%w just now; at the next start all is imported, or nothing", err)
	case err != nil:
		return fmt.Errorf("%w, as the log says; nothing was imported", err)
	}
	r.decided = true
	return nil
}

// parse reads a line into what is stored.
func (r *importRun) parse(line []byte) (ImportLine, error) {
	k, c, err := r.validator.Line(line)
	if err != nil {
		return ImportLine{}, err
	}
	doc, err := c.encode(k.Contract)
	return ImportLine{Key: k, Document: doc, Line: int64(r.end.Lines)}, err
}

// bad reports a line.
func (r *importRun) bad(line int64, err error) {
	r.end.Bad++
	r.events = append(r.events, importEvent{Line: line, Faults: faultsOf(err)})
}

// apply stores some of what is staged.
func (r *importRun) apply() error {
	stored, done, err := r.to.Apply()
	if err != nil {
		return fmt.Errorf("%w; the next start imports the rest", err)
	}
	r.end.Imported += stored
	r.events = append(r.events, importEvent{Stored: int64(stored), Of: int64(r.end.Lines - r.end.Bad)})
	if done {
		r.over = true
		r.events = append(r.events, importEvent{End: &r.end})
	}
	return nil
}

// maxLine is the longest line, in bytes: the largest --max-body and what a line has
// beside.
const maxLine = 1<<30 + 4<<10

// errLongLine is a bad line's.
var errLongLine = errors.New("the line is longer than 1 GiB")

// lineReader reads lines, of which the last may have no end.
type lineReader struct {
	r    *bufio.Reader
	line []byte // of what next returned, at most the longest one
	read int64  // bytes
}

// next returns a line without its end, which dies with the next call. It returns
// errLongLine for one that is too long, when it is read to its end.
func (l *lineReader) next() ([]byte, error) {
	l.line = l.line[:0]
	long := false
	for {
		piece, err := l.r.ReadSlice('\n')
		l.read += int64(len(piece))
		if long = long || len(l.line)+len(piece) > maxLine; !long {
			l.line = append(l.line, piece...)
		}
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case err == io.EOF && len(piece)+len(l.line) == 0 && !long:
			return nil, io.EOF
		case err != nil && err != io.EOF:
			return nil, err
		case long:
			return nil, errLongLine
		}
		return bytes.TrimSuffix(l.line, []byte("\n")), nil
	}
}
