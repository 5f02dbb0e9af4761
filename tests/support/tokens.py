"""An issuer of tokens for tests: real keys, signed tokens, its key set as JSON, by file or over HTTPS."""

from __future__ import annotations

import base64
import http.server
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from tests.support.certificates import certificate

ISSUER = "https://login.example.com/"
AUDIENCE = "agent-gateway"


def rsa_key(bits: int = 2048) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def ec_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def ed_key() -> ed25519.Ed25519PrivateKey:
    return ed25519.Ed25519PrivateKey.generate()


def pem_of(key: Any) -> bytes:
    """The public half of a key."""
    return bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )


def jwk_of(key: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    """The public half of a key as a JWK."""
    kind: Any = (
        jwt.algorithms.RSAAlgorithm
        if isinstance(key, rsa.RSAPrivateKey)
        else jwt.algorithms.ECAlgorithm
        if isinstance(key, ec.EllipticCurvePrivateKey)
        else jwt.algorithms.OKPAlgorithm
    )
    made = dict(kind.to_jwk(key.public_key(), as_dict=True)) | more
    made.pop("key_ops", None)
    return made if kid is None else made | {"kid": kid}


def claims(**more: Any) -> dict[str, Any]:
    """The claims of a good token; None leaves one out."""
    now = int(time.time())
    made = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "iat": now, "exp": now + 600} | more
    return {name: value for name, value in made.items() if value is not None}


def token(key: Any, algorithm: str = "RS256", *, kid: str | None = "k1", headers: Any = None, **more: Any) -> str:
    """A signed token."""
    named = {"kid": kid} if kid is not None else {}
    return jwt.encode(claims(**more), key, algorithm=algorithm, headers=named | (headers or {}))


def by_hand(head: Mapping[str, Any], said: Mapping[str, Any], signature: bytes = b"") -> str:
    """A token that no library would make."""
    parts = (json.dumps(head).encode(), json.dumps(said).encode(), signature)
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


class KeyServer:
    """Serves a key set over HTTPS; ``asked`` counts."""

    def __init__(self, port: int, ca_file: Path) -> None:
        self.url = f"https://127.0.0.1:{port}/jwks.json"
        self.ca_file = ca_file
        self.keys: list[dict[str, Any]] = []
        self.status = 200
        self.asked = 0


@contextmanager
def key_server(folder: Path) -> Iterator[KeyServer]:
    """Run a `KeyServer`."""
    ca_file, context = certificate(folder)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            serving.asked += 1
            body = json.dumps({"keys": serving.keys}).encode()
            self.send_response(serving.status)
            self.send_header("content-length", str(len(body)))
            self.send_header("location", serving.url)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    serving = KeyServer(server.server_address[1], ca_file)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield serving
    finally:
        server.shutdown()
        thread.join(60)
        server.server_close()
