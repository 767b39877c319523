"""Which entries go: the policy, asked with what is in the store at this moment."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable

from ray_envcache.gc import policy
from ray_envcache.gc.policy import Candidate, Disk, Limits, Victim
from ray_envcache.store.inventory import Status, survey
from ray_envcache.store.layout import Layout
from ray_envcache.store.sizes import Sizes
from ray_envcache.system import disk


def look_at(layout: Layout) -> dict[str, Status]:
    """All entries by name, with their recorded sizes, however old: most of them stay, and are not walked through."""
    return {os.path.basename(status.path): status for status in survey(layout, max_age=math.inf)}


def choose(layout: Layout, limits: Limits, found: dict[str, Status]) -> list[tuple[Victim, Status]]:
    """The entries that go, layers after what they lie on, each with its sizes as they are now."""
    measured: set[str] = set()
    while True:
        victims = _victims(layout, limits, found)
        stale = {victim.candidate.name for victim in victims} - measured
        if not stale:
            return [(victim, found[victim.candidate.name]) for victim in victims]
        # What they free may be more or less than recorded, and then others go: asked again.
        found |= _measured(layout, (found[name] for name in stale))
        measured |= stale


def _victims(layout: Layout, limits: Limits, found: dict[str, Status]) -> list[Victim]:
    space = disk.free_space(layout.root)
    candidates = [_candidate(name, status) for name, status in found.items()]
    victims = policy.choose(candidates, limits, Disk(space.total, space.free), time.time())
    return [*victims, *_layers_on(victims, candidates, found)]


def _layers_on(victims: list[Victim], candidates: list[Candidate], found: dict[str, Status]) -> list[Victim]:
    """The layers on environments that go: without these they can never be used again."""
    going = {victim.candidate.name for victim in victims}
    gone = {found[name].path for name in going}
    left = [one for one in candidates if one.name not in going and not one.protected]
    return [Victim(one, "its environment goes") for one in left if found[one.name].base_path in gone]


def _candidate(name: str, status: Status) -> Candidate:
    protected = "pinned" if status.pinned else "in use" if status.in_use else ""
    protected = "building" if status.state == "building" else protected
    # What is broken can never be handed out: it goes whatever its age.
    last_used = status.last_used if status.state == "ready" else 0.0
    return Candidate(name, last_used, status.size_bytes, status.reclaimable_bytes, protected)


def _measured(layout: Layout, stale: Iterable[Status]) -> dict[str, Status]:
    sizes, found = Sizes(layout, max_age=0), {}
    for status in stale:
        name = os.path.basename(status.path)
        if entry := layout.entry(name):
            now = sizes.of(entry)
            found[name] = status._replace(
                size_bytes=now.size_bytes, reclaimable_bytes=now.reclaimable_bytes, exact=now.exact
            )
    return found
