"""The policy: who goes, in which order and why; and who stays whatever happens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_envcache.errors import FieldValueError
from ray_envcache.gc.policy import (
    DAY,
    DEFAULT_FREE_SPACE,
    Candidate,
    Disk,
    Limits,
    Victim,
    choose,
    frees_something,
    in_turn,
)
from ray_envcache.system.texts import Space

NOW = 1000 * DAY
GB = 10**9
NONE = Limits(unused_for=None, min_free_space=None)
DISK = Disk(total=1000, free=50)


def idle(name: str, days: float, size: int = 10, reclaimable: int | None = None, protected: str = "") -> Candidate:
    """A candidate that was last used `days` ago."""
    return Candidate(name, NOW - days * DAY, size, size if reclaimable is None else reclaimable, protected)


# 100 bytes on a disk of 1000, of which 50 are free.
STORE = (idle("d", 1, 10), idle("b", 20, 30, protected="in use"), idle("a", 30, 40), idle("c", 10, 20))


def names(victims: Sequence[Victim]) -> str:
    return " ".join(victim.candidate.name for victim in victims)


def chosen(limits: Limits, *candidates: Candidate, disk: Disk = DISK, now: float = NOW) -> str:
    return names(choose(candidates, limits, disk, now))


@pytest.mark.parametrize(
    ("limit", "gone"),
    [
        ({}, ""),
        # Age.
        ({"unused_for": 30 * DAY + 1}, ""),
        ({"unused_for": 30 * DAY}, "a"),
        ({"unused_for": 15 * DAY}, "a"),
        ({"unused_for": 10 * DAY}, "a c"),
        ({"unused_for": 0.0}, "a c d"),
        # A ceiling, reached exactly is not exceeded.
        ({"max_used_space": Space(100)}, ""),
        ({"max_used_space": Space(99)}, "a"),
        ({"max_used_space": Space(60)}, "a"),
        ({"max_used_space": Space(59)}, "a c"),
        ({"max_used_space": Space(31)}, "a c d"),
        ({"max_used_space": Space(0)}, "a c d"),
        ({"max_used_space": Space(share=0.1)}, ""),
        ({"max_used_space": Space(share=0.06)}, "a"),
        # Free space on the disk.
        ({"min_free_space": Space(50)}, ""),
        ({"min_free_space": Space(51)}, "a"),
        ({"min_free_space": Space(90)}, "a"),
        ({"min_free_space": Space(91)}, "a c"),
        ({"min_free_space": Space(1000)}, "a c d"),
        ({"min_free_space": Space(share=0.05)}, ""),
        ({"min_free_space": DEFAULT_FREE_SPACE}, "a c"),
        # The floor: who would break it is passed over, a smaller one may go instead.
        ({"reserved_space": Space(0)}, ""),
        ({"max_used_space": Space(0), "reserved_space": Space(60)}, "a"),
        ({"max_used_space": Space(0), "reserved_space": Space(61)}, "c d"),
        ({"max_used_space": Space(0), "reserved_space": Space(90)}, "d"),
        ({"max_used_space": Space(0), "reserved_space": Space(91)}, ""),
        ({"max_used_space": Space(0), "reserved_space": Space(500)}, ""),
        ({"max_used_space": Space(0), "reserved_space": Space(share=0.06)}, "a"),
        ({"min_free_space": Space(1000), "reserved_space": Space(60)}, "a"),
        ({"min_free_space": Space(1000), "reserved_space": Space(share=0.1)}, ""),
        # Age knows no floor, and makes room that need not be made again.
        ({"unused_for": 10 * DAY, "reserved_space": Space(100)}, "a c"),
        ({"unused_for": 30 * DAY, "max_used_space": Space(60)}, "a"),
        ({"unused_for": 30 * DAY, "max_used_space": Space(59)}, "a c"),
        ({"unused_for": 30 * DAY, "min_free_space": Space(90)}, "a"),
        # The stricter one of both space limits counts.
        ({"max_used_space": Space(60), "min_free_space": Space(91)}, "a c"),
        ({"max_used_space": Space(59), "min_free_space": Space(51)}, "a c"),
        # Everything.
        ({"everything": True}, "a c d"),
        ({"everything": True, "reserved_space": Space(100)}, "a c d"),
    ],
)
def test_limits(limit: dict[str, Any], gone: str) -> None:
    """Each limit removes what it says, the least recently used first, and no more than needed."""
    assert chosen(replace(NONE, **limit), *STORE) == gone


@pytest.mark.parametrize(("free", "gone"), [(98, "a c"), (99, "a")])
def test_defaults(free: int, gone: str) -> None:
    """By default goes what nobody used for 14 days, and more while less than a tenth of the disk is free."""
    small = [replace(one, size=1, reclaimable=1) for one in STORE]
    assert chosen(Limits(), *small, disk=Disk(1000, free)) == gone


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ({"unused_for": DAY}, "unused for 30 days"),
        ({"max_used_space": Space(60)}, "the store takes 100 B, more than 60 B"),
        ({"max_used_space": Space(share=0.06)}, "the store takes 100 B, more than 6 %"),
        ({"min_free_space": Space(51)}, "50 B are free, less than 51 B"),
        ({"min_free_space": DEFAULT_FREE_SPACE}, "50 B are free, less than 10 % or 20 GB"),
        ({"everything": True, "unused_for": DAY}, "all were asked for"),
        ({"unused_for": DAY, "max_used_space": Space(60)}, "unused for 30 days"),
    ],
)
def test_reasons(limit: dict[str, Any], reason: str) -> None:
    """A victim says why it goes, with the figures that led to it."""
    assert choose(STORE, replace(NONE, **limit), DISK, NOW)[0].reason == reason


def test_figures_of_each_victim() -> None:
    """The figures of a reason are those after the victims before it."""
    victims = choose(STORE, replace(NONE, max_used_space=Space(0)), DISK, NOW)
    assert [victim.reason.split(",")[0] for victim in victims] == [
        "the store takes 100 B",
        "the store takes 60 B",
        "the store takes 40 B",
    ]


def test_order() -> None:
    """The least recently used goes first; among those of the same moment, the first by name."""
    store = [idle("z", 2), idle("b", 1), idle("c", 1), idle("a", 1), idle("y", 3)]
    assert chosen(replace(NONE, everything=True), *store) == "y z a b c"
    assert chosen(replace(NONE, max_used_space=Space(20)), *store) == "y z a"


@pytest.mark.parametrize("why", ["in use", "pinned", "building"])
@pytest.mark.parametrize(
    "limits",
    [
        replace(NONE, everything=True),
        replace(NONE, unused_for=0.0),
        replace(NONE, max_used_space=Space(0)),
        replace(NONE, min_free_space=Space(share=1.0)),
    ],
    ids=["everything", "unused_for", "max_used_space", "min_free_space"],
)
def test_protected(limits: Limits, why: str) -> None:
    """A protected one stays, whatever the limit and whatever the reason; the others go in its place."""
    assert chosen(limits, idle("old", 900, protected=why), idle("young", 1)) == "young"


def test_protected_ones_count() -> None:
    """What is protected takes space like everything else, and holds the floor like everything else."""
    store = [idle("old", 900, 80, protected="pinned"), idle("young", 1, 20)]
    assert chosen(replace(NONE, max_used_space=Space(80)), *store) == "young"
    assert chosen(replace(NONE, max_used_space=Space(0), reserved_space=Space(80)), *store) == "young"


def test_nothing_to_gain() -> None:
    """For free space no entry goes that frees nothing; for the ceiling and by age it goes all the same."""
    store = [idle("linked", 3, 50, reclaimable=0), idle("own", 2, 50)]
    assert chosen(replace(NONE, min_free_space=Space(1000)), *store) == "own"
    assert chosen(replace(NONE, max_used_space=Space(50)), *store) == "linked"
    assert chosen(replace(NONE, unused_for=DAY), *store) == "linked own"
    assert chosen(replace(NONE, everything=True), *store) == "linked own"


def test_in_vain() -> None:
    """For free space entries go only while all that are left would free a twentieth of their size."""
    full = replace(NONE, min_free_space=Space(1000))
    linked = [idle(name, days, 100, reclaimable=4) for name, days in (("a", 4), ("b", 3), ("c", 2))]
    assert chosen(full, *linked) == ""
    assert chosen(full, *linked, idle("own", 1, 100)) == "a b c own"
    assert chosen(full, idle("own", 5, 100), *linked) == "own"
    assert chosen(replace(full, unused_for=4 * DAY), *linked) == "a"


@pytest.mark.parametrize(
    ("total", "free", "gone"),
    [(100 * GB, 10 * GB, ""), (100 * GB, 10 * GB - 1, "a"), (10**4 * GB, 20 * GB, ""), (10**4 * GB, 20 * GB - 1, "a")],
)
def test_default_free_space(total: int, free: int, gone: str) -> None:
    """A tenth of the disk is to be free, and of a large disk 20 GB."""
    assert chosen(Limits(), idle("a", 1, GB), disk=Disk(total, free)) == gone


def test_broken_ones() -> None:
    """What can never be used goes, whatever the limits are, but not while a process uses it."""
    broken = replace(idle("half", 0), broken=True)
    assert chosen(NONE, broken, idle("whole", 900)) == "half"
    assert choose([broken], NONE, DISK, NOW)[0].reason == "it is broken and can never be used"
    assert chosen(NONE, replace(broken, protected="in use")) == ""


def test_what_the_store_occupies_besides() -> None:
    """The ceiling is one of all that the store occupies, uv's cache in it included."""
    limits = replace(NONE, max_used_space=Space(60))
    assert chosen(limits, idle("a", 2), idle("b", 1), disk=Disk(1000, 50, other=40)) == ""
    assert chosen(limits, idle("a", 2), idle("b", 1), disk=Disk(1000, 50, other=41)) == "a"


