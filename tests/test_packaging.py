"""The wheel: exactly four packages, defaults as data, and it runs from an empty folder after an ordinary install."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from cyclonedx.schema import OutputFormat, SchemaVersion
from cyclonedx.validation import make_schemabased_validator
from packaging.requirements import Requirement

from gateway import __version__
from scripts.sbom import add_hashes, hashes_of, of_environment
from tests.support.http import HttpClient
from tests.support.server import free_port, stop
from tests.support.waiting import wait_for
from tests.test_repository import image_commands

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

        wait_for(answers, what="the installed gateway is ready")
        assert "default/weather" in {model["id"] for model in client.get("/v1/models").json()["data"]}
        listed = run(*command, "list", "--path", agents, "--json", cwd=work).stdout
        assert [agent["name"] for agent in json.loads(listed)["agents"]] == ["default/weather"]
    finally:
        stop(process)
    assert not (tmp_path / ".gateway" / "gateway.json").exists()


class Stranger:
    """A user without rights, who runs the installed command in an empty folder, as the image does.

    Root becomes one, where that one may read this Python; anybody else is one.
    """

    def __init__(self, home: Path, interpreter: Path) -> None:
        self.home, self.interpreter = home, interpreter
        self.options: dict[str, Any] = {}
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            nobody = {"user": 65534, "group": 65534, "extra_groups": []}
            with suppress(PermissionError):
                subprocess.run([str(interpreter), "-c", "import encodings"], check=True, **nobody)
                shutil.chown(home, 65534, 65534)
                self.options = nobody

    def environment(self, **env: str) -> dict[str, str]:
        """The image's own, with this machine's folders and port."""
        docker = (ROOT / "Dockerfile").read_text(encoding="utf-8").rpartition("FROM ")[2]
        image = dict(re.findall(r"\b(GATEWAY_[A-Z_]+|PYTHONUNBUFFERED)=([^\s\\]+)", docker))
        folders = {"GATEWAY_AGENT_DISCOVERY_PATH": "agents", "GATEWAY_STATE_DIR": "state"}
        assert folders.keys() <= image.keys()
        here = {name: str(self.home / folder) for name, folder in folders.items()}
        return {"PATH": os.environ["PATH"], **image, **here, "GATEWAY_HOST": "127.0.0.1", **env}

    def run(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [str(self.interpreter), "-m", "gateway_cli", *words]
        return subprocess.run(
            command,
            cwd=self.home,
            env=self.environment(**env),
            capture_output=True,
            text=True,
            check=False,
            **self.options,
        )

    @contextmanager
    def serving(self, words: list[str], **env: str) -> Iterator[tuple[HttpClient, subprocess.Popen[bytes]]]:
        port = free_port()
        env |= {"GATEWAY_PORT": str(port)}
        with (self.home.parent / f"{port}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(self.interpreter), "-m", "gateway_cli", *words],
                cwd=self.home,
                env=self.environment(**env),
                stdout=log,
                stderr=log,
                **self.options,
            )

        def is_well() -> bool:
            assert process.poll() is None, (self.home.parent / f"{port}.log").read_text(encoding="utf-8")
            with suppress(OSError):
                return client.get("/readyz").status == 200
            return False

        client = HttpClient(port, key=env["GATEWAY_API_KEY"])
        try:
            wait_for(is_well, what="the image's command serves")
            assert self.run(*image_commands()["HEALTHCHECK"][1:], **env).returncode == 0
            yield client, process
        finally:
            stop(process)
        assert self.run("health", **env).returncode == 1


@pytest.fixture
def stranger(installed: Path) -> Iterator[Stranger]:
    """With the environment where everybody may read it, as pytest's own folders are not."""
    with tempfile.TemporaryDirectory(prefix="image-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(installed, folder / "opt", symlinks=True)
        (folder / "srv").mkdir()
        found = Stranger(folder / "srv", python(folder / "opt"))
        assert found.run("version").returncode == 0
        yield found


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="the image is a Linux one")
def test_the_images_command_serves_the_stack_of_compose_without_rights(stranger: Stranger) -> None:
    """The image's CMD and health check; the services `gateway` and `demo-upstream`, as Compose starts them."""
    services = yaml.safe_load((ROOT / "docker-compose.yaml").read_text(encoding="utf-8"))["services"]
    words = image_commands()["CMD"][1:]
    with stranger.serving(words, **services["demo-upstream"]["environment"] | {"GATEWAY_STATE_DIR": "up"}) as (
        model,
        _,
    ):
        for folder in ("agents", "config"):
            shutil.copytree(ROOT / "src" / folder, stranger.home / folder, ignore=shutil.ignore_patterns("__pycache__"))
        upstreams = (ROOT / "deploy/compose/upstreams.yaml").read_text(encoding="utf-8")
        file = stranger.home / "upstreams.yaml"
        file.write_text(upstreams.replace("demo-upstream:8000", f"127.0.0.1:{model.port}"), encoding="utf-8")
        env = {
            "GATEWAY_UPSTREAM_CONFIG": str(file),
            "DEMO_UPSTREAM_KEY": services["gateway"]["environment"]["DEMO_UPSTREAM_KEY"],
            "GATEWAY_API_KEY": "sk-admin",
            "GATEWAY_METRICS_TOKEN": "sk-metrics",
            "GATEWAY_WORKERS": "2",
        }
        with stranger.serving(words, **env) as (client, process):
            assert client.get("/v1/models", key="dev-secret").status == 401
            expected = {"default/hello", "sandbox/demo/demo"}

            def listed() -> bool:
                """Whether each worker lists them: it loads the agents for itself, and any of them answers."""
                answers = client.ask_each_worker(2, "GET", "/v1/models").values()
                return all(expected <= {model["id"] for model in answer.json()["data"]} for answer in answers)

            wait_for(listed, what="the agent and the upstream's model are listed")
            question = {"messages": [{"role": "user", "content": "How do people greet in Paris?"}], "stream": True}
            for name in ("default/hello", "sandbox/demo/demo"):
                answer = client.post("/v1/chat/completions", {"model": name, **question})
                assert answer.status == 200, answer.body
                assert answer.body.count(b"data: ") > 3
                assert answer.body.rstrip().endswith(b"data: [DONE]")
            counted = re.compile(
                rb"^agent_gateway_upstream_requests_total\{(?=.*sandbox)(?=.*200).* 3(\.0)?$", re.MULTILINE
            )
            wait_for(  # a worker tells of its counts a little later
                lambda: counted.search(client.get("/metrics/prometheus", key="sk-metrics").body),
                what="the three model calls are counted: two of the agent, one of the client",
            )
            database = stranger.home / "state" / "gateway.db"
            wait_for(database.exists, what="the ledger has written")
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0


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
def test_the_sbom_is_valid_and_names_every_locked_package() -> None:
    """Of the environment the tests run in; `make sbom` asks the same of one that holds the runtime alone."""
    lock = (ROOT / "requirements-dev.txt").read_text(encoding="utf-8")
    document = of_environment(Path(sys.executable))
    strangers = add_hashes(document, hashes_of(lock))  # what somebody installed beside the lock
    assert not {name.split()[0] for name in strangers} & pins(ROOT / "requirements-dev.txt").keys()
    text = json.dumps(document)
    assert make_schemabased_validator(OutputFormat.JSON, SchemaVersion.V1_6).validate_str(text) is None
    assert document["metadata"]["component"]["name"] == "agent-gateway"
    listed = {re.sub(r"[-_.]+", "-", item["name"]).lower(): item for item in document["components"]}
    here = {
        Requirement(line).name.lower()
        for line in re.findall(r"^([A-Za-z0-9][^\n\\]*==[^\n\\]*)", lock, re.MULTILINE)
        if (marker := Requirement(line).marker) is None or marker.evaluate()
    }
    assert here <= set(listed)
    for name in here:
        references = listed[name]["externalReferences"]
        hashes = [item["content"] for found in references for item in found.get("hashes", ())]
        assert hashes, name
        assert all(content in lock for content in hashes)
