// Manages a contract with the client that @hey-api/openapi-ts generates (as api/, by the test).
// The argument is the service.
import assert from "node:assert/strict";
import { client } from "./api/client.gen.js";
import * as api from "./api/index.js";

const owner = { org_id: "5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11", user_id: "016b78a7-0c7c-4241-a277-015c3ad3cb90" };
const demo = "3c90c3cc-0d44-4b50-8888-8dd25736052a";

client.setConfig({ baseUrl: process.argv[2]! });
const credentials = { grant_type: "client_credentials", client_id: "demo", client_secret: "demo-secret" } as const;
const token = await api.issueToken({ body: credentials, throwOnError: true });
client.setConfig({ auth: token.data.access_token });

const got = await api.getEnergyContract({ path: { ...owner, energy_contract_id: demo }, throwOnError: true });
assert.equal(got.data.id, demo);
const list = await api.listEnergyContracts({ path: owner, query: { limit: 1 }, throwOnError: true });
assert.deepEqual(list.data, [got.data]);

const wanted: api.EnergyContractRequest = {
  energy_contract_type: "spot_hourly",
  energy_prices: [{ price: 0.2134, timestamp: "2026-11-23T17:00:00+01:00" }],
  supplier: "Nordlys Energi AB",
  currency_energy_price: "EUR",
};
const created = await api.createEnergyContract({ path: owner, body: wanted, throwOnError: true });
const id: string = created.data.id;
// @ts-expect-error: the id is not of the type any.
const wrong: number = created.data.id;
const contract: api.EnergyContract = {
  energy_contract_type: "spot_hourly",
  energy_prices: [{ price: 0.2134, timestamp: "2026-11-23T17:00:00+01:00" }],
  id,
  building: null,
  meter_id: null,
  supplier: "Nordlys Energi AB",
  currency_energy_price: "EUR",
  energy_price_includes_external_components: null,
};
assert.deepEqual(created.data, contract);

const path = { ...owner, energy_contract_id: id };
const meter_id = "735999102100010234";
const updated = await api.updateEnergyContract({ path, body: { ...wanted, meter_id }, throwOnError: true });
assert.deepEqual(updated.data, { ...contract, meter_id });
const patched = await api.patchEnergyContract({ path, body: { supplier: null }, throwOnError: true });
assert.deepEqual(patched.data, { ...contract, meter_id, supplier: null });
await api.deleteEnergyContract({ path, throwOnError: true });
const gone = await api.getEnergyContract({ path });
assert.equal(gone.error?.detail, "This user has no energy contract with this id.");

console.log("ok");