def test_only_what_is_reclaimable_counts_as_freed() -> None:
    """Free space grows by what a removal frees now, not by the size of the entry."""
    store = [idle(name, 1, 50, reclaimable=10) for name in "abc"]
    assert chosen(replace(NONE, min_free_space=Space(70)), *store) == "a b"


def test_clock_that_went_back() -> None:
    """An entry used in the future counts as used now: it is not old, and space limits take it last."""
    store = [idle("future", -500), idle("today", 0), idle("yesterday", 1)]
    assert chosen(replace(NONE, unused_for=DAY), *store) == "yesterday"
    assert chosen(replace(NONE, max_used_space=Space(0)), *store) == "yesterday today future"
    victims = choose(store, replace(NONE, unused_for=0.0), DISK, NOW)
    assert names(victims) == "yesterday today future"
    assert victims[-1].reason == "unused for 0 seconds"


def test_empty_store() -> None:
    """In an empty store nobody goes, however full the disk is; nor does a disk without size break anything."""
    limits = replace(Limits(), max_used_space=Space(0), everything=True)
    assert choose([], limits, Disk(0, 0), NOW) == []
    assert chosen(Limits(unused_for=None), *STORE, disk=Disk(0, 0)) == ""


@pytest.mark.parametrize(
    ("name", "text", "field", "value"),
    [
        ("UNUSED_FOR", "2d", "unused_for", 2 * DAY),
        ("UNUSED_FOR", "0", "unused_for", 0.0),
        ("UNUSED_FOR", "off", "unused_for", None),
        ("UNUSED_FOR", " None ", "unused_for", None),
        ("UNUSED_FOR", "", "unused_for", 14 * DAY),
        ("UNUSED_FOR", "  ", "unused_for", 14 * DAY),
        ("MAX_USED_SPACE", "50GB", "max_used_space", Space(50 * 10**9)),
        ("MAX_USED_SPACE", "30%", "max_used_space", Space(share=0.3)),
        ("MAX_USED_SPACE", "0", "max_used_space", Space(0)),
        ("MAX_USED_SPACE", "off", "max_used_space", None),
        ("MIN_FREE_SPACE", "20 GiB", "min_free_space", Space(20 * 2**30)),
        ("MIN_FREE_SPACE", "5%", "min_free_space", Space(share=0.05)),
        ("MIN_FREE_SPACE", "OFF", "min_free_space", None),
        ("MIN_FREE_SPACE", "", "min_free_space", DEFAULT_FREE_SPACE),
        ("MIN_FREE_SPACE", "10%", "min_free_space", Space(share=0.1)),
        ("RESERVED_SPACE", "1TB", "reserved_space", Space(10**12)),
        ("RESERVED_SPACE", "1%", "reserved_space", Space(share=0.01)),
        ("RESERVED_SPACE", "off", "reserved_space", None),
    ],
)
def test_variables(name: str, text: str, field: str, value: Any) -> None:
    """Each variable sets its limit and no other; "off" switches it off, and an empty one is none."""
    found = Limits.from_environ({f"RAY_ENVCACHE_{name}": text, "PATH": "/bin"})
    assert found == replace(Limits(), **{field: value})


