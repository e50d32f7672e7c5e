#!/bin/sh
# The requests of the vendor's documentation, as it writes them, with the demo data's
# client and ids. The argument is the service. Prints the last answer.
set -eu
service=$1

token=$(curl --silent --show-error --fail-with-body --request POST \
  --url "$service/oauth2/token/" \
  --header 'Authorization: Basic ZGVtbzpkZW1vLXNlY3JldA==' \
  --header 'Content-Type: application/json' \
  --data '{"grant_type": "client_credentials"}' | sed 's/.*"access_token":"\([^"]*\)".*/\1/')

curl --silent --show-error --fail-with-body --request PUT \
  --url "$service/api/partners/v2.0/org/5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11/users/016b78a7-0c7c-4241-a277-015c3ad3cb90/energy-contracts/3c90c3cc-0d44-4b50-8888-8dd25736052a" \
  --header "Authorization: Bearer $token" \
  --header 'Content-Type: application/json' \
  --data '
{
  "energy_contract_type": "spot_hourly",
  "energy_prices": [],
  "building_id": "3c90c3cc-0d44-4b50-8888-8dd25736052a",
  "meter_id": "<string>",
  "supplier": "<string>",
  "currency_energy_price": "<string>",
  "energy_price_includes_external_components": true
}
'
