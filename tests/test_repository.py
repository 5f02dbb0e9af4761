"""The files around the code: container, compose, CI script, helper scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config import Settings
from gateway.upstreams.config import load_upstreams
from gateway_cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]


def test_the_image_copies_what_exists_and_what_the_ignore_file_lets_through() -> None:
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    sources = [
        word for line in re.findall(r"^COPY (?!--from)(.*)$", docker, re.MULTILINE) for word in line.split()[:-1]
    ]
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(encoding="utf-8"), re.MULTILINE)
    assert sources
    for source in sources:
        assert (ROOT / source).exists()
        assert source in allowed


def test_the_image_runs_without_rights_in_production() -> None:
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    last = docker.rpartition("FROM ")[2]
    assert re.search(r"^USER gateway$", last, re.MULTILINE)
    assert "GATEWAY_ENV=production" in last
    assert "HEALTHCHECK" in last
    assert "--require-hashes" in docker


def test_the_image_takes_everything_from_settings_and_stops_by_signal() -> None:
    docker = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    last = docker.rpartition("FROM ")[2]
    known = {name for item in fields(Settings) for name in (item.metadata["env"], *item.metadata["aliases"])}
    assert set(re.findall(r"\bGATEWAY_[A-Z_]+", docker)) <= known
    assert re.search(r"^STOPSIGNAL SIGTERM$", last, re.MULTILINE)
    for kind, words in image_commands().items():
        build_parser().parse_args(words[1:])
        assert words[0] == "gateway", kind


def image_commands() -> dict[str, list[str]]:
    """What the image runs: its CMD and its health check, in the form without a shell."""
    last = (ROOT / "Dockerfile").read_text(encoding="utf-8").rpartition("FROM ")[2]
    lines = re.findall(r"^(?:(HEALTHCHECK) .*)?CMD (\[.*\])$", last, re.MULTILINE)
    found = {kind: json.loads(words) for kind, words in lines}
    assert set(found) == {"", "HEALTHCHECK"}
    return {"CMD": found[""], "HEALTHCHECK": found["HEALTHCHECK"]}


COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yaml").read_text(encoding="utf-8"))


def test_compose_holds_the_gateway_a_demo_upstream_and_what_watches_them() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"gateway", "demo-upstream", "prometheus", "grafana"}
    watching = {name for name, service in services.items() if service.get("profiles") == ["observability"]}
    assert watching == {"prometheus", "grafana"}
    assert services["gateway"]["image"] == services["demo-upstream"]["image"]
    for name in watching:
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", services[name]["image"]), "a release, not `latest`"


def test_compose_publishes_on_loopback_only_and_gives_no_rights() -> None:
    for name, service in COMPOSE["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ())), name
        # Compose copies a secret of the environment into the container, which must be writable then.
        assert service["read_only"] is (name != "prometheus"), name
        assert service["cap_drop"] == ["ALL"]
    assert "ports" not in COMPOSE["services"]["demo-upstream"]


def test_compose_demands_a_key_and_names_only_settings_and_files_that_exist() -> None:
    gateway = COMPOSE["services"]["gateway"]
    assert gateway["environment"]["GATEWAY_API_KEY"].startswith("${GATEWAY_API_KEY:?")
    known = {name for item in fields(Settings) for name in (item.metadata["env"], *item.metadata["aliases"])}
    for service in (gateway, COMPOSE["services"]["demo-upstream"]):
        assert {name for name in service["environment"] if name.startswith("GATEWAY_")} <= known
    for name, service in COMPOSE["services"].items():
        for source, *_ in (volume.split(":") for volume in service.get("volumes", ())):
            assert (ROOT / source).is_dir() if source.startswith(".") else source in COMPOSE["volumes"], (name, source)


def test_compose_gives_the_gateway_the_time_that_it_takes_to_end() -> None:
    gateway = COMPOSE["services"]["gateway"]
    drain = float(gateway["environment"]["GATEWAY_SHUTDOWN_DRAIN_S"].partition(":-")[2].rstrip("}"))
    assert drain == Settings().drain_s
    assert int(gateway["stop_grace_period"].rstrip("s")) >= drain + 5


def test_the_upstream_of_compose_is_the_demo_service() -> None:
    services = COMPOSE["services"]
    file = ROOT / "deploy/compose/upstreams.yaml"
    assert services["gateway"]["environment"]["GATEWAY_UPSTREAM_CONFIG"].endswith(f"/srv/compose/{file.name}}}")
    key = services["gateway"]["environment"]["DEMO_UPSTREAM_KEY"]
    assert key == services["demo-upstream"]["environment"]["GATEWAY_API_KEY"]
    (sandbox,) = load_upstreams(Settings(upstream_config=file), {"DEMO_UPSTREAM_KEY": key}).upstreams
    assert sandbox.base_url == "http://demo-upstream:8000/v1"
    with_openai = load_upstreams(
        Settings(upstream_config=file, openai_api_key="sk-x"), {"DEMO_UPSTREAM_KEY": key}
    ).upstreams
    assert [item.name for item in with_openai] == ["openai", "sandbox"]


def test_the_windows_script_does_what_make_run_does() -> None:
    script = (ROOT / "scripts/dev-server.ps1").read_text(encoding="utf-8")
    assert "/" not in "".join(re.findall(r"\.venv\S*", script)), "paths are Windows' own"
    (arguments,) = re.findall(r"\$arguments = @\((.*)\)", script)
    words = [word.strip().strip('"').replace("$Port", "8000") for word in arguments.split(",")]
    assert words[:2] == ["-m", "gateway_cli"]
    build_parser().parse_args([*words[2:], "src/agents"])
    assert script.count("$LASTEXITCODE -ne 0") == 3, "a program that fails stops the script"
    assert "--require-hashes -r requirements.txt" in script


@pytest.mark.skipif(os.name == "nt", reason="file modes")
def test_scripts_are_executable_and_stop_at_the_first_failure() -> None:
    for name in (".ci/run", "scripts/lock.sh", "scripts/release.sh"):
        path = ROOT / name
        assert os.access(path, os.X_OK), name
        assert "set -euo pipefail" in path.read_text(encoding="utf-8")


@pytest.fixture
def agents(tmp_path: Path) -> Path:
    for name, needs in {"Weather": "six==1.17.0\n", "labs/Research": "# nothing yet\n"}.items():
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "agent.py").touch()
        (folder / "requirements.txt").write_text(needs, encoding="utf-8")
    (tmp_path / "Plain").mkdir()
    (tmp_path / "Plain" / "agent.py").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "requirements.txt").write_text("never==1\n", encoding="utf-8")
    return tmp_path


def install(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/install_agent_deps.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_dependencies_of_agents_are_shown_before_anything_is_installed(agents: Path) -> None:
    every = install("--root", agents, "--dry-run")
    assert every.returncode == 0
    assert "six==1.17.0" in every.stdout
    assert "Research" in every.stdout
    assert "never" not in every.stdout

    one = install("--root", agents, "--agent", "labs/Research", "--dry-run")
    assert "six" not in one.stdout


def test_an_agent_without_requirements_is_refused_by_name(agents: Path) -> None:
    done = install("--root", agents, "--agent", "Plain", "--dry-run")
    assert done.returncode == 2
    assert "no requirements.txt for Plain" in done.stderr


def test_installing_holds_the_gateway_s_own_versions(agents: Path) -> None:
    """An agent that wants another version of what the gateway runs on is refused by pip, and nothing is installed."""
    (agents / "Weather" / "requirements.txt").write_text("packaging==1.0\n", encoding="utf-8")
    done = install("--root", agents, "--agent", "Weather")
    assert done.returncode != 0
