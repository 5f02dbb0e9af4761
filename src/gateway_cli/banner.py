"""What `gateway dev` prints when it is ready: the models, and two calls that work when pasted."""

from __future__ import annotations

import json
import shlex

from gateway import __version__
from gateway.config import Settings
from gateway.registry.entry import AgentEntry
from gateway.security.keys import DEV_KEY, digest
from gateway.snapshot import Snapshot
from gateway_cli.settings import path_option, relative

QUESTION = "What is the weather in Paris, and how do people greet there?"
"""Fits the shipped sample as well as what `gateway new` writes, so that the demo model calls the tool of either."""


def render_banner(settings: Settings, url: str, snapshot: Snapshot) -> str:
    """Return the text for a gateway that answers at ``url``. A key of the operator's own is never printed."""
    has_dev_key = digest(DEV_KEY) in snapshot.keyring.credentials
    key = DEV_KEY if has_dev_key else "YOUR_KEY"
    folder = relative(settings.agents_root())
    entries = snapshot.registry.list_entries()
    agents = [entry for entry in entries if entry.executor is not None and entry.options.expose]
    broken = [entry for entry in entries if entry.status != "ready"]
    models = [(entry.id, entry.description or "") for entry in agents]
    models += [(model.id, "") for model in snapshot.upstreams.list_models()]
    lines = [f"Agent Gateway {__version__} answers at {url} (Ctrl-C stops it)", ""]
    if models:
        width = max(len(name) for name, _ in models)
        lines += ["Models", *(f"  {name:{width}}  {text}".rstrip() for name, text in models), ""]
    if not agents:
        command = f"gateway new Hello{path_option(settings)}"
        lines += [f"No agents in {folder} yet; `{command}` makes one, and it is served at once.", ""]
    if broken:
        lines += ["Broken", *(f"  {entry.id}: {_reason(entry)}" for entry in broken), ""]
    if snapshot.upstreams.default.config.provider == "demo":
        lines += ["Answers come from the demo model. OPENAI_API_KEY or upstreams.yaml brings a real one.", ""]
    model = models[0][0] if models else "default/hello"
    lines += [
        f"Key: {DEV_KEY} (from this machine only)" if has_dev_key else "Key: one of those in security.yaml",
        "",
        "curl",
        *(f"  {line}" for line in curl(url, key, model).splitlines()),
        "",
        "Python (pip install openai)",
        *(f"  {line}" for line in python(url, key, model).splitlines()),
        "",
    ]
    if settings.agent_auto_reload:
        lines += [f"Watching {folder}: save an agent.py there and it is served.", ""]
    return "\n".join(lines)


def _reason(entry: AgentEntry) -> str:
    item = next((item for item in entry.diagnostics if item.severity == "error"), None)
    if item is None:
        return "`gateway validate` says why."
    return f"{item.file}{f':{item.line}' if item.line else ''}: {item.message} {item.fix}"


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
