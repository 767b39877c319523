"""Filters and orders of `list`: what is shown, and what is refused in which words."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ray_envcache.cli.listing import ORDERS, POSSIBLE, parse_filter
from ray_envcache.errors import FieldValueError
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.record import write_facts
from ray_envcache.survey.inventory import Status, survey
from ray_envcache.system import flock
from ray_envcache.system.texts import utc
from tests.gc.fabricated import add_file, change, make_entry, make_layout

HOUR, DAY = 3600.0, 86_400.0


def give_packages(entry: Entry, **versions: str) -> None:
    write_facts(entry, {f"package {name}": version for name, version in versions.items()})


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Number 1 is large, old and of the project `big`; number 2 small and new; number 3 a layer on 1; number 4 broken."""
    layout = make_layout(tmp_path / "store")
    old, new, layer, broken = (make_entry(layout, number) for number in (1, 2, 3, 4))
    add_file(old, 3_000_000)
    for entry in (old, layer, broken):
        give_packages(entry, torch="2.8.0+cu128", numpy="2.4.1", odd="(no version)")
    give_packages(new, numpy="2.5.0rc1", torch="2.7.1 (inherited)")
    change(old, project="big", created_at=utc(time.time() - 40 * DAY))
    change(layer, base=old.name)
    change(new, created_at=utc(time.time() - HOUR))
    os.utime(old.in_use, (time.time() - 10 * DAY,) * 2)
    broken.ready.unlink()
    return layout


def passing(layout: Layout, text: str) -> str:
    """The numbers of the entries that pass."""
    chosen = parse_filter(text)
    return "".join(sorted(str(int(one.key, 16)) for one in survey(layout) if chosen(layout, one)))


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("size>1MB", "1"),
        ("size < 1 MiB", "234"),
        ("size>0", "1234"),
        ("unused>7d", "1"),
        ("used<1d", "234"),
        ("unused<1h", "234"),
        ("has:torch", "123"),
        ("has:Torch==2.8.0", "13"),
        ("has:torch<2.8", "2"),
        ("has: numpy>=2.4, <2.5", "13"),
        ("has:numpy==2.5.0rc1", "2"),
        ("has:pandas", ""),
        ("has:odd", "13"),
        ("has:odd>0", ""),
        ("project:big", "1"),
        ("project:bi", ""),
    ],
)
def test_filters(layout: Layout, text: str, numbers: str) -> None:
    """A layer has what lies below it, inherited packages count, an entry without a record has nothing."""
    assert passing(layout, text) == numbers


def test_what_is_in_use_is_used_now(layout: Layout) -> None:
    """An environment that workers have run from for days is not unused."""
    entry = layout.first_entry(f"{1:032x}")
    descriptor = flock.try_flock(entry.in_use, exclusive=False)
    assert descriptor is not None
    assert (passing(layout, "unused>7d"), passing(layout, "used<1m")) == ("", "1234")
    os.close(descriptor)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "size",
        "size:1GB",
        "mass>1GB",
        "project>1",
        "unused>",
        "has:",
        "has>1",
        "torch",
        "size=1",
        "size>=1GB",
        "used<=1d",
        "x\n",
    ],
)
def test_unknown_filters(text: str) -> None:
    """The error names the filter, and the ones there are."""
    with pytest.raises(FieldValueError) as caught:
        parse_filter(text)
    assert f"`{text}`" in caught.value.message
    assert POSSIBLE in caught.value.hint


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("size>1XB", "Not a size: `1XB`"),
        ("unused>1y", "Not a duration: `1y`"),
        ("used<yesterday", "Not a duration: `yesterday`"),
        ("has:torch=2", "Not a package: `torch=2`"),
        ("has:torch[gpu]", "Only a name and versions can be asked for: `torch[gpu]`"),
    ],
)
def test_bad_values(text: str, named: str) -> None:
    """The error names the value, and the hint what may stand there."""
    with pytest.raises(FieldValueError) as caught:
        parse_filter(text)
    assert caught.value.message == named
    assert caught.value.hint


def test_every_filter_that_is_named_works(layout: Layout) -> None:
    """What help and errors propose can be written."""
    for text in POSSIBLE.replace(" (either with < or >)", "").split(", "):
        passing(layout, text)


def test_facts_that_are_damaged(layout: Layout) -> None:
    """An entry whose facts cannot be read, or that has none, has no packages; the others are shown."""
    layout.first_entry(f"{1:032x}").facts.write_text("[[[")
    layout.first_entry(f"{2:032x}").facts.unlink()
    assert passing(layout, "has:torch") == "3"


def test_orders(layout: Layout) -> None:
    """The largest, the last used and the newest come first."""

    def first(order: str) -> int:
        found: list[Status] = sorted(survey(layout), key=ORDERS[order])
        return int(found[0].key, 16)

    os.utime(layout.first_entry(f"{2:032x}").in_use, (time.time() + 5,) * 2)
    assert [first("size"), first("used")] == [1, 2]
    assert [int(one.key, 16) for one in sorted(survey(layout), key=ORDERS["created"])][-1] == 1