def test_no_variables() -> None:
    """Without variables the defaults hold: 14 days, a tenth of the disk or 20 GB free."""
    assert Limits.from_environ({}) == Limits()
    assert Limits() == Limits(14 * DAY, None, DEFAULT_FREE_SPACE, None, everything=False)


@pytest.mark.parametrize("name", ["UNUSED_FOR", "MAX_USED_SPACE", "MIN_FREE_SPACE", "RESERVED_SPACE"])
@pytest.mark.parametrize("text", ["soon", "-1", "on", "101%", "9" * 400, "offf"])
def test_bad_variables(name: str, text: str) -> None:
    """An error names the variable, quotes its value and says what to write."""
    with pytest.raises(FieldValueError, match=f"^RAY_ENVCACHE_{name}: .*`{text}`") as caught:
        Limits.from_environ({f"RAY_ENVCACHE_{name}": text})
    assert "write" in caught.value.hint


# Small numbers: ties, zeros and limits that are hit exactly are frequent.
amounts = st.integers(0, 40)
spaces = st.none() | st.builds(Space, amounts) | st.builds(Space, share=st.sampled_from([0.0, 0.05, 0.5, 1.0]))
moments = st.integers(-2, 8).map(lambda days: NOW - days * DAY)
protections = st.sampled_from(["", "", "", "in use", "pinned", "building"])
candidates = st.builds(Candidate, st.text("ab", min_size=1, max_size=4), moments, amounts, amounts, protections)
stores = st.lists(candidates, max_size=8, unique_by=lambda one: one.name)
disks = st.builds(Disk, st.integers(0, 400), amounts)
ages = st.none() | st.integers(0, 8).map(lambda days: days * DAY)
space_limits = st.builds(Limits, st.none(), spaces, spaces, spaces)
all_limits = st.builds(Limits, ages, spaces, spaces, spaces, st.booleans())
modest = settings(max_examples=80)


