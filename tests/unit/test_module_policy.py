"""Allow and deny lists: judged from names and source, before anything runs."""

from __future__ import annotations

import ast

import pytest

from gateway.registry.policy import ModulePolicy, ModuleRules, Violation

NAMES = ("agents.labs.Research.agent", "labs.Research.agent", "labs.Research", "labs/research")


def judge(source: str, *deny: str) -> Violation | None:
    return ModulePolicy(deny=deny).judge_source("default", ast.parse(source))


@pytest.mark.parametrize(
    "source",
    [
        "import subprocess",
        "import subprocess as quiet",
        "import os, subprocess",
        "def f():\n    import subprocess",
        "from subprocess import run",
        "from subprocess import run as r",
        "__import__('subprocess')",
        "__import__(name='subprocess')",
        "import importlib\nimportlib.import_module('subprocess')",
        "from importlib import import_module as load\nload('subprocess')",
        "import importlib as i\ni.import_module('sub' + 'process')",
        "import builtins\nbuiltins.__import__('subprocess')",
    ],
)
def test_an_import_in_any_disguise(source: str) -> None:
    violation = judge(source, "subprocess")
    assert violation is not None
    assert "subprocess" in violation.message and "rule 'subprocess'" in violation.message
    assert violation.line == source.count("\n") + 1


@pytest.mark.parametrize(
    "source",
    ["import subprocesses", "from . import subprocess", "from .subprocess import run", "x = 'import subprocess'"],
)
def test_what_is_not_the_denied_module(source: str) -> None:
    assert judge(source, "subprocess") is None


def test_patterns_reach_submodules_and_members() -> None:
    assert judge("import urllib.request", "urllib") is not None
    assert judge("from urllib import request", "urllib.request") is not None
    assert judge("from os import execv", "os.exec*") is not None
    assert judge("import os", "os.exec*") is None
    assert judge("import urllib", "urllib.request") is None


def test_names_of_drop_ins_deny_wins() -> None:
    assert ModulePolicy().judge_name("labs", NAMES) is None
    assert ModulePolicy(allow=("labs.*",)).judge_name("labs", NAMES) is None
    assert ModulePolicy(allow=("labs/*",)).judge_name("labs", NAMES) is None
    refused = ModulePolicy(allow=("trusted.*",)).judge_name("labs", NAMES)
    assert refused is not None and "trusted.*" in refused.message
    denied = ModulePolicy(allow=("labs.*",), deny=("agents.labs.*",)).judge_name("labs", NAMES)
    assert denied is not None and "agents.labs.*" in denied.message


def test_rules_of_a_namespace() -> None:
    policy = ModulePolicy(
        allow=("trusted.*",),
        deny=("socket",),
        namespaces={"labs": ModuleRules(allow=("labs.*",), deny=("ctypes",))},
    )
    assert policy.judge_name("labs", NAMES) is None
    assert policy.judge_name("default", NAMES) is not None
    tree = ast.parse("import ctypes")
    assert policy.judge_source("labs", tree) is not None
    assert policy.judge_source("default", tree) is None
    assert policy.judge_source("labs", ast.parse("import socket")) is not None
