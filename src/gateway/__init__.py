"""The product: admission, routing, security, runs. Knows neither the web framework nor the Agents SDK."""

__version__ = "0.1.0"
"""The one place that says which version this is; the wheel reads it from here."""
