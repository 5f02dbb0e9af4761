"""Registry: the frozen table from model names to entries. Reading it never touches the disk."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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

    ``names`` has every name that means one agent to everybody; ``shorter`` those that are no id, with the agents that
    bear it as their bare name and as an alias. ``rejected`` holds entries whose id is taken by another one: listed with
    their diagnostic, never found.
    """

    entries: Mapping[str, AgentEntry] = field(default_factory=lambda: MappingProxyType({}))
    rejected: tuple[AgentEntry, ...] = ()
    names: Mapping[str, AgentEntry] = field(default_factory=lambda: MappingProxyType({}), repr=False)
    shorter: Mapping[str, tuple[list[AgentEntry], list[AgentEntry]]] = field(
        default_factory=lambda: MappingProxyType({}), repr=False
    )
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
        shorter: dict[str, tuple[list[AgentEntry], list[AgentEntry]]] = {}
        tiers: tuple[Callable[[AgentEntry], Iterable[str]], ...] = (lambda e: (e.name,), lambda e: e.aliases)
        for rank, names_of in enumerate(tiers):
            offered = [(name, entry) for entry in served.values() for name in {*names_of(entry)}]
            times = Counter(name for name, _ in offered)
            for name, entry in offered:
                shorter.setdefault(name, ([], []))[rank].append(entry)
                if times[name] == 1:
                    names.setdefault(name, entry)
        ordered = sorted([*served.values(), *rejected], key=lambda entry: (entry.id, entry.file or ""))
        return cls(
            MappingProxyType(served),
            tuple(rejected),
            MappingProxyType(names),
            MappingProxyType(shorter),
            tuple(ordered),
        )

    def find(self, name: str) -> AgentEntry | None:
        """Return the entry of an id, a unique bare name or a unique alias; ASCII case does not matter."""
        found = self.names.get(name)
        if found is None and name.isascii():
            found = self.names.get(name.lower())
        return found

    def find_reached(self, name: str, reaches: Callable[[str], bool]) -> AgentEntry | None:
        """Return the entry of an id, or the only one of a bare name, or of an alias, that the caller reaches.

        ``reaches`` is asked for the ids that share a shorter name, so that an agent which a caller may not know of
        neither takes the name from another one nor shows that it is there.
        """
        found = self.entries.get(name)
        tiers = self.shorter.get(name) if found is None else None
        if found is None and tiers is None and name.isascii():
            lower = name.lower()
            found, tiers = self.entries.get(lower), self.shorter.get(lower)
        if found is not None or tiers is None:
            return found
        for tier in tiers:
            reached = [entry for entry in tier if reaches(entry.id)]
            if len(reached) == 1:
                return reached[0]
        return None

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
