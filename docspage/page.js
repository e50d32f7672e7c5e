// Shows openapi.json and sends requests to this service.

// at returns the URL of a path of the service. It is relative to this page and not to the
// server of the description, since behind a proxy the service may not know its own URL.
const at = (path) => new URL("../../.." + path, location).href;

// local returns the text of a description with the URLs of the service that this page is from.
function local(text) {
  const description = JSON.parse(text);
  description.servers[0].url = at("");
  description.components.securitySchemes.clientCredentials.flows.clientCredentials.tokenUrl = at("/oauth2/token/");
  return JSON.stringify(description);
}

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#page",
  deepLinking: true,
  displayRequestDuration: true,
  tryItOutEnabled: true,
  validatorUrl: null, // the default sends the description to validator.swagger.io
  plugins: [{ statePlugins: { spec: { wrapActions: { updateSpec: (update) => (text) => update(local(text)) } } } }],
});
