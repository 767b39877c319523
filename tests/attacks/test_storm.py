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
from contextlib import suppress
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.gc.collector import collect
from ray_envcache.gc.policy import Limits
from tests import support

pytestmark = [pytest.mark.host, pytest.mark.attack]

USER = """
import fcntl, os, subprocess, sys, time, random
from pathlib import Path
from ray_envcache.gc import collector, evict
from ray_envcache.store import pins
from ray_envcache.resolve.cluster_ray import installed_ray
from ray_envcache.errors import EnvCacheError, InUseError, UnknownKeyError
from ray_envcache.store.leases import Holder
from ray_envcache.gc.policy import Limits
from ray_envcache.field.spec import EnvSpec
from ray_envcache.acquire import Store

projects, markers, seed = sys.argv[1].split(","), Path(sys.argv[2]), int(sys.argv[3])
dice = random.Random(seed)
store = Store.open()

# Marks its entry as used from outside, waits, and imports what it has not imported yet.
PROGRAM = '''
import fcntl, sys, time
marker = open(sys.argv[1], "w")
fcntl.flock(marker, fcntl.LOCK_EX)
marker.write(sys.argv[2]); marker.flush()
time.sleep(float(sys.argv[3]))
import deep.late
'''

def use():
    project = dice.choice(projects)
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("storm")) as lease:
        marker = markers / f"{os.getpid()}-{time.monotonic_ns()}"
        child = subprocess.Popen([lease.python, "-c", PROGRAM, marker, lease.entry.path, str(dice.random() / 5)], stderr=subprocess.PIPE, text=True)
        if dice.random() < 0.3:
            # From here on the interpreter's own hold is all that keeps the entry.
            while not marker.exists() and child.poll() is None: time.sleep(0.002)
            lease.release()
        if dice.random() < 0.15:
            child.kill()
        said = child.communicate()[1]
        # Else they grow faster than the watcher, one among many here, can look at them.
        marker.unlink(missing_ok=True)
        if child.returncode not in (0, -9):
            print("VIOLATION", said, flush=True)
        print("used", flush=True)

def gc():
    report = collector.collect(store.layout, Limits(everything=True) if dice.random() < 0.5 else Limits(unused_for=0.2, min_free_space=None))
    for name, reason in report.failed: print("FAILED", name, reason, flush=True)
    print("removed", len(report.removed), flush=True)

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
        dice.choices([use, gc, pin, rm], weights=[10, 3, 1, 1])[0]()
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


def storm(store: Store, folder: Path, projects: list[Path], seconds: float, processes: int) -> dict[str, int]:
    """Let it rage; what happened, counted."""
    markers = folder / "markers"
    markers.mkdir()
    dice = random.Random(1)
    users: list[subprocess.Popen[bytes]] = []
    logs: list[Path] = []
    counts = {"kills": 0, "violations": 0, "used": 0, "removed": 0, "refused": 0}

    def begin() -> None:
        log = folder / f"log-{len(logs)}"
        arguments = [",".join(map(str, projects)), str(markers), str(len(logs))]
        logs.append(log)
        with log.open("w") as file:
            users.append(
                subprocess.Popen(
                    [sys.executable, "-c", textwrap.dedent(USER), *arguments],
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            )

    for _ in range(processes):
        begin()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(0.05)
        for entry in watch(markers):
            print("removed under a user:", entry)
            counts["violations"] += 1
        if dice.random() < 0.15:
            victim = users.pop(dice.randrange(len(users)))
            # Sometimes alone, sometimes with all it started.
            (os.killpg if dice.random() < 0.5 else os.kill)(victim.pid, signal.SIGKILL)
            victim.wait()
            counts["kills"] += 1
            begin()
        for user in [user for user in users if user.poll() is not None]:
            users.remove(user)
            counts["crashes"] = counts.get("crashes", 0) + 1
            begin()
    for user in users:
        os.killpg(user.pid, signal.SIGKILL)
        user.wait()
    text = "".join(log.read_text() for log in logs)
    counts["violations"] += text.count("VIOLATION") + text.count("FAILED")
    counts["used"], counts["refused"] = text.count("used\n"), text.count("refused\n")
    counts["removed"] = sum(int(line.split()[1]) for line in text.splitlines() if line.startswith("removed"))
    for line in text.splitlines():
        if line.startswith(("VIOLATION", "FAILED")):
            print(line)
    assert "Traceback" not in text, text[text.index("Traceback") :][:3000]
    return counts


def rage(store: Store, tmp_path: Path, wheels: Path, seconds: float, processes: int) -> dict[str, int]:
    projects = []
    for name in ("red", "green", "blue", "black", "white"):
        modules = {"deep/__init__.py": "", "deep/late.py": f"COLOUR = {name!r}\n"}
        support.make_wheel(wheels, name, modules=modules)
        projects.append(support.make_project(tmp_path / f"project-{name}", wheels, ["ray", name]))
    counts = storm(store, tmp_path, projects, seconds, processes)
    print(counts)
    for pin in store.layout.pins.iterdir():
        # Of somebody killed before he unpinned: a pin survives everything.
        pin.unlink()
    support.wait_until(lambda: collect(store.layout, Limits(everything=True)).in_use == 0, "all users are gone")
    collect(store.layout, Limits(everything=True))
    assert list(store.layout.entries.iterdir()) == list(store.layout.trash.iterdir()) == []
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
