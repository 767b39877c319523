"""Why an environment is a new one: the entry of the store that is nearest to it, and what differs in their facts."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.record import Facts, ReadyRecord, read_facts

KINDS = ("python", "ray", "option", "setting", "content", "package", "artifact")
"""What may differ, in the order in which people see it."""

NAMED = 3
"""So many differences are named in one line."""

DIGESTS = frozenset({"setting", "content", "artifact"})
"""The kinds whose values are digests, which say nothing to people."""


@dataclass(frozen=True)
class Difference:
    """What differs: a package, the artifact of one, Python, ray, an option, a setting of uv, a local package's content.

    `was` is what the existing entry has, `now` what is wanted; None where it has nothing of that name.
    """

    kind: str
    name: str
    was: str | None
    now: str | None

    def __str__(self) -> str:
        name = self.name if self.kind in {"package", "ray", "option"} else f"{self.kind} {self.name}"
        return name if self.kind in DIGESTS else f"{name} {self.was or 'none'} -> {self.now or 'none'}"


@dataclass(frozen=True)
class Nearest:
    """An entry of the store, and how what is wanted differs from it.

    `fault` says why it would not be handed out even for the same key.
    """

    key: str
    project: str
    path: str
    fault: str
    differences: tuple[Difference, ...]

    def reason(self, project: str) -> str:
        """Why what `project` wants is new, in one line."""
        if self.differences:
            more = len(self.differences) - NAMED
            why = ", ".join(map(str, self.differences[:NAMED])) + (f", and {more} more" if more > 0 else "")
        else:
            why = f"of the earlier one {self.fault}" if self.fault else "another version of ray-envcache built the last"
        other = "" if self.project == project else f"the first of {project}; compared with {self.project}: "
        return f"new: {other}{why}"


def nearest(layouts: Iterable[Layout], project: str, wanted: Facts) -> Nearest | None:
    """The entry of the same kind with the fewest differences, of the same project if it has any; None where none is.

    One that is not handed out any more counts too.
    """
    entries = (one for layout in layouts for one in layout.all_entries())
    alike = [found for one in entries if (found := _compared(one, wanted))]
    own = [one for one in alike if one.project == project]
    return min(own or alike, key=lambda one: len(one.differences), default=None)


def why_new(layout: Layout, project: str, wanted: Facts) -> str:
    """Why a build is needed, in one line; "" in a store without anything to compare with."""
    found = nearest([layout], project, wanted)
    return found.reason(project) if found else ""


def _compared(entry: Entry, wanted: Facts) -> Nearest | None:
    """The comparison of environments with environments, of layers with layers; None where one has no facts."""
    record, there = ReadyRecord.read_any(entry), read_facts(entry)
    if not (record and there and wanted) or _is_layer(there) != _is_layer(wanted):
        return None
    return Nearest(entry.key, record.project, os.fspath(entry.path), record.fault(entry), _differences(there, wanted))


def _is_layer(found: Facts) -> bool:
    return any(fact.startswith("content ") for fact in found)


def _differences(was: Facts, now: Facts) -> tuple[Difference, ...]:
    changed = {fact for fact in was.keys() | now.keys() if was.get(fact) != now.get(fact)}
    found = [_difference(fact, was, now) for fact in changed if not _follows(fact, changed)]
    # A later version may note other kinds.
    known = [one for one in found if one.kind in KINDS]
    return tuple(sorted(known, key=lambda one: (KINDS.index(one.kind), one.name)))


def _difference(fact: str, was: Facts, now: Facts) -> Difference:
    kind, _, name = fact.partition(" ")
    return Difference("ray" if fact == "package ray" else kind, name, was.get(fact), now.get(fact))


def _follows(fact: str, changed: Collection[str]) -> bool:
    """Whether a change says no more than another: all of Python changes with its version, a file with its package."""
    kind, _, name = fact.partition(" ")
    cause = {"python": "python version", "artifact": f"package {name}"}.get(kind)
    return cause in changed and cause != fact
