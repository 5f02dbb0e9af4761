"""Which files are drop-ins, and what they are called, before a line of them runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.registry.discovery import Discovered, discover, find_roots, hash_file, list_sources, name_spellings
from gateway.registry.requirements import check_requirements
from tests.support.loading import write


def found(root: Path) -> dict[str, str]:
    return {item.dropin.label: item.dropin.id for item in discover([root.resolve()], "default")}


def only(root: Path) -> Discovered:
    [item] = discover([root.resolve()], "default")
    return item


def test_folders_namespaces_and_single_files(tmp_path: Path) -> None:
    for name in ("WeatherAgent/agent.py", "labs/Research/agent.py", "labs/deep/down/agent.py", "single.py"):
        write(tmp_path, name, "")
    assert found(tmp_path) == {
        "single.py": "default/single",
        "WeatherAgent/agent.py": "default/weatheragent",
        "labs/Research/agent.py": "labs/research",
        "labs/deep/down/agent.py": "labs/down",
    }


@pytest.mark.parametrize(
    "name",
    [
        "_private.py",
        "conftest.py",
        "test_thing.py",
        ".hidden.py",
        ".git/agent.py",
        "A/__pycache__/agent.py",
        "node_modules/x/agent.py",
        "notes.txt",
        "labs/helper.py",
    ],
)
def test_what_is_not_a_drop_in(tmp_path: Path, name: str) -> None:
    write(tmp_path, name, "")
    assert found(tmp_path) == {}


def test_a_virtual_environment_in_a_folder_is_not_walked(tmp_path: Path) -> None:
    write(tmp_path, "A/agent.py", "")
    write(tmp_path, "A/env/pyvenv.cfg", "")
    write(tmp_path, "A/env/lib/thing/agent.py", "")
    assert list(found(tmp_path)) == ["A/agent.py"]


def test_a_name_without_letters_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "日本/agent.py", "")
    problem = only(tmp_path).problem
    assert problem is not None and problem.code == "invalid_name"


def test_links_that_lead_out_are_refused(tmp_path: Path) -> None:
    root, outside = tmp_path / "agents", tmp_path / "outside"
    write(outside, "agent.py", "")
    (root / "File").mkdir(parents=True)
    (root / "File/agent.py").symlink_to(outside / "agent.py")
    (root / "Folder").symlink_to(outside)
    (root / "Broken").mkdir()
    (root / "Broken/agent.py").symlink_to(root / "nowhere.py")
    items = {item.dropin.slug: item for item in discover([root.resolve()], "default")}
    assert set(items) == {"file", "folder", "broken"}
    for item in items.values():
        assert item.problem is not None
        assert (item.problem.code, item.problem.kind) == ("path_escapes_root", "security")
        assert str(tmp_path) not in item.problem.message + item.problem.fix + item.problem.file


def test_links_inside_the_root_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path, "Real/agent.py", "")
    (tmp_path / "Loop").symlink_to(tmp_path)
    (tmp_path / "Real" / "self").symlink_to(tmp_path / "Real")
    write(tmp_path, "..data/agent.py", "")  # a mounted ConfigMap
    (tmp_path / "Mounted").mkdir()
    (tmp_path / "Mounted/agent.py").symlink_to(tmp_path / "..data/agent.py")
    items = discover([tmp_path.resolve()], "default")
    assert all(item.problem is None for item in items)
    assert {"Real/agent.py", "Mounted/agent.py"} <= {item.dropin.label for item in items}
    assert len(items) <= 4


def test_sources_of_a_folder_leave_other_drop_ins_out(tmp_path: Path) -> None:
    for name in ("A/agent.py", "A/helper.py", "A/sub/more.py", "A/Inner/agent.py", "A/requirements.txt", "A/data.csv"):
        write(tmp_path, name, "")
    dropin = next(i.dropin for i in discover([tmp_path.resolve()], "default") if i.dropin.label == "A/agent.py")
    names = {path.relative_to(tmp_path.resolve()).as_posix() for path in list_sources(dropin)}
    assert names == {"A/agent.py", "A/helper.py", "A/sub/more.py", "A/requirements.txt"}


def test_names_a_policy_may_use(tmp_path: Path) -> None:
    root = tmp_path / "agents"
    write(root, "labs/Research/agent.py", "")
    assert set(name_spellings(only(root).dropin)) == {
        "agents.labs.Research.agent",
        "labs.Research.agent",
        "labs.Research",
        "labs/Research/agent.py",
        "labs/research",
    }


def test_an_init_py_in_the_root_is_one_sentence(tmp_path: Path) -> None:
    write(tmp_path, "agents/__init__.py", "")
    with pytest.raises(ConfigError) as caught:
        find_roots(Settings(agent_path=tmp_path / "agents"))
    assert "agents/__init__.py" in caught.value.message and "delete" in caught.value.message
    assert str(tmp_path) not in caught.value.message and "\n" not in caught.value.message


def test_extra_roots_come_after_the_first(tmp_path: Path) -> None:
    first, extra = tmp_path / "agents", tmp_path / "more"
    extra.mkdir()
    assert find_roots(Settings(agent_path=first, agent_extra_paths=(str(extra), str(extra)))) == (first, extra)
    with pytest.raises(ConfigError, match="EXTRA_PATHS"):
        find_roots(Settings(agent_path=first, agent_extra_paths=(str(tmp_path / "absent"),)))


def test_a_package_as_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "acme/bots/__init__.py", "raise AssertionError('never imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_roots(Settings(agent_package="acme.bots")) == (tmp_path / "acme" / "bots",)
    with pytest.raises(ConfigError, match=r"acme\.none"):
        find_roots(Settings(agent_path=tmp_path, agent_extra_package="acme.none"))


def test_a_root_that_does_not_exist_holds_nothing(tmp_path: Path) -> None:
    assert find_roots(Settings(agent_path=tmp_path / "later")) == (tmp_path / "later",)
    assert discover([tmp_path / "later"], "default") == []
    assert hash_file(tmp_path / "later") == "unreadable"


def requirements(tmp_path: Path, text: str) -> list[tuple[str, int | None, str]]:
    path = write(tmp_path, "A/requirements.txt", text)
    return [(item.code, item.line, item.message) for item in check_requirements(path, "A/requirements.txt")]


def test_requirements_that_are_met(tmp_path: Path) -> None:
    text = """# comment
    -r other.txt
    pytest>=1   # trailing comment
    msgspec >= 0.1 \\
        --hash=sha256:abc
    absent-package; sys_platform == "nowhere"
    """
    assert requirements(tmp_path, text) == []
    assert check_requirements(tmp_path / "none.txt", "none.txt") == ()


def test_requirements_that_are_missing_or_of_a_wrong_version(tmp_path: Path) -> None:
    [(code, line, message)] = requirements(tmp_path, "pytest\nabsent-package>=2\npytest<0.1\n")
    assert (code, line) == ("requirement_missing", 2)
    assert "absent-package>=2" in message and "pytest<0.1 (installed:" in message


def test_requirements_that_cannot_be_read(tmp_path: Path) -> None:
    assert requirements(tmp_path, "pytest\n=== what\n")[0][:2] == ("invalid_requirements", 2)
    (tmp_path / "A/requirements.txt").write_bytes(b"\xff\xfe\x00")
    assert check_requirements(tmp_path / "A/requirements.txt", "A/requirements.txt")[0].kind == "dependency"
