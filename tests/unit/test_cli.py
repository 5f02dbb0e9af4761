"""The command line without a gateway: what it prints, and how it refuses."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import shlex
import socket
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


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("routing.yaml", "models: {smart: {targets: [{model: no/x}]}}", "FAIL  routing: routing.yaml: models: 'smart'"),
        ("prices.yaml", "models: x", "FAIL  prices: prices.yaml:1: models:"),
        ("cache.yaml", "modles: []", "FAIL  cache: cache.yaml:1: unknown key 'modles'; did you mean 'models'?"),
        ("agents.yaml", "agents: [{nam: x}]", "FAIL  agents.yaml: agents.yaml:1: unknown key 'nam'"),
    ],
)
def test_doctor_reads_every_file_that_a_start_reads(
    file: str, text: str, said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = home / "src" / "config"
    config.mkdir(parents=True)
    (home / "src/agents").mkdir()
    (config / file).write_text(text, encoding="utf-8")
    assert main(["doctor"]) == 1
    (failed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed.startswith(said)


def test_doctor_says_each_trouble_once(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = home / "src" / "config"
    config.mkdir(parents=True)
    (home / "src/agents").mkdir()
    (config / "upstreams.yaml").write_text("upstreams: x", encoding="utf-8")
    assert main(["doctor"]) == 1
    (failed,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert failed.startswith("FAIL  upstreams:")


def test_doctor_names_a_variable_that_is_no_setting(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GATEWAY_PROT", "8001")
    main(["doctor"])
    assert "GATEWAY_PROT is no setting (did you mean GATEWAY_PORT?)" in capsys.readouterr().out


def test_doctor_says_where_nothing_can_be_kept(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "state").write_text("")
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(home / "state"))
    assert main(["doctor"]) == 1
    assert "state cannot be written to; set GATEWAY_STATE_DIR" in capsys.readouterr().out


def test_doctor_counts_the_keys_of_the_database(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "src/agents").mkdir(parents=True)
    monkeypatch.setenv("GATEWAY_ENV", "production")
    monkeypatch.setenv("GATEWAY_STATE_DIR", str(home / "state"))
    assert main(["doctor"]) == 1 and "FAIL  keys: No usable API key" in capsys.readouterr().out
    with monkeypatch.context() as peppered:
        peppered.setenv("GATEWAY_KEY_PEPPER", "p" * 40)
        assert main(["keys", "create", "alice"]) == 0
        capsys.readouterr()
        assert main(["doctor"]) == 0
        assert "; 1 stored key\n" in capsys.readouterr().out
    assert main(["doctor"]) == 1
    assert "FAIL  keys: GATEWAY_KEY_PEPPER is not set" in capsys.readouterr().out
    assert main(["keys", "create", "bob"]) == 0
    assert "this one works without" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["doctor"], ["usage"], ["keys", "list"]])
def test_a_database_that_does_not_answer_is_said_in_one_sentence(
    command: list[str], home: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "src/agents").mkdir(parents=True)
    monkeypatch.setenv("GATEWAY_DATABASE_URL", f"postgresql://me:hidden@127.0.0.1:{_free_port()}/gateway")
    assert main(command) == 1
    out, err = capfd.readouterr()
    lines = [line for line in (out + err).splitlines() if not line.startswith("ok ")]
    assert len(lines) == 1 and "The database does not answer (" in lines[0] and "Connection refused" in lines[0]
    assert "hidden" not in out + err


def test_an_entry_is_printed_though_the_file_is_wrong(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = home / "src" / "config"
    config.mkdir(parents=True)
    (home / "src/agents").mkdir()
    (config / "security.yaml").write_text("api_keys: [{id: alice, hashed_key: …}]\n", encoding="utf-8")
    assert main(["keys", "create", "bob", "--yaml"]) == 0
    out, err = capsys.readouterr()
    assert "hashed_key:" in out and "Mend the file as well: security.yaml: hashed_key of 'alice'" in err
    assert main(["keys", "create", "bob"]) == 1


def test_a_gateway_in_production_is_pointed_at(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "src/agents").mkdir(parents=True)
    monkeypatch.setenv("XDG_DATA_HOME", str(home))
    monkeypatch.setattr(sys, "platform", "linux")
    with announce(replace(Settings(), environment="production"), "http://127.0.0.1:8123"):
        assert main(["list"]) == 0
        assert "(not asked: `gateway serve` at http://127.0.0.1:8123; --url asks it)" in capsys.readouterr().out
        assert main(["tools", "list"]) == 1
        assert "`gateway serve` answers at http://127.0.0.1:8123; name it with --url." in capsys.readouterr().err


def test_list_says_where_an_agent_is_broken(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new", "Weather"]) == 0
    (home / "src/agents/Weather/agent.py").write_text("agent = (\n")
    (home / "src/config").mkdir()
    (home / "src/config/agents.yaml").write_text("agents: [{nam: x}]\n")
    assert main(["list"]) == 1
    said = capsys.readouterr().out
    assert "Weather/agent.py:1: Python cannot read this line" in said
    assert "         agents.yaml:1: unknown key 'nam'; did you mean 'name'? Correct" in said


@pytest.mark.parametrize(
    ("cert", "key", "said"),
    [
        ("no.pem", "no.key", "GATEWAY_TLS_CERT: no.pem cannot be read (No such file or directory)."),
        ("empty.pem", "no.key", "GATEWAY_TLS_KEY: no.key cannot be read (No such file or directory)."),
        ("empty.pem", "empty.pem", "The certificate of empty.pem and empty.pem (GATEWAY_TLS_CERT, GATEWAY_TLS_KEY)"),
    ],
)
def test_the_file_of_a_certificate_that_cannot_be_used_is_named(
    cert: str, key: str, said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "empty.pem").touch()
    assert main(["serve", "--tls-cert", cert, "--tls-key", key]) == 1
    assert said in capsys.readouterr().err


def test_an_address_of_another_machine_is_said(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for host in ("192.0.2.1", "nowhere.invalid"):
        assert main(["dev", "--host", host]) == 1
        assert f"Cannot listen on {host}:8000: it is no address of this machine" in capsys.readouterr().err


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


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


@pytest.mark.parametrize("command", ["list", "health", "health --ready", "health --providers", "tools list"])
def test_a_gateway_that_does_not_answer_is_one_sentence(
    command: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"http://127.0.0.1:{_free_port()}"
    assert main([*command.split(), "--url", url]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("gateway: ") and url in line and "Connection refused" in line


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
