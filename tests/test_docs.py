"""The documentation is a contract: what the code has is named there, and what it names exists.

Everything is discovered from the code: settings, routes, errors, log events, metrics, diagnostics, YAML keys,
command-line commands, make targets. A new one fails here until docs/references says what it means.
"""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from functools import cache
from pathlib import Path

import msgspec
import pytest

from api.route_table import TABLE
from gateway.caching.config import CacheConfig
from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.registry.declarations import AgentsConfig
from gateway.registry.entry import AgentOptions
from gateway.routing.config import RoutingConfig
from gateway.security.config import SecurityConfig
from gateway.tools.config import ToolsConfig
from gateway.upstreams.config import UpstreamsConfig
from gateway.usage.prices import PricesConfig
from gateway_cli.errors import CliError
from gateway_cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]
SRC = ROOT / "src"
REFERENCES = ROOT / "docs" / "references"
ROOMS = ("api", "gateway", "gateway_cli", "sdk_adapter")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])

MAKE = re.compile(r"\bmake ([a-z][a-z-]*)")
VARIABLE = re.compile(r"\b(?:GATEWAY|OPENAI)_[A-Z0-9_]+\b")
CODE = re.compile(r"`([^`\n]+)`")
EVENT = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\s*\$?\s*(?:PYTHONPATH=src (?:\.venv/bin/)?python -m gateway_cli|gateway) ([a-z].*)")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@cache
def page(name: str) -> str:
    return (REFERENCES / name).read_text(encoding="utf-8")


def named_in(name: str) -> set[str]:
    """Everything a page puts in code font."""
    return {found.group(1) for found in CODE.finditer(page(name))}


@cache
def trees() -> tuple[tuple[Path, ast.Module], ...]:
    files = [path for room in ROOMS for path in sorted((SRC / room).rglob("*.py"))]
    return tuple((path, ast.parse(path.read_text(encoding="utf-8"))) for path in files)


def log_events() -> set[str]:
    """The event name of every ``log_event`` or ``EventShape`` of ``(logger, "event.name", …)``.

    Where the name is a parameter, every argument in the module that is shaped like one counts.
    """
    found = set()
    for path, tree in trees():
        for node in ast.walk(tree):
            if (
                not (isinstance(node, ast.Call) and _name(node.func) in ("log_event", "EventShape"))
                or path.name == "logs.py"
            ):
                continue
            names = events_in(_literals(node.args[1], tree))
            if isinstance(node.args[1], ast.Name):
                calls = [
                    call for call in ast.walk(tree) if isinstance(call, ast.Call) and _name(call.func) != "getLogger"
                ]
                names |= events_in({text for call in calls for word in call.args for text in _literals(word, tree)})
            assert names, f"{path}:{node.lineno}: the event's name is not written out, so nobody can look it up"
            found |= names
    return found


def events_in(texts: set[str]) -> set[str]:
    return {text for text in texts if EVENT.fullmatch(text) and not text.endswith((".yaml", ".py"))}


def diagnostic_codes() -> set[str]:
    """The literal code of every diagnostic: ``Diagnostic(code=…)``, ``diagnose(dropin, code, …)`` and the like."""
    positions = {"diagnose": 1, "SourceRefused": 1, "_misconfigured": 2}
    found = set()
    for _, tree in trees():
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = _name(node.func)
            arguments = [keyword.value for keyword in node.keywords if keyword.arg == "code" and name == "Diagnostic"]
            if name in positions and len(node.args) > positions[name]:
                arguments.append(node.args[positions[name]])
            for argument in arguments:
                found |= _literals(argument, tree)
    return found


