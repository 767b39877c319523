"""What the journal tells: counts, savings, and the builds that stand out."""

from __future__ import annotations

from typing import Any

import pytest

from ray_envcache.store.journal import Event, Journal
from ray_envcache.survey.statistics import Statistics, statistics

A, B = "a" * 32, "b" * 32


def event(at: int, name: str, **fields: Any) -> Event:
    return Event(f"2026-01-{at:02}T00:00:00Z", name, fields)


def setup(at: int, result: str, cluster: str = "", key: str = A, **more: Any) -> Event:
    return event(at, "setup", result=result, cluster=cluster, key=key, kind="agent", project="p", **more)


def told(*events: Event, since: str = "", project: str = "") -> Statistics:
    return statistics(Journal([*events], {}, 0), (), since, project)


def counts(found: Statistics, *names: str) -> tuple[float, ...]:
    return tuple(found.counts[name] for name in names)


BUILD = event(1, "build", key=A, project="p", seconds=60)
GONE = event(9, "removal", key=A, bytes=1000, freed_bytes=400)


def test_nothing() -> None:
    """Of an empty journal there are zeros, and no rate."""
    found = told()
    assert (found.begins_at, found.hit_rate, found.slowest, found.most_often) == ("", None, [], [])
    assert {*found.setups.values(), *found.counts.values()} == {0}


def test_setups_and_hit_rate() -> None:
    """The rate is of what was handed out: refused and failed set-ups are neither hits nor misses."""
    results = ["found", "found", "lower", "built", "waited", "refused", "failed", "of another kind"]
    found = told(*(setup(1, result) for result in results))
    assert found.setups == {"found": 2, "lower": 1, "fetched": 0, "built": 1, "waited": 1, "refused": 1, "failed": 1}
    assert found.hit_rate == pytest.approx(3 / 5)


def test_savings_are_copies_less_builds() -> None:
    """Three clusters and one run used what was built once: three copies were not made."""
    clusters = [setup(1, "built", "c1"), *(setup(2, "found", name) for name in ("c2", "c3", "c2", "c1"))]
    run = event(3, "setup", result="found", key=A, kind="run")
    found = told(BUILD, *clusters, run, GONE)
    assert (found.saved_copies, found.saved_bytes, found.saved_seconds) == (3, 3000, 180)
    assert counts(found, "removals", "freed_bytes") == (1, 400)


def test_what_saved_nothing() -> None:
    """A driver that made ready, the only cluster of an environment, and what was refused save nothing."""
    ready = event(1, "setup", result="built", key=A, kind="driver")
    assert told(BUILD, ready, setup(1, "found", "c1"), setup(1, "failed", "c2"), GONE).saved_copies == 0
    assert told(BUILD, BUILD, setup(1, "found", "c1"), GONE).saved_copies == 0


def test_waiting_saves_no_time() -> None:
    """Who waited for the builder saved a copy, but no second."""
    found = told(BUILD, setup(1, "built", "c1"), setup(1, "waited", "c2", seconds=59), GONE)
    assert (found.saved_copies, found.saved_seconds, found.wait_seconds) == (1, 1, 59)


def test_a_layer_saves_what_lies_below() -> None:
    """Two clusters with layers of their own share the environment below: one copy of that was not made."""
    layers = [event(1, "build", key=key, seconds=1) for key in ("c" * 32, "d" * 32)]
    uses = [setup(1, "built", name, key=key * 32, base=A) for name, key in (("c1", "c"), ("c2", "d"))]
    found = told(BUILD, *layers, *uses, GONE)
    assert (found.saved_copies, found.saved_bytes, found.saved_seconds) == (1, 1000, 60)


def test_since_and_project() -> None:
    """Only what came since, and only of one project: of a removal, or a refusal, by its key or path."""
    other = [event(2, "build", key=B, project="q", seconds=5), event(3, "removal", key=B, freed_bytes=7)]
    last = [event(2, "setup", result="found", key=B, path="/q", project="q")]
    last.append(event(2, "setup", result="refused", path="/q"))
    swept = event(4, "collection", swept_bytes=100, removed=1)
    everything = (BUILD, setup(1, "built"), *other, *last, swept)
    found = told(*everything, project="q")
    assert counts(found, "builds", "removals", "freed_bytes") == (1, 1, 7)
    assert found.setups["refused"] == 1
    found = told(*everything, since="2026-01-03T00:00:00Z")
    assert counts(found, "builds", "removals", "freed_bytes", "collections") == (0, 1, 107, 1)
    assert found.begins_at == "2026-01-03T00:00:00Z"
    assert told(*everything, since="2020-01-01T00:00:00Z").begins_at == BUILD.at


def test_builds_that_stand_out() -> None:
    """The slowest come first; of a project it shows whether it built new keys, or the same again."""
    builds = [event(day, "build", key=A, project="p", seconds=day) for day in range(1, 9)]
    found = told(*builds, event(9, "build", key=B, project="q", seconds=100))
    assert [one.seconds for one in found.slowest] == [100, 8, 7, 6, 5]
    assert [(one.project, one.builds, one.keys, one.seconds) for one in found.most_often] == [
        ("p", 8, 1, 36), ("q", 1, 1, 100),
    ]  # fmt: skip
