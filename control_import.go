package main

// The control endpoint that imports contracts. It reads JSON Lines and at the same time
// sends events with the progress and the faults, both in pieces of bounded size.

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/go-json-experiment/json"
)

// importEvent is one line of the response. An import sends the faults of each invalid line
// and how much was read and stored, and at last either Problem or End.
type importEvent struct {
	// Line is the number of an invalid line, from 1, and Faults are its faults.
	Line   int64   `json:"line,omitzero"`
	Faults []fault `json:"faults,omitempty"`
	// Read is the number of bytes read since the last event that has it.
	Read int64 `json:"read,omitzero"`
	// Stored is the number of contracts stored since the last event that has it, and Of the
	// number of contracts to store in total.
	Stored int64 `json:"stored,omitzero"`
	Of     int64 `json:"of,omitzero"`
	// Problem is why the import failed, and whether anything was imported.
	Problem string `json:"problem,omitzero"`
	// End is the result of an import that did not fail.
	End *importEnd `json:"end,omitzero"`
}

// importEnd is the result of an import.
type importEnd struct {
	Lines    int  `json:"lines"`            // that should have a contract
	Bad      int  `json:"bad"`              // lines that are invalid
	CutOff   bool `json:"cut_off,omitzero"` // an export has its first line and not its last
	Imported int  `json:"imported"`         // contracts
}

// The first and the last line of an export. A pipe that breaks off loses the end of what it
// carries, so an input with the first line and without the last is known to be cut off. They have
// no number of contracts, which would be wrong after every filter. An input with neither may come
// from anywhere.
const (
	exportBegin = `{"export":"begin"}`
	exportEnd   = `{"export":"end"}`
)

// cutOff says that an export has no end.
const cutOff = "the export is cut off, since its last line " + exportEnd + " is missing"

// importControl serves the import endpoint.
type importControl struct {
	store    *Store
	maxBody  int64           // of a contract in a request, in bytes
	stopping context.Context // done when the server is told to stop
}

// post imports the contracts in the body: of all lines, or of none if a line is invalid.
// With the query parameter keep_going=true it imports those of the valid lines.
func (c importControl) post(x *exchange) (response, error) {
	query, err := readQuery(x, "keep_going")
	if err != nil {
		return response{}, err
	}
	keepGoing, err := strconv.ParseBool(cmp.Or(query.Get("keep_going"), "false"))
	if err != nil {
		return response{}, newProblem(http.StatusUnprocessableEntity, "keep_going must be true or false")
	}
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
		return response{}, newProblem(http.StatusConflict, "Another import is running; try again when it has ended.")
	}
	if err != nil {
		return response{}, err
	}
	input := &inputReader{body: x.r.Body, connection: connection, stopping: c.stopping, left: pieceTimeout}
	unwatch := context.AfterFunc(c.stopping, input.interrupt)
	x.onEnd = func() { unwatch(); i.Close() }
	run := &importRun{
		x: x, validator: validator, to: i,
		lines:     lineReader{r: bufio.NewReaderSize(input, importReadBytes), max: maxLine(c.maxBody)},
		keepGoing: keepGoing,
	}
	return response{status: http.StatusOK, contentType: jsonLinesType, more: func(buf []byte) ([]byte, error) {
		if err := connection.Flush(); err != nil {
			return nil, fmt.Errorf("%w: %w", errClientGone, err)
		}
		return run.next(buf)
	}}, nil
}

// importReadBytes is the size of the buffer for reading lines from the connection, in bytes.
const importReadBytes = 64 << 10

// importRun is the state of one import. Each step stages some lines. Once all lines
// are staged and the import is committed, each step moves some of the staged contracts.
type importRun struct {
	x         *exchange
	validator *Validator
	to        *Import
	lines     lineReader
	keepGoing bool

	line      int64         // number of the current line, from 1
	open      int           // exports of which the first line was read and not yet the last
	staged    []ImportLine  // by the current step
	events    []importEvent // of the current step
	faults    int           // in events
	end       importEnd     // so far
	committed bool          // the store will carry the import out, even after a crash
	ended     bool          // the last event was returned
}

