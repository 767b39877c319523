"""Why an environment is a new one: the entry of the store that is nearest to it, and what differs.

Both are described by facts, such as the version of a package or a setting of uv. An entry has them in its ready record
and its pylock.toml; a layer has those of its environment too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from ray_envcache.store.key import digest_of
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.record import ReadyRecord
from ray_envcache.survey import packages
from ray_envcache.survey.inventory import last_used
from ray_envcache.survey.packages import Package

RECENT, CANDIDATES = 200, 10
"""Of so many entries the records are read, and of so many the packages: 0.1 and 4 ms each, in a store of any size."""

NAMED = 3
"""So many differences are named in one line."""

_Facts: TypeAlias = "dict[tuple[str, str], Any]"
_ORDER = ("python", "ray", "option", "setting", "content", "package", "artifact")


class Wanted(NamedTuple):
    """What a build makes: its key, and what that is made of.

    `tables` are the packages in pylock form. A layer has none; its `base` is the entry it lies on. `inputs` as in
    `ReadyRecord`.
    """

    key: str
    project: str
    inputs: Mapping[str, Any]
    tables: Iterable[Mapping[str, Any]] = ()
    base: Entry | None = None


class Difference(NamedTuple):
    """What differs: a package, the artifact of one, Python, ray, an option, a setting of uv, a local package's content.

    `was` is what the existing entry has, `now` what is wanted; None where it has nothing of that name.
    """

    kind: str
    name: str
    was: str | None
    now: str | None

    def __str__(self) -> str:
        change = f"{self.was or 'off'} -> {self.now or 'off'}"
        if self.kind == "setting":
            return f"uv's setting {self.name}"
        if self.kind == "python":
            return f"Python {change}" if self.name == "version" else f"Python's {self.name} {change}"
        if self.kind == "option":
            return f"{self.name} {change}"
        if self.was is None or self.now is None:
            return f"+{self.name} {self.now}" if self.was is None else f"-{self.name} {self.was}"
        if self.kind == "content":
            return f"the code of {self.name}"
        return f"another file of {self.name}" if self.kind == "artifact" else f"{self.name} {change}"


class Nearest(NamedTuple):
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
        if self.fault and not self.differences:
            return f"new: of the earlier one {self.fault}"
        if not self.differences:
            return "new: another version of ray-envcache built the one before"
        if self.project == project:
            return f"new: {_summary(self.differences)}"
        count = len(self.differences)
        return f"new: the first of {project}; {count} difference{'s' * (count > 1)} from {self.project}"


def nearest(layouts: Iterable[Layout], wanted: Wanted) -> Nearest | None:
    """The entry of the same kind with the fewest differences, of the same project if it has any; None where none is.

    Of a large store the most recently used entries are looked at. One that is not handed out any more counts too.
    """
    entries = sorted((one for layout in layouts for one in layout.all_entries()), key=last_used, reverse=True)
    recorded = [(entry, record) for entry in entries[:RECENT] if (record := ReadyRecord.read_any(entry))]
    # What earlier versions recorded does not tell enough.
    alike = [one for one in recorded if one[1].inputs and bool(one[1].base) == bool(wanted.base)]
    own = [one for one in alike if one[1].project == wanted.project]
    facts = _wanted_facts(wanted)
    found = [_compared(entry, record, facts) for entry, record in (own or alike)[:CANDIDATES]]
    return min(found, key=lambda one: len(one.differences), default=None)


def why_new(layout: Layout, wanted: Wanted) -> str:
    """Why a build is needed, in one line; "" in a store without anything to compare with."""
    found = nearest([layout], wanted)
    return found.reason(wanted.project) if found else ""


def _compared(entry: Entry, record: ReadyRecord, facts: _Facts) -> Nearest:
    differences = _differences(_entry_facts(entry, record), facts)
    return Nearest(entry.key, record.project, os.fspath(entry.path), record.fault(entry), differences)


def _wanted_facts(wanted: Wanted) -> _Facts:
    below = ReadyRecord.read_any(wanted.base) if wanted.base else None
    if wanted.base and below:
        return _entry_facts(wanted.base, below) | _facts({}, wanted.inputs)
    return _facts(packages.of_tables(wanted.tables, wanted.inputs.get("outside", ())), wanted.inputs)


def _entry_facts(entry: Entry, record: ReadyRecord) -> _Facts:
    base = entry.base(record.base) if record.base else None
    below = ReadyRecord.read_any(base) if base else None
    if base and below:
        return _entry_facts(base, below) | _facts({}, record.inputs or {})
    return _facts(packages.of_entry(entry, record), record.inputs or {})


def _facts(found: Mapping[str, Package], inputs: Mapping[str, Any]) -> _Facts:
    facts: _Facts = {("ray" if name == "ray" else "package", name): one for name, one in found.items()}
    facts |= {("python", name): value for name, value in inputs.get("interpreter", {}).items()}
    facts |= {("option", str(one)): "on" for one in inputs.get("outside", ()) if isinstance(one, str)}
    settings = json.loads(inputs.get("build_settings") or "{}")
    # Their values may hold secrets.
    facts |= {("setting", name): digest_of(value) for name, value in settings.items()}
    return facts | {("content", name): digest for name, digest in inputs.get("contents", {}).items()}


def _differences(was: _Facts, now: _Facts) -> tuple[Difference, ...]:
    found = [_difference(*name, was.get(name), now.get(name)) for name in was.keys() | now.keys()]
    kept = [one for one in found if one.was != one.now]
    if any(one[:2] == ("python", "version") for one in kept):
        # Its build, tags and markers change with the version.
        kept = [one for one in kept if one.kind != "python" or one.name == "version"]
    return tuple(sorted(kept, key=lambda one: (_ORDER.index(one.kind), one.name)))


def _difference(kind: str, name: str, was: Any, now: Any) -> Difference:
    if isinstance(was, Package) and isinstance(now, Package) and str(was) == str(now):
        return Difference("artifact", name, was.artifact, now.artifact)
    return Difference(kind, name, _text(was), _text(now))


def _text(fact: Any) -> str | None:
    if fact is None or isinstance(fact, str):
        return fact
    return str(fact) if isinstance(fact, Package) else json.dumps(fact, sort_keys=True)


def _summary(differences: Iterable[Difference]) -> str:
    """The differences in a few words: changes first, then how many packages are more or fewer."""
    parts = {"": [], "+": [], "-": []}  # type: dict[str, list[str]]
    for one in differences:
        text = str(one)
        parts[text[0] if text[0] in "+-" else ""].append(text)
    changed, *others = parts.values()
    more = [f"{len(changed) - NAMED} more changes"] if len(changed) > NAMED else []
    counts = [each[0] if len(each) == 1 else f"{each[0][0]}{len(each)} packages" for each in others if each]
    return ", ".join([*changed[:NAMED], *more, *counts])
