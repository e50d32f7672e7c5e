package main

// The routes of the API and the handlers of the contract endpoints. A handler returns a response
// or an error; exchange.go and problem.go turn both into HTTP.

import (
	"errors"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"
)

// newAPI returns the API on a store, with all its endpoints registered.
func newAPI(store *Store, now func() time.Time, log *slog.Logger, settings apiSettings) (*api, error) {
	v, err := newValidator()
	if err != nil {
		return nil, err
	}
	a := &api{
		endpoints:   newEndpoints(log, "There is nothing under this path; contracts are under /api/partners/v2.0/org/{org_id}/users/{user_id}/energy-contracts, and "+settings.publicURL+docsPath+" describes the API."),
		apiSettings: settings, store: store, validator: v, now: now, throttle: newLoginThrottle(),
	}
	a.memory = &memory{bound: settings.bodyMemory}
	a.metrics = newAPIMetrics(a.memory.inUse)
	a.handler = withCORS(a.origins, a.router)
	read, write := Scopes{Read: true}, Scopes{Write: true}
	a.contract(http.MethodGet, contractsPath, read, a.listContracts)
	a.contract(http.MethodHead, contractsPath, read, a.listContracts)
	a.contract(http.MethodPost, contractsPath, write, a.postContract)
	a.contract(http.MethodGet, contractPath, read, a.getContract)
	a.contract(http.MethodHead, contractPath, read, a.getContract)
	a.contract(http.MethodPut, contractPath, write, a.putContract)
	a.contract(http.MethodPatch, contractPath, write, a.patchContract)
	a.contract(http.MethodDelete, contractPath, write, a.deleteContract)
	for _, method := range []string{http.MethodGet, http.MethodHead} {
		a.public(method, "/healthz", a.getHealth)
		a.public(method, "/readyz", a.getReady)
		a.public(method, "/", getRoot)
		a.public(method, openAPIPath, a.getOpenAPI)
		for _, f := range docsFiles() {
			a.public(method, f.path, f.get)
		}
		if a.builtInTokens {
			a.public(method, metadataPath, a.getMetadata)
		}
	}
	if a.builtInTokens {
		for _, slash := range []string{"", "/"} { // two paths for httprouter, since newEndpoints disables its redirects
			a.public(http.MethodPost, tokenPath+slash, a.postToken)
			a.public(http.MethodPost, revocationPath+slash, a.postRevocation)
		}
	}
	return a, nil
}

// target is the contract, or the collection of contracts, that a request is for.
type target struct {
	Key           // Contract is "" for the collection
	client string // the id of the client that sent the request
}

// contract registers a contract endpoint, which requires a token with the scopes of need for the
// organization in the path. Before it calls serve it checks the token and the ids in the path.
func (a *api) contract(method, pattern string, need Scopes, serve func(*exchange, target) (response, error)) {
	a.handle(method, pattern, func(x *exchange, ps params) (response, error) {
		token, err := a.authorize(x, need, ps.ByName("org_id"))
		if err != nil {
			return response{}, err
		}
		t := target{Key: Key{Owner: Owner{Org: token.Org}}, client: token.Client}
		var faults invalid
		for _, p := range ps {
			id, err := parseID(p.Value)
			if err != nil {
				faults.addParameter(p.Key, "uuid", err.Error())
			}
			switch p.Key {
			case "user_id":
				t.User = id
			case "energy_contract_id":
				t.Contract = id
			}
		}
		if err := faults.err(); err != nil {
			return response{}, err
		}
		return serve(x, t)
	})
}

// getContract returns a contract, or a 304 without content if If-None-Match has its entity tag. For
// HEAD, it does not read the document.
func (a *api) getContract(x *exchange, t target) (response, error) {
	pre, err := parsePreconditions(x.r.Header)
	if err != nil {
		return response{}, err
	}
	resp := response{status: http.StatusOK}
	var version Version
	if x.r.Method == http.MethodHead {
		var size int
		version, size, err = a.store.Find(t.Key, pre.check)
		resp.size = int64(size)
	} else {
		x.pooled = buffers.Get().(*buffer)
		x.pooled.b, version, err = a.store.Get(x.pooled.b[:0], t.Key, pre.check)
		x.pooled.fit()
		resp.content = x.pooled.b
	}
	resp.etag = etag(version)
	switch {
	case errors.Is(err, errNoneMatch):
		return response{status: http.StatusNotModified, etag: resp.etag}, nil
	case err != nil:
		return response{}, err
	}
	return resp, x.hold(cap(resp.content), 1)
}

