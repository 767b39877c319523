"""What a node's runtime env agent does so that idle environments are collected without cron.

A collection starts with the agent, after the last release of its cluster, and after the agent's own end. Each is a
process of its own, at most one in an hour. The agent cannot start the last one: at `ray.shutdown()` it is
killed by SIGKILL. So a shell waits beside it (in less than a megabyte) at a pipe that ends with the agent.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ray_envcache.store.layout import Layout
from ray_envcache.system import children
from ray_envcache.system.texts import is_off, parse_duration

INTERVAL = "RAY_ENVCACHE_GC_INTERVAL"
DEFAULT_INTERVAL_SECONDS = 3600.0
SETTLING_SECONDS = 10.0
"""How long the workers of a cluster may take to end: a collection that follows a release waits so long first."""

_SHELL = "/bin/sh"
# Constant: what differs are its positional parameters. In the background, so that its parent is reaped at once; there a
# shell would read from nowhere by itself, and dash does so even with `<&0`.
_AT_THE_END = 'exec 3<&0; { read -r _; exec "$@"; } <&3 3<&- &'


def start(layout: Layout, environ: Mapping[str, str]) -> int | None:
    """Collect now, and once more when this process ends. Never fails and never waits for a collection.

    Returns the descriptor that has to stay open until then; None where $RAY_ENVCACHE_GC_INTERVAL is "off" or no number,
    or no shell can be started.
    """
    collect_soon(layout, environ, 0)
    with suppress(OSError, ValueError, subprocess.CalledProcessError):
        return _wait_for_our_end(layout, environ) if _interval(environ) is not None else None
    return None


def collect_soon(layout: Layout, environ: Mapping[str, str], delay: float) -> None:
    """Collect after `delay` seconds, if it is time. Never fails and never waits for a collection."""
    # What goes wrong here must not touch the cluster; `ray-envcache gc` says what it is.
    with suppress(OSError, ValueError, subprocess.CalledProcessError):
        if is_time(layout, environ):
            children.start_detached(_command(layout, delay), environ=environ)


def is_time(layout: Layout, environ: Mapping[str, str]) -> bool:
    """Whether the last collection was long enough ago.

    $RAY_ENVCACHE_GC_INTERVAL says how long that is ("1h"); 0 is always, "off" never. Raises ValueError for others.
    """
    interval = _interval(environ)
    try:
        ago = time.time() - layout.last_collection.stat().st_mtime
    except FileNotFoundError:
        return interval is not None and layout.top.is_dir()
    # A time in the future means that the clock went back: better once too often.
    return interval is not None and not 0 <= ago < interval


def _interval(environ: Mapping[str, str]) -> float | None:
    text = environ.get(INTERVAL, "").strip()
    return None if is_off(text) else parse_duration(text or DEFAULT_INTERVAL_SECONDS)


def _command(layout: Layout, delay: float) -> list[str | Path]:
    return [sys.executable, "-m", "ray_envcache.gc.collector", layout.root, str(delay)]


def _wait_for_our_end(layout: Layout, environ: Mapping[str, str]) -> int:
    its, ours = os.pipe()
    try:
        command = [_SHELL, "-c", _AT_THE_END, "sh", *_command(layout, SETTLING_SECONDS)]
        children.run_launcher(command, environ=environ, stdin=its)
    except BaseException:
        os.close(ours)
        raise
    finally:
        os.close(its)
    return ours
