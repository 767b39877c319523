"""The clock: a jump of the wall clock makes nothing old, and time that really passed does."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ray_envcache.gc import clock
from ray_envcache.gc.clock import TOLERANCE_SECONDS, note_clock
from ray_envcache.store.layout import Layout

DAY = 86_400.0
WALL = 1_700_000_000.0
UPTIME = 5000.0


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    layout = Layout(tmp_path)
    layout.top.mkdir()
    return layout


def look(layout: Layout, wall: float, uptime: float) -> tuple[float, float]:
    """What `note_clock` says when the clocks are so much later than at first."""
    return note_clock(layout, lambda: WALL + wall, lambda: UPTIME + uptime)


def change(layout: Layout, **fields: Any) -> None:
    layout.clock.write_text(json.dumps({**json.loads(layout.clock.read_text()), **fields}))


def test_first_look(layout: Layout) -> None:
    """The first look believes the clock, and notes both clocks for the next."""
    assert look(layout, 0, 0) == (WALL, 0)
    noted = json.loads(layout.clock.read_text())
    assert (noted["wall"], noted["uptime"], noted["not_before"]) == (WALL, UPTIME, 0)


@pytest.mark.parametrize(
    ("passed", "jump", "caught"),
    [
        (0, 0, False),
        (60, 0, False),
        (30 * DAY, 0, False),
        (60, 5, False),
        (60, -5, False),
        (60, TOLERANCE_SECONDS, False),
        (60, -TOLERANCE_SECONDS, False),
        (60, TOLERANCE_SECONDS + 1, True),
        (60, -TOLERANCE_SECONDS - 1, True),
        (60, 30 * DAY, True),
        (60, -30 * DAY, True),
        (30 * DAY, 30 * DAY, True),
        (30 * DAY, -30 * DAY, True),
        (0, 10 * 365 * DAY, True),
        (0, -WALL, True),
    ],
)
def test_jumps(layout: Layout, *, passed: float, jump: float, caught: bool) -> None:
    """A wall clock that went further, ahead or back, than time passed starts all idle times anew; a correction not."""
    look(layout, 0, 0)
    now = WALL + passed + jump
    assert look(layout, passed + jump, passed) == (now, now if caught else 0)


def test_jump_is_remembered(layout: Layout) -> None:
    """After a jump idle times count from it, at every later look and also beyond a restart of the machine."""
    look(layout, 0, 0)
    jumped = look(layout, 30 * DAY, 60)[0]
    assert look(layout, 40 * DAY, 60 + 10 * DAY) == (WALL + 40 * DAY, jumped)
    assert look(layout, 50 * DAY, 60 + 20 * DAY) == (WALL + 50 * DAY, jumped)
    change(layout, boot="another")
    assert look(layout, 90 * DAY, 0) == (WALL + 90 * DAY, jumped)


def test_jump_and_back(layout: Layout) -> None:
    """A clock that is put right again starts idle times anew at the right time, not in the future."""
    look(layout, 0, 0)
    look(layout, 30 * DAY, 60)
    assert look(layout, 120, 120) == (WALL + 120, WALL + 120)
    assert look(layout, DAY, DAY) == (WALL + DAY, WALL + 120)


def test_steps_are_compared_with_the_look_before(layout: Layout) -> None:
    """Small corrections are each believed, however far they lead together."""
    assert {look(layout, step * 3000, step)[1] for step in range(5)} == {0}


@pytest.mark.parametrize("wall", [30 * DAY, -30 * DAY, 0])
def test_other_boot(layout: Layout, wall: float) -> None:
    """Across a restart the clock is believed, whatever it says: the machine may have been off for weeks."""
    look(layout, 0, 0)
    change(layout, boot="another")
    assert look(layout, wall, 10) == (WALL + wall, 0)


def test_restart_of_a_system_without_boot_id(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no boot can be told from the next, an uptime that went back is a restart."""
    monkeypatch.setattr(clock, "boot_id", lambda: "")
    look(layout, 0, 0)
    assert look(layout, 30 * DAY, -UPTIME + 10) == (WALL + 30 * DAY, 0)
    assert look(layout, 31 * DAY, -UPTIME + 20) == (WALL + 31 * DAY, WALL + 31 * DAY)


