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
    Limits,
    choose,
    frees_something,
    in_turn,
    may_go,
)
from ray_envcache.survey.inventory import Status
from ray_envcache.system.disk import FileSystem
from ray_envcache.system.texts import Space

NOW = 1000 * DAY
GB = 10**9
NONE = Limits(unused_for=None, min_free_space=None)
PROTECTED: dict[str, dict[str, Any]] = {
    "in use": {"in_use": True},
    "pinned": {"pinned": True},
    "building": {"state": "building"},
}

Chosen = Sequence[tuple[Status, str]]


def disk(total: int, free: int) -> FileSystem:
    return FileSystem(total, free, inodes_free=None, kind="")


DISK = disk(total=1000, free=50)


def entry(
    name: str, last_used: float, size: int, reclaimable: int, protected: str = "", state: str = "ready"
) -> Status:
    fields: dict[str, Any] = {
        **dict.fromkeys(("created_at", "python", "ray", "project", "source")),
        "state": state,
        "in_use": False,
        "pinned": False,
        **PROTECTED.get(protected, {}),
    }
    return Status(
        key=name,
        path=name,
        users=(),
        size_bytes=size,
        reclaimable_bytes=reclaimable,
        exact=True,
        last_used=last_used,
        **fields,
    )


def idle(name: str, days: float, size: int = 10, reclaimable: int | None = None, **more: str) -> Status:
    """An entry that was last used `days` ago."""
    return entry(name, NOW - days * DAY, size, size if reclaimable is None else reclaimable, **more)


# 100 bytes on a disk of 1000, of which 50 are free.
STORE = (idle("d", 1, 10), idle("b", 20, 30, protected="in use"), idle("a", 30, 40), idle("c", 10, 20))


def names(going: Chosen) -> str:
    return " ".join(one.path for one, _ in going)


def chosen(limits: Limits, *store: Status, space: FileSystem = DISK, other: int = 0) -> str:
    return names(choose(store, limits, space, other, NOW))


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
    small = [one._replace(size_bytes=1, reclaimable_bytes=1) for one in STORE]
    assert chosen(Limits(), *small, space=disk(1000, free)) == gone


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
    """It is said why an entry goes, with the figures that led to it."""
    assert choose(STORE, replace(NONE, **limit), DISK, 0, NOW)[0][1] == reason


def test_figures_of_each_reason() -> None:
    """The figures of a reason are those after the entries before it."""
    going = choose(STORE, replace(NONE, max_used_space=Space(0)), DISK, 0, NOW)
    assert [reason.split(",")[0] for _, reason in going] == [
        "the store takes 100 B",
        "the store takes 60 B",
        "the store takes 40 B",
    ]


def test_order() -> None:
    """The least recently used goes first; among those of the same moment, the first by name."""
    store = [idle("z", 2), idle("b", 1), idle("c", 1), idle("a", 1), idle("y", 3)]
    assert chosen(replace(NONE, everything=True), *store) == "y z a b c"
    assert chosen(replace(NONE, max_used_space=Space(20)), *store) == "y z a"


@pytest.mark.parametrize("why", PROTECTED)
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
    assert chosen(Limits(), idle("a", 1, GB), space=disk(total, free)) == gone


def test_broken_ones() -> None:
    """What can never be used goes, whatever the limits are, but not while a process uses it."""
    broken = idle("half", 0, state="broken")
    assert chosen(NONE, broken, idle("whole", 900)) == "half"
    assert choose([broken], NONE, DISK, 0, NOW)[0][1] == "it is broken and can never be used"
    assert chosen(NONE, broken._replace(in_use=True)) == ""


def test_what_the_store_occupies_besides() -> None:
    """The ceiling is one of all that the store occupies, uv's cache in it included."""
    limits = replace(NONE, max_used_space=Space(60))
    assert chosen(limits, idle("a", 2), idle("b", 1), other=40) == ""
    assert chosen(limits, idle("a", 2), idle("b", 1), other=41) == "a"


def test_only_what_is_reclaimable_counts_as_freed() -> None:
    """Free space grows by what a removal frees now, not by the size of the entry."""
    store = [idle(name, 1, 50, reclaimable=10) for name in "abc"]
    assert chosen(replace(NONE, min_free_space=Space(70)), *store) == "a b"


def test_clock_that_went_back() -> None:
    """An entry used in the future counts as used now: it is not old, and space limits take it last."""
    store = [idle("future", -500), idle("today", 0), idle("yesterday", 1)]
    assert chosen(replace(NONE, unused_for=DAY), *store) == "yesterday"
    assert chosen(replace(NONE, max_used_space=Space(0)), *store) == "yesterday today future"
    going = choose(store, replace(NONE, unused_for=0.0), DISK, 0, NOW)
    assert names(going) == "yesterday today future"
    assert going[-1][1] == "unused for 0 seconds"


