// Client does with energy contracts what a partner does, by a client that
// oapi-codegen generates from the service's openapi.json (as api.gen.go, by the
// test), and by tokens that golang.org/x/oauth2 gets. The argument is the service.
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"

	"github.com/google/uuid"
	"golang.org/x/oauth2/clientcredentials"
)

// The demo data.
var (
	org      = uuid.MustParse("5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11")
	user     = uuid.MustParse("016b78a7-0c7c-4241-a277-015c3ad3cb90")
	contract = uuid.MustParse("3c90c3cc-0d44-4b50-8888-8dd25736052a")
)

func main() {
	if err := use(context.Background(), os.Args[1]); err != nil {
		log.Fatal(err)
	}
	fmt.Println("ok")
}

func use(ctx context.Context, service string) error {
	tokens := clientcredentials.Config{ClientID: "demo", ClientSecret: "demo-secret", TokenURL: service + "/oauth2/token/", Scopes: []string{"read", "write"}}
	api, err := NewClientWithResponses(service, WithHTTPClient(tokens.Client(ctx)))
	if err != nil {
		return err
	}

	list, err := api.ListEnergyContractsWithResponse(ctx, org, user, &ListEnergyContractsParams{Limit: new(Limit(2))})
	if err := expect("list", list, err, http.StatusOK); err != nil {
		return err
	}
	if list.JSON200 == nil || len(*list.JSON200) != 2 || list.HTTPResponse.Header.Get("Link") == "" {
		return fmt.Errorf("list: %s", list.Body)
	}

	price := func(price float64, at string) PriceRequest {
		return PriceRequest{Price: price, Timestamp: &at}
	}
	wanted := EnergyContractRequest{
		EnergyContractType:  new(SpotHourly),
		EnergyPrices:        &[]PriceRequest{price(0.2134, "2026-11-23T17:00:00+01:00"), price(-0.0021, "2026-11-23T18:00:00+01:00")},
		CurrencyEnergyPrice: new("EUR"),
		Supplier:            new("Nordlys Energi AB"),
	}
	key := uuid.NewString()
	created, err := api.CreateEnergyContractWithResponse(ctx, org, user, &CreateEnergyContractParams{IdempotencyKey: &key}, wanted)
	if err := expect("create", created, err, http.StatusOK); err != nil {
		return err
	}
	again, err := api.CreateEnergyContractWithResponse(ctx, org, user, &CreateEnergyContractParams{IdempotencyKey: &key}, wanted)
	if err := expect("create again", again, err, http.StatusOK); err != nil {
		return err
	}
	id := created.JSON200.Id
	if again.JSON200.Id != id {
		return fmt.Errorf("the same Idempotency-Key made %s and %s", id, again.JSON200.Id)
	}

	got, err := api.GetEnergyContractWithResponse(ctx, org, user, id, nil)
	if err := expect("get", got, err, http.StatusOK); err != nil {
		return err
	}
	if c := got.JSON200; *c.Supplier != *wanted.Supplier || len(c.EnergyPrices) != 2 || c.EnergyPrices[1].Price != -0.0021 || c.Building != nil {
		return fmt.Errorf("get: %s", got.Body)
	}

	wanted.MeterId = new("735999102100010234")
	etag := got.HTTPResponse.Header.Get("ETag")
	updated, err := api.UpdateEnergyContractWithResponse(ctx, org, user, id, &UpdateEnergyContractParams{IfMatch: &etag}, wanted)
	if err := expect("update", updated, err, http.StatusOK); err != nil {
		return err
	}
	stale, err := api.UpdateEnergyContractWithResponse(ctx, org, user, id, &UpdateEnergyContractParams{IfMatch: &etag}, wanted)
	if err := expect("update with a stale ETag", stale, err, http.StatusPreconditionFailed); err != nil {
		return err
	}
	patched, err := api.PatchEnergyContractWithApplicationMergePatchPlusJSONBodyWithResponse(ctx, org, user, id, nil,
		EnergyContractPatch{Supplier: new("Helios Sähkö Oy")})
	if err := expect("patch", patched, err, http.StatusOK); err != nil {
		return err
	}
	if c := patched.JSON200; *c.Supplier != "Helios Sähkö Oy" || *c.MeterId != *wanted.MeterId {
		return fmt.Errorf("patch: %s", patched.Body)
	}

	// What the description cannot say: two prices for one instant.
	twice := EnergyContractRequest{
		EnergyPrices:        &[]PriceRequest{price(1, "2026-11-23T17:00:00+01:00"), price(2, "2026-11-23T16:00:00Z")},
		CurrencyEnergyPrice: new("EUR"),
	}
	refused, err := api.UpdateEnergyContractWithResponse(ctx, org, user, contract, nil, twice)
	if err := expect("update with two prices for one instant", refused, err, http.StatusUnprocessableEntity); err != nil {
		return err
	}
	if p := refused.ApplicationproblemJSON422; p == nil || p.Errors == nil || *(*p.Errors)[0].Pointer != "#/energy_prices/1/timestamp" {
		return fmt.Errorf("update with two prices for one instant: %s", refused.Body)
	}

	deleted, err := api.DeleteEnergyContractWithResponse(ctx, org, user, id, nil)
	if err := expect("delete", deleted, err, http.StatusNoContent); err != nil {
		return err
	}
	gone, err := api.GetEnergyContractWithResponse(ctx, org, user, id, nil)
	return expect("get what was deleted", gone, err, http.StatusNotFound)
}

// expect is an error unless an answer has a status.
func expect(what string, answer interface {
	StatusCode() int
	GetBody() []byte
}, err error, status int) error {
	switch {
	case err != nil:
		return fmt.Errorf("%s: %w", what, err)
	case answer.StatusCode() != status:
		return fmt.Errorf("%s: status %d, want %d: %s", what, answer.StatusCode(), status, answer.GetBody())
	}
	return nil
}
