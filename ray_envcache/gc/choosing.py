"""Which entries go: the policy, asked with what is in the store at this moment."""

from __future__ import annotations

import math
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from ray_envcache.gc import policy
from ray_envcache.gc.policy import Candidate, Disk, Limits, Victim
from ray_envcache.store import leases
from ray_envcache.store.layout import Layout
from ray_envcache.survey.inventory import Status, going_too, survey
from ray_envcache.system import disk


def look_at(layout: Layout) -> dict[str, Status]:
    """All entries by name, with their recorded sizes, however old. What is in use counts as used now."""
    _note_deaths(layout)
    found = {os.path.basename(status.path): status for status in survey(layout, max_age=math.inf)}
    for name, status in found.items():
        if status.in_use and (entry := layout.entry(name)):
            # Else what actors used for weeks would be unused for weeks when their cluster is killed.
            leases.touch(entry.in_use)
    return found


def choose(layout: Layout, limits: Limits, found: dict[str, Status]) -> list[tuple[Victim, Status]]:
    """The entries that go, layers after what they lie on."""
    space = disk.free_space(layout.root)
    candidates = policy.in_turn(_candidate(name, status) for name, status in found.items())
    other = 0
    # Trees are walked through only where bytes decide, 5 s for a million files.
    if limits.max_used_space or limits.reserved_space:
        candidates, other = _with_occupied(layout, candidates, found)
    if limits.lacks_space(space.total, space.free):
        candidates = _with_freed(layout, candidates, found)
    victims = policy.choose(candidates, limits, Disk(space.total, space.free, other), time.time())
    victims += _layers_on(victims, candidates, found)
    return [(victim, found[victim.candidate.name]) for victim in victims]


def _candidate(name: str, status: Status) -> Candidate:
    protected = "pinned" if status.pinned else "in use" if status.in_use else ""
    protected = "building" if status.state == "building" else protected
    broken = status.state == "broken"
    return Candidate(name, status.last_used, status.size_bytes, status.reclaimable_bytes, protected, broken)


def _with_occupied(
    layout: Layout, candidates: list[Candidate], found: dict[str, Status]
) -> tuple[list[Candidate], int]:
    """The candidates with what the store occupies less when they go in turn, and what it occupies besides them."""
    # Files that they share with what stays do not go.
    ordered = sorted(candidates, key=lambda one: bool(one.protected))
    entries = [Path(found[one.name].path) for one in ordered]
    uv_cache, bytecode, *occupied = disk.occupied_in_turn([layout.uv_cache, layout.bytecode, *entries])
    return [replace(one, size=size) for one, size in zip(ordered, occupied, strict=True)], uv_cache + bytecode


def _with_freed(layout: Layout, candidates: list[Candidate], found: dict[str, Status]) -> list[Candidate]:
    """The candidates with what deleting them in turn frees."""
    idle = [one for one in candidates if not one.protected]
    freed = disk.freed_in_turn([Path(found[one.name].path) for one in idle], going_too(layout))
    measured = [replace(one, reclaimable=size) for one, (size, _) in zip(idle, freed, strict=True)]
    return [one for one in candidates if one.protected] + measured


def _layers_on(victims: list[Victim], candidates: list[Candidate], found: dict[str, Status]) -> list[Victim]:
    """The layers on environments that go: without these they can never be used again."""
    going = {victim.candidate.name for victim in victims}
    gone = {found[name].path for name in going}
    left = [one for one in candidates if one.name not in going and not one.protected]
    return [Victim(one, "its environment goes") for one in left if found[one.name].base_path in gone]


def _note_deaths(layout: Layout) -> None:
    """Count the death of a lease's holder as a use: when it died is not known, only that it was after the last look."""
    for key in layout.leased_keys():
        folder = layout.leases_of(key)
        with suppress(FileNotFoundError):
            if len(os.listdir(folder)) > len(leases.live_leases(layout, key)):
                for entry in layout.entries_of(key):
                    leases.touch(entry.in_use)
