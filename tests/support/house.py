"""A furnished gateway home for tests: keys of every kind, two upstreams, drop-ins from the fixtures."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

FIXTURES = Path(__file__).parents[1] / "fixtures" / "dropin_agents"

ADMIN = "sk-test-admin-canary-aaaaaaaaaaaaaaaaaaaaaaaa"
CHAT = "sk-test-chat-canary-bbbbbbbbbbbbbbbbbbbbbbbbbb"
NARROW = "sk-test-narrow-canary-cccccccccccccccccccccccc"
EXPIRED = "sk-test-expired-canary-dddddddddddddddddddddd"
WEBUI = "sk-test-webui-canary-eeeeeeeeeeeeeeeeeeeeeeeeee"
UPSTREAM_KEY = "sk-canary-upstream-ffffffffffffffffffffffff"

SECURITY = f"""\
version: 1
default:
  hide_foreign_models: HIDE
api_keys:
  - id: admin
    hashed_key: "{hashlib.sha256(ADMIN.encode()).hexdigest()}"
    allow_agents: ["*"]
    scopes: [chat, admin]
  - id: chat
    hashed_key: "{hashlib.sha256(CHAT.encode()).hexdigest()}"
    allow_agents: ["*"]
  - id: narrow
    hashed_key: "{hashlib.sha256(NARROW.encode()).hexdigest()}"
    allow_agents: ["default/weatheragent", "labs/*"]
  - id: webui
    hashed_key: "{hashlib.sha256(WEBUI.encode()).hexdigest()}"
    allow_agents: ["*"]
    profile: openwebui
  - id: expired
    hashed_key: "{hashlib.sha256(EXPIRED.encode()).hexdigest()}"
    allow_agents: ["*"]
    expires_at: 2020-01-01T00:00:00Z
"""

UPSTREAMS = """\
version: 1
upstreams:
  - name: local
    provider: openai-compatible
    base_url: {url}
    api_key: {key}
    default_model: test-model
    models: [test-model]
  - name: hasty
    provider: openai-compatible
    base_url: {url}
    api_key: {key}
    priority: 2
    default_model: hasty-model
    models: [hasty-model]
    timeouts: {{connect_s: 1, first_byte_s: 0.6, idle_s: 0.6, total_s: 5}}
  - name: gone
    provider: openai-compatible
    base_url: http://127.0.0.1:9/v1
    api_key: {key}
    priority: 3
    default_model: gone-model
    models: [gone-model]
    timeouts: {{connect_s: 1}}
aliases:
  gpt-5-mini: local/test-model
  "o3-*": local/test-model
"""


def furnish(home: Path, upstream_url: str, *, hide_foreign_models: bool = False, security: bool = True) -> None:
    """Write ``upstreams.yaml`` and ``security.yaml`` into ``home``, where ``running_gateway`` finds them.

    Without ``security`` the file names no key at all.
    """
    (home / "agents").mkdir(parents=True, exist_ok=True)
    (home / "upstreams.yaml").write_text(UPSTREAMS.format(url=upstream_url, key=UPSTREAM_KEY), encoding="utf-8")
    text = SECURITY.replace("HIDE", "true" if hide_foreign_models else "false") if security else "version: 1\n"
    (home / "security.yaml").write_text(text, encoding="utf-8")


def drop(name: str, agents: Path, *, as_: str | None = None) -> Path:
    """Copy a fixture (a folder, or a single file) into a drop-in folder, as a user would."""
    source, target = FIXTURES / name, agents / (as_ or Path(name).name if not name.startswith("labs/") else name)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)
    return target


def write_agent(agents: Path, name: str, instructions: str, *, extra: str = "", tools: str = "") -> Path:
    """Write a small agent into ``agents/name/agent.py`` the way careful editors do: a new file, then a rename.

    ``extra`` stands before the agent; ``tools`` are names of it, comma-separated.
    """
    folder = agents / name
    folder.mkdir(parents=True, exist_ok=True)
    call = f"Agent(name={name!r}, instructions={instructions!r}, tools=[{tools}])"
    text = f"from agents import Agent\n\n{extra}\nagent = {call}\n"
    (folder / ".agent.py.swap").write_text(text, encoding="utf-8")
    return (folder / ".agent.py.swap").rename(folder / "agent.py")
