"""What is known beforehand about servers that speak OpenAI's dialect: address, how the key is shown, quirks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Preset:
    """One kind of server.

    ``base_url`` None means that each user has an address of their own, which ``address`` describes. ``key_header`` is
    where the key goes: ``authorization`` (as ``Bearer``) or a header that holds nothing else. ``list_key_header`` is
    the one for GET requests, where a server wants another. ``own_server`` marks software that runs at the user's, whose
    models are few and are listed without being asked for. ``further_models`` is the field of a request in which a
    server takes more models than one, to answer with instead.
    """

    base_url: str | None = None
    address: str = "the address up to and with /v1"
    key_header: str = "authorization"
    list_key_header: str | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    own_server: bool = False
    further_models: str | None = None


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "openai": Preset("https://api.openai.com/v1"),
        "azure": Preset(
            address="https://RESOURCE.openai.azure.com/openai/v1",
            key_header="api-key",
        ),
        "anthropic": Preset(
            "https://api.anthropic.com/v1",
            # The chat endpoint speaks OpenAI's dialect, the model list does not.
            list_key_header="x-api-key",
            headers=MappingProxyType({"anthropic-version": "2023-06-01"}),
        ),
        "gemini": Preset("https://generativelanguage.googleapis.com/v1beta/openai"),
        "bedrock": Preset(address="https://bedrock-mantle.REGION.api.aws/v1"),
        "openrouter": Preset("https://openrouter.ai/api/v1", further_models="models"),
        "groq": Preset("https://api.groq.com/openai/v1"),
        "mistral": Preset("https://api.mistral.ai/v1"),
        "together": Preset("https://api.together.xyz/v1"),
        "deepseek": Preset("https://api.deepseek.com/v1"),
        "huggingface": Preset("https://router.huggingface.co/v1"),
        "xai": Preset("https://api.x.ai/v1"),
        "lmstudio": Preset("http://127.0.0.1:1234/v1", own_server=True),
        "ollama": Preset("http://127.0.0.1:11434/v1", own_server=True),
        "vllm": Preset("http://127.0.0.1:8000/v1", own_server=True),
        "openai-compatible": Preset(own_server=True),
        "demo": Preset(),
    }
)
"""By the name that ``provider`` gives."""
