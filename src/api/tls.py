"""TLS of `gateway serve`: one context, whose certificate can be replaced while connections are open."""

from __future__ import annotations

import logging
import ssl

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.observability.logs import log_event

_LOG = logging.getLogger("api.tls")


def open_tls(settings: Settings) -> ssl.SSLContext | None:
    """Return the TLS context of the settings, if they have a certificate; raises `ConfigError`."""
    if settings.tls_cert is None and settings.tls_key is None:
        return None
    if settings.tls_cert is None:
        raise ConfigError("GATEWAY_TLS_KEY is set without GATEWAY_TLS_CERT; name the certificate chain as well.")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    _load_certificate(context, settings)
    return context


def reload_tls(context: ssl.SSLContext | None, settings: Settings) -> None:
    """Have new connections shown the certificate that the files hold now; a wrong one leaves the old."""
    if context is None:
        return
    try:
        _load_certificate(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), settings)  # tried out first
        _load_certificate(context, settings)
    except ConfigError as error:
        log_event(_LOG, "config.reload.failed", level=logging.ERROR, file="certificate", message=error.message)
    else:
        log_event(_LOG, "config.reload.done", file="certificate")


def _load_certificate(context: ssl.SSLContext, settings: Settings) -> None:
    assert settings.tls_cert is not None
    for name, file in (("GATEWAY_TLS_CERT", settings.tls_cert), ("GATEWAY_TLS_KEY", settings.tls_key)):
        try:
            if file is not None:
                file.open("rb").close()
        except OSError as error:
            raise ConfigError(f"{name}: {file} cannot be read ({error.strerror}).") from error
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key, password=lambda: "")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or "no certificate with its private key is there"
        files = " and ".join(str(file) for file in (settings.tls_cert, settings.tls_key) if file is not None)
        raise ConfigError(
            f"The certificate of {files} (GATEWAY_TLS_CERT, GATEWAY_TLS_KEY) cannot be used: {reason}. Both are PEM "
            "files, the key without a password and belonging to the first certificate of the chain."
        ) from error
