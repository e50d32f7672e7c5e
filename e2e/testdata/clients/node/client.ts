// Does with energy contracts what a partner does: openid-client finds the token
// endpoint and gets a token, openapi-fetch asks, typed by openapi-typescript from the
// service's openapi.json (as api.d.ts, by the test). The argument is the service.
import { OffsetDateTime } from "@js-joda/core";
import assert from "node:assert/strict";
import { randomUUID } from "node:crypto";
import createClient from "openapi-fetch";
import * as oauth from "openid-client";
import type { components, paths } from "./api.d.ts";

const service = process.argv[2]!;
const owner = { org_id: "5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11", user_id: "016b78a7-0c7c-4241-a277-015c3ad3cb90" };
const contracts = "/api/partners/v2.0/org/{org_id}/users/{user_id}/energy-contracts";
const contract = `${contracts}/{energy_contract_id}` as const;

const config = await oauth.discovery(new URL(service), "demo", undefined, oauth.ClientSecretBasic("demo-secret"), {
  algorithm: "oauth2",
  execute: [oauth.allowInsecureRequests], // plain HTTP, on this machine
});
const token = await oauth.clientCredentialsGrant(config, { scope: "read write" });
assert.equal(token.expires_in, 36000);
assert.equal(token.scope, "read write");
const api = createClient<paths>({ baseUrl: service, headers: { Authorization: `Bearer ${token.access_token}` } });

const list = await api.GET(contracts, { params: { path: owner, query: { limit: 2 } } });
assert.equal(list.response.status, 200);
assert.equal(list.data?.length, 2);
assert.match(list.response.headers.get("Link") ?? "", /rel="next"/);

const wanted: components["schemas"]["EnergyContractRequest"] = {
  energy_contract_type: "spot_hourly",
  energy_prices: [
    { price: 0.2134, timestamp: "2026-11-23T17:00:00+01:00" },
    { price: -0.0021, timestamp: "2026-11-23T18:00:00+01:00" },
  ],
  building_id: null,
  currency_energy_price: "EUR",
  supplier: "Nordlys Energi AB",
};
const key = randomUUID();
const create = () => api.POST(contracts, { params: { path: owner, header: { "Idempotency-Key": key } }, body: wanted });
const created = await create();
assert.equal(created.response.status, 200);
const again = await create();
assert.deepEqual(again.data, created.data);
const path = { ...owner, energy_contract_id: created.data!.id };
assert.equal(
  new URL(created.response.headers.get("Location")!, created.response.url).href,
  service + contract.replace(/\{(\w+)\}/g, (_, name: keyof typeof path) => path[name]),
);

const got = await api.GET(contract, { params: { path } });
assert.deepEqual(got.data, {
  energy_contract_type: "spot_hourly",
  energy_prices: wanted.energy_prices,
  id: path.energy_contract_id,
  building: null,
  meter_id: null,
  supplier: "Nordlys Energi AB",
  currency_energy_price: "EUR",
  energy_price_includes_external_components: null,
});
const etag = got.response.headers.get("ETag")!;
const unchanged = await api.GET(contract, { params: { path, header: { "If-None-Match": etag } } });
assert.equal(unchanged.response.status, 304);

const update = () => api.PUT(contract, {
  params: { path, header: { "If-Match": etag } },
  body: { ...wanted, meter_id: "735999102100010234" },
});
const updated = await update();
assert.equal(updated.data?.meter_id, "735999102100010234");
const stale = await update();
assert.equal(stale.response.status, 412);
assert.equal(stale.error?.instance, stale.response.headers.get("X-Request-ID"));

// Java's times, whose text has no seconds if they are zero.
const [at, next] = ["2026-11-23T17:00+01:00", "2026-11-23T18:00Z"].map((text) => OffsetDateTime.parse(text));
const inJava = await api.PUT(contract, {
  params: { path },
  body: {
    currency_energy_price: "EUR",
    energy_prices: [{ price: 1, timestamp: at!.toString() }, { price: 2, timestamp: next!.toString() }],
  },
});
assert.deepEqual(inJava.data?.energy_prices, [
  { price: 1, timestamp: "2026-11-23T17:00:00+01:00" },
  { price: 2, timestamp: "2026-11-23T18:00:00Z" },
]);

const patched = await api.PATCH(contract, {
  params: { path },
  headers: { "Content-Type": "application/merge-patch+json" },
  body: { supplier: "Helios Sähkö Oy", meter_id: null },
});
assert.equal(patched.data?.supplier, "Helios Sähkö Oy");
assert.equal(patched.data?.meter_id, null);

// What the description cannot say: two prices for one instant.
const refused = await api.PUT(contract, {
  params: { path },
  body: { ...wanted, energy_prices: [{ price: 1, timestamp: "2026-11-23T17:00:00+01:00" }, { price: 2, timestamp: "2026-11-23T16:00:00Z" }] },
});
assert.equal(refused.response.status, 422);
assert.equal(refused.error?.errors?.[0]?.pointer, "#/energy_prices/1/timestamp");

const deleted = await api.DELETE(contract, { params: { path } });
assert.equal(deleted.response.status, 204);
const gone = await api.GET(contract, { params: { path } });
assert.equal(gone.response.status, 404);

await oauth.tokenRevocation(config, token.access_token);
const revoked = await api.GET(contracts, { params: { path: owner } });
assert.equal(revoked.response.status, 401);

console.log("ok");