// listContracts returns a range of a user's contracts as a JSON array, in the order of their ids.
// An array too long for one read of the store is sent in parts, so that its memory is bounded.
func (a *api) listContracts(x *exchange, t target) (response, error) {
	r, err := parseRange(x.r.URL.RawQuery)
	if err != nil {
		return response{}, err
	}
	buf := buffers.Get().(*buffer)
	x.pooled = buf
	page, err := a.store.List(append(buf.b[:0], '['), t.Owner, r)
	buf.b = page.Documents
	buf.fit()
	if err == nil {
		err = x.hold(cap(buf.b), 1)
	}
	if err != nil {
		return response{}, err
	}
	resp := response{status: http.StatusOK, content: buf.b}
	if page.Last != "" {
		next := url.Values{"after": {string(page.Last)}, "limit": {strconv.Itoa(r.Limit)}}
		resp.link = "<?" + next.Encode() + `>; rel="next"`
	}
	if !page.More {
		buf.b = append(buf.b, ']')
		resp.content = buf.b
		return resp, nil
	}
	resp.more = func(b []byte) ([]byte, error) {
		if !page.More {
			return nil, nil
		}
		page, err = a.store.List(append(b, ','), t.Owner, page.Rest)
		if err != nil {
			return nil, err
		}
		b, buf.b = page.Documents, page.Documents
		if err := x.hold(cap(b), 1); err != nil {
			return nil, err
		}
		if len(b) == 1 { // nothing but the comma: the remaining contracts were deleted meanwhile
			b = b[:0]
		}
		if !page.More {
			b = append(b, ']')
		}
		return b, nil
	}
	return resp, nil
}

// parseRange reads the query parameters limit and after, and ignores others. It returns a
// *malformed for a query that cannot be parsed, and an *invalid for values that are not allowed.
func parseRange(query string) (r Range, err error) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return r, &malformed{fault{Parameter: "query", rule: "percent_encoding", Detail: "is not valid; percent-encode its values"}}
	}
	var faults invalid
	for _, name := range []string{"limit", "after"} {
		switch v := values[name]; {
		case len(v) == 0:
		case len(v) > 1:
			faults.addParameter(name, "once", "appears more than once")
		case name == "limit":
			r.Limit, err = strconv.Atoi(v[0])
			if err != nil || r.Limit < 1 || r.Limit > maxLimit || strconv.Itoa(r.Limit) != v[0] {
				faults.addParameter(name, "range", "must be a whole number from 1 to "+strconv.Itoa(maxLimit)+", without sign or leading zero, is "+quoted(v[0]))
			}
		default:
			if r.After, err = parseID(v[0]); err != nil {
				faults.addParameter(name, "uuid", err.Error())
			}
		}
	}
	return r, faults.err()
}

// maxLimit is the maximum of the query parameter limit.
const maxLimit = 1000

// postContract stores a new contract. With an Idempotency-Key that the client has used in the last
// 24 hours, it returns the first response again and stores nothing.
func (a *api) postContract(x *exchange, t target) (response, error) {
	if err := checkMediaType(x.r.Header, jsonType); err != nil {
		return response{}, err
	}
	key, err := parseIdempotencyKey(x.r.Header)
	if err != nil {
		return response{}, err
	}
	if key != "" {
		done, ok := a.inFlight.begin(string(t.Org+"/"+t.User+"/") + t.client + "\x00" + key)
		if !ok {
			return response{}, newProblem(http.StatusConflict, "A request with this Idempotency-Key is still in progress; send this one again when it has ended.").with("Retry-After", retryAfter)
		}
		defer done()
	}
	body, err := x.body(a.maxBody)
	if err != nil {
		return response{}, err
	}
	c, err := a.validator.Contract(body)
	if err != nil {
		return response{}, err
	}
	t.Contract = newID()
	doc, err := c.encode(t.Contract)
	if err != nil {
		return response{}, err
	}
	var once *Idempotency
	if key != "" {
		once = &Idempotency{Client: t.client, Key: key, Body: hashOf(body)}
	}
	created, err := a.store.Create(t.Key, doc, once)
	if err != nil {
		return response{}, err
	}
	// The vendor's specification has 200 here, where 201 would be usual.
	return response{status: http.StatusOK, etag: etag(created.Version), location: "energy-contracts/" + string(created.ID), content: created.Document}, nil
}

// putContract replaces a contract. With If-None-Match: * it creates the contract under the id in
// the path, and responds with a 201. Without it, a contract that does not exist is a 404.
func (a *api) putContract(x *exchange, t target) (response, error) {
	body, err := a.content(x, jsonType)
	if err != nil {
		return response{}, err
	}
	c, err := a.validator.Contract(body)
	if err != nil {
		return response{}, err
	}
	pre, err := parsePreconditions(x.r.Header)
	if err != nil {
		return response{}, err
	}
	doc, err := c.encode(t.Contract)
	if err != nil {
		return response{}, err
	}
	created := false
	version, err := a.store.Put(t.Key, doc, func(current Version, exists bool) error {
		if err := pre.check(current, exists); err != nil {
			return err
		}
		created = !exists
		if created && !pre.ifNoneMatch.any {
			return ErrNotFound
		}
		return nil
	})
	switch {
	case err != nil:
		return response{}, err
	case created:
		return response{status: http.StatusCreated, etag: etag(version), location: string(t.Contract), content: doc}, nil
	}
	return response{status: http.StatusOK, etag: etag(version), content: doc}, nil
}

