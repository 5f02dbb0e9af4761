"""Names: canonical ids, bare names and aliases that are unique, clashes, case."""

from __future__ import annotations

import pytest

from gateway.registry.entry import AgentEntry
from gateway.registry.registry import Registry, slugify


def entry(id_: str, *aliases: str, source: str = "file", file: str | None = None) -> AgentEntry:
    namespace, _, name = id_.partition("/")
    return AgentEntry(
        id=id_,
        namespace=namespace,
        name=name,
        display_name=name,
        kind="sdk",
        source=source,  # type: ignore[arg-type]
        created=0,
        executor=object(),  # type: ignore[arg-type]
        aliases=aliases,
        file=file,
    )


@pytest.mark.parametrize(
    ("text", "slug"),
    [
        ("WeatherAgent", "weatheragent"),
        ("Weather Agent", "weather-agent"),
        ("my_agent", "my-agent"),
        ("  Ünïcode!! ", "n-code"),
        ("日本", ""),
        ("-", ""),
    ],
)
def test_slug(text: str, slug: str) -> None:
    assert slugify(text) == slug


def test_find_by_id_bare_name_and_alias_without_case() -> None:
    weather = entry("default/weatheragent", "weather-agent", "default/weather-agent")
    registry = Registry.build([weather])
    for name in (
        "default/weatheragent",
        "DEFAULT/WeatherAgent",
        "weatheragent",
        "Weather-Agent",
        "default/weather-agent",
    ):
        assert registry.find(name) is weather
    for name in ("weather", "", "default/", "default/weatheragent ", "weatheragent\u0000"):
        assert registry.find(name) is None


def test_names_that_only_look_alike_in_unicode_find_nothing() -> None:
    registry = Registry.build([entry("default/kelvin")])
    assert registry.find("default/\u212aelvin") is None  # KELVIN SIGN lowers to an ASCII k
    assert registry.find("ＤＥＦＡＵＬＴ/kelvin") is None


def test_names_that_are_not_unique_find_nothing() -> None:
    one, two = entry("a/same", "assistant"), entry("b/same", "assistant")
    registry = Registry.build([one, two])
    assert registry.find("same") is None and registry.find("assistant") is None
    assert registry.find("a/same") is one and registry.find("b/same") is two


def test_a_shared_name_means_what_the_caller_reaches_of_it() -> None:
    one, two = entry("a/same", "assistant"), entry("b/same", "assistant")
    registry = Registry.build([one, two])
    for name in ("same", "SAME", "assistant"):
        assert registry.find_reached(name, {"a/same"}.__contains__) is one
        assert registry.find_reached(name, {"b/same"}.__contains__) is two
        assert registry.find_reached(name, {"a/same", "b/same"}.__contains__) is None
        assert registry.find_reached(name, set[str]().__contains__) is None
    assert registry.find_reached("A/Same", set[str]().__contains__) is one, "an id means one agent to everybody"


def test_a_folder_wins_over_the_name_of_another_agent() -> None:
    folder, other = entry("default/weather"), entry("default/other", "weather", "default/weather")
    registry = Registry.build([other, folder])
    assert registry.find("weather") is folder and registry.find("default/weather") is folder


def test_a_clash_serves_the_first_and_names_both_files() -> None:
    first = entry("default/weather", file="Weather/agent.py")
    second = entry("default/weather", file="weather/agent.py")
    registry = Registry.build([first, second])
    assert registry.find("default/weather") is first
    [rejected] = registry.rejected
    assert (rejected.status, rejected.executor) == ("error", None)
    [problem] = rejected.diagnostics
    assert problem.code == "name_clash"
    assert "Weather/agent.py" in problem.message and "weather/agent.py" in problem.message
    assert registry.list_entries() == (first, rejected)


def test_yaml_over_a_drop_in_says_so() -> None:
    yaml = entry("default/weather", source="yaml", file="agents.yaml")
    registry = Registry.build([yaml, entry("default/weather", file="Weather/agent.py")])
    assert registry.find("weather") is yaml
    assert registry.rejected[0].diagnostics[0].code == "shadowed_by_yaml"
    assert "agents.yaml" in registry.rejected[0].diagnostics[0].message


def test_entries_are_listed_in_order_of_their_ids() -> None:
    registry = Registry.build([entry("b/b"), entry("a/z"), entry("a/a")])
    assert [row.id for row in registry.list_entries()] == ["a/a", "a/z", "b/b"]
