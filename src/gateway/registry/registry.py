"""Registry: the frozen table from model names to entries. Reading it never touches the disk."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from gateway.registry.entry import AgentEntry, Diagnostic

_NOT_IN_SLUG = re.compile(r"[^a-z0-9]+")


def slugify(text: str) -> str:
    """Return ``text`` lower-case, every run of other characters as one ``-``; empty if nothing is left."""
    return _NOT_IN_SLUG.sub("-", text.lower()).strip("-")


@dataclass(frozen=True, slots=True)
class Registry:
    """Every agent by id, and by the shorter names that are unique.

    ``rejected`` holds entries whose id is taken by another one: listed with their diagnostic, never found.
    """

    entries: Mapping[str, AgentEntry] = field(default_factory=lambda: MappingProxyType({}))
    rejected: tuple[AgentEntry, ...] = ()
    names: Mapping[str, AgentEntry] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    ordered: tuple[AgentEntry, ...] = field(default=(), repr=False)

    @classmethod
    def build(cls, entries: Iterable[AgentEntry]) -> Registry:
        """Build the table; of two entries with one id the first is served and the other listed as an error.

        A name finds, in this order: the id; the bare name, if unique; an alias, if unique.
        """
        served: dict[str, AgentEntry] = {}
        rejected: list[AgentEntry] = []
        for entry in entries:
            holder = served.setdefault(entry.id, entry)
            if holder is not entry:
                rejected.append(_reject(entry, holder))
        names = dict(served)
        for tier in (lambda e: (e.name,), lambda e: e.aliases):
            offered = [(name, entry) for entry in served.values() for name in {*tier(entry)}]
            times = Counter(name for name, _ in offered)
            for name, entry in offered:
                if times[name] == 1:
                    names.setdefault(name, entry)
        ordered = sorted([*served.values(), *rejected], key=lambda entry: (entry.id, entry.file or ""))
        return cls(MappingProxyType(served), tuple(rejected), MappingProxyType(names), tuple(ordered))

    def find(self, name: str) -> AgentEntry | None:
        """Return the entry of an id, a unique bare name or a unique alias; ASCII case does not matter."""
        found = self.names.get(name)
        if found is None and name.isascii():
            found = self.names.get(name.lower())
        return found

    def list_entries(self) -> Sequence[AgentEntry]:
        """Return all entries, sorted by id; those in error and the rejected ones included."""
        return self.ordered


def _reject(entry: AgentEntry, holder: AgentEntry) -> AgentEntry:
    """Return ``entry`` as an error that names both files."""
    mine, other = entry.file or "agents.yaml", holder.file or "agents.yaml"
    if holder.source == "yaml" and entry.source == "file":
        code = "shadowed_by_yaml"
        message = f"'{entry.id}' is also declared in {other}, and the YAML agent wins; {mine} is not served."
        fix = f"Rename one of the two: change the folder of {mine}, or 'name' in {other}."
    else:
        code = "name_clash"
        message = f"'{entry.id}' is the name of two agents: {other} is served, {mine} is not."
        fix = f"Rename the folder of {mine} (names are compared lower-case, other characters as '-')."
    problem = Diagnostic(kind="validation", code=code, message=message, fix=fix, file=mine)
    return replace(entry, executor=None, status="error", diagnostics=(problem, *entry.diagnostics))