def test_jump_noted_in_the_future(layout: Layout) -> None:
    """A jump noted for a time that the clock, put right while the machine was off, has not reached is forgotten."""
    look(layout, 0, 0)
    look(layout, 30 * DAY, 60)
    change(layout, boot="another")
    assert look(layout, DAY, 10) == (WALL + DAY, 0)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\0" * 100,
        "[]",
        "null",
        "{}",
        '{"wall": 1}',
        '{"boot": "BOOT", "wall": "x", "uptime": 1, "not_before": 0}',
        '{"boot": "BOOT", "wall": null, "uptime": 1, "not_before": 0}',
        '{"boot": "BOOT", "wall": 1, "uptime": [], "not_before": 0}',
        '{"boot": "BOOT", "wall": 1, "uptime": 1, "not_before": {}}',
    ],
)
def test_damaged_file(layout: Layout, text: str) -> None:
    """A damaged note is no note: the clock is believed, and the note is whole again."""
    look(layout, 0, 0)
    boot = json.loads(layout.clock.read_text())["boot"]
    layout.clock.write_text(text.replace("BOOT", boot))
    assert look(layout, 30 * DAY, 60) == (WALL + 30 * DAY, 0)
    assert json.loads(layout.clock.read_text())["wall"] == WALL + 30 * DAY


def test_note_of_a_newer_version(layout: Layout) -> None:
    """A note with fields that are not known here is a note."""
    look(layout, 0, 0)
    change(layout, added=1)
    assert look(layout, 30 * DAY, 60) == (WALL + 30 * DAY, WALL + 30 * DAY)


@contextmanager
def no_room() -> Iterator[None]:
    """Whoever writes to a file gets an OSError, even root."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_for_a_note(layout: Layout) -> None:
    """Without room the old note stays, and the next look compares with it: a jump is still caught."""
    look(layout, 0, 0)
    with no_room():
        found = [look(layout, DAY, DAY), look(layout, 30 * DAY, DAY + 60)]
    assert found == [(WALL + DAY, 0), (WALL + 30 * DAY, WALL + 30 * DAY)]
    assert json.loads(layout.clock.read_text())["wall"] == WALL
    assert os.listdir(layout.top) == [layout.clock.name]


def test_no_store(tmp_path: Path) -> None:
    """Where there is no store nothing is noted, and nothing made."""
    assert look(Layout(tmp_path / "nowhere"), 0, 0) == (WALL, 0)
    assert os.listdir(tmp_path) == []


def test_clocks_of_this_machine(layout: Layout) -> None:
    """The real clocks of two looks in a row agree, and the uptime does not go back."""
    before = clock.uptime()
    first, second = note_clock(layout), note_clock(layout)
    assert (first[1], second[1]) == (0, 0)
    assert clock.uptime() >= before


@given(st.lists(st.tuples(st.floats(0, 100 * DAY), st.floats(-100 * DAY, 100 * DAY)), max_size=6))
@example([(0.0, 7204.0), (0.0, -1.0)])
@settings(max_examples=25)
def test_idle_time_is_never_more_than_passed(tmp_path_factory: pytest.TempPathFactory, steps: list[Any]) -> None:
    """However often the clock jumps, an entry used at the first look is never idle for longer than really passed.

    Up to the corrections that are believed: one for each look.
    """
    layout = Layout(tmp_path_factory.mktemp("clock"))
    layout.top.mkdir()
    look(layout, 0, 0)
    wall = passed = 0.0
    for count, (seconds, jump) in enumerate(steps, start=1):
        passed += seconds
        wall += seconds + jump
        now, not_before = look(layout, wall, passed)
        assert not_before <= now
        assert now - max(WALL, not_before) <= passed + count * (TOLERANCE_SECONDS + 1)
