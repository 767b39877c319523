"""A storm of users, collectors and SIGKILLs on one store, watched by two independent detectors.

Inside: every user runs a Python from its environment and imports a module late; an import that fails is a violation.
Outside: every user holds an flock on a marker that names its entry; a watcher that finds a held marker whose entry is
not there has found a violation. Neither uses anything of the package under test.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.gc.collector import collect
from ray_envcache.gc.policy import Limits
from tests import support

pytestmark = [pytest.mark.host, pytest.mark.attack]

COLOURS = ("red", "green", "blue", "black", "white")
ALL = ("use",) * 10 + ("gc",) * 3 + ("pin", "rm")
"""What a process of the storm does, by the names of functions in USER: one of these, again and again."""

USER = """
import fcntl, os, subprocess, sys, time, random
from pathlib import Path
from ray_envcache.gc import collector, evict
from ray_envcache.store import pins
from ray_envcache.survey import inventory
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.errors import EnvCacheError, InUseError, UnknownKeyError
from ray_envcache.store.leases import Holder
from ray_envcache.gc.policy import Limits
from ray_envcache.field.spec import EnvSpec
from ray_envcache.acquire import Store
from ray_envcache.system import flock

projects, markers, seed, actions = sys.argv[1].split(","), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(",")
dice = random.Random(seed)
store = Store.open()

# Marks its entry as used from outside, looks for its own hold as the kernel knows it, waits, and imports what it has not
# imported yet.
PROGRAM = '''
import fcntl, os, sys, time
marker = open(sys.argv[1], "w")
fcntl.flock(marker, fcntl.LOCK_EX)
marker.write(sys.argv[2]); marker.flush()
if os.path.isdir("/proc/self/fdinfo"):
    in_use = os.stat(os.path.join(sys.argv[2], "in-use")).st_ino
    held = []
    for fd in os.listdir("/proc/self/fdinfo"):
        try:
            held += [line for line in open(f"/proc/self/fdinfo/{fd}") if "FLOCK" in line]
        except FileNotFoundError:
            pass  # the descriptor of that list
    if not any(f":{in_use} " in line for line in held):
        sys.exit("it runs without its hold")
time.sleep(float(sys.argv[3]))
import deep.late
'''

def start(entry):
    marker = markers / f"{os.getpid()}-{time.monotonic_ns()}"
    command = [entry.python, "-c", PROGRAM, marker, entry.path, str(dice.random() / 5)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True), marker

def end(child, marker):
    said = child.communicate()[1]
    # Else they grow faster than the watcher, one among many here, can look at them.
    marker.unlink(missing_ok=True)
    if child.returncode not in (0, -9):
        print("VIOLATION", said, flush=True)
    print("used", flush=True)

def use():
    project = dice.choice(projects)
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("storm")) as lease:
        child, marker = start(lease.entry)
        if dice.random() < 0.3:
            # From here on the interpreter's own hold is all that keeps the entry.
            while not marker.exists() and child.poll() is None: time.sleep(0.002)
            lease.release()
        if dice.random() < 0.15:
            child.kill()
        end(child, marker)

def run():
    # As a cron job does, without a lease.
    ready = [entry for entry in store.layout.all_entries() if entry.ready.exists()]
    if ready:
        end(*start(dice.choice(ready)))

def gc():
    report = collector.collect(store.layout, Limits(everything=True) if dice.random() < 0.5 else Limits(unused_for=0.2, min_free_space=None))
    for name, reason in report.failed: print("FAILED", name, reason, flush=True)
    print("removed", len(report.removed), flush=True)

def look():
    print("looked", len(inventory.survey(store.layout)), flush=True)

def peek():
    # What a lister does with an entry, without all that it does besides.
    for entry in store.layout.all_entries():
        for _ in range(100): flock.is_free(entry.in_use)

def rest():
    time.sleep(dice.random() / 2)

def tidy():
    collector.collect(store.layout, Limits(min_free_space=None))

def pin():
    # One at a time: whoever unpins gives free what another one pinned.
    with open(markers.parent / "pinning", "w") as alone:
        try:
            fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        pin_one()

def pin_one():
    for entry in list(store.layout.all_entries())[:1]:
        # Of what a killed builder left the key is pinned, but the next builder of that key throws it away.
        complete = entry.ready.exists()
        pins.pin(store.layout, entry)
        time.sleep(dice.random() / 20)
        if complete and not entry.ready.exists(): print("VIOLATION pinned entry vanished", entry.path.name, flush=True)
        pins.unpin(store.layout, entry.key)

def rm():
    for entry in list(store.layout.all_entries())[:1]:
        evict.evict(store.layout, entry)
        print("removed", 1, flush=True)

while True:
    try:
        globals()[dice.choice(actions)]()
    except (InUseError, UnknownKeyError, FileNotFoundError) as error:
        if isinstance(error, FileNotFoundError) and "trash" not in str(error) and "entries" not in str(error): raise
        print("refused", flush=True)
