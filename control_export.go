package main

// The control endpoint that sends contracts as JSON Lines.

import (
	"net/http"
)

// exportControl serves the export endpoint.
type exportControl struct{ store *Store }

// get sends one line for each contract. The query parameters org_id and user_id select
// the contracts of one organization and of one user.
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
	more := true
	return response{status: http.StatusOK, contentType: jsonLinesType, more: func([]byte) (_ []byte, err error) {
		buf = buf[:0]
		for more && len(buf) == 0 && err == nil { // a scan may select nothing
			after, more, err = c.store.Scan(sel, after, func(k Key, doc []byte) { buf = appendLine(buf, k, doc) })
		}
		return buf, err
	}}, nil
}