def total_size(victims: Sequence[Victim]) -> int:
    return sum(victim.candidate.size for victim in victims)


@given(stores, all_limits, disks)
@modest
def test_victims(store: list[Candidate], limits: Limits, disk: Disk) -> None:
    """Victims are unprotected entries, each once, with a reason, least recently used first and then by name."""
    victims = choose(store, limits, disk, NOW)
    found = [victim.candidate for victim in victims]
    assert set(found) <= set(store)
    assert not any(one.protected for one in found)
    assert len(set(found)) == len(found)
    assert all(victim.reason for victim in victims)
    assert found == sorted(found, key=lambda one: (one.last_used, one.name))


@given(stores, all_limits, disks, st.randoms(use_true_random=False))
@modest
def test_order_of_the_input(store: list[Candidate], limits: Limits, disk: Disk, random: Any) -> None:
    """The choice does not depend on the order in which the entries were found."""
    shuffled = [*store]
    random.shuffle(shuffled)
    assert choose(iter(shuffled), limits, disk, NOW) == choose(store, limits, disk, NOW)


@given(stores, space_limits, spaces.filter(bool), disks)
@modest
def test_floor(store: list[Candidate], limits: Limits, floor: Space, disk: Disk) -> None:
    """Space limits alone never shrink the store below the floor, nor remove anything where it is below already."""
    victims = choose(store, replace(limits, reserved_space=floor), disk, NOW)
    used = sum(one.size for one in store)
    assert not victims or used - total_size(victims) >= floor.bytes_of(disk.total)


