package main

// The contract endpoints and the routes of the API. A handler reads like the
// specification and returns a response or an error.

import (
	"errors"
	"log/slog"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

func newAPI(store *Store, now func() time.Time, log *slog.Logger, settings apiSettings) (*api, error) {
	v, err := newValidator()
	if err != nil {
		return nil, err
	}
	a := &api{
		endpoints:   newEndpoints(log, "There is nothing under this path; contracts are under /api/partners/v2.0/org/{org_id}/users/{user_id}/energy-contracts, and "+docsPath+" describes all."),
		apiSettings: settings, store: store, validator: v, now: now, throttle: newLoginThrottle(),
	}
	a.metrics = newAPIMetrics()
	if len(a.origins) > 0 {
		a.handler = withCORS(a.origins, a.router)
	}
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
		for _, f := range docsFiles() {
			a.public(method, f.path, f.get)
		}
		if a.builtInTokens {
			a.public(method, metadataPath, a.getMetadata)
		}
	}
	if a.builtInTokens {
		for _, slash := range []string{"", "/"} { // httprouter would redirect
			a.public(http.MethodPost, tokenPath+slash, a.postToken)
			a.public(http.MethodPost, revocationPath+slash, a.postRevocation)
		}
	}
	return a, nil
}

// target is what the path of a contract endpoint names, and who asks.
type target struct {
	Key    // Contract is "" for the collection
	client string
}

// contract registers an endpoint that needs a token with a scope.
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
				faults.addParameter(p.Key, err.Error())
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

func (a *api) getContract(x *exchange, t target) (response, error) {
	pre, err := parsePreconditions(x.r.Header)
	if err != nil {
		return response{}, err
	}
	buf := buffers.Get().(*buffer)
	x.pooled = buf
	doc, version, err := a.current(buf, t.Key, pre)
	switch {
	case errors.Is(err, errNoneMatch):
		return response{status: http.StatusNotModified, etag: etag(version)}, nil
	case err != nil:
		return response{}, err
	}
	return response{status: http.StatusOK, etag: etag(version), content: doc}, nil
}

// current gets a contract into buf and checks the preconditions against it.
func (a *api) current(buf *buffer, k Key, pre preconditions) ([]byte, Version, error) {
	doc, version, err := a.store.Get(buf.b[:0], k)
	buf.b = doc
	if err != nil && !errors.Is(err, ErrNotFound) {
		return nil, 0, err
	}
	if failed := pre.check(version, err == nil); failed != nil {
		return nil, version, failed
	}
	return doc, version, err
}

func (a *api) listContracts(x *exchange, t target) (response, error) {
	r, err := parseRange(x.r.URL.RawQuery)
	if err != nil {
		return response{}, err
	}
	buf := buffers.Get().(*buffer)
	x.pooled = buf
	page, err := a.store.List(append(buf.b[:0], '['), t.Owner, r)
	buf.b = page.Documents
	if err != nil {
		return response{}, err
	}
	ans := response{status: http.StatusOK, content: page.Documents}
	if page.Last != "" {
		// A path and query, so that it is right behind any proxy (RFC 8288 §3.1).
		next := url.URL{Path: x.r.URL.Path, RawQuery: url.Values{"after": {string(page.Last)}, "limit": {strconv.Itoa(r.Limit)}}.Encode()}
		ans.link = "<" + next.String() + `>; rel="next"`
	}
	if !page.More {
		buf.b = append(buf.b, ']')
		ans.content = buf.b
		return ans, nil
	}
	ans.more = func(b []byte) ([]byte, error) {
		if !page.More {
			return nil, nil
		}
		page, err = a.store.List(append(b, ','), t.Owner, page.Rest)
		if err != nil {
			return nil, err
		}
		b = page.Documents
		if len(b) == 1 { // the rest was deleted meanwhile
			b = b[:0]
		}
		if !page.More {
			b = append(b, ']')
		}
		return b, nil
	}
	return ans, nil
}

// parseRange reads limit and after. It returns a *malformed or an *invalid.
func parseRange(query string) (r Range, err error) {
	values, err := url.ParseQuery(query)
	if err != nil {
		return r, &malformed{fault{Parameter: "query", Detail: "is not percent-encoded as a URL is"}}
	}
	var faults invalid
	for _, name := range []string{"limit", "after"} {
		switch v := values[name]; {
		case len(v) == 0:
		case len(v) > 1:
			faults.addParameter(name, "appears more than once")
		case name == "limit":
			if r.Limit, err = strconv.Atoi(v[0]); err != nil || r.Limit < 1 || r.Limit > maxLimit {
				faults.addParameter(name, "must be a whole number from 1 to "+strconv.Itoa(maxLimit)+", is "+quoted(v[0]))
			}
		default:
			if r.After, err = parseID(v[0]); err != nil {
				faults.addParameter(name, err.Error())
			}
		}
	}
	return r, faults.err()
}

