// Shows openapi.json and sends requests to this service.
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#page",
  deepLinking: true,
  displayRequestDuration: true,
  tryItOutEnabled: true,
  validatorUrl: null, // the default sends the description to validator.swagger.io
});
