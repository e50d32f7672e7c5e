// Client gets, creates, updates, patches and deletes a contract, by a client that ogen generates
// from the service's openapi.json (as the package api, by the test). The argument is the service.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"reflect"
	"time"

	"github.com/google/uuid"
	"github.com/ogen-go/ogen/ogenerrors"

	"client/api"
)

// The demo data.
var (
	org      = uuid.MustParse("5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11")
	user     = uuid.MustParse("016b78a7-0c7c-4241-a277-015c3ad3cb90")
	contract = uuid.MustParse("3c90c3cc-0d44-4b50-8888-8dd25736052a")
)

// demo is the demo client, and its token once it has one.
type demo struct{ token string }

func (demo) Basic(context.Context, api.OperationName) (api.Basic, error) {
	return api.Basic{Username: "demo", Password: "demo-secret"}, nil
}

func (d *demo) ClientCredentials(context.Context, api.OperationName) (api.ClientCredentials, error) {
	return api.ClientCredentials{Token: d.token}, nil
}

func (demo) Bearer(context.Context, api.OperationName) (api.Bearer, error) {
	return api.Bearer{}, ogenerrors.ErrSkipClientSecurity
}

func main() {
	if err := use(context.Background(), os.Args[1]); err != nil {
		log.Fatal(err)
	}
	fmt.Println("ok")
}

func use(ctx context.Context, service string) error {
	as := &demo{}
	client, err := api.NewClient(service, as)
	if err != nil {
		return err
	}
	issued, err := client.IssueToken(ctx, &api.IssueTokenApplicationXWwwFormUrlencoded{GrantType: api.TokenRequestGrantTypeClientCredentials})
	if err != nil {
		return err
	}
	token, err := content[api.Token](issued)
	if err != nil {
		return err
	}
	as.token = token.AccessToken

	got, err := client.GetEnergyContract(ctx, api.GetEnergyContractParams{OrgID: org, UserID: user, EnergyContractID: contract})
	if err != nil {
		return err
	}
	if first, err := content[api.EnergyContract](got); err != nil || first.ID != contract {
		return fmt.Errorf("get: %+v, %w", got, err)
	}

	at := time.Date(2026, 11, 23, 17, 0, 0, 0, time.FixedZone("", 3600))
	text := func(at time.Time) api.OptNilString { return api.NewOptNilString(at.Format(time.RFC3339)) }
	request := api.EnergyContractRequest{
		EnergyContractType:  api.NewOptNilEnergyContractType(api.EnergyContractTypeSpotHourly),
		EnergyPrices:        []api.PriceRequest{{Price: 0.2134, Timestamp: text(at)}, {Price: -0.0021, Timestamp: text(at.Add(time.Hour))}},
		Supplier:            api.NewOptNilString("Nordlys Energi AB"),
		CurrencyEnergyPrice: api.NewOptNilString("EUR"),
	}
	created, err := client.CreateEnergyContract(ctx, &request, api.CreateEnergyContractParams{OrgID: org, UserID: user, IdempotencyKey: api.NewOptString(uuid.NewString())})
	if err != nil {
		return err
	}
	wanted, err := content[api.EnergyContract](created)
	if err != nil {
		return err
	}
	id := wanted.ID
	if err := same("create", created, api.EnergyContract{
		ID:                 id,
		EnergyContractType: api.NewNilEnergyContractType(api.EnergyContractTypeSpotHourly),
		EnergyPrices:       []api.Price{{Price: 0.2134, Timestamp: api.NewOptNilDateTime(at)}, {Price: -0.0021, Timestamp: api.NewOptNilDateTime(at.Add(time.Hour))}},
		Building:           api.NilUUID{Null: true}, MeterID: api.NilString{Null: true}, Supplier: api.NewNilString("Nordlys Energi AB"),
		CurrencyEnergyPrice:                   api.NewNilString("EUR"),
		EnergyPriceIncludesExternalComponents: api.NilBool{Null: true},
	}); err != nil {
		return err
	}

	request.MeterID = api.NewOptNilString("735999102100010234")
	wanted.MeterID = api.NewNilString("735999102100010234")
	etag := api.NewOptString(created.(interface{ GetETag() string }).GetETag())
	update := api.UpdateEnergyContractParams{OrgID: org, UserID: user, EnergyContractID: id, IfMatch: etag}
	updated, err := client.UpdateEnergyContract(ctx, &request, update)
	if err != nil {
		return err
	}
	if err := same("update", updated, wanted); err != nil {
		return err
	}
	stale, err := client.UpdateEnergyContract(ctx, &request, update)
	if err := refused("update with a stale ETag", stale, err, 412); err != nil {
		return err
	}

	wanted.Supplier, wanted.MeterID = api.NewNilString("Helios Sähkö Oy"), api.NilString{Null: true}
	patch := api.EnergyContractPatch{Supplier: api.NewOptNilString("Helios Sähkö Oy"), MeterID: api.OptNilString{Set: true, Null: true}}
	patched, err := client.PatchEnergyContract(ctx, (*api.PatchEnergyContractApplicationMergePatchJSON)(&patch), api.PatchEnergyContractParams{OrgID: org, UserID: user, EnergyContractID: id})
	if err != nil {
		return err
	}
	if err := same("patch", patched, wanted); err != nil {
		return err
	}

	deleted, err := client.DeleteEnergyContract(ctx, api.DeleteEnergyContractParams{OrgID: org, UserID: user, EnergyContractID: id})
	if err != nil {
		return err
	}
	if _, err := content[api.Problem](deleted); err == nil {
		return fmt.Errorf("delete: %+v", deleted)
	}
	gone, err := client.GetEnergyContract(ctx, api.GetEnergyContractParams{OrgID: org, UserID: user, EnergyContractID: id})
	return refused("get what was deleted", gone, err, 404)
}

// content returns the content of a response, or an error if it is of another type.
func content[T any](response any) (T, error) {
	if r, ok := response.(interface{ GetResponse() T }); ok {
		return r.GetResponse(), nil
	}
	var none T
	return none, fmt.Errorf("the response is %T, %+v", response, response)
}

// same is an error unless a response has a contract.
func same(what string, response any, want api.EnergyContract) error {
	got, err := content[api.EnergyContract](response)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	for i, p := range got.EnergyPrices { // an instant has no one representation
		if i < len(want.EnergyPrices) && p.Timestamp.Value.Equal(want.EnergyPrices[i].Timestamp.Value) {
			got.EnergyPrices[i].Timestamp = want.EnergyPrices[i].Timestamp
		}
	}
	if !reflect.DeepEqual(got, want) {
		return fmt.Errorf("%s: got\n%+v\nwant\n%+v", what, got, want)
	}
	return nil
}

// refused is an error unless a response is a problem with a status.
func refused(what string, response any, err error, status int) error {
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	if p, err := content[api.Problem](response); err != nil || p.Status != status {
		return fmt.Errorf("%s: %+v, %w", what, response, err)
	}
	return nil
}
