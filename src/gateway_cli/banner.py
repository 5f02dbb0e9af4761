"""What `gateway dev` prints when it is ready: the models, and two calls that work when pasted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from gateway import __version__
from gateway.config import Settings

QUESTION = "What is the weather in Paris, and how do people greet there?"
"""Fits the shipped sample as well as what `gateway new` writes, so that the demo model calls the tool of either."""


def render_banner(settings: Settings, url: str, key: str | None, models: Sequence[tuple[str, str]]) -> str:
    """Return the text; ``models`` are ids with their descriptions, ``key`` is one that works here."""
    shown_key = key or "YOUR_KEY"
    folder = _relative(settings.agents_root())
    lines = [f"Agent Gateway {__version__} answers at {url} (Ctrl-C stops it)", ""]
    if models:
        width = max(len(name) for name, _ in models)
        lines += ["Models", *(f"  {name:{width}}  {text}".rstrip() for name, text in models), ""]
    elif key is None:
        lines += ["Models: ask GET /v1/models with one of the keys in security.yaml.", ""]
    else:
        lines += [f"No agents in {folder} yet; `gateway new Hello` makes one, and it is served at once.", ""]
    model = models[0][0] if models else "default/hello"
    lines += [
        f"Key: {shown_key}{' (from this machine only)' if key and key != settings.api_key else ''}",
        "",
        "curl",
        *(f"  {line}" for line in curl(url, shown_key, model).splitlines()),
        "",
        "Python (pip install openai)",
        *(f"  {line}" for line in python(url, shown_key, model).splitlines()),
        "",
    ]
    if settings.agent_auto_reload:
        lines += [f"Watching {folder}: save an agent.py there and it is served.", ""]
    return "\n".join(lines)


def curl(url: str, key: str, model: str) -> str:
    """Return a command line that asks ``model`` one question."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": QUESTION}]})
    return (
        f"curl {url}/v1/chat/completions \\\n"
        f"  -H {shlex.quote(f'Authorization: Bearer {key}')} \\\n"
        f"  -H 'Content-Type: application/json' \\\n"
        f"  -d {shlex.quote(body)}"
    )


def python(url: str, key: str, model: str) -> str:
    """Return a program of the official client that asks ``model`` one question."""
    return (
        "from openai import OpenAI\n"
        f'client = OpenAI(base_url="{url}/v1", api_key="{key}")\n'
        "answer = client.chat.completions.create(\n"
        f'    model="{model}",\n'
        f'    messages=[{{"role": "user", "content": "{QUESTION}"}}],\n'
        ")\n"
        "print(answer.choices[0].message.content)"
    )


def _relative(path: Path) -> Path:
    resolved = path.resolve()
    return resolved.relative_to(Path.cwd()) if resolved.is_relative_to(Path.cwd()) else resolved
