package main

// The control socket, over which a command reaches the server that has the database
// open: its path, and the format of requests and responses.

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/go-json-experiment/json"
)

// controlPath returns the path of the control socket of a database file. Symbolic links
// to the file are followed, so that all paths of a file have the same socket.
func controlPath(db string) string {
	path := withoutLinks(db)
	if absolute, err := filepath.Abs(path); err == nil {
		path = absolute
	}
	return path + ".sock"
}

// maxSocketPath is the number of bytes of a path that fit into the address of a socket: 107
// on Linux, 103 on macOS and the BSDs.
const maxSocketPath = len(syscall.RawSockaddrUnix{}.Path) - 1

// atSocket calls listenOrDial with an address of the socket at path. If the path is too long for
// an address, the address leads through a temporary link to the directory of the socket.
func atSocket(path string, listenOrDial func(address string) error) error {
	address := path
	if len(path) > maxSocketPath {
		dir, err := os.MkdirTemp("", "ec-")
		link := filepath.Join(dir, "d")
		if err == nil {
			defer os.RemoveAll(dir)
			err = os.Symlink(filepath.Dir(path), link)
		}
		if err != nil {
			// Not wrapped: the error is not one of the socket.
			return fmt.Errorf("%s: the path has more than the %d bytes of a socket's address, and a shorter link cannot be made: %s", path, maxSocketPath, err.Error())
		}
		address = filepath.Join(link, filepath.Base(path))
	}
	if len(address) > maxSocketPath {
		return fmt.Errorf("%s: the path is too long for a socket's address, which has at most %d bytes, also through a link; use a shorter name for the database, or a shorter directory for temporary files (TMPDIR)", path, maxSocketPath)
	}
	err := listenOrDial(address)
	var at *net.OpError
	if errors.As(err, &at) { // it names the address
		err = at.Err
	}
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// maxControlBody is the maximum size of a request body on the control socket, in bytes. It
// does not apply to an import.
const maxControlBody = 64 << 10

// readControl decodes the JSON body of a command's request into out.
func readControl(x *exchange, out any) error {
	body, err := x.body(maxControlBody)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(body, out, json.RejectUnknownMembers(true)); err != nil {
		return errUnreadable
	}
	return nil
}

// errUnreadable is returned for a request that no command of this version sends.
var errUnreadable = newProblem(http.StatusBadRequest, "The server cannot read this request; use a command of the same version as the server.")

// readQuery returns the query parameters of a command's request, each of which must be one of
// names and appear once. An unknown one could select what the server then does not.
func readQuery(x *exchange, names ...string) (url.Values, error) {
	query, err := url.ParseQuery(x.r.URL.RawQuery)
	if err != nil {
		return nil, errUnreadable
	}
	for name, values := range query {
		if len(values) > 1 || !slices.Contains(names, name) {
			return nil, errUnreadable
		}
	}
	return query, nil
}

// withDetail returns a problem whose detail is the text of err. The API would keep this text
// for the log, but every user of the socket may read the log. The errors of a canceled request
// and of a write without a known outcome are returned unchanged: they end the connection
// without a response.
func withDetail(err error) error {
	if errors.Is(err, context.Canceled) || errors.Is(err, ErrClosed) || errors.Is(err, ErrUnknown) {
		return err
	}
	p := *problemOf(err)
	p.Detail = err.Error()
	return &p
}

// controlResponse returns a response with content as JSON.
func controlResponse(content any) (response, error) {
	b, err := json.Marshal(content)
	return response{status: http.StatusOK, noStore: true, content: b}, err
}

// jsonLinesType is the media type of JSON Lines. It is in common use but not registered.
const jsonLinesType = "application/jsonl"
