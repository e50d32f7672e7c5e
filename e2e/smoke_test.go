package e2e

import (
	"net/http"
	"strings"
	"testing"
)

// TestServiceRespondsAndSurvivesAKill sends the two requests of the README, kills the process and
// checks the contract after a restart. It is quick, so that it also runs under -short.
func TestServiceRespondsAndSurvivesAKill(t *testing.T) {
	db := shortPath(t)
	p := startProcess(t, nil, "--demo", "--db", db)
	form := http.Header{"Content-Type": {"application/x-www-form-urlencoded"}, "Authorization": {"Basic ZGVtbzpkZW1vLXNlY3JldA=="}}
	resp, got := do(t, http.DefaultClient, "POST", p.URL+"/oauth2/token/", form, "grant_type=client_credentials")
	_, bearer, _ := strings.Cut(got, `"access_token":"`)
	bearer, _, _ = strings.Cut(bearer, `"`)
	if resp.StatusCode != http.StatusOK || bearer == "" {
		t.Fatalf("%s\n%s", resp.Status, got)
	}
	contract := contractsURL("", demoOrg, demoUser) + "/" + demoContract
	header := with(jsonBody, "Authorization", "Bearer "+bearer)
	resp, put := do(t, http.DefaultClient, "PUT", p.URL+contract, header, readFile(t, "../testdata/seed.request.json"))
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("%s\n%s", resp.Status, put)
	}
	p.Kill(t)
	checkFileSound(t, db)
	p = startProcess(t, nil, "--db", db)
	if resp, got := do(t, http.DefaultClient, "GET", p.URL+contract, header, ""); resp.StatusCode != http.StatusOK || got != put {
		t.Errorf("after the kill: %s\n%s\nwant\n%s", resp.Status, got, put)
	}
	if err := p.Terminate(t); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, p.Stderr)
	}
}
