"""A storm in which processes freeze: SIGSTOP at any moment, and SIGCONT up to two seconds later.

A paused container, Ctrl-Z, a laptop that sleeps and a host without a processor to spare do the same. A process that meets
a frozen one may wait for it, but must never conclude from its own waiting that an entry is gone, free, or to be built.
The storm has its two detectors, and each interpreter looks for its hold as the kernel knows it. Here two more see builds:
a package of every environment that notes each check of a new one, and a look at the ready records on the disk.
"""

from __future__ import annotations

import os
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from ray_envcache.acquire import Store
from tests import support
from tests.attacks.test_storm import ALL, COLOURS, Storm, Users, clear, make_projects

pytestmark = [pytest.mark.host, pytest.mark.attack]

SECONDS = 2.0
"""No process is frozen for longer. After it none for as long, so that two times do not become one of four seconds."""
PEEK = ("peek",)
lengths = pytest.mark.parametrize(
    "seconds", [15, pytest.param(600, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)


class Freezer:
    """Freezes up to four processes of a storm at a time, and watches for keys of which two entries are ready."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.frozen: dict[psutil.Process, float] = {}
        self.spared: dict[psutil.Process, float] = {}
        self.built_twice: set[str] = set()

    def __call__(self, users: Users, counts: Counter[str], dice: random.Random) -> None:
        self.built_twice |= twice_ready(self.store.layout.entries)
        now = time.monotonic()
        for process in [one for one, end in self.frozen.items() if end < now]:
            self.thaw(process)
            self.spared[process] = now + SECONDS
        if len(self.frozen) == 4:
            return
        peeking = [psutil.Process(user.pid) for user, actions in users.items() if actions == PEEK]
        picky = dice.random() < 0.5
        victim = dice.choice(peeking if picky else self.family())
        if victim not in self.frozen and self.spared.get(victim, 0) < now:
            with suppress(psutil.NoSuchProcess):
                counts["barred"] += stop(victim, dice, tries=100 if picky else 1)
                self.frozen[victim] = now + dice.random() * SECONDS
                counts["frozen"] += 1

    def thaw(self, process: psutil.Process) -> None:
        del self.frozen[process]
        with suppress(psutil.NoSuchProcess):
            process.resume()

    def family(self) -> list[psutil.Process]:
        """All users, what they started (uv, its backends, interpreters), and what works for the store in the background."""
        root = str(self.store.layout.root)
        background = [one for one in psutil.process_iter() if any(root in word for word in support.command_of(one))]
        return psutil.Process().children(recursive=True) + background


def stop(process: psutil.Process, dice: random.Random, tries: int) -> bool:
    """Stop a process; with several tries at a moment at which it bars an entry, if one of them is such."""
    for left in reversed(range(tries)):
        process.suspend()
        if bars_an_entry(process.pid):
            return True
        if left:
            process.resume()
            time.sleep(dice.random() / 100)
    return False


def bars_an_entry(pid: int) -> bool:
    """Whether a process has the exclusive flock of an entry's `in-use` file, by what the kernel says."""
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fdinfo").iterdir():
            if re.search(r"FLOCK +ADVISORY +WRITE", file.read_text()):
                return os.readlink(f"/proc/{pid}/fd/{file.name}").endswith("/in-use")
    return False


@contextmanager
def freezer(store: Store) -> Iterator[Freezer]:
    """A freezer that leaves nothing frozen behind."""
    one = Freezer(store)
    try:
        yield one
    finally:
        for process in list(one.frozen):
            one.thaw(process)


def twice_ready(entries: Path) -> set[str]:
    """Keys of which two entries are complete at one moment: the second one was built for nothing."""
    ready = [path.parent.name for path in entries.glob("*/ready.json")]
    # Those that are there still were all there when the last one was seen.
    keys = Counter(name.rpartition("-")[0] for name in ready if (entries / name / "ready.json").exists())
    return {key for key, count in keys.items() if count > 1}


@lengths
def test_nothing_is_built_twice(store: Store, tmp_path: Path, wheels: Path, seconds: float) -> None:
    """Where nothing is removed, there is one build for each key, whoever freezes while looking, collecting or building."""
    log = tmp_path / "witness"
    support.make_witness(wheels, log)
    storm = Storm(
        tmp_path,
        make_projects(tmp_path, wheels, "envcache-witness"),
        [("use", "run", "rest", "rest", "tidy")] * 6 + [("look",), PEEK, PEEK],
    )
    with freezer(store) as disturb:
        counts = storm.rage(seconds, disturb)
    assert counts["violations"] == 0
    assert min(counts["used"], counts["looked"], counts["frozen"]) > 0
    assert support.count_builds(log) == len(COLOURS)
    assert disturb.built_twice == set()
    clear(store)


@lengths
def test_nothing_is_taken_away(store: Store, tmp_path: Path, wheels: Path, seconds: float) -> None:
    """Where much is removed, too: no environment is taken from under a user, no interpreter runs without its hold."""
    storm = Storm(tmp_path, make_projects(tmp_path, wheels), [(*ALL, *("rest",) * 15)] * 8 + [("look",), PEEK, PEEK])
    with freezer(store) as disturb:
        counts = storm.rage(seconds, disturb)
    assert counts["violations"] == 0
    assert min(counts["used"], counts["frozen"]) > 0
    assert counts["removed"] > 0
    assert disturb.built_twice == set()
    clear(store)
