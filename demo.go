package main

// The demo data: clients of two organizations, with published secrets, and some contracts.

import (
	_ "embed"
	"errors"
	"fmt"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// demoJSON is the demo data as JSON.
//
//go:embed testdata/demo.json
var demoJSON []byte

// demoData is the content of testdata/demo.json. Clients may rely on it, so it must not
// change.
type demoData struct {
	Clients []struct {
		ID     string `json:"client_id"`
		Secret string `json:"client_secret"`
		Org    ID     `json:"org_id"`
		Scopes Scopes `json:"scope"`
	} `json:"clients"`
	Contracts []struct {
		Org      ID             `json:"org_id"`
		User     ID             `json:"user_id"`
		ID       ID             `json:"id"`
		Contract jsontext.Value `json:"contract"` // as a client sends it
	} `json:"contracts"`
}

// readDemo decodes the demo data.
func readDemo() (d demoData, err error) {
	if err := json.Unmarshal(demoJSON, &d, json.RejectUnknownMembers(true)); err != nil {
		return d, fmt.Errorf("read demo data: %w", err)
	}
	return d, nil
}

// loadDemo stores the demo data. It returns ErrHadSamples if the store has ever had it.
func loadDemo(store *Store, now time.Time) error {
	d, err := readDemo()
	if err != nil {
		return err
	}
	v, err := newValidator()
	if err != nil {
		return err
	}
	samples := Samples{Documents: make(map[Key][]byte)}
	for _, c := range d.Clients {
		samples.Clients = append(samples.Clients, Client{ID: c.ID, Org: c.Org, Scopes: c.Scopes, Secret: hashOf(c.Secret), Created: now})
	}
	for _, s := range d.Contracts {
		c, err := v.Contract(s.Contract)
		if err != nil {
			return fmt.Errorf("demo contract %s: %w", s.ID, err)
		}
		doc, err := c.encode(s.ID)
		if err != nil {
			return fmt.Errorf("demo contract %s: %w", s.ID, err)
		}
		samples.Documents[Key{Owner{s.Org, s.User}, s.ID}] = doc
	}
	if err := store.AddSamples(samples); err != nil {
		return fmt.Errorf("store demo data: %w", err)
	}
	return nil
}

// demoClients returns the ids of the demo clients that still accept their published secrets.
func demoClients(store *Store, now time.Time) (ids []string, err error) {
	d, err := readDemo()
	if err != nil {
		return nil, err
	}
	for _, c := range d.Clients {
		stored, err := store.Client(c.ID)
		switch {
		case errors.Is(err, ErrNotFound):
		case err != nil:
			return nil, err
		case stored.HasSecret(hashOf(c.Secret), now):
			ids = append(ids, c.ID)
		}
	}
	return ids, nil
}

// publishedSecrets returns the hashes of the secrets in the demo data, which everyone knows.
func publishedSecrets() (secrets []Hash, err error) {
	d, err := readDemo()
	for _, c := range d.Clients {
		secrets = append(secrets, hashOf(c.Secret))
	}
	return secrets, err
}

// demoClient is the client whose published secret demoCommands has.
const demoClient = "demo"

// demoCommands returns the text that --demo prints: two commands for a POSIX shell, the
// second of which is the example of the vendor's documentation. The README shows both.
func demoCommands(origin string) string {
	return fmt.Sprintf(`The demo data is loaded. To try the API in a browser, open %[1]s/ and press
Authorize (client demo, secret demo-secret). To try it in another terminal, get a token:

TOKEN=$(curl --silent --user demo:demo-secret --data grant_type=client_credentials \
  --url %[1]s/oauth2/token/ | sed 's/.*"access_token":"\([^"]*\)".*/\1/')

Then update an energy contract:

curl --request PUT \
  --url %[1]s/api/partners/v2.0/org/5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11/users/016b78a7-0c7c-4241-a277-015c3ad3cb90/energy-contracts/3c90c3cc-0d44-4b50-8888-8dd25736052a \
  --header "Authorization: Bearer $TOKEN" \
  --header 'Content-Type: application/json' \
  --data '
{
  "energy_contract_type": "spot_hourly",
  "energy_prices": [
    {"price": 0.2134, "timestamp": "2026-11-23T17:00:00+01:00"},
    {"price": 0.1875, "timestamp": "2026-11-23T18:00:00+01:00"}
  ],
  "building_id": "8d6f2f4a-51c6-4a0b-9d3e-6b1f0c7a2e94",
  "meter_id": "735999102100010234",
  "supplier": "Nordlys Energi AB",
  "currency_energy_price": "EUR",
  "energy_price_includes_external_components": true
}
'

`, origin)
}