// maxLimit is the most contracts that a client may ask for at once.
const maxLimit = 1000

func (a *api) postContract(x *exchange, t target) (response, error) {
	if err := checkMediaType(x.r.Header, "application/json"); err != nil {
		return response{}, err
	}
	key, err := parseIdempotencyKey(x.r.Header)
	if err != nil {
		return response{}, err
	}
	if key != "" {
		done, ok := a.inFlight.begin(string(t.Org+"/"+t.User+"/") + t.client + "\x00" + key)
		if !ok {
			return response{}, newProblem(http.StatusConflict, "A request with this Idempotency-Key is still running; send it again when that one is answered.").with("Retry-After", retryAfter)
		}
		defer done()
	}
	body, err := x.body(a.maxBody)
	if err != nil {
		return response{}, err
	}
	defer body.free()
	c, err := a.validator.Contract(body.b)
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
		once = &Idempotency{Client: t.client, Key: key, Body: hashOf(body.b)}
	}
	created, err := a.store.Create(t.Key, doc, once)
	if err != nil {
		return response{}, err
	}
	t.Contract = created.ID
	// The source says 200, where another API would say 201.
	return response{status: http.StatusOK, etag: etag(created.Version), location: location(t.Key), content: created.Document}, nil
}

func (a *api) putContract(x *exchange, t target) (response, error) {
	body, err := a.content(x, "application/json")
	if err != nil {
		return response{}, err
	}
	defer body.free()
	c, err := a.validator.Contract(body.b)
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
		return response{status: http.StatusCreated, etag: etag(version), location: location(t.Key), content: doc}, nil
	}
	return response{status: http.StatusOK, etag: etag(version), content: doc}, nil
}

// errChanged: another write came between reading a contract and patching it.
var errChanged = errors.New("changed meanwhile")

func (a *api) patchContract(x *exchange, t target) (response, error) {
	body, err := a.content(x, mergePatchType)
	if err != nil {
		return response{}, err
	}
	defer body.free()
	if err := a.validator.Patch(body.b); err != nil {
		return response{}, err
	}
	pre, err := parsePreconditions(x.r.Header)
	if err != nil {
		return response{}, err
	}
	buf := buffers.Get().(*buffer)
	defer buf.free()
	for {
		old, version, err := a.current(buf, t.Key, pre)
		if err != nil {
			return response{}, err
		}
		c, err := parseDocument(old)
		if err != nil {
			return response{}, err
		}
		if c, err = a.validator.Patched(*c, body.b); err != nil {
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

func (a *api) getHealth(*exchange) (response, error) {
	return response{status: http.StatusOK, content: []byte(`{"status":"ok"}`)}, nil
}

func (a *api) getReady(x *exchange) (response, error) {
	return response{status: http.StatusOK, content: []byte(`{"status":"ready"}`)}, a.store.Ready()
}

// content reads a body of a media type. The caller frees it.
func (a *api) content(x *exchange, mediaType string) (*buffer, error) {
	if err := checkMediaType(x.r.Header, mediaType); err != nil {
		return nil, err
	}
	return x.body(a.maxBody)
}

func checkMediaType(h http.Header, want string) error {
	is := h.Get("Content-Type")
	media, params, err := mime.ParseMediaType(is)
	charset := params["charset"]
	if err != nil || media != want || charset != "" && !strings.EqualFold(charset, "utf-8") {
		sent := "missing"
		if is != "" {
			sent = quoted(is)
		}
		p := newProblem(http.StatusUnsupportedMediaType, "Content-Type must be "+want+" in UTF-8, is "+sent+".")
		if want == mergePatchType {
			return p.with("Accept-Patch", mergePatchType) // RFC 5789 §2.2
		}
		return p
	}
	if coding := h.Get("Content-Encoding"); coding != "" && !strings.EqualFold(coding, "identity") {
		return newProblem(http.StatusUnsupportedMediaType, "Content-Encoding must be identity, is "+quoted(coding)+".").
			with("Accept-Encoding", "identity") // RFC 9110 §12.5.3
	}
	return nil
}

// location is the path of a contract.
func location(k Key) string {
	return strings.NewReplacer(":org_id", string(k.Org), ":user_id", string(k.User), ":energy_contract_id", string(k.Contract)).Replace(contractPath)
}

const (
	contractsPath = "/api/partners/v2.0/org/:org_id/users/:user_id/energy-contracts"
	contractPath  = contractsPath + "/:energy_contract_id"
)
