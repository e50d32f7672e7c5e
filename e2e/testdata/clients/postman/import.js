// Imports the service's openapi.json as the Postman app does, and sends each request of the
// collection as the demo client. The argument is the service.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { promisify } from "node:util";
import newman from "newman";
import converter from "openapi-to-postmanv2";

const service = process.argv[2];
const description = readFileSync("openapi.json", "utf8");

// converted returns the collection that an import with some options makes.
async function converted(options) {
  const { result, reason, output } = await promisify(converter.convertV2)({ type: "string", data: description }, options);
  assert.ok(result, reason);
  const collection = output[0].data;
  assert.deepEqual(collection.variable, [{ key: "baseUrl", value: service }]);
  for (const { request } of requests(collection)) {
    if (request.auth?.type === "oauth2") {
      assert.deepEqual(request.auth.oauth2, [
        { key: "scope", value: "read write" },
        { key: "accessTokenUrl", value: `${service}/oauth2/token/` },
        { key: "grant_type", value: "client_credentials" },
      ]);
    }
    for (const field of request.body?.urlencoded ?? []) {
      if (field.key === "grant_type") assert.equal(field.value, "client_credentials");
    }
  }
  return collection;
}

// requests returns the requests in a folder and in the folders in it.
function requests(folder) {
  return folder.item.flatMap((item) => (item.item ? requests(item) : [item]));
}

// By default an import has placeholders for a person to fill in, such as <uuid>.
await converted({});

const collection = await converted({ parametersResolution: "Example" });
const all = requests(collection);
assert.equal(all.length, Object.values(JSON.parse(description).paths).flatMap((path) => Object.keys(path).filter((key) => key !== "parameters")).length);
for (const { name, request } of all) {
  assert.doesNotMatch(JSON.stringify([request.url, request.header, request.body]), /"<?string>?"/, name);
}

// What the button "Get New Access Token" does.
const basic = Buffer.from("demo:demo-secret").toString("base64");
const response = await fetch(`${service}/oauth2/token/`, {
  method: "POST",
  headers: { Authorization: `Basic ${basic}` },
  body: new URLSearchParams({ grant_type: "client_credentials", scope: "read write" }),
});
const { access_token } = await response.json();
for (const { request } of all) request.auth?.oauth2?.push({ key: "accessToken", value: access_token });

// The contract is deleted last, since other requests are for the same one.
collection.item = all.toSorted((a, b) => (a.request.method === "DELETE") - (b.request.method === "DELETE"));
const { run } = await promisify(newman.run)({
  collection,
  envVar: [{ key: "basicAuthUsername", value: "demo" }, { key: "basicAuthPassword", value: "demo-secret" }],
});
const sent = run.executions.map(({ item, response }) => [item.name, response?.code]);
const succeed = collection.item.map(({ name, response }) => [name, Math.min(...response.map(({ code }) => code))]);
assert.deepEqual(sent, succeed);

console.log("ok");
