"""The product: admission, routing, security, runs. Knows neither the web framework nor the Agents SDK."""
