"""What operators see of the gateway: logs, metrics, recent errors."""