"""


def watch(markers: Path) -> list[str]:
    """Markers that somebody holds, whose entry is not there: each a violation."""
    found = []
    for path in markers.iterdir():
        with suppress(FileNotFoundError), path.open("r+") as file:  # its user may have removed it
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                entry = file.read()
                if entry and not os.path.exists(os.path.join(entry, "venv", "bin", "python")):
                    found.append(entry)
                continue
            path.unlink()
    return found


Users = dict["subprocess.Popen[bytes]", Sequence[str]]
"""The living processes of a storm, and what each does."""


def kill(users: Users, counts: Counter[str], dice: random.Random) -> None:
    """Now and then kill one of the users: sometimes alone, sometimes with all that it started."""
    if dice.random() < 0.15:
        victim = dice.choice(list(users))
        (os.killpg if dice.random() < 0.5 else os.kill)(victim.pid, signal.SIGKILL)
        victim.wait()
        counts["kills"] += 1


class Storm:
    """A process for each of `actions`, which does at random what these name, on the store of our environment."""

    def __init__(self, folder: Path, projects: list[Path], actions: Sequence[Sequence[str]]) -> None:
        self.folder, self.projects = folder, projects
        self.markers = folder / "markers"
        self.markers.mkdir()
        self.counts = Counter[str]()
        self.logs: list[Path] = []
        self.users: Users = {}
        for some in actions:
            self._begin(some)

    def rage(self, seconds: float, disturb: Callable[[Users, Counter[str], random.Random], None]) -> Counter[str]:
        """Let it go on; `disturb` is called twenty times a second, and who ends is replaced. What happened, counted."""
        deadline, dice = time.monotonic() + seconds, random.Random(1)
        try:
            while time.monotonic() < deadline:
                time.sleep(0.05)
                for entry in watch(self.markers):
                    print("removed under a user:", entry)
                    self.counts["violations"] += 1
                disturb(self.users, self.counts, dice)
                for user in [user for user in self.users if user.poll() is not None]:
                    self._begin(self.users.pop(user))
        finally:
            for user in self.users:
                os.killpg(user.pid, signal.SIGKILL)
                user.wait()
        self._read_logs()
        return self.counts

    def _begin(self, actions: Sequence[str]) -> None:
        log = self.folder / f"log-{len(self.logs)}"
        arguments = [",".join(map(str, self.projects)), str(self.markers), str(len(self.logs)), ",".join(actions)]
        self.logs.append(log)
        with log.open("w") as file:
            command = [sys.executable, "-c", textwrap.dedent(USER), *arguments]
            self.users[subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True)] = actions

    def _read_logs(self) -> None:
        texts = [log.read_text() for log in self.logs]
        lines = "".join(texts).splitlines()
        wrong = [line for line in lines if line.startswith(("VIOLATION", "FAILED"))]
        self.counts["violations"] += len(wrong)
        self.counts["used"], self.counts["refused"] = lines.count("used"), lines.count("refused")
        self.counts["looked"] = sum(line.startswith("looked") for line in lines)
        self.counts["removed"] = sum(int(line.split()[1]) for line in lines if line.startswith("removed"))
        print(*wrong, dict(self.counts), sep="\n")
        crashed = [text for text in texts if "Traceback" in text]
        assert not crashed, crashed[0][-3000:]


def make_projects(tmp_path: Path, wheels: Path, *more: str) -> list[Path]:
    """Projects with an environment each, whose package has a module to be imported late."""
    for name in COLOURS:
        modules = {"deep/__init__.py": "", "deep/late.py": f"COLOUR = {name!r}\n"}
        support.make_wheel(wheels, name, modules=modules)
    return [support.make_project(tmp_path / f"project-{name}", wheels, ["ray", name, *more]) for name in COLOURS]


def clear(store: Store) -> None:
    """Wait until nobody uses the store, and empty it."""
    for pin in store.layout.pins.iterdir():
        # Of a process that was killed before it unpinned: a pin survives everything.
        pin.unlink()
    support.wait_until(lambda: collect(store.layout, Limits(everything=True)).in_use == 0, "all users are gone")
    collect(store.layout, Limits(everything=True))
    assert list(store.layout.entries.iterdir()) == list(store.layout.trash.iterdir()) == []


def rage(store: Store, tmp_path: Path, wheels: Path, seconds: float, processes: int) -> Counter[str]:
    counts = Storm(tmp_path, make_projects(tmp_path, wheels), [ALL] * processes).rage(seconds, kill)
    clear(store)
    return counts


def test_storm(store: Store, tmp_path: Path, wheels: Path) -> None:
    """Eight processes for a quarter of a minute: no environment is taken from under a user."""
    counts = rage(store, tmp_path, wheels, seconds=15, processes=8)
    assert counts["violations"] == 0
    assert counts["used"] > 0
    assert counts["removed"] > 0
    assert counts["kills"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_long_storm(store: Store, tmp_path: Path, wheels: Path) -> None:
    """Sixteen processes for ten minutes."""
    counts = rage(store, tmp_path, wheels, seconds=600, processes=16)
    assert counts["violations"] == 0
    assert counts["used"] > 100