// next runs one step and appends its events to buf, as JSON Lines. It returns nothing after
// the last event.
func (r *importRun) next(buf []byte) ([]byte, error) {
	if r.ended {
		return nil, nil
	}
	r.events, r.faults = r.events[:0], 0
	step := r.stage
	if r.committed {
		step = r.apply
	}
	if err := step(); err != nil {
		// The response has begun, so that the error can only be sent as an event: breaking
		// the connection off would not tell the command the reason.
		r.x.err, r.ended = err, true
		r.events = append(r.events, importEvent{Problem: err.Error()})
	}
	if r.ended {
		// Before the last event, since a command that has read it may import again, or close the
		// store.
		r.x.onEnd()
		r.x.onEnd = nil
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

// stage reads, checks and stages some lines: about as many as one transaction may write.
// At the end of the input it commits the import, or ends it if a line was invalid.
func (r *importRun) stage() error {
	clear(r.staged) // a large document is not kept for longer than its step
	r.staged = r.staged[:0]
	size := 0
	atEOF := false
	read := r.lines.read
	if r.line == 0 {
		if problem := foreign(r.lines.r); problem != "" {
			r.refuse(problem)
			return nil
		}
	}
	for !atEOF && size < importBytes && r.lines.read-read < importBytes && len(r.staged)+r.faults < importContracts {
		line, err := r.lines.next()
		var long *malformed
		switch {
		case errors.Is(err, io.EOF):
			atEOF = true
			continue
		case errors.Is(err, errStopping):
			r.refuse("the server is stopping, so nothing was imported; import again when it has started")
			return nil
		case errors.Is(err, os.ErrDeadlineExceeded):
			r.refuse("the input brought less than 64 KiB in 30 seconds, so nothing was imported; write it to a file and import the file")
			return nil
		case err != nil && !errors.As(err, &long):
			return fmt.Errorf("%w: line %d cannot be read: %w; nothing was imported", errClientGone, r.line+1, err)
		}
		r.line++
		if err == nil && r.hasNoContract(bytes.Trim(line, "\ufeff \t\r")) {
			continue
		}
		r.end.Lines++
		var l ImportLine
		if err == nil {
			l, err = r.parse(line)
		}
		if err != nil {
			r.reportBad(r.line, err)
			continue
		}
		r.staged = append(r.staged, l)
		size += len(l.Document)
	}
	before, err := r.to.Stage(r.staged)
	if err != nil {
		return fmt.Errorf("%w, and the log says why; nothing was imported", err)
	}
	for n, first := range before {
		if first > 0 {
			r.reportBad(r.staged[n].Line, &malformed{fault{Pointer: "#/id", rule: "unique", Detail: fmt.Sprintf("is the same contract as line %d", first)}})
		}
	}
	slices.SortStableFunc(r.events, func(a, b importEvent) int { return cmp.Compare(a.Line, b.Line) })
	r.events = append(r.events, importEvent{Read: r.lines.read - read})
	if !atEOF {
		return nil
	}
	if r.end.Bad > 0 && !r.keepGoing {
		r.ended = true
		r.events = append(r.events, importEvent{End: &r.end})
		return nil
	}
	if r.end.CutOff = r.open > 0; r.end.CutOff && !r.keepGoing {
		r.refuse(cutOff + ", so nothing was imported; get all of it, or use --keep-going to import what is there")
		return nil
	}
	switch err := r.to.Commit(); {
	case errors.Is(err, ErrClosed), errors.Is(err, ErrDamaged):
		return fmt.Errorf("%w; it is not known whether the import was committed; the next start imports all contracts or none", err)
	case err != nil:
		return fmt.Errorf("%w, and the log says why; nothing was imported", err)
	}
	r.committed = true
	return nil
}

// refuse ends the import for a reason that is no fault of the service.
func (r *importRun) refuse(problem string) {
	r.x.reason, r.ended = problem, true
	r.events = append(r.events, importEvent{Problem: problem})
}

// hasNoContract reports whether a line is empty, as editors and scripts leave one at the end, or
// the first or the last line of an export, which it counts. Several exports may follow one
// another. A program that changed every line may have added members to those two.
func (r *importRun) hasNoContract(line []byte) bool {
	var mark struct {
		Export string `json:"export"`
	}
	if bytes.HasPrefix(line, []byte(`{"export":`)) && json.Unmarshal(line, &mark) != nil {
		return false
	}
	switch mark.Export {
	case "begin":
		r.open++
	case "end":
		r.open = max(0, r.open-1)
	default:
		return len(line) == 0
	}
	return true
}

// foreign returns what to do about an input that has no lines of JSON, from its first two bytes.
// Otherwise each piece between two line ends would be reported, and not the cause.
func foreign(r *bufio.Reader) string {
	start, _ := r.Peek(2)
	switch {
	case isUTF16(start):
		return "the input is in UTF-16, so nothing was imported; save it as UTF-8 and import it again"
	case string(start) == gzipMagic:
		return "the input is compressed with gzip, so nothing was imported; decompress it and import it again"
	case len(start) > 0 && start[0] == '[':
		return "the input is a JSON array, so nothing was imported; write each contract on a line of its own and import it again"
	}
	return ""
}

// gzipMagic is the start of a file that is compressed with gzip (RFC 1952 §2.3.1).
const gzipMagic = "\x1f\x8b"

// parse returns the contract of a line, in the form in which it is stored.
func (r *importRun) parse(line []byte) (ImportLine, error) {
	k, c, err := r.validator.Line(line)
	if err != nil {
		return ImportLine{}, err
	}
	doc, err := c.encode(k.Contract)
	return ImportLine{Key: k, Document: doc, Line: r.line}, err
}

// reportBad counts an invalid line and adds an event with its faults.
func (r *importRun) reportBad(line int64, err error) {
	r.end.Bad++
	faults := faultsOf(err)
	r.faults += len(faults)
	r.events = append(r.events, importEvent{Line: line, Faults: faults})
}

// apply stores some of the staged contracts.
func (r *importRun) apply() error {
	stored, done, err := r.to.Move()
	if err != nil {
		return fmt.Errorf("%w; the next start imports the rest", err)
	}
	r.end.Imported += stored
	r.events = append(r.events, importEvent{Stored: int64(stored), Of: int64(r.end.Lines - r.end.Bad)})
	if done {
		r.ended = true
		r.events = append(r.events, importEvent{End: &r.end})
	}
	return nil
}

// inputReader reads the content of an import, of which a client must send each pieceSize within
// pieceTimeout. Only the time counts in which the import waits for the client: the disk may be
// slower, and so may be the reader of the events. Read returns os.ErrDeadlineExceeded if the client
// is too slow, and errStopping once the server is told to stop.
type inputReader struct {
	body       io.Reader
	connection *http.ResponseController
	stopping   context.Context
	left       time.Duration // for the rest of the piece
	read       int           // bytes of the piece
}

// errStopping is returned by inputReader.Read when the server is told to stop.
var errStopping = errors.New("the server is stopping")

// Read reads the next bytes.
func (r *inputReader) Read(b []byte) (int, error) {
	began := time.Now()
	_ = r.connection.SetReadDeadline(began.Add(r.left)) // which net/http supports
	if r.stopping.Err() != nil {                        // interrupt may have come before SetReadDeadline
		return 0, errStopping
	}
	n, err := r.body.Read(b)
	r.left -= time.Since(began)
	if r.read += n; r.read >= pieceSize {
		r.left, r.read = pieceTimeout, 0
	}
	switch {
	case err == io.EOF:
		_ = r.connection.SetReadDeadline(time.Time{}) // what is read is stored now, which may take long
	case err != nil && r.stopping.Err() != nil:
		err = errStopping
	}
	return n, err
}

// interrupt ends a Read that waits.
func (r *inputReader) interrupt() { _ = r.connection.SetReadDeadline(time.Now()) }

// maxLine returns the maximum length of a line, in bytes, where the content of a request may have
// maxBody: a quarter more, since a stored contract has its timestamps in a longer form than a
// request may have them, and 4 KiB for the members that a request need not have.
func maxLine(maxBody int64) int { return int(maxBody + maxBody/4 + 4<<10) }

// lineReader reads lines. The last one need not end with a newline.
type lineReader struct {
	r    *bufio.Reader
	max  int    // length of a line with its newline, in bytes
	line []byte // reused by next
	read int64  // bytes read from r
}

// next returns the next line without its newline; it is valid until the next call. If the
// line is too long, next reads to its end and returns a *malformed. It returns io.EOF after
// the last line.
func (l *lineReader) next() ([]byte, error) {
	if cap(l.line) > maxPooled {
		l.line = nil
	}
	l.line = l.line[:0]
	long := false
	for {
		piece, err := l.r.ReadSlice('\n')
		l.read += int64(len(piece))
		if long = long || len(l.line)+len(piece) > l.max; long {
			l.line = nil
		} else {
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
			return nil, &malformed{fault{Pointer: "#", rule: "max", Detail: fmt.Sprintf("must be at most %d bytes; import a longer line while a server with a larger --max-body runs", l.max)}}
		}
		return bytes.TrimSuffix(l.line, []byte("\n")), nil
	}
}
