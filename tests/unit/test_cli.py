"""The command line without a gateway: what it prints, and how it refuses."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from gateway.config import Settings, load_yaml
from gateway.events import RunEvent
from gateway.observability.metrics import Metrics
from gateway.principal import Limits
from gateway.registry.entry import AgentEntry, AgentOptions, Diagnostic
from gateway.registry.registry import Registry
from gateway.routing.table import Router
from gateway.security.config import SecurityConfig
from gateway.security.keys import Keyring
from gateway.snapshot import Snapshot
from gateway.store.store import DATABASE_FILE
from gateway.upstreams.config import load_upstreams
from gateway.upstreams.table import open_upstreams
from gateway_cli import offline
from gateway_cli.banner import curl, python, render_banner
from gateway_cli.errors import CliError
from gateway_cli.main import main
from gateway_cli.state import announce, find_running, state_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to call commands in; some of them configure logging, which other tests want as it was."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield tmp_path
    root.setLevel(level)
    root.handlers[:] = handlers


def test_help_answers_at_once_and_imports_neither_sdk_nor_web_framework() -> None:
    program = (
        "import sys\nfrom gateway_cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'agents', 'fastapi', 'starlette', 'uvicorn', 'openai', 'pydantic', 'api', 'sdk_adapter'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": "src"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert "dev" in done.stdout


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ([], "required"),
        (["nonsense"], "invalid choice"),
        (["dev", "--port", "70000"], "'70000' is not a port (0 to 65535)"),
        (["dev", "no-such-folder"], "no-such-folder is not a folder"),
        (["validate", "no-such-folder"], "does not exist"),
        (["new", "My Agent"], "for example MyAgent"),
        (["new", "a/b/c"], "cannot name an agent's folder"),
        (["new", "../evil"], "cannot name an agent's folder"),
        (["keys", "create", "--yaml", "two words"], "A key's id"),
        (["keys", "create", "--yaml", "x", "--expires", "tomorrow"], "write YYYY-MM-DD"),
        (["list", "--url", "ftp://x"], "is not an address"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_exit_code_2(
    command: list[str], sentence: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("gateway: ")
    assert sentence in err


def test_a_wrong_setting_is_one_sentence(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_PORT", "many")
    assert main(["list"]) == 1
    assert capsys.readouterr().err == "gateway: GATEWAY_PORT='many' is not a number.\n"


def test_dev_refuses_production(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_ENV", "production")
    assert main(["dev"]) == 1
    assert "is for development" in capsys.readouterr().err


def test_new_makes_a_folder_and_names_the_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "WeatherAgent"]) == 0
    assert main(["new", "labs/Research"]) == 0
    out = capsys.readouterr().out
    assert "the model default/weatheragent" in out
    assert "the model labs/research" in out
    assert "Next: gateway dev" in out
    compile((home / "src/agents/WeatherAgent/agent.py").read_text(encoding="utf-8"), "agent.py", "exec")
    assert not list(home.rglob("__init__.py"))


def test_new_names_the_command_that_runs_in_this_environment(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_ENV", "production")
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(home / "state"))
    assert main(["new", "Weather"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Next: gateway serve"
    assert main(["new", "Weather", "--path", "some/where"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "Next: gateway serve some/where"


def test_new_makes_the_folder_of_agents_that_is_named(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "Weather", "--path", "some/where"]) == 0
    assert (home / "some/where/Weather/agent.py").is_file()
    assert "gateway dev some/where" in capsys.readouterr().out
    (home / "file").write_text("", encoding="utf-8")
    assert main(["new", "Weather", "--path", "file/below"]) == 1
    assert "file/below cannot be made" in capsys.readouterr().err


def test_keys_are_those_of_the_gateway_that_runs_and_the_command_says_whose(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GATEWAY_ENV", "GATEWAY_STATE_DIR", "GATEWAY_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(home / "data"))
    monkeypatch.setattr(sys, "platform", "linux")
    served = replace(Settings.from_env(), environment="production")

    def made(name: str) -> tuple[bool, bool, str]:
        assert main(["keys", "create", name]) == 0
        assert main(["keys", "list"]) == 0
        shown = capsys.readouterr()
        files = [settings.state_folder() / DATABASE_FILE for settings in (Settings.from_env(), served)]
        return files[0].exists(), files[1].exists(), shown.err

    with announce(served, "http://127.0.0.1:8000"):
        assert made("alice")[:2] == (False, True), "gateway serve runs: its keys"
        assert "production; GATEWAY_ENV=development chooses the other" in made("bob")[2]
        with announce(Settings.from_env(), "http://127.0.0.1:8001"):
            assert made("carol")[:2] == (True, True), "gateway dev runs here: its keys"
    assert "development; GATEWAY_ENV=production chooses the other" in made("dora")[2]
    monkeypatch.setenv("GATEWAY_ENV", "production")
    assert "(production" in made("dora")[2]


def test_new_overwrites_nothing_and_refuses_a_taken_model(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "Weather"]) == 0
    before = (home / "src/agents/Weather/agent.py").read_text(encoding="utf-8")
    assert main(["new", "Weather"]) == 1
    assert main(["new", "wea-ther"]) == 0
    assert main(["new", "Wea_Ther"]) == 1
    err = capsys.readouterr().err
    assert "exists already" in err
    assert "is the model default/wea-ther already" in err
    assert (home / "src/agents/Weather/agent.py").read_text(encoding="utf-8") == before


def test_keys_create_prints_a_stanza_that_security_yaml_accepts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(
            [
                *("keys", "create", "alice", "--yaml", "--allow", "default/*", "--allow", "labs/a", "--admin"),
                *(
                    "--expires",
                    "2031-05-01",
                    "--profile",
                    "openwebui",
                    "--description",
                    'zoë: "x"',
                    "--cost-per-day",
                    "5",
                ),
            ]
        )
        == 0
    )
    out = capsys.readouterr().out
    key = next(line.strip() for line in out.splitlines() if line.strip().startswith("sk-gw-"))
    stanza = out[out.index("  - id") :]
    assert key not in stanza
    file = home / "security.yaml"
    file.write_text(f"api_keys:\n{stanza}", encoding="utf-8")
    (entry,) = load_yaml(file, SecurityConfig).api_keys
    assert entry.hashed_key == hashlib.sha256(key.encode()).hexdigest()
    assert entry.allow_agents == ["default/*", "labs/a"]
    assert set(entry.scopes) == {"chat", "admin"}
    assert str(yaml.safe_load(stanza)[0]["expires_at"]) == "2031-05-01"
    assert (entry.profile, entry.description, entry.allow_tools) == ("openwebui", 'zoë: "x"', None)
    assert entry.limits == Limits(cost_per_day_usd=5)
    assert not (home / ".gateway").exists() and not (home / "src/.gateway").exists(), "nothing is stored"


def test_two_new_keys_differ(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = set()
    for _ in range(2):
        assert main(["keys", "create", "x", "--yaml"]) == 0
        keys |= {word for word in capsys.readouterr().out.split() if word.startswith("sk-gw-")}
    assert len(keys) == 2


def test_version_names_what_runs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {
        "agent-gateway",
        "python",
        "openai-agents",
        "openai",
    }


def test_doctor_is_content_with_a_fresh_agent(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "Weather"]) == 0
    os.environ["GATEWAY_PORT"] = "18431"
    assert main(["doctor"]) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()[2:]
    assert all(line.startswith("ok ") for line in lines)
    assert any("openai-agents" in line for line in lines)


def test_doctor_finds_a_stray_init_file(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "Weather"]) == 0
    (home / "src/agents/__init__.py").touch()
    assert main(["doctor"]) == 1
    assert "delete it" in capsys.readouterr().out


def test_doctor_names_a_wrong_configuration(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = home / "src" / "config"
    config.mkdir(parents=True)
    (config / "upstreams.yaml").write_text("upstreams:\n  - nam: x\n", encoding="utf-8")
    assert main(["doctor"]) == 1
    assert "FAIL  upstreams: upstreams.yaml:2: unknown key 'nam'; did you mean 'name'?" in capsys.readouterr().out


def test_doctor_says_what_a_jail_needs(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = home / "src" / "config"
    config.mkdir(parents=True)
    (config / "tools.yaml").write_text("tools:\n  - {name: sh, provider: shell}\n", encoding="utf-8")
    monkeypatch.setenv("PATH", str(config))
    assert main(["doctor"]) == 1
    wanted = "'bwrap' is not installed. Install the package 'bubblewrap'"
    assert f"FAIL  tools: sh: {wanted}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GATEWAY_BUDGET_ALERT_URL", "ftp://x"),
        ("GATEWAY_BUDGET_ALERT_URL", "http://[::1"),
        ("GATEWAY_BUDGET_ALERT_URL", "http://127.0.0.1:99999/x"),
        ("GATEWAY_BUDGET_ALERT_URL", "http://me:word@127.0.0.1/x"),
        ("GATEWAY_CORS_ORIGINS", "app.example"),
        ("GATEWAY_DATABASE_URL", "mysql://x"),
        ("GATEWAY_KEY_PEPPER", "short"),
        ("GATEWAY_LIMITS_STORE", "redis"),
        ("GATEWAY_READY_NEEDS", "redis"),
        ("GATEWAY_REDIS_URL", "somewhere"),
        ("GATEWAY_TLS_CERT", "/nowhere.pem"),
        ("GATEWAY_TRACES", "2"),
        ("GATEWAY_TRUSTED_HOSTS", "a/b"),
        ("GATEWAY_TRUSTED_PROXIES", "a-proxy"),
    ],
)
def test_doctor_refuses_what_a_start_refuses(
    name: str, value: str, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["new", "Weather"]) == 0
    monkeypatch.setenv("GATEWAY_BUDGET_ALERT_SECRET", "shh")
    monkeypatch.setenv(name, value)
    assert main(["doctor"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1 and name.removesuffix("_CERT") in failed[0]


def test_a_state_folder_that_cannot_be_written_to_is_one_sentence(home: Path) -> None:
    (home / "file").touch()
    settings = Settings(state_dir=home / "file" / "state")
    with pytest.raises(CliError, match="set GATEWAY_STATE_DIR"), announce(settings, "http://127.0.0.1:1"):
        pass


@pytest.mark.parametrize("url", ["http://127.0.0.1:ab", "http://127.0.0.1:99999", "http://[::1", "http://", "ftp://x"])
@pytest.mark.parametrize("command", ["list", "health", "health --providers", "tools list"])
def test_what_is_no_address_is_one_sentence(
    command: str, url: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command.split(), "--url", url]) == 2
    assert capsys.readouterr().err == f"gateway: {url} is not an address; write http://HOST:PORT.\n"


def test_the_state_file_lives_as_long_as_the_gateway(home: Path) -> None:
    settings = Settings(agent_path=home / "agents")
    assert find_running(settings) is None
    with announce(settings, "http://127.0.0.1:1"):
        running = find_running(settings)
        assert running is not None
        assert (running.pid, running.url) == (os.getpid(), "http://127.0.0.1:1")
    assert not state_file(settings).exists()


@pytest.mark.parametrize("text", ["", "{", '{"pid": 1}', '{"pid": "x", "url": "y"}', "[]"])
def test_a_broken_state_file_counts_as_none(text: str, home: Path) -> None:
    settings = Settings(agent_path=home / "agents")
    state_file(settings).parent.mkdir(parents=True)
    state_file(settings).write_text(text, encoding="utf-8")
    assert find_running(settings) is None


def test_the_state_of_a_gateway_that_was_killed_counts_as_none(home: Path) -> None:
    settings = Settings(agent_path=home / "agents")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    state_file(settings).parent.mkdir(parents=True)
    state_file(settings).write_text(f'{{"pid": {ended.pid}, "url": "http://127.0.0.1:1"}}', encoding="utf-8")
    assert find_running(settings) is None


def test_settings_survive_the_way_into_the_inspecting_process() -> None:
    settings = Settings(
        agent_path=Path("/somewhere"), agent_extra_paths=("a", "b"), openai_api_key="k", run_timeout_s=1.5
    )
    order = offline._Order({name: getattr(settings, name) for name in Settings.__dataclass_fields__}, Path("/x"))
    sent = msgspec.json.encode(order, enc_hook=str)
    received = msgspec.json.decode(sent, type=offline._Order, dec_hook=offline._to_path)
    assert msgspec.convert(received.settings, type=Settings, dec_hook=offline._to_path) == settings


def banner(settings: Settings, *entries: AgentEntry) -> str:
    async def render() -> str:
        async with open_upstreams(load_upstreams(settings, {})) as upstreams:
            routes = Router(Metrics()).build(upstreams.table)
            snapshot = Snapshot(1, Registry.build(entries), upstreams.table, Keyring.load(settings), routes)
            return render_banner(settings, URL, snapshot)

    return asyncio.run(render())


def entry(name: str, **changes: Any) -> AgentEntry:
    row = AgentEntry(
        id=f"default/{name}",
        namespace="default",
        name=name,
        display_name=name,
        kind="sdk",
        source="file",
        created=0,
        executor=NoExecutor(),
        description=f"Says {name}.",
    )
    return replace(row, **changes)


class NoExecutor:
    def execute(self, run: Any) -> AsyncIterator[RunEvent]:
        raise NotImplementedError


URL = "http://127.0.0.1:8000"


def test_the_banner_holds_what_can_be_pasted(home: Path) -> None:
    text = banner(Settings(agent_path=home / "agents", agent_auto_reload=True), entry("a"))
    assert "  default/a  Says a.\n  demo/demo\n" in text
    for line in (
        *curl(URL, "dev-secret", "default/a").splitlines(),
        "Watching agents",
        "Key: dev-secret",
        "demo model",
    ):
        assert line in text
    compile(python(URL, "dev-secret", "default/a"), "snippet", "exec")


def test_the_banner_names_what_is_broken_and_leaves_out_what_is_hidden(home: Path) -> None:
    problem = Diagnostic(kind="import", code="syntax_error", message="No.", fix="Mend it.", file="Bad/agent.py", line=3)
    text = banner(
        Settings(agent_path=home / "agents"),
        entry("bad", executor=None, status="error", diagnostics=(problem,)),
        entry("hidden", options=AgentOptions(expose=False)),
    )
    assert "Broken\n  default/bad: Bad/agent.py:3: No. Mend it.\n" in text
    assert "default/hidden" not in text


def test_the_banner_without_agents_says_how_to_make_one(home: Path) -> None:
    assert "`gateway new Hello`" in banner(Settings())


def test_what_the_banner_says_to_make_is_served_by_the_gateway_that_says_it(home: Path) -> None:
    """Another folder than the usual one: without --path the agent would stand where nobody looks."""
    mine = home / "my agents"
    mine.mkdir()
    text = banner(Settings(agent_path=mine))
    command = next(line for line in text.splitlines() if "gateway new Hello" in line).split("`")[1]
    assert main(shlex.split(command)[1:]) == 0
    assert (mine / "Hello" / "agent.py").is_file()


def test_the_banner_never_prints_a_key_of_the_operator(home: Path) -> None:
    config = home / "config"
    config.mkdir()
    (config / "security.yaml").write_text("api_keys: []\n", encoding="utf-8")
    text = banner(Settings(agent_path=home / "agents", api_key="sk-secret-of-mine"))
    assert "sk-secret-of-mine" not in text
    assert "Bearer YOUR_KEY" in text