// errChanged is returned by the condition of a patch when another request changed the contract
// after it was read.
var errChanged = errors.New("changed meanwhile")

// patchContract applies a JSON Merge Patch (RFC 7396) to a contract. It computes the patched
// document outside of the store's transaction, and starts again with a fresh copy if another
// request changed the contract in between. The preconditions are checked against each copy.
func (a *api) patchContract(x *exchange, t target) (response, error) {
	body, err := a.content(x, mergePatchType, jsonType)
	if err != nil {
		return response{}, err
	}
	if err := a.validator.Patch(body); err != nil {
		return response{}, err
	}
	pre, err := parsePreconditions(x.r.Header)
	if err != nil {
		return response{}, err
	}
	buf := buffers.Get().(*buffer)
	defer buf.free()
	for {
		var version Version
		buf.b, version, err = a.store.Get(buf.b[:0], t.Key, pre.check)
		buf.fit()
		if err == nil {
			err = x.hold(cap(body)+cap(buf.b), madeOfBody)
		}
		if err != nil {
			return response{}, err
		}
		c, err := parseDocument(buf.b)
		if err != nil {
			return response{}, err
		}
		if c, err = a.validator.Patched(*c, body); err != nil {
			return response{}, err
		}
		doc, err := c.encode(t.Contract)
		if err != nil {
			return response{}, err
		}
		patched, err := a.store.Put(t.Key, doc, func(current Version, exists bool) error {
			if !exists || current != version {
				return errChanged
			}
			return nil
		})
		switch {
		case err == nil:
			return response{status: http.StatusOK, etag: etag(patched), content: doc}, nil
		case !errors.Is(err, errChanged):
			return response{}, err
		}
	}
}

// deleteContract deletes a contract.
func (a *api) deleteContract(x *exchange, t target) (response, error) {
	pre, err := parsePreconditions(x.r.Header)
	if err != nil {
		return response{}, err
	}
	err = a.store.Delete(t.Key, func(current Version, exists bool) error {
		if err := pre.check(current, exists); err != nil {
			return err
		}
		if !exists {
			return ErrNotFound
		}
		return nil
	})
	return response{status: http.StatusNoContent}, err
}

// getHealth responds with a 200 as long as the process serves requests. It does not use the store.
func (a *api) getHealth(*exchange) (response, error) {
	return response{status: http.StatusOK, content: []byte(`{"status":"ok"}`)}, nil
}

// getReady responds with a 200 if the store accepts writes, else with a 503.
func (a *api) getReady(x *exchange) (response, error) {
	return response{status: http.StatusOK, content: []byte(`{"status":"ready"}`)}, a.store.Ready()
}

// content checks the media type of a request and reads its body.
func (a *api) content(x *exchange, mediaTypes ...string) ([]byte, error) {
	if err := checkMediaType(x.r.Header, mediaTypes...); err != nil {
		return nil, err
	}
	return x.body(a.maxBody)
}

// charsets are the values of the parameter charset that stand for UTF-8, or for a part of it. The
// parameter has no meaning for JSON (RFC 8259 §11), but many clients send it.
var charsets = []string{"", "utf-8", "utf8", "us-ascii"}

// checkMediaType returns a *malformed if there are several media types, and a 415 unless the content
// is of one of those in want, in UTF-8 and without a content coding.
func checkMediaType(h http.Header, want ...string) error {
	if err := checkOnce(h, "Content-Type"); err != nil {
		return err
	}
	got := h.Get("Content-Type")
	media, params, err := mime.ParseMediaType(got)
	if err != nil || !slices.Contains(want, media) || !slices.Contains(charsets, strings.ToLower(params["charset"])) {
		sent := "missing"
		if got != "" {
			sent = quoted(got)
		}
		p := newProblem(http.StatusUnsupportedMediaType, "Content-Type must be "+strings.Join(want, " or ")+" in UTF-8, is "+sent+".")
		if want[0] == mergePatchType {
			return p.with("Accept-Patch", mergePatchType) // RFC 5789 §2.2
		}
		return p
	}
	return checkCoding(h)
}

// The patterns of the contract endpoints, in the syntax of httprouter.
const (
	contractsPath = "/api/partners/v2.0/org/:org_id/users/:user_id/energy-contracts"
	contractPath  = contractsPath + "/:energy_contract_id"
)
