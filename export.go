package main

// The command export, and what it asks of the process that has the database
// (control.go): contracts as JSON Lines.

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
)

// jsonLinesType is the usual name of the media type, which is not registered.
const jsonLinesType = "application/jsonl"

type exportCmd struct {
	Org  string `env:"-" placeholder:"UUID" help:"The contracts of this organization only."`
	User string `env:"-" placeholder:"UUID" help:"The contracts of this user only."`
	File string `arg:"" default:"-" help:"Write to this file, in place of what is there; - is standard output (default: ${default})."`
	database
}

// Run writes a line for each contract, in the order of organization, user and id. A
// contract that is written meanwhile may be in it or not, but never half of one.
func (c *exportCmd) Run(ctx context.Context, a *app) (err error) {
	query := url.Values{}
	for name, id := range map[string]string{"org": c.Org, "user": c.User} {
		if id == "" {
			continue
		}
		if _, err := parseID(id); err != nil {
			return fmt.Errorf("--%s %w", name, err)
		}
		query.Set(name+"_id", id)
	}
	control, err := a.control(c.DB, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, control.close()) }()
	return a.output(c.File, func(to io.Writer) error {
		return a.receive(ctx, control, "/contracts?"+query.Encode(), to)
	}, nil)
}

// exportControl is the other end.
type exportControl struct{ store *Store }

func (c exportControl) get(x *exchange) (answer, error) {
	var sel Selection
	query := x.r.URL.Query()
	for name, into := range map[string]*ID{"org_id": &sel.Org, "user_id": &sel.User} {
		if !query.Has(name) {
			continue
		}
		var err error
		if *into, err = parseID(query.Get(name)); err != nil {
			return answer{}, newProblem(http.StatusUnprocessableEntity, name+" "+err.Error())
		}
	}
	var after Key
	var buf []byte
	more := true
	return answer{status: http.StatusOK, contentType: jsonLinesType, more: func([]byte) (_ []byte, err error) {
		buf = buf[:0]
		for more && len(buf) == 0 && err == nil { // none of a scan may be selected
			after, more, err = c.store.Scan(sel, after, func(k Key, doc []byte) { buf = appendLine(buf, k, doc) })
		}
		return buf, err
	}}, nil
}
