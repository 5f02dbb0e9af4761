"""What of the settings can be judged before anything is opened: asked at every start, and by `gateway doctor`."""

from __future__ import annotations

from api.edge import Edge
from api.providers import check_needs
from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.limits.alerts import alert_config
from gateway.limits.opening import choose_store
from gateway.security.stored import check_pepper
from gateway.store.redis import check_redis_url
from gateway.store.store import database_url


def check_settings(settings: Settings, *, is_alone: bool) -> None:
    """Raise `ConfigError` for settings that nothing can be served with; ``is_alone``: by one process."""
    check_pepper(settings)
    check_needs(settings)
    Edge.of(settings)
    database_url(settings)
    if settings.redis_url is not None:
        check_redis_url(settings.redis_url)
    choose_store(settings, is_alone=is_alone)
    alert_config(settings)
    if settings.traces and not 0 < settings.traces <= 1:
        raise ConfigError(f"GATEWAY_TRACES={settings.traces:g} is no share of requests: it is between 0 and 1.")
