"""How much of the machine we may use: affinity, and the limits of the container or service that we run in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

_ROOT = Path("/")


def processors(root: Path = _ROOT) -> int:
    """The number of processors that this process may keep busy, at least one."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([usable, *(int(quota) for folder in _cgroups(root) for quota in _quota(folder))]))


def memory(root: Path = _ROOT) -> int:
    """The bytes of memory that this process can have without harm to others of its machine or container."""
    return min([psutil.virtual_memory().available, *(left for folder in _cgroups(root) for left in _left(folder))])


def _cgroups(root: Path) -> list[Path]:
    """The folders of the cgroups (version 2) that bound us, innermost first."""
    top = root / "sys/fs/cgroup"
    mine = top / _read(root / "proc/self/cgroup").rpartition("0::/")[2].strip()
    return [folder for folder in (mine, *mine.parents) if folder.is_relative_to(top)]


def _quota(cgroup: Path) -> Iterator[float]:
    """Processors that the cgroup's time is worth; nothing where it is not limited."""
    words = _read(cgroup / "cpu.max").split()
    if len(words) == 2 and all(word.isdigit() for word in words):
        yield int(words[0]) / int(words[1])


def _left(cgroup: Path) -> Iterator[int]:
    """Bytes that the cgroup may still use; nothing where it is not limited."""
    limit, used = _read(cgroup / "memory.max").strip(), _read(cgroup / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        # Pages of files that were not touched for long count as used, and go where memory is wanted.
        counts = dict(line.split() for line in _read(cgroup / "memory.stat").splitlines())
        yield int(limit) - int(used) + int(counts.get("inactive_file", 0))


def _read(path: Path) -> str:
    try:
        return path.read_text("ascii")
    except OSError:
        return ""


def wait_for_idle(patience: float) -> None:
    """Return when a processor of this machine had little to do for half a second, or after `patience` seconds."""
    deadline, before = time.monotonic() + patience, psutil.cpu_times().idle
    while time.monotonic() < deadline:
        began = time.monotonic()
        time.sleep(0.5)
        now = psutil.cpu_times().idle
        if now - before > 0.7 * (time.monotonic() - began):
            return
        before = now
