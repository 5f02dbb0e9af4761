"""What watches the gateway refers only to what the gateway has: scrape configuration, alert rules, dashboard."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from api.route_table import TABLE
from gateway.errors import FaultDomain
from gateway.observability.families import HistogramFamily
from gateway.observability.metrics import Metrics
from gateway.registry.entry import Status
from gateway.routing.failures import Kind
from tests.test_docs import anchors, named_in

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana/dashboards/agent-gateway.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yaml").read_text(encoding="utf-8"))

# --- a reader of PromQL that knows names, labels and matchers -------------------------------------------------------

TOKEN = re.compile(
    r"""\s+|(?P<text>"(?:[^"\\]|\\.)*")|(?P<number>\d+(?:\.\d+)?(?:ms|[smhdwy])?|\$__rate_interval)"""
    r"""|(?P<name>[A-Za-z_:][\w:]*)|(?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^<>=(){}\[\],])"""
)
AGGREGATIONS = {"sum", "max", "min", "avg", "count", "topk"}
FUNCTIONS = {"rate", "increase", "histogram_quantile"}
GROUPINGS = {"by", "without", "on", "ignoring"}
WORDS = {"and", "or", "unless", "bool", "offset"}
TARGET_LABELS = {"job", "instance"}


@dataclass
class Query:
    """What an expression names: series with their matchers, and the labels it groups by."""

    series: list[tuple[str, list[tuple[str, str, str]]]] = field(default_factory=list)
    groupings: set[str] = field(default_factory=set)


def tokens(expression: str) -> list[str]:
    found, at = [], 0
    while at < len(expression):
        match = TOKEN.match(expression, at)
        assert match, f"no PromQL from here on: {expression[at:]}"
        at = match.end()
        if match.group().strip():
            found.append(match.group())
    return found


def read(expression: str) -> Query:
    words = [*tokens(expression), ""]
    assert all(words.count(a) == words.count(b) for a, b in ("()", "{}", "[]")), expression
    query, at = Query(), 0
    while words[at]:
        word, following = words[at], words[at + 1]
        at += 1
        if not re.fullmatch(r"[A-Za-z_:][\w:]*", word) or word in WORDS | AGGREGATIONS:
            continue
        if word in GROUPINGS:
            end = words.index(")", at)
            query.groupings |= set(words[at + 1 : end]) - {","}
            at = end + 1
        elif following == "(":
            assert word in FUNCTIONS, f"{word} is no function known here: {expression}"
        else:
            matchers = []
            if following == "{":
                end = words.index("}", at)
                inner = [item for item in words[at + 1 : end] if item != ","]
                matchers = [(a, b, json.loads(c)) for a, b, c in zip(*[iter(inner)] * 3, strict=True)]
                at = end + 1
            query.series.append((word, matchers))
    return query


def series() -> dict[str, set[str]]:
    """Every time series of a process by name, with its labels."""
    found = {"up": set(TARGET_LABELS)}
    for family in Metrics().families:
        labels = {*family.labels, *TARGET_LABELS}
        if isinstance(family, HistogramFamily):
            found |= {f"{family.name}_bucket": labels | {"le"}, f"{family.name}_sum": labels}
            found |= {f"{family.name}_count": labels}
        else:
            found[f"{family.name}_total" if family.kind == "counter" else family.name] = labels
    return found


SERIES = series()
VALUES: dict[tuple[str, str], set[str]] = {
    ("agent_gateway_errors_total", "domain"): set(get_args(FaultDomain)),
    ("agent_gateway_errors_total", "code"): named_in("errors.md"),
    ("agent_gateway_agents", "status"): set(get_args(Status)),
    ("agent_gateway_routing_attempts_total", "outcome"): {*get_args(Kind), "success", "cancelled", "rejected"},
    ("agent_gateway_runs_total", "outcome"): {"success", "failure", "cancelled"},
    ("agent_gateway_usage_rows_total", "outcome"): {"written", "dropped"},
    ("agent_gateway_budget_alerts_total", "outcome"): {"delivered", "retried", "failed"},
    ("agent_gateway_limit_rejections_total", "limit"): {"requests", "tokens", "runs", "cost"},
    ("agent_gateway_tool_invocations_total", "status"): {
        *("success", "error", "timeout", "denied", "invalid", "missing", "unavailable", "cancelled")
    },
}
"""The values that a label can have, where they are a closed set."""


def expressions() -> Iterator[tuple[str, str]]:
    yield from ((f"alert {rule['alert']}", rule["expr"]) for rule in RULES)
    for panel in PANELS:
        yield from ((f"panel {panel['title']}", target["expr"]) for target in panel["targets"])
    for variable in DASHBOARD["templating"]["list"]:
        found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
        assert found, variable
        yield f"variable {variable['name']}", f'{found[1]}{{{found[2]}="$any"}}'