def _literals(node: ast.expr, tree: ast.Module) -> set[str]:
    """The texts an expression may be; a plain name may be whatever the module assigns to it."""
    if isinstance(node, ast.Name):
        values = [
            item.value
            for item in ast.walk(tree)
            if isinstance(item, ast.Assign) and any(_name(target) == node.id for target in item.targets)
        ]
        return {text for value in values for text in _literals(value, tree) if not isinstance(value, ast.Name)}
    if isinstance(node, ast.IfExp):
        return _literals(node.body, tree) | _literals(node.orelse, tree)
    if isinstance(node, ast.JoinedStr):
        parts = [_literals(part, tree) for part in node.values]
        return {"".join(words) for words in itertools.product(*parts)}
    if isinstance(node, ast.FormattedValue):
        return _literals(node.value, tree)
    return {node.value} if isinstance(node, ast.Constant) and isinstance(node.value, str) else set()


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def yaml_keys(kind: type) -> set[str]:
    """Every key of a configuration file, at any depth."""
    names, seen, waiting = set(), set(), [kind]
    while waiting:
        struct = waiting.pop()
        if struct in seen:
            continue
        seen.add(struct)
        for field in msgspec.structs.fields(struct):
            names.add(field.encode_name)
            waiting += structs_in(field.type)
    return names


def structs_in(hint: object) -> list[type]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [hint]
    return [kind for part in getattr(hint, "__args__", ()) for kind in structs_in(part)]


def test_generated_tables_are_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/reference_docs.py", "--check"],
        cwd=ROOT,
        env={"PYTHONPATH": "src"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"run `make docs`: {done.stdout}{done.stderr}"


def test_every_setting_is_documented() -> None:
    names = {name for item in fields(Settings) for name in (item.metadata["env"], *item.metadata["aliases"])}
    assert names <= named_in("settings.md")


def test_every_endpoint_is_documented() -> None:
    paths = {path for route in TABLE.routes for path in route.aliases}
    assert {f"{route.method} {route.path}" for route in TABLE.routes} | paths <= named_in("endpoints.md")


def test_every_error_code_is_documented() -> None:
    assert {code for kind in error_classes(GatewayError) if (code := kind.code)} <= named_in("errors.md")


def test_every_code_that_an_error_is_given_where_it_is_raised_is_documented() -> None:
    names = {kind.__name__ for kind in error_classes(GatewayError)}
    given = {
        code
        for _, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _name(node.func) in names
        for keyword in node.keywords
        if keyword.arg == "code"
        for code in _literals(keyword.value, tree)
    }
    assert given <= named_in("errors.md")


def error_classes(kind: type[GatewayError]) -> list[type[GatewayError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in error_classes(child))]


def test_log_events_and_their_page_agree() -> None:
    documented = {found.group(1) for found in re.finditer(r"^\| `([a-z_.]+)` \|", page("log-events.md"), re.MULTILINE)}
    assert documented == log_events()


def test_diagnostic_codes_and_their_page_agree() -> None:
    documented = {found.group(1) for found in re.finditer(r"^\| `(\w+)` \|", page("diagnostics.md"), re.MULTILINE)}
    assert documented == diagnostic_codes()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("agents-yaml.md", AgentsConfig),
        ("cache-yaml.md", CacheConfig),
        ("prices-yaml.md", PricesConfig),
        ("routing-yaml.md", RoutingConfig),
        ("security-yaml.md", SecurityConfig),
        ("tools-yaml.md", ToolsConfig),
        ("upstreams-yaml.md", UpstreamsConfig),
    ],
)
def test_every_yaml_key_is_documented(name: str, kind: type) -> None:
    assert yaml_keys(kind) <= named_in(name)


def test_every_option_of_an_agent_is_documented() -> None:
    guide = (ROOT / "docs" / "guides" / "DropInAgentGuide.md").read_text(encoding="utf-8")
    assert {item.name for item in fields(AgentOptions)} <= {found.group(1) for found in CODE.finditer(guide)}


def test_every_name_of_the_context_object_is_documented() -> None:
    (made,) = [
        node
        for path, tree in trees()
        if path.name == "context.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _name(node.func) == "cls"
    ]
    assert {keyword.arg for keyword in made.keywords} <= named_in("context.md")


