// Manages a contract with the client that oazapfts generates (as api.ts, by the test). The
// argument is the service.
import assert from "node:assert/strict";
import { ok } from "@oazapfts/runtime";
import * as api from "./api.js";

const owner = ["5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11", "016b78a7-0c7c-4241-a277-015c3ad3cb90"] as const;
const demo = "3c90c3cc-0d44-4b50-8888-8dd25736052a";

api.defaults.baseUrl = process.argv[2]!;
const credentials = { grant_type: "client_credentials", client_id: "demo", client_secret: "demo-secret" } as const;
const token = await ok(api.issueToken(credentials));
api.defaults.headers = { Authorization: `Bearer ${token.access_token}` };

const got = await ok(api.getEnergyContract(...owner, demo));
assert.equal(got.id, demo);
const list = await ok(api.listEnergyContracts(...owner, { limit: 1 }));
assert.deepEqual(list, [got]);

const wanted: api.EnergyContractRequest = {
  energy_contract_type: "spot_hourly",
  energy_prices: [{ price: 0.2134, timestamp: "2026-11-23T17:00:00+01:00" }],
  supplier: "Nordlys Energi AB",
  currency_energy_price: "EUR",
};
const created = await ok(api.createEnergyContract(...owner, wanted));
const id: string = created.id;
// @ts-expect-error: the id is not of the type any.
const wrong: number = created.id;
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
assert.deepEqual(created, contract);

const meter_id = "735999102100010234";
const updated = await ok(api.updateEnergyContract(...owner, id, { ...wanted, meter_id }));
assert.deepEqual(updated, { ...contract, meter_id });
const patched = await ok(api.patchEnergyContract(...owner, id, { supplier: null }));
assert.deepEqual(patched, { ...contract, meter_id, supplier: null });
await ok(api.deleteEnergyContract(...owner, id));
const gone = await api.getEnergyContract(...owner, id);
assert.equal(gone.status === 404 && gone.data.detail, "This user has no energy contract with this id.");

console.log("ok");
