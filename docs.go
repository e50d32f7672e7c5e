package main

// The OpenAPI 3.1 description of the API, and a page that shows it with Swagger UI. All
// files are embedded in the binary; the page loads nothing from other sites.

import (
	"bytes"
	"embed"
	"errors"
	"io/fs"
	"net/http"
	"sync"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/swaggest/swgui/v5/static"
)

// The paths of the OpenAPI description and of the page that shows it.
const (
	openAPIPath = "/api/partners/v2.0/openapi.json"
	docsPath    = "/api/partners/v2.0/docs"
)

// openAPI is the description of a service at describedURL.
//
//go:embed openapi.json
var openAPI []byte

// describedURL is where openapi.json has the service: at the default address. Nothing else in
// the file may contain this text, since getOpenAPI replaces it.
const describedURL = "http://127.0.0.1:8080"

// openAPIParts returns the parts of openAPI between the places of describedURL.
var openAPIParts = sync.OnceValue(func() [][]byte { return bytes.Split(openAPI, []byte(describedURL)) })

// openAPIVersion returns the version of openAPI. The first call computes it.
var openAPIVersion = sync.OnceValue(func() Version { return versionOf(openAPI) })

// docsFS holds the files of this repository that docsFiles serves; those of Swagger UI come
// from its package.
//
//go:embed docspage
var docsFS embed.FS

// pagePolicy is the Content-Security-Policy of the page: the browser loads scripts, styles
// and data only from this service, and shows the page in no frame. Images may be data:
// URLs too, since the icons in Swagger UI's style sheet are.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; " +
	"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// docsFile is an embedded file that is served unchanged.
type docsFile struct {
	path        string
	contentType string
	header      [2]string // name and value of one more header field, or empty
	// read returns the content and its version. The first call reads the file and computes
	// the version, so that the start of the server does not wait for that.
	read func() ([]byte, Version)
}

// docsFiles returns the page and the files that it loads.
func docsFiles() []*docsFile {
	page := [2]string{"Content-Security-Policy", pagePolicy}
	// Swagger UI is stored compressed and sent like that, whatever Accept-Encoding has:
	// every browser accepts gzip, and a request without Accept-Encoding accepts any coding
	// (RFC 9110 §12.5.3).
	compressed := [2]string{"Content-Encoding", "gzip"}
	const script, style = "text/javascript; charset=utf-8", "text/css; charset=utf-8"
	var files []*docsFile
	for _, f := range []struct {
		path        string
		from        fs.ReadFileFS
		name        string
		contentType string
		header      [2]string
	}{
		{docsPath, docsFS, "docspage/page.html", "text/html; charset=utf-8", page},
		{docsPath + "/page.js", docsFS, "docspage/page.js", script, [2]string{}},
		{docsPath + "/page.css", docsFS, "docspage/page.css", style, [2]string{}},
		{docsPath + "/swagger-ui-bundle.js", static.FS, "swagger-ui-bundle.js.gz", script, compressed},
		{docsPath + "/swagger-ui.css", static.FS, "swagger-ui.css.gz", style, compressed},
		{docsPath + "/favicon.png", static.FS, "favicon-32x32.png", "image/png", [2]string{}},
	} {
		files = append(files, &docsFile{f.path, f.contentType, f.header, sync.OnceValues(func() ([]byte, Version) {
			content, _ := f.from.ReadFile(f.name) // cannot fail: it is embedded, and a test gets each file
			return content, versionOf(content)
		})})
	}
	return files
}

// get responds with the file.
func (f *docsFile) get(x *exchange) (response, error) {
	content, version := f.read()
	return ifPreconditions(x, version, response{status: http.StatusOK, contentType: f.contentType, header: f.header, content: content})
}

// getOpenAPI responds with the description. Its URLs are absolute, since many programs that
// import a description cannot resolve others, and begin with the base URL of the service. It is not
// put together in memory, which anybody could make the service hold by reading it slowly.
func (a *api) getOpenAPI(x *exchange) (response, error) {
	base, err := a.baseURL(x.r)
	if err != nil {
		return response{}, err
	}
	inJSON, err := jsontext.AppendQuote(nil, base)
	if err != nil {
		return response{}, err
	}
	parts := openAPIParts()
	resp := response{status: http.StatusOK, content: parts[0], size: int64(len(parts[0]))}
	var rest [][]byte
	for _, part := range parts[1:] {
		url := inJSON[1 : len(inJSON)-1]
		rest = append(rest, url, part)
		resp.size += int64(len(url) + len(part))
	}
	resp.more = func([]byte) (next []byte, _ error) {
		if len(rest) > 0 {
			next, rest = rest[0], rest[1:]
		}
		return next, nil
	}
	// The content depends only on the program and on the base URL.
	program := openAPIVersion()
	return ifPreconditions(x, versionOf(append(program[:], base...)), resp)
}

// ifPreconditions returns resp, the response with a version of a file, subject to the
// preconditions of the request (RFC 9110 §13).
func ifPreconditions(x *exchange, version Version, resp response) (response, error) {
	pre, err := parsePreconditions(x.r.Header)
	if err != nil {
		return response{}, err
	}
	resp.etag = etag(version)
	switch err := pre.check(version, true); {
	case errors.Is(err, errNoneMatch):
		return response{status: http.StatusNotModified, etag: resp.etag}, nil
	case errors.Is(err, errAlteredTag):
		return response{}, err
	case err != nil:
		return response{}, newProblem(http.StatusPreconditionFailed, "The file does not have the version that If-Match names; send the request without If-Match.")
	}
	return resp, nil
}

// getRoot redirects a person who opens the root of the service in a browser to the page.
func getRoot(*exchange) (response, error) {
	return response{status: http.StatusFound, location: docsPath[1:]}, nil
}
