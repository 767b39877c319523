"""Collecting by itself: after a cluster's last release and at its start, at most so often, in a process of its own.

`python -m ray_envcache.autogc ROOT [PID]`: detached, so that it delays nobody and survives the agent, which is killed
a moment after the last release. It waits until the agent PID is gone before it begins, and for the workers of the
dying cluster as long as they keep something that is due.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ray_envcache import _process
from ray_envcache.collector import collect, due_but_in_use
from ray_envcache.layout import Layout
from ray_envcache.policy import Limits
from ray_envcache.units import parse_duration

INTERVAL = "RAY_ENVCACHE_GC_INTERVAL"
DEFAULT_INTERVAL_SECONDS = 3600.0
PATIENCE_SECONDS = 30.0
"""How long a dying cluster is waited for."""


def trigger(layout: Layout, environ: Mapping[str, str], *, after: int = 0, wait: bool = True) -> None:
    """Start a collection in the background, unless there was one lately. Returns in milliseconds, and never fails.

    `after` is the process to wait for. $RAY_ENVCACHE_GC_INTERVAL says how often ("1h"); 0 is always, "off" never.
    """
    # What goes wrong here must not touch whoever starts or ends a cluster; `ray-envcache gc` says what it is.
    with suppress(OSError, ValueError, subprocess.CalledProcessError):
        interval = environ.get(INTERVAL, "").strip().lower()
        if interval in {"off", "none"} or not _is_time(layout, parse_duration(interval or DEFAULT_INTERVAL_SECONDS)):
            return
        layout.last_collection.touch()
        command: list[str | Path] = [sys.executable, "-m", "ray_envcache.autogc", layout.root, str(after)]
        _process.start_detached(command, environ=environ, wait=wait)


def run(layout: Layout, limits: Limits, after: int) -> None:
    """Collect; again, while something due is only kept by a cluster that ends."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while after and os.path.exists(f"/proc/{after}") and time.monotonic() < deadline:
        time.sleep(0.1)
    collect(layout, limits)
    while after and time.monotonic() < deadline and due_but_in_use(layout, limits):
        time.sleep(1)
        collect(layout, limits)


def _is_time(layout: Layout, interval: float) -> bool:
    try:
        ago = time.time() - layout.last_collection.stat().st_mtime
    except FileNotFoundError:
        return layout.top.is_dir()
    # A time in the future means that the clock went back: better once too often.
    return not 0 <= ago < interval


def main(arguments: list[str]) -> int:
    """Serve `trigger`."""
    root, after = arguments
    os.nice(10)
    run(Layout(Path(root)), Limits.from_environ(os.environ), int(after))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