@given(stores, space_limits, disks)
@modest
def test_targets_are_reached(store: list[Candidate], limits: Limits, disk: Disk) -> None:
    """Without a floor each space limit is reached, or no entry is left whose removal would help."""
    victims = choose(store, replace(limits, reserved_space=None), disk, NOW)
    gone = {victim.candidate for victim in victims}
    left = {one for one in store if not one.protected and one not in gone}
    used = sum(one.size for one in store) - total_size(victims)
    free = disk.free + sum(one.reclaimable for one in gone)
    if limits.max_used_space is not None:
        assert used <= limits.max_used_space.bytes_of(disk.total) or not left
    if limits.min_free_space is not None:
        idle = in_turn(one for one in store if not one.protected)
        worth = [one for number, one in enumerate(idle) if one.reclaimable and frees_something(idle[number:])]
        assert free >= limits.min_free_space.bytes_of(disk.total) or not left.intersection(worth)


@given(stores, space_limits, disks)
@modest
def test_nobody_goes_in_vain(store: list[Candidate], limits: Limits, disk: Disk) -> None:
    """Before the last victim by space went, a space limit was still missed."""
    victims = choose(store, limits, disk, NOW)
    before = victims[:-1]
    used = sum(one.size for one in store) - total_size(before)
    free = disk.free + sum(victim.candidate.reclaimable for victim in before)
    ceiling, target = limits.max_used_space, limits.min_free_space
    too_much = ceiling is not None and used > ceiling.bytes_of(disk.total)
    too_little = target is not None and free < target.bytes_of(disk.total)
    assert not victims or too_much or too_little


@given(stores, all_limits, st.integers(0, 9))
@modest
def test_age_is_exact(store: list[Candidate], limits: Limits, days: int) -> None:
    """By age go all unprotected ones that are old enough, whatever else is set, and by age alone no others."""
    old = {one for one in store if not one.protected and max(NOW - one.last_used, 0) >= days * DAY}
    gone = choose(store, replace(limits, unused_for=days * DAY), Disk(400, 20), NOW)
    assert {victim.candidate for victim in gone} >= old
    alone = choose(store, replace(NONE, unused_for=days * DAY), Disk(400, 20), NOW)
    assert {victim.candidate for victim in alone} == old


@st.composite
def widened(draw: st.DrawFn) -> tuple[Limits, Limits]:
    """Limits without a floor, and others of which each is the same, wider or off."""
    age, ceiling, target = draw(ages), draw(st.none() | amounts), draw(st.none() | amounts)
    off = st.booleans()
    wider_age = None if age is None or draw(off) else age + draw(st.integers(0, 4)) * DAY
    wider_ceiling = None if ceiling is None or draw(off) else ceiling + draw(amounts)
    wider_target = None if target is None or draw(off) else draw(st.integers(0, target))
    return _sized(age, ceiling, target), _sized(wider_age, wider_ceiling, wider_target)


def _sized(age: float | None, ceiling: int | None, target: int | None) -> Limits:
    return Limits(age, None if ceiling is None else Space(ceiling), None if target is None else Space(target))


@given(stores, widened(), disks)
@settings(max_examples=150)
def test_wider_limits(store: list[Candidate], limits: tuple[Limits, Limits], disk: Disk) -> None:
    """Who stays under some limits stays under wider ones."""
    narrow, wide = ({victim.candidate for victim in choose(store, one, disk, NOW)} for one in limits)
    assert wide <= narrow


@given(stores, all_limits, amounts, amounts, disks)
@modest
def test_higher_floor(store: list[Candidate], limits: Limits, floor: int, more: int, disk: Disk) -> None:
    """A higher floor never removes more bytes (others may go: what would break the floor is passed over)."""
    low = choose(store, replace(limits, reserved_space=Space(floor)), disk, NOW)
    high = choose(store, replace(limits, reserved_space=Space(floor + more)), disk, NOW)
    assert total_size(high) <= total_size(low)
