// Manages a contract with the client that swagger-typescript-api generates (as api.ts, by the
// test). The argument is the service.
import assert from "node:assert/strict";
import { Api, type EnergyContract, type EnergyContractRequest, EnergyContractType, type TokenRequest } from "./api.js";

const owner = ["5f0c2b9e-6f7a-4f0e-9b1d-2a4c8e6d0f11", "016b78a7-0c7c-4241-a277-015c3ad3cb90"] as const;
const demo = "3c90c3cc-0d44-4b50-8888-8dd25736052a";

const { api, oauth2, setSecurityData } = new Api<string>({
  baseUrl: process.argv[2]!,
  securityWorker: (token) => (token ? { headers: { Authorization: `Bearer ${token}` } } : {}),
});
const grant_type = "client_credentials" as TokenRequest["grant_type"];
const token = await oauth2.issueToken({ grant_type, client_id: "demo", client_secret: "demo-secret" });
setSecurityData(token.data.access_token);

const got = await api.getEnergyContract(...owner, demo);
assert.equal(got.data.id, demo);
const list = await api.listEnergyContracts(...owner, { limit: 1 });
assert.deepEqual(list.data, [got.data]);

const wanted: EnergyContractRequest = {
  energy_contract_type: EnergyContractType.SpotHourly,
  energy_prices: [{ price: 0.2134, timestamp: "2026-11-23T17:00:00+01:00" }],
  supplier: "Nordlys Energi AB",
  currency_energy_price: "EUR",
};
const created = await api.createEnergyContract(...owner, wanted);
const id: string = created.data.id;
// @ts-expect-error: the id is not of the type any.
const wrong: number = created.data.id;
const contract: EnergyContract = {
  energy_contract_type: EnergyContractType.SpotHourly,
  energy_prices: [{ price: 0.2134, timestamp: "2026-11-23T17:00:00+01:00" }],
  id,
  building: null,
  meter_id: null,
  supplier: "Nordlys Energi AB",
  currency_energy_price: "EUR",
  energy_price_includes_external_components: null,
};
assert.deepEqual(created.data, contract);

const meter_id = "735999102100010234";
const updated = await api.updateEnergyContract(...owner, id, { ...wanted, meter_id });
assert.deepEqual(updated.data, { ...contract, meter_id });
const patched = await api.patchEnergyContract(...owner, id, { supplier: null });
assert.deepEqual(patched.data, { ...contract, meter_id, supplier: null });
await api.deleteEnergyContract(...owner, id);
await assert.rejects(api.getEnergyContract(...owner, id), { status: 404 });

console.log("ok");
