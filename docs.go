package main

// The OpenAPI description and the page that shows it: OpenAPI 3.1 and Swagger UI, served
// from the binary alone.

import (
	"embed"
	"errors"
	"io/fs"
	"net/http"
	"sync"

	"github.com/swaggest/swgui/v5/static"
)

const (
	openAPIPath = "/api/partners/v2.0/openapi.json"
	docsPath    = "/api/partners/v2.0/docs"
)

//go:embed openapi.json docspage
var docsFS embed.FS

// pagePolicy lets the page run and load what this service serves, and nothing else;
// the icons of Swagger UI's style sheet are data: URLs.
const pagePolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; " +
	"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// file is a file of the binary that is served as it is.
type docsFile struct {
	path        string
	contentType string
	header      [2]string // one field more, name and value, or empty
	// read returns the content and its version. The first call reads the file: a start
	// need not wait for that.
	read func() ([]byte, Version)
}

// docsFiles are the description, the page, and what the page loads.
func docsFiles() []*docsFile {
	page := [2]string{"Content-Security-Policy", pagePolicy}
	// Sent as they are stored, without a look at Accept-Encoding: each browser takes
	// gzip, and a client that says nothing takes anything (RFC 9110 §12.5.3).
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
		{openAPIPath, docsFS, "openapi.json", "application/json", [2]string{}},
		{docsPath, docsFS, "docspage/page.html", "text/html; charset=utf-8", page},
		{docsPath + "/page.js", docsFS, "docspage/page.js", script, [2]string{}},
		{docsPath + "/page.css", docsFS, "docspage/page.css", style, [2]string{}},
		{docsPath + "/swagger-ui-bundle.js", static.FS, "swagger-ui-bundle.js.gz", script, compressed},
		{docsPath + "/swagger-ui.css", static.FS, "swagger-ui.css.gz", style, compressed},
		{docsPath + "/favicon.png", static.FS, "favicon-32x32.png", "image/png", [2]string{}},
	} {
		files = append(files, &docsFile{f.path, f.contentType, f.header, sync.OnceValues(func() ([]byte, Version) {
			content, _ := f.from.ReadFile(f.name) // part of the binary, as a test knows
			return content, Version(checksum(nil, content))
		})})
	}
	return files
}

func (f *docsFile) get(x *exchange) (response, error) {
	pre, err := parsePreconditions(x.r.Header)
	if err != nil {
		return response{}, err
	}
	content, version := f.read()
	switch err := pre.check(version, true); {
	case errors.Is(err, errNoneMatch):
		return response{status: http.StatusNotModified, etag: etag(version)}, nil
	case err != nil:
		return response{}, newProblem(http.StatusPreconditionFailed, "The file is not the one that If-Match names; get it without.")
	}
	return response{status: http.StatusOK, contentType: f.contentType, etag: etag(version), header: f.header, content: content}, nil
}

// getRoot leads a person who opens the service in a browser to the page.
func getRoot(*exchange) (response, error) {
	return response{status: http.StatusFound, location: docsPath}, nil
}
