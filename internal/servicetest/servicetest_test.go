package servicetest

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
)

// Each of these responses is valid except for one fault, which must be found.
func TestAnswerThatIsNotAsDescribedIsFound(t *testing.T) {
	contract := ContractsURL("", DemoOrg, DemoUser) + "/" + DemoContract
	const right = `{"energy_contract_type":null,"energy_prices":[],"id":"3c90c3cc-0d44-4b50-8888-8dd25736052a","building":null,"meter_id":null,"supplier":null,"currency_energy_price":null,"energy_price_includes_external_components":null}`
	for _, tt := range []struct {
		name         string
		method, path string
		sent         string
		status       int
		header       [2]string // one that is other
		content      string
		want         string // "" is right
	}{
		{"nothing", "PUT", contract, `{}`, 200, [2]string{}, right, ""},
		{"the path", "PUT", contract + "/prices", `{}`, 200, [2]string{}, right, "the path is not described"},
		{"the method", "POST", contract, `{}`, 200, [2]string{}, right, "the method is not described"},
		{"the status", "PUT", contract, `{}`, 202, [2]string{}, right, "the status is not described"},
		{"a field more", "PUT", contract, `{}`, 200, [2]string{"X-Powered-By", "Go"}, right, "the field X-Powered-By is not described"},
		{"a field less", "PUT", contract, `{}`, 200, [2]string{"ETag", ""}, right, "the field ETag is missing"},
		{"a field less of a HEAD", "HEAD", contract, "", 200, [2]string{"ETag", ""}, "", "the field ETag is missing"},
		{"a field less of a 304", "GET", contract, "", 304, [2]string{"ETag", ""}, "", "the field ETag is missing"},
		{"a field's value", "PUT", contract, `{}`, 200, [2]string{"ETag", "weak"}, right, `"ETag" doesn't match schema`},
		{"the media type", "PUT", contract, `{}`, 200, [2]string{"Content-Type", "text/plain"}, right, "Content-Type text/plain is not described"},
		{"a member more", "PUT", contract, `{}`, 200, [2]string{}, strings.Replace(right, "{", `{"version":1,`, 1), `property "version" is unsupported`},
		{"a member less", "PUT", contract, `{}`, 200, [2]string{}, strings.Replace(right, `"meter_id":null,`, "", 1), `property "meter_id" is missing`},
		{"a member's type", "PUT", contract, `{}`, 200, [2]string{}, strings.Replace(right, `[]`, "null", 1), "energy_prices"},
		{"an id that is none", "PUT", contract, `{}`, 200, [2]string{}, strings.Replace(right, `"id":"3`, `"id":"`, 1), "uuid"},
		{"a request that should be refused", "PUT", contract, `{"meter_id":"12345678901234567890"}`, 200, [2]string{}, right, "the service takes a request that is not described"},
		{"a price without its currency", "PUT", contract, `{"energy_contract_type":"spot_hourly","energy_prices":[{"price":1}]}`, 200, [2]string{}, right, "the service takes a request that is not described"},
		{"prices without their time", "PUT", contract, `{"energy_prices":[{"price":1},{"price":2}]}`, 200, [2]string{}, right, "the service takes a request that is not described"},
		{"a refusal that is no problem document", "GET", contract, "", 404, [2]string{"Content-Type", "application/problem+json"}, `{"error":"not found"}`, "doesn't match schema"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := http.NewRequest(tt.method, "http://service.example"+tt.path, strings.NewReader(tt.sent))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Content-Type", "application/json")
			resp := &http.Response{StatusCode: tt.status, Header: http.Header{
				"X-Request-Id": {"0b5c1f6e-9d3a-4c1e-8f27-5a6d4b3c2e10"}, "X-Content-Type-Options": {"nosniff"},
			}}
			if tt.status < 400 {
				resp.Header["Content-Type"], resp.Header["Etag"] = []string{"application/json"}, []string{`"0123456789abcdef0123456789abcdef"`}
			}
			switch name, value := tt.header[0], tt.header[1]; {
			case value != "":
				resp.Header.Set(name, value)
			case name != "":
				resp.Header.Del(name)
			}
			if tt.status == 304 {
				resp.Header.Del("Content-Type")
			}
			_, err = Described().check(r, resp, []byte(tt.content))
			if is := fmt.Sprint(err); tt.want == "" && err != nil || !strings.Contains(is, tt.want) {
				t.Errorf("got %v\nwant %s", err, tt.want)
			}
		})
	}
}

func TestSecretIsFoundWhereverItStands(t *testing.T) {
	const secret = "uFZr3Ck9-Qw1YxV7n_T0dLmE5sHbJ2gPa8RfoXiK4tc"
	s := &Secrets{long: map[string]struct{}{}}
	s.Add("header.claims." + secret)
	s.Add("a-secret")
	for text, want := range map[string]int{
		"": 0, secret: 1, "token=" + secret + "&": 1, "x" + secret + "y" + secret: 2, secret[1:]: 0,
		"\x00\x01" + secret + "\xff": 1, "my a-secret": 1, strings.ToUpper(secret): 0,
	} {
		if got := s.in(text); len(got) != want {
			t.Errorf("in %q: %q, want %d", text, got, want)
		}
	}
}
