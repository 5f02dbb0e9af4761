"""What operators and maintainers run: workflows, make targets, the release script, the load test, the SBOM script."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.sbom import add_hashes, hashes_of

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yaml"))
MAKEFILE_TEXT = (ROOT / "Makefile").read_text(encoding="utf-8")
TARGETS = re.findall(r"^([a-z-]+):", MAKEFILE_TEXT, re.MULTILINE)
PROMISED = (
    *("run", "install", "install-dev", "fmt", "lint", "types", "test", "test-acceptance", "coverage", "smoke"),
    *("wheel", "sbom", "audit", "docker-build", "release", "lock", "docs", "load", "bench"),
)


def test_every_promised_target_is_there_explained_and_does_something() -> None:
    assert set(PROMISED) <= set(TARGETS)
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rules = dict(re.findall(r"^([a-z-]+):(.*\n(?:\t.*\n)*)", MAKEFILE_TEXT, re.MULTILINE))
    for target in PROMISED:
        assert re.search(rf"^{target} +\S", shown, re.MULTILINE), f"make help does not say what {target} does"
        needs, *recipe = rules[target].splitlines()
        assert recipe or needs.partition("##")[0].strip(), f"{target} does nothing"
    phony = re.findall(r"[a-z-]+", re.findall(r"^\.PHONY:((?:.*\\\n)*.*)$", MAKEFILE_TEXT, re.MULTILINE)[0])
    assert set(phony) == set(TARGETS)


def test_the_parts_of_a_release_are_steps_that_make_knows() -> None:
    script = (ROOT / "scripts/release.sh").read_text(encoding="utf-8")
    called = {word for line in re.findall(r"\bmake --no-print-directory ([a-z -]+)", script) for word in line.split()}
    assert called == {"lint", "types", "test", "wheel", "sbom", "docker-build"}
    assert called <= set(TARGETS)


def test_the_promised_suites_exist() -> None:
    """Suites over registries, the SDK adapter, tools, security, streaming, routes; the smoke test by its name."""
    suites = {
        "registries": ("unit/test_registry.py", "unit/test_loader.py"),
        "SDK adapter": ("unit/test_executor.py", "unit/test_translation.py"),
        "tool manager": ("unit/test_tools_config.py", "e2e/test_tools.py"),
        "security manager": ("unit/test_keys.py", "unit/test_acl.py"),
        "streaming helpers": ("unit/test_sse.py", "e2e/test_stream_wire.py"),
        "API routes": ("e2e/test_every_route.py", "unit/test_admin.py"),
        "smoke": ("test_smoke_gateway.py",),
    }
    for name, files in suites.items():
        for file in files:
            assert "def test_" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name
    assert (ROOT / "tests/fixtures/dropin_agents").is_dir()
    assert "tests/test_smoke_gateway.py" in MAKEFILE_TEXT


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items():
            for step in job.get("steps", ()):
                yield f"{path.name}: {name}", step


def test_workflows_call_targets_and_files_that_exist() -> None:
    called = set()
    for where, step in steps():
        assert ("run" in step) != ("uses" in step), where
        for target in re.findall(r"\bmake (?:--\S+ )*([a-z-]+)", step.get("run", "")):
            assert target in TARGETS, f"{where} calls make {target}"
            called.add(target)
        for name in re.findall(r"(?:scripts|deploy)/[\w./-]*\w", step.get("run", "")):
            assert (ROOT / name).exists(), f"{where} names {name}"
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w./-]+@v\d+", step["uses"]), f"{where}: {step['uses']} is not pinned"
    assert {"lint", "types", "coverage", "test-acceptance", "audit", "docker-build", "sbom", "release"} <= called


def workflow(name: str) -> dict[str, Any]:
    found: dict[Any, Any] = yaml.safe_load((ROOT / ".github/workflows" / name).read_text(encoding="utf-8"))
    found["on"] = found.pop(True)  # YAML 1.1 reads the key `on` as a boolean
    return found


def test_the_suite_runs_on_every_supported_python_with_real_servers() -> None:
    job = workflow("ci.yaml")["jobs"]["test"]
    classifiers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["classifiers"]
    supported = [name.rpartition(" ")[2] for name in classifiers if re.search(r":: 3\.\d+$", name)]
    assert job["strategy"]["matrix"]["python"] == supported
    for server in (job, workflow("release.yaml")["jobs"]["release"]):
        assert set(server["services"]) == {"postgres", "redis"}
        assert {"GATEWAY_TEST_POSTGRES_URL", "GATEWAY_TEST_REDIS_URL"} <= set(server["env"])


def test_the_audit_runs_every_night_and_its_failure_is_reported() -> None:
    nightly = workflow("nightly.yaml")
    assert nightly["on"]["schedule"] == [{"cron": "0 3 * * *"}]
    assert nightly["jobs"]["report"]["needs"] == ["audit", "suite"]
    (audit,) = [step["run"] for step in nightly["jobs"]["audit"]["steps"] if "make" in step.get("run", "")]
    assert "||" not in audit


def test_a_release_is_signed_from_its_tag() -> None:
    release = workflow("release.yaml")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    job = release["jobs"]["release"]
    assert job["permissions"]["id-token"] == "write"
    (step,) = [step for step in job["steps"] if "make release" in step.get("run", "")]
    assert step["env"] == {"PUSH": "1", "REQUIRE_SIGNATURE": "1"}


# --- the release script, in a repository of its own ------------------------------------------------------------------

MAKEFILE = """\
lint types test docker-build:
\t@echo $@ >>$(LOG)
wheel:
\t@echo $@ >>$(LOG); mkdir -p dist; echo wheel >dist/agent_gateway-1.2.3-py3-none-any.whl
sbom:
\t@echo $@ >>$(LOG); echo '{}' >sbom.json
"""
CHANGELOG = (
    "# Changelog\n\n## Unreleased\n\n## 1.2.3 - 2030-01-31\n\n- Something new.\n\n## 1.2.2 - 2029-01-01\n\n- Old.\n"
)


class Repository:
    """A repository with what the release script looks at, and tools that only write down that they were called."""

    def __init__(self, home: Path) -> None:
        self.home, self.log, self.tools = home / "repository", home / "log", home / "tools"
        self.write("src/gateway/__init__.py", '__version__ = "1.2.3"\n')
        self.write("CHANGELOG.md", CHANGELOG)
        self.write("Makefile", MAKEFILE)
        self.write(".gitignore", "/dist/\n/sbom.json\n")
        self.write("scripts/release.sh", (ROOT / "scripts/release.sh").read_text(encoding="utf-8"))
        self.tools.mkdir()
        self.tool("docker", "exit 1")
        self.git("init", "--quiet", "--initial-branch=main")
        self.commit()

    def write(self, name: str, text: str) -> None:
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def tool(self, name: str, script: str) -> None:
        path = self.tools / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >>"$LOG"\n{script}\n', encoding="utf-8")
        path.chmod(0o755)

    def git(self, *words: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com", "-c", "commit.gpgsign=false")
        done = subprocess.run(["git", *identity, *words], cwd=self.home, capture_output=True, text=True, check=True)
        return done.stdout

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "x")

    def release(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        identity = {
            f"GIT_{who}_{what}": "t@example.com" for who in ("COMMITTER", "AUTHOR") for what in ("NAME", "EMAIL")
        }
        path = f"{self.tools}{os.pathsep}{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "scripts/release.sh", *words],
            cwd=self.home,
            env={**os.environ, **identity, "PATH": path, "LOG": str(self.log), **env},
            capture_output=True,
            text=True,
            check=False,
        )

    def calls(self) -> list[str]:
        return self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []


@pytest.fixture
def repository(tmp_path: Path) -> Repository:
    return Repository(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize(
    ("file", "text", "words", "reason"),
    [
        (None, "", ("1.2.3",), "call it as"),
        (None, "", (), "call it as"),
        (None, "", ("v1.2.4",), "another version than 1.2.4"),
        ("CHANGELOG.md", CHANGELOG.replace("## 1.2.3 - 2030-01-31", "## 1.2.1 - 2020-01-01"), ("v1.2.3",), "no entry"),
        ("CHANGELOG.md", CHANGELOG.replace("1.2.3 - 2030-01-31", "1.2.3 - soon"), ("v1.2.3",), "no entry"),
        ("CHANGELOG.md", CHANGELOG.replace("- Something new.\n", ""), ("v1.2.3",), "is empty"),
    ],
)
def test_a_release_is_refused(
    repository: Repository, file: str | None, text: str, words: tuple[str, ...], reason: str
) -> None:
    if file is not None:
        repository.write(file, text)
        repository.commit()
    done = repository.release(*words)
    assert done.returncode == 1
    assert reason in done.stderr
    assert repository.calls() == []
    assert repository.git("tag") == ""


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_release_of_a_dirty_tree_or_of_a_tag_that_exists_is_refused(repository: Repository) -> None:
    repository.write("new.txt", "")
    assert "has changes" in repository.release("v1.2.3").stderr
    (repository.home / "new.txt").unlink()
    assert repository.release("v1.2.3", CHECK_ONLY="1").returncode == 0
    repository.git("tag", "v1.2.3")
    assert "v1.2.3 exists" in repository.release("v1.2.3").stderr
    assert repository.calls() == []


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_a_release_checks_builds_signs_and_tags(repository: Repository) -> None:
    repository.tool("cosign", ':>"$4"')
    done = repository.release("v1.2.3", REQUIRE_SIGNATURE="1")
    assert done.returncode == 0, done.stderr
    assert "there is no image" in done.stderr
    calls = repository.calls()
    assert [call for call in calls if " " not in call] == ["lint", "types", "test", "wheel", "sbom"]
    assert "cosign sign-blob --yes --bundle dist/SHA256SUMS.bundle dist/SHA256SUMS" in calls
    assert repository.git("tag").split() == ["v1.2.3"]
    assert (repository.home / "dist/NOTES.md").read_text().count("- ") == 2  # the heading's, and the one entry
    sums = (repository.home / "dist/SHA256SUMS").read_text()
    assert "agent_gateway-1.2.3-py3-none-any.whl" in sums
    assert "agent-gateway-1.2.3.sbom.json" in sums


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_where_an_engine_answers_the_image_is_built_pushed_and_signed_by_its_digest(repository: Repository) -> None:
    repository.tool("docker", 'case "$1" in inspect) echo registry/agent-gateway@sha256:1;; esac')
    repository.tool("cosign", "")
    done = repository.release("v1.2.3", PUSH="1", IMAGE="registry/agent-gateway")
    assert done.returncode == 0, done.stderr
    calls = repository.calls()
    assert calls.index("docker-build") < calls.index("docker push registry/agent-gateway:1.2.3")
    assert "cosign sign --yes registry/agent-gateway@sha256:1" in calls
    assert any(call.startswith("cosign attest") and "sbom.json" in call for call in calls)


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
@pytest.mark.parametrize("target", ["lint", "test", "sbom"])
def test_nothing_is_tagged_when_a_step_fails(repository: Repository, target: str) -> None:
    repository.write("Makefile", MAKEFILE.replace(f"{target}", "other") + f"{target}:\n\t@exit 1\n")
    repository.commit()
    assert repository.release("v1.2.3").returncode != 0
    assert repository.git("tag") == ""


# --- SBOM -------------------------------------------------------------------------------------------------------------


def test_the_sbom_has_the_locks_hashes_and_says_which_are_missing() -> None:
    digests = ["a" * 64, "b" * 64]
    pins = ["Some.Thing==1.0 ; sys_platform != 'win32' \\", *(f"    --hash=sha256:{digest} \\" for digest in digests)]
    lock = "\n".join([*pins, "    # via x", "other==2", ""])
    document = {
        "components": [{"name": n, "version": v} for n, v in (("some_thing", "1.0"), ("other", "2"), ("pip", "9"))]
    }
    assert add_hashes(document, hashes_of(lock)) == ["other 2"]
    (reference,) = document["components"][0]["externalReferences"]  # type: ignore[misc]
    assert [item["content"] for item in reference["hashes"]] == digests  # type: ignore[index]