def test_every_relative_link_resolves() -> None:
    broken = []
    for path in PAGES:
        for found in LINK.finditer(FENCE.sub("", path.read_text(encoding="utf-8"))):
            target, _, anchor = found.group(1).partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            file = (path.parent / target).resolve() if target else path
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{path.relative_to(ROOT)}: {found.group(1)}")
    assert not broken, "\n".join(broken)


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def code_of(path: Path) -> str:
    """What a page writes as code, inline or fenced."""
    text = path.read_text(encoding="utf-8")
    blocks = [found.group(2) for found in FENCE.finditer(text)]
    return "\n".join([*blocks, *(found.group(1) for found in CODE.finditer(FENCE.sub("", text)))])


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {name for path in PAGES for name in MAKE.findall(code_of(path))}
    assert named
    assert named <= targets


def test_every_variable_named_exists() -> None:
    known = {name for item in fields(Settings) for name in (item.metadata["env"], *item.metadata["aliases"])}
    named = {name for path in PAGES for name in VARIABLE.findall(path.read_text(encoding="utf-8"))}
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    assert named
    assert named <= known | set(re.findall(r'environ\.get\("(GATEWAY_TEST_\w+)"', tests))


def test_every_command_line_named_is_one_the_command_accepts() -> None:
    refused = []
    for path in PAGES:
        for line in code_of(path).splitlines():
            found = COMMAND.match(line)
            if found is None:
                continue
            words = shlex.split(found.group(1).partition(" #")[0])
            try:
                build_parser().parse_args([word for word in words if word not in ("…", "...")])
            except CliError as error:
                refused.append(f"{path.relative_to(ROOT)}: {line.strip()}: {error}")
    assert not refused, "\n".join(refused)


def test_every_source_path_named_exists() -> None:
    """A page that names a file of the repository names one that is there (names with capitals are placeholders)."""
    pattern = re.compile(r"(?<![\w./-])((?:src|docs|scripts|tests|\.ci)/[\w./-]*\w)")
    made_by_user = re.compile(r"src/agents/(?!Hello\b)|\.local\.ya?ml$|src/config/(upstreams|security|agents)\.yaml$")
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in PAGES
        for name in pattern.findall(code_of(path))
        if not made_by_user.search(name) and not (ROOT / name).exists()
    ]
    assert not missing, "\n".join(missing)


def test_every_page_is_reached_from_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    linked = {(ROOT / "docs" / found.group(1).partition("#")[0]).resolve() for found in LINK.finditer(index)}
    pages = {path for path in (ROOT / "docs").rglob("*.md") if path.name != "README.md"}
    assert pages <= linked


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("docs/README.md", ("Guides", "References", "Systems", "Decisions")),
        ("docs/references/README.md", ("settings", "endpoints", "errors", "metrics")),
        ("docs/guides/DropInAgentGuide.md", ("Where files go", "What is published", "Options", "validate")),
        ("docs/plans/DropInAgents_TestPlan.md", ("criterion", "Handoffs", "guardrails")),
        ("docs/guides/OperatorRunbook.md", ("## Configuration matrix", "## Incident response", "## Alerts")),
        ("docs/guides/Troubleshooting.md", ("ModuleNotFoundError", "upstream_unreachable", "## Streaming stops")),
        ("docs/systems/tooling.md", ("tools.yaml", "local_tools_allowlist")),
        ("docs/systems/security.md", ("hide_foreign_models", "gateway audit")),
        ("docs/systems/observability.md", ("## Logs", "## Metrics", "## Dashboard and alerts")),
        ("docs/systems/resiliency.md", ("## Workers", "## Shutdown")),
        ("RELEASE.md", ("## Checking a release", "cosign verify")),
    ],
)
def test_the_pages_that_were_promised_are_there(name: str, content: tuple[str, ...]) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [word for word in content if word not in text] == []


def test_python_examples_compile() -> None:
    for path in PAGES:
        for found in FENCE.finditer(path.read_text(encoding="utf-8")):
            if found.group(1) in ("py", "python"):
                compile(found.group(2), str(path), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
