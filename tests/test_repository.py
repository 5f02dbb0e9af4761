"""The files around the code: container, compose, CI script, helper scripts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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


def test_compose_publishes_on_loopback_only_and_demands_a_key() -> None:
    (service,) = yaml.safe_load((ROOT / "docker-compose.yaml").read_text(encoding="utf-8"))["services"].values()
    assert service["ports"] == ["127.0.0.1:8000:8000"]
    assert service["environment"]["GATEWAY_API_KEY"].startswith("${GATEWAY_API_KEY:?")
    assert service["read_only"] is True


@pytest.mark.skipif(os.name == "nt", reason="file modes")
def test_scripts_are_executable_and_stop_at_the_first_failure() -> None:
    for name in (".ci/run", "scripts/lock.sh"):
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
