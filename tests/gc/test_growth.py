"""A store that lives long: nothing in it grows with the number of builds, and in the end only the layout is left."""

from __future__ import annotations

import os
import random
import secrets
import threading
import time
from pathlib import Path

import pytest

from ray_envcache.gc import rubbish
from ray_envcache.gc.collector import collect
from ray_envcache.gc.policy import DAY, Limits
from ray_envcache.store import journal, leases
from ray_envcache.store.key import Memo, recall, remember
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder
from ray_envcache.survey.inventory import record_sizes
from ray_envcache.system import files
from ray_envcache.system.flock import exclusive_flock
from ray_envcache.system.texts import utc_now
from tests.gc.fabricated import add_file, make_entry, make_layout, publish

ALL = Limits(everything=True)
AGE_ONLY = Limits(min_free_space=None)


def build(layout: Layout, number: int, memo: int) -> Entry:
    """What a build and a cluster leave: flocks, leases, records, a memo, and packages linked from uv's cache."""
    key = f"{number:032x}"
    with exclusive_flock(layout.builder_flock(key), lambda: None):
        found = [entry for entry in layout.entries_of(key) if entry.ready.exists()]
        entry = found[0] if found else make_entry(layout, number, ready=False)
        if not found:
            unpack(layout, entry)
            publish(entry)
    lease = leases.claim(entry, layout, Holder("agent"))
    assert lease is not None
    files.write_json(layout.memo_of(f"{memo:032x}"), {"entry": entry.path.name}, durable=False)
    if not entry.compiled.exists():
        files.write_json(entry.compiled, {"compiled_at": utc_now(), "seconds": 1.0}, durable=False)
        record_sizes(layout, entry)
    lease.release()
    return entry


def unpack(layout: Layout, entry: Entry) -> None:
    archive = layout.uv_cache / "archive-v0" / secrets.token_hex(8)
    archive.mkdir(parents=True)
    os.link(add_file(entry, 100), archive / "data")
    note = layout.uv_cache / "wheels-v8" / archive.name
    note.mkdir(parents=True)
    (note / "1.0.rev").write_text(archive.name)
    (note / "1.0").symlink_to(archive)


def die_in_the_middle(layout: Layout, number: int) -> None:
    """What killed builders, collectors and agents leave."""
    half = make_entry(layout, number, ready=False)
    files.write_json(half.building, {"pid": 1}, durable=False)
    (layout.trash / secrets.token_hex(8)).mkdir()
    (layout.memo / f".tmp-{secrets.token_hex(8)}").touch()
    folder = layout.leases_of(half.key)
    folder.mkdir(exist_ok=True)
    (folder / secrets.token_hex(8)).write_text('{"kind": "agent"}')


def age(entry: Entry) -> None:
    then = time.time() - 15 * DAY
    os.utime(entry.in_use, (then, then))


def names(layout: Layout) -> set[str]:
    """All that is in the store, files and folders."""
    return {str(path.relative_to(layout.root)) for path in layout.root.rglob("*")}


LONG = pytest.param(10_000, 200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])


@pytest.mark.parametrize(("builds", "keys"), [(500, 50), LONG])
def test_only_the_layout_is_left(tmp_path: Path, builds: int, keys: int) -> None:
    """After many builds of so many keys, killed ones among them, a full collection leaves the layout alone."""
    layout = make_layout(tmp_path / "store")
    fresh = names(layout)
    chance = random.Random(0)
    for memo in range(builds):
        entry = build(layout, chance.randrange(keys), memo)
        if chance.random() < 0.2:
            age(entry)
        if chance.random() < 0.05:
            die_in_the_middle(layout, chance.randrange(2 * keys))
        if memo % 100 == 99:
            assert collect(layout, AGE_ONLY).failed == []
    report = collect(layout, ALL)
    assert (report.failed, report.in_use) == ([], 0)
    journal.remove(layout)  # which stays until then, and has a bound of its own
    assert names(layout) - fresh == {"uv", "uv/.lock"}


def test_what_is_used_for_ever_keeps_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an environment that stays, and gets a memo with each edit of a project, no leases and few memos stay."""
    monkeypatch.setattr(rubbish, "MEMOS", 50)
    layout = make_layout(tmp_path / "store")
    for memo in range(70):
        build(layout, 1, memo)
        path = layout.memo_of(f"{memo:032x}")
        os.utime(path, (memo, memo))
    collect(layout, AGE_ONLY)
    assert {path.stem for path in layout.memo.iterdir()} == {f"{memo:032x}" for memo in range(20, 70)}
    assert list(layout.leases.iterdir()) == []
    assert len(list(layout.entries.iterdir())) == 1


def test_memos_that_are_recalled_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The collector keeps the memos that were written or recalled last, whichever are older."""
    monkeypatch.setattr(rubbish, "MEMOS", 2)
    layout = make_layout(tmp_path / "store")
    entry = make_entry(layout, 1)
    for number, name in enumerate("abcd"):
        remember(name, layout, Memo(entry.name, "/", (), (), "", {}))
        os.utime(layout.memo_of(name), (number, number))
    assert recall("a", "/", layout, ()) is not None
    collect(layout, AGE_ONLY)
    assert {path.stem for path in layout.memo.iterdir()} == {"a", "d"}
    collect(layout, ALL)
    assert list(layout.memo.iterdir()) == []


def test_builders_never_share_a_key_though_its_flock_is_swept(tmp_path: Path) -> None:
    """While a collector sweeps the files of flocks all the time, there is never more than one builder of a key."""
    layout = make_layout(tmp_path / "store")
    inside: list[int] = []
    seen: list[int] = []
    over = threading.Event()

    def sweep() -> None:
        while not over.is_set():
            collect(layout, AGE_ONLY)

    def work(number: int) -> None:
        for _ in range(50):
            with exclusive_flock(layout.builder_flock("a" * 32), lambda: None):
                inside.append(number)
                seen.append(len(inside))
                time.sleep(0.001)
                inside.remove(number)

    collector = threading.Thread(target=sweep)
    builders = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in (collector, *builders):
        thread.start()
    for thread in builders:
        thread.join()
    over.set()
    collector.join()
    assert set(seen) == {1}
    collect(layout, AGE_ONLY)
    assert list(layout.flocks.glob("*.build")) == []
