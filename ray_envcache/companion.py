"""A process beside each node's runtime env agent, which has idle environments collected by itself.

At the cluster's start, after its last release, and after its end. The agent cannot do the last itself: it is killed a
moment after the last release, on a busy host before it hears of it, and sometimes with SIGKILL. So this process starts
with the agent and sleeps in a read from a pipe, `python -m ray_envcache.companion ROOT`: a byte is the last release,
and the pipe's end is the agent's, whatever ended it. What it holds meanwhile is a bare Python.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ray_envcache import _process
from ray_envcache.layout import Layout
from ray_envcache.units import parse_duration

INTERVAL = "RAY_ENVCACHE_GC_INTERVAL"
DEFAULT_INTERVAL_SECONDS = 3600.0
PATIENCE_SECONDS = 30.0
"""How long a cluster may take to end after its last release, and its workers after its agent."""


def start(layout: Layout, environ: Mapping[str, str]) -> int | None:
    """Start it, detached. Never fails; returns the descriptor that `tell` needs, or None where there is none to tell.

    $RAY_ENVCACHE_GC_INTERVAL says how often the hosts' clusters collect at most ("1h"); 0 is always, "off" never.
    """
    # What goes wrong here must not touch whoever starts a cluster; `ray-envcache gc` says what it is.
    with suppress(OSError, ValueError, subprocess.CalledProcessError):
        if _interval(environ) is None:
            return None
        its, ours = os.pipe()
        try:
            command: list[str | Path] = [sys.executable, "-m", "ray_envcache.companion", layout.root]
            _process.start_detached(command, environ=environ, stdin=its)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(its)
        return ours
    return None


def tell(companion: int | None) -> None:
    """Tell it that the node's last reference went. Takes microseconds: we may be killed a moment later."""
    if companion is not None:
        with suppress(OSError):  # somebody killed it: whoever comes later collects
            os.write(companion, b"\n")


def _interval(environ: Mapping[str, str]) -> float | None:
    text = environ.get(INTERVAL, "").strip().lower()
    return None if text in {"off", "none"} else parse_duration(text or DEFAULT_INTERVAL_SECONDS)


def _is_time(layout: Layout, interval: float) -> bool:
    try:
        ago = time.time() - layout.last_collection.stat().st_mtime
    except FileNotFoundError:
        return layout.top.is_dir()
    # A time in the future means that the clock went back: better once too often.
    return not 0 <= ago < interval


def _collect(layout: Layout, interval: float, patience: float = 0.0) -> None:
    """Collect if it is time: in a child, so that what that needs is in memory no longer than it takes."""
    with suppress(OSError):
        if _is_time(layout, interval):
            layout.last_collection.touch()
            command = [sys.executable, "-m", "ray_envcache.autogc", os.fspath(layout.root), str(patience)]
            subprocess.run(command, stdin=subprocess.DEVNULL, check=False)


def _ended_within(seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while select.select([0], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not os.read(0, 4096):
            return True
    return False


def main(arguments: list[str]) -> int:
    """Serve `start`."""
    (root,) = arguments
    layout, interval = Layout(Path(root)), _interval(os.environ)
    assert interval is not None
    os.nice(10)
    _collect(layout, interval)
    while os.read(0, 4096) and not _ended_within(PATIENCE_SECONDS):
        _collect(layout, interval)
    _collect(layout, interval, PATIENCE_SECONDS)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
