package main

// The control endpoint that sends contracts as JSON Lines.

import (
	"fmt"
	"net/http"
)

// exportControl serves the export endpoint.
type exportControl struct{ store *Store }

// get sends one line for each contract, between exportBegin and exportEnd. The query parameters
// org_id and user_id select the contracts of one organization and of one user.
func (c exportControl) get(x *exchange) (response, error) {
	var sel Selection
	query, err := readQuery(x, "org_id", "user_id")
	if err != nil {
		return response{}, err
	}
	for name, id := range map[string]*ID{"org_id": &sel.Org, "user_id": &sel.User} {
		if !query.Has(name) {
			continue
		}
		if *id, err = parseID(query.Get(name)); err != nil {
			return response{}, newProblem(http.StatusUnprocessableEntity, name+" "+err.Error())
		}
	}
	var after Key
	var buf []byte
	more, ended := true, false
	connection := http.NewResponseController(x.w)
	return response{status: http.StatusOK, contentType: jsonLinesType, content: []byte(exportBegin + "\n"), more: func([]byte) (_ []byte, err error) {
		if after == (Key{}) { // so that an export that fails at once is one that is cut off
			if err := connection.Flush(); err != nil {
				return nil, fmt.Errorf("%w: %w", errClientGone, err)
			}
		}
		buf = buf[:0]
		for more && len(buf) == 0 && err == nil { // a scan may select nothing
			after, more, err = c.store.Scan(sel, after, func(k Key, doc []byte) { buf = appendLine(buf, k, doc) })
		}
		if !more && !ended && err == nil {
			ended = true
			buf = append(buf, exportEnd+"\n"...)
		}
		return buf, err
	}}, nil
}