def test_empty_store() -> None:
    """In an empty store nobody goes, however full the disk is; nor does a disk without size break anything."""
    limits = replace(Limits(), max_used_space=Space(0), everything=True)
    assert choose([], limits, disk(0, 0), 0, NOW) == []
    assert chosen(Limits(unused_for=None), *STORE, space=disk(0, 0)) == ""


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
protections = st.sampled_from(["", "", "", *PROTECTED])
entries = st.builds(entry, st.text("ab", min_size=1, max_size=4), moments, amounts, amounts, protections)
stores = st.lists(entries, max_size=8, unique_by=lambda one: one.path)
disks = st.builds(disk, st.integers(0, 400), amounts)
ages = st.none() | st.integers(0, 8).map(lambda days: days * DAY)
space_limits = st.builds(Limits, st.none(), spaces, spaces, spaces)
all_limits = st.builds(Limits, ages, spaces, spaces, spaces, st.booleans())
modest = settings(max_examples=80)


def total_size(going: Chosen) -> int:
    return sum(one.size_bytes for one, _ in going)


@given(stores, all_limits, disks)
@modest
def test_who_goes(store: list[Status], limits: Limits, space: FileSystem) -> None:
    """Only entries go that may, each once, with a reason, least recently used first and then by name."""
    going = choose(store, limits, space, 0, NOW)
    found = [one for one, _ in going]
    assert set(found) <= {one for one in store if not (one.in_use or one.pinned or one.state == "building")}
    assert len(set(found)) == len(found)
    assert all(reason for _, reason in going)
    assert found == sorted(found, key=lambda one: (one.last_used, one.path))


@given(stores, all_limits, disks, st.randoms(use_true_random=False))
@modest
def test_order_of_the_input(store: list[Status], limits: Limits, space: FileSystem, random: Any) -> None:
    """The choice does not depend on the order in which the entries were found."""
    shuffled = [*store]
    random.shuffle(shuffled)
    assert choose(iter(shuffled), limits, space, 0, NOW) == choose(store, limits, space, 0, NOW)


@given(stores, space_limits, spaces.filter(bool), disks)
@modest
def test_floor(store: list[Status], limits: Limits, floor: Space, space: FileSystem) -> None:
    """Space limits alone never shrink the store below the floor, nor remove anything where it is below already."""
    going = choose(store, replace(limits, reserved_space=floor), space, 0, NOW)
    used = sum(one.size_bytes for one in store)
    assert not going or used - total_size(going) >= floor.bytes_of(space.total)


@given(stores, space_limits, disks)
@modest
def test_targets_are_reached(store: list[Status], limits: Limits, space: FileSystem) -> None:
    """Without a floor each space limit is reached, or no entry is left whose removal would help."""
    going = choose(store, replace(limits, reserved_space=None), space, 0, NOW)
    gone = {one for one, _ in going}
    left = {one for one in store if may_go(one) and one not in gone}
    used = sum(one.size_bytes for one in store) - total_size(going)
    free = space.free + sum(one.reclaimable_bytes for one in gone)
    if limits.max_used_space is not None:
        assert used <= limits.max_used_space.bytes_of(space.total) or not left
    if limits.min_free_space is not None:
        idle = in_turn(one for one in store if may_go(one))
        worth = [one for number, one in enumerate(idle) if one.reclaimable_bytes and frees_something(idle[number:])]
        assert free >= limits.min_free_space.bytes_of(space.total) or not left.intersection(worth)


@given(stores, space_limits, disks)
@modest
def test_nothing_goes_in_vain(store: list[Status], limits: Limits, space: FileSystem) -> None:
    """Before the last entry by space went, a space limit was still missed."""
    going = choose(store, limits, space, 0, NOW)
    before = going[:-1]
    used = sum(one.size_bytes for one in store) - total_size(before)
    free = space.free + sum(one.reclaimable_bytes for one, _ in before)
    ceiling, target = limits.max_used_space, limits.min_free_space
    too_much = ceiling is not None and used > ceiling.bytes_of(space.total)
    too_little = target is not None and free < target.bytes_of(space.total)
    assert not going or too_much or too_little


@given(stores, all_limits, st.integers(0, 9))
@modest
def test_age_is_exact(store: list[Status], limits: Limits, days: int) -> None:
    """By age go all that may go and are old enough, whatever else is set, and by age alone no others."""
    old = {one for one in store if may_go(one) and max(NOW - one.last_used, 0) >= days * DAY}
    gone = choose(store, replace(limits, unused_for=days * DAY), disk(400, 20), 0, NOW)
    assert {one for one, _ in gone} >= old
    alone = choose(store, replace(NONE, unused_for=days * DAY), disk(400, 20), 0, NOW)
    assert {one for one, _ in alone} == old


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
def test_wider_limits(store: list[Status], limits: tuple[Limits, Limits], space: FileSystem) -> None:
    """Who stays under some limits stays under wider ones."""
    narrow, wide = ({one for one, _ in choose(store, each, space, 0, NOW)} for each in limits)
    assert wide <= narrow


@given(stores, all_limits, amounts, amounts, disks)
@modest
def test_higher_floor(store: list[Status], limits: Limits, floor: int, more: int, space: FileSystem) -> None:
    """A higher floor never removes more bytes (others may go: what would break the floor is passed over)."""
    low = choose(store, replace(limits, reserved_space=Space(floor)), space, 0, NOW)
    high = choose(store, replace(limits, reserved_space=Space(floor + more)), space, 0, NOW)
    assert total_size(high) <= total_size(low)
