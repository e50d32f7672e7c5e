// Manages a contract with the client that openapi-zod-client generates (as api.ts, by the
// test). The argument is the service.
import assert from "node:assert/strict";
import type { z } from "zod";
import { createApiClient, schemas } from "./api.js";

const owner = { org_id: "5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11", user_id: "016b78a7-0c7c-4241-a277-015c3ad3cb90" };
const demo = "3c90c3cc-0d44-4b50-8888-8dd25736052a";

const api = createApiClient(process.argv[2]!);
const credentials = { grant_type: "client_credentials", client_id: "demo", client_secret: "demo-secret" } as const;
const token = await api.issueToken(credentials);
api.axios.defaults.headers.common.Authorization = `Bearer ${token.access_token}`;

const got = await api.getEnergyContract({ params: { ...owner, energy_contract_id: demo } });
assert.equal(got.id, demo);
const list = await api.listEnergyContracts({ params: owner, queries: { limit: 1 } });
assert.deepEqual(list, [got]);

const wanted: z.infer<typeof schemas.EnergyContractRequest> = {
  energy_contract_type: "spot_hourly",
  energy_prices: [{ price: 0.2134, timestamp: "2026-11-23T17:00:00+01:00" }],
  supplier: "Nordlys Energi AB",
  currency_energy_price: "EUR",
};
const created = await api.createEnergyContract(wanted, { params: owner });
const id: string = created.id;
// @ts-expect-error: the id is not of the type any.
const wrong: number = created.id;
const contract: z.infer<typeof schemas.EnergyContract> = {
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

const params = { ...owner, energy_contract_id: id };
const meter_id = "735999102100010234";
const updated = await api.updateEnergyContract({ ...wanted, meter_id }, { params });
assert.deepEqual(updated, { ...contract, meter_id });
const patched = await api.patchEnergyContract({ supplier: null }, { params });
assert.deepEqual(patched, { ...contract, meter_id, supplier: null });
await api.deleteEnergyContract(undefined, { params });
await assert.rejects(api.getEnergyContract({ params }), { status: 404 });

console.log("ok");
