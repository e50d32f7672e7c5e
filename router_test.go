package main

// Requests that no HTTP library sends, as far as the router decides about them.

import (
	"io"
	"net"
	"regexp"
	"strings"
	"testing"
)

// exchanged sends a request as it is and returns the whole response, without what differs each time.
func exchanged(t *testing.T, base, request string) string {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.WriteString(conn, request+" HTTP/1.1\r\nHost: energy.test\r\nConnection: close\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	response, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`(?m)^(Date|X-Request-Id): .*\r\n`).ReplaceAllString(string(response), "")
}

// A URL such as http://energy.test has no path; it stands for / or, with OPTIONS, for the server.
func TestURLWithoutAPathIsTheRootOrTheServer(t *testing.T) {
	s := start(t, "--demo")
	const always = "X-Content-Type-Options: nosniff\r\nConnection: close\r\n"
	root := "HTTP/1.1 302 Found\r\nContent-Length: 0\r\nLocation: api/partners/v2.0/docs\r\n" + always + "\r\n"
	server := "HTTP/1.1 204 No Content\r\nAccept-Patch: application/merge-patch+json\r\nAllow: DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT\r\n" + always + "\r\n"
	ofRoot := "HTTP/1.1 204 No Content\r\nAllow: GET, HEAD, OPTIONS\r\n" + always + "\r\n"
	for _, tt := range []struct{ request, want string }{
		{"GET /", root},
		{"GET http://energy.test/", root},
		{"GET http://energy.test", root},
		{"GET http://energy.test?x", root},
		{"GET https://energy.test:8443", root},
		{"HEAD http://energy.test", root},
		{"OPTIONS *", server},
		{"OPTIONS http://energy.test", server},
		{"OPTIONS http://energy.test/", ofRoot},
		{"OPTIONS http://energy.test?x", ofRoot}, // RFC 9112 §3.2.4: only without a query
		{"OPTIONS /", ofRoot},
	} {
		t.Run(tt.request, func(t *testing.T) {
			if got := exchanged(t, s.url, tt.request); got != tt.want {
				t.Errorf("got\n%s\nwant\n%s", got, tt.want)
			}
		})
	}
	for _, request := range []string{"DELETE http://energy.test", "POST http://energy.test"} {
		t.Run(request, func(t *testing.T) {
			got := exchanged(t, s.url, request)
			if !strings.HasPrefix(got, "HTTP/1.1 405 Method Not Allowed\r\n") || !strings.Contains(got, "\r\nAllow: GET, HEAD, OPTIONS\r\n") {
				t.Errorf("got\n%s", got)
			}
		})
	}
	s.stop()
	for line, want := range map[string]int{`msg=request method=OPTIONS route="" status=204`: 5, "msg=request method=GET route=/ status=302": 5} {
		if n := strings.Count(s.log.String(), line); n != want {
			t.Errorf("the log has %q %d times, want %d\n%s", line, n, want, s.log)
		}
	}
}
