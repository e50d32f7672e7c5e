package main

// The demo data: two organizations with published secrets, and some contracts.

import (
	_ "embed"
	"errors"
	"fmt"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

//go:embed testdata/demo.json
var demoJSON []byte

// demoData is testdata/demo.json. Clients may rely on what is in it.
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
		Contract jsontext.Value `json:"contract"` // as a client would send it
	} `json:"contracts"`
}

func readDemo() (d demoData, err error) {
	if err := json.Unmarshal(demoJSON, &d, json.RejectUnknownMembers(true)); err != nil {
		return d, fmt.Errorf("read demo data: %w", err)
	}
	return d, nil
}

// loadDemo stores the demo data, unless it is there already.
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

// hasDemoClient tells whether one of the secrets that everyone knows opens the
// store.
func hasDemoClient(store *Store, now time.Time) (bool, error) {
	d, err := readDemo()
	if err != nil {
		return false, err
	}
	for _, c := range d.Clients {
		stored, err := store.Client(c.ID)
		switch {
		case errors.Is(err, ErrNotFound):
		case err != nil:
			return false, err
		case stored.HasSecret(hashOf(c.Secret), now):
			return true, nil
		}
	}
	return false, nil
}

// demoCommands is what --demo prints: two commands for a POSIX shell, the second
// of them the one of the vendor's page.
func demoCommands(origin string) string {
	return fmt.Sprintf(`The demo data is loaded. Open %[1]s/ in a browser, press Authorize (client demo,
secret demo-secret) and try the API there, or paste these into another terminal: first get a token,

TOKEN=$(curl --silent --user demo:demo-secret --data grant_type=client_credentials \
  --url %[1]s/oauth2/token/ | sed 's/.*"access_token":"\([^"]*\)".*/\1/')

then update an energy contract:

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
