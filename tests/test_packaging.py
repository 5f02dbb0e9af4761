"""The wheel: exactly four packages, defaults as data, and it runs from an empty folder after an ordinary install."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from gateway import __version__
from tests.support.http import HttpClient
from tests.support.server import free_port, stop
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"api", "gateway", "gateway_cli", "sdk_adapter"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it; what the wheel requires is borrowed from the running one by a .pth."""
    home = tmp_path_factory.mktemp("installed")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    scheme = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", scheme))
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--target", site, wheel)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib"), encoding="utf-8")
    return home


def run(*command: object, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        check=False,
        env={name: os.environ[name] for name in os.environ if name != "PYTHONPATH"},
        **options,  # type: ignore[call-overload]
    )
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def python(home: Path) -> Path:
    return home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def test_the_wheel_holds_exactly_our_packages(wheel: Path) -> None:
    """Never `agents`: a wheel with that name in it would install into the SDK."""
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {*ROOMS, f"agent_gateway-{__version__}.dist-info"}
    assert {"gateway/defaults/security.yaml", "gateway/defaults/agents.yaml", "gateway/py.typed"} <= set(names)
    assert "gateway/samples/Hello/agent.py" in names
    assert not [name for name in names if re.search(r"__pycache__|\.local\.|ruff", name)]


def test_every_default_configuration_is_in_the_wheel(wheel: Path) -> None:
    """The wheel names its data file by file; a new default must be named too."""
    packed = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("gateway/defaults/")}
    tracked = run("git", "ls-files", "src/config", cwd=ROOT).stdout.split()
    assert packed == {Path(name).name for name in tracked}


def test_the_wheel_says_what_it_needs(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(f"agent_gateway-{__version__}.dist-info/METADATA").decode()
    assert "Requires-Python: >=3.11" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    scripts = archive.read(f"agent_gateway-{__version__}.dist-info/entry_points.txt").decode()
    assert "gateway = gateway_cli.main:main" in scripts
    assert f"agent_gateway-{__version__}.dist-info/licenses/LICENSE" in archive.namelist()


@pytest.mark.slow
def test_the_installed_command_serves_a_folder_from_anywhere(installed: Path, tmp_path: Path) -> None:
    agents = tmp_path / "my agents"
    work = tmp_path / "elsewhere"
    work.mkdir()
    command = [str(python(installed)), "-m", "gateway_cli"]
    assert f"agent-gateway {__version__}" in run(*command, "version", cwd=work).stdout
    agents.mkdir()
    assert "default/weather" in run(*command, "new", "Weather", "--path", agents, cwd=work).stdout

    port = free_port()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [*command, "dev", str(agents), "--port", str(port)],
            cwd=work,
            env={name: os.environ[name] for name in os.environ if name != "PYTHONPATH"} | {"PYTHONUNBUFFERED": "1"},
            stdout=log,
            stderr=log,
        )
    try:
        client = HttpClient(port, key="dev-secret")

        def answers() -> bool:
            assert process.poll() is None, (tmp_path / "log").read_text(encoding="utf-8")
            try:
                return client.get("/readyz").status == 200
            except OSError:
                return False

        wait_for(answers, timeout_s=40, what="the installed gateway is ready")
        assert "default/weather" in {model["id"] for model in client.get("/v1/models").json()["data"]}
        listed = run(*command, "list", "--path", agents, "--json", cwd=work).stdout
        assert [agent["name"] for agent in json.loads(listed)["agents"]] == ["default/weather"]
    finally:
        stop(process)
    assert not (tmp_path / ".gateway" / "gateway.json").exists()


def test_the_locks_pin_everything_with_hashes_and_name_no_index() -> None:
    for name in ("requirements.txt", "requirements-dev.txt"):
        text = (ROOT / name).read_text(encoding="utf-8")
        entries = re.findall(r"^[A-Za-z0-9][^\n]*(?:\n    --hash[^\n]*)*", text, re.MULTILINE)
        assert entries
        assert [entry for entry in entries if "==" not in entry or "--hash=sha256:" not in entry] == []
        assert not re.search(r"https?://|--index-url|--find-links|file:", text)


def test_the_locks_agree_and_cover_what_the_project_declares() -> None:
    locks = {name: pins(ROOT / name) for name in ("requirements.txt", "requirements-dev.txt")}
    assert locks["requirements.txt"].items() <= locks["requirements-dev.txt"].items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for lock, declared in (
        ("requirements.txt", project["project"]["dependencies"]),
        ("requirements-dev.txt", project["dependency-groups"]["dev"]),
    ):
        names = {re.split(r"[^A-Za-z0-9._-]", line)[0].lower() for line in declared}
        assert names <= set(locks[lock])


def pins(path: Path) -> dict[str, str]:
    found = re.findall(r"^([A-Za-z0-9][\w.-]*)==([^\s;]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {name.lower(): version for name, version in found}


@pytest.mark.slow
def test_the_sbom_is_valid_and_names_every_locked_package(tmp_path: Path) -> None:
    target = tmp_path / "sbom.json"
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "cyclonedx-py environment" in make
    run(
        *(sys.executable, "-m", "cyclonedx_py", "environment", "--pyproject", ROOT / "pyproject.toml"),
        *("--of", "JSON", "--validate", "-o", target, sys.executable),
    )
    document = json.loads(target.read_text(encoding="utf-8"))
    assert document["bomFormat"] == "CycloneDX"
    assert document["metadata"]["component"]["name"] == "agent-gateway"
    listed = {component["name"].lower().replace("_", "-") for component in document["components"]}
    here = {name for name in pins(ROOT / "requirements.txt") if name not in ("pywin32", "httpx2-jsfetch")}
    assert here <= listed