def complaints(expression: str) -> list[str]:
    """What an expression names that does not exist."""
    query = read(expression)
    found = [f"no metric {name}" for name, _ in query.series if name not in SERIES]
    known = [(name, matchers) for name, matchers in query.series if name in SERIES]
    for name, matchers in known:
        for label, sign, value in matchers:
            if label not in SERIES[name]:
                found.append(f"{name} has no label {label}")
            elif (name, label) in VALUES and not value.startswith("$"):
                values = value.split("|") if "~" in sign else [value]
                found += [f"{label} of {name} is never {item}" for item in values if item not in VALUES[name, label]]
    for name, _ in known:
        found += [f"{name} has no label {label}" for label in query.groupings - SERIES[name]]
    return found


@pytest.mark.parametrize(("where", "expression"), list(expressions()))
def test_an_expression_names_only_what_exists(where: str, expression: str) -> None:
    assert not complaints(expression), where
    assert any(name in SERIES for name, _ in read(expression).series)


@pytest.mark.parametrize(
    ("expression", "complaint"),
    [
        ("sum(rate(agent_gateway_request_total[5m]))", "no metric agent_gateway_request_total"),
        ('agent_gateway_agents{state="ready"}', "no label state"),
        ('agent_gateway_agents{status=~"ready|gone"}', "never gone"),
        ("sum by (model) (rate(agent_gateway_requests_total[5m]))", "no label model"),
        ("rate(gen_ai_server_time_to_first_token[5m])", "no metric gen_ai_server_time_to_first_token"),
    ],
)
def test_the_reader_sees_what_does_not_exist(expression: str, complaint: str) -> None:
    assert complaint in " ".join(complaints(expression))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_how_urgent_it_is_and_where_its_help_is(rule: dict[str, Any]) -> None:
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"[A-Z][A-Za-z]+", rule["alert"])
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert anchor == rule["alert"].lower()
    assert anchor in anchors(ROOT / page), f"{page} has no section {rule['alert']}"
    query = read(rule["expr"])
    mentioned = set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]))
    assert mentioned <= query.groupings | ({"instance"} if not query.groupings else set())


def test_every_section_of_an_alert_in_the_runbook_has_its_alert() -> None:
    text = (ROOT / "docs/guides/OperatorRunbook.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### ([A-Z][a-z]+[A-Z]\w+)$", text, re.MULTILINE)
    assert sections == [rule["alert"] for rule in RULES]


def test_the_scrape_configuration_reads_what_the_gateway_serves() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    assert all((DEPLOY / "prometheus" / name).is_file() for name in config["rule_files"])
    (job,) = config["scrape_configs"]
    assert any(route.path == job["metrics_path"] and route.scope == "metrics" for route in TABLE.routes)
    assert job["job_name"] == "agent-gateway"
    assert f'job="{job["job_name"]}"' in RULES[0]["expr"]
    host, _, port = job["static_configs"][0]["targets"][0].partition(":")
    image = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert host in COMPOSE["services"]
    assert f"GATEWAY_PORT={port}" in image
    (secret,) = COMPOSE["services"]["prometheus"]["secrets"]
    assert job["authorization"]["credentials_file"] == f"/run/secrets/{secret}"
    assert COMPOSE["secrets"][secret] == {"environment": "GATEWAY_METRICS_TOKEN"}
    # Compose copies such a secret into the container, and refuses a service whose file system is read-only.
    assert COMPOSE["services"]["prometheus"]["read_only"] is False
    assert "GATEWAY_METRICS_TOKEN" in COMPOSE["services"]["gateway"]["environment"]


def test_grafana_finds_its_data_source_and_its_dashboard() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text("utf-8"))["datasources"]
    assert source["url"].removeprefix("http://").partition(":")[0] in COMPOSE["services"]
    used = {target["datasource"]["uid"] for panel in PANELS for target in panel["targets"]}
    assert used == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards/gateway.yaml").read_text("utf-8"))["providers"]
    mounts = [volume.split(":")[:2] for volume in COMPOSE["services"]["grafana"]["volumes"]]
    assert ["./deploy/grafana/dashboards", provider["options"]["path"]] in mounts


def test_the_dashboard_is_in_order() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(numbers) == len(set(numbers))
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= read(target["expr"]).groupings, panel["title"]
    for above, below in pairwise(sorted(DASHBOARD["panels"], key=lambda panel: panel["gridPos"]["y"])):
        a, b = above["gridPos"], below["gridPos"]
        assert a["y"] == b["y"] or a["y"] + a["h"] <= b["y"]
