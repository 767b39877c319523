"""A process beside each node's runtime env agent, which has idle environments collected by itself.

At the cluster's start, after its last release, and after its end. The agent cannot do the last itself: it is killed a
moment after the last release, on a busy host before it hears of it, and sometimes with SIGKILL. So a shell starts with
the agent (in a millisecond, and in less than a megabyte) and reads from a pipe whose end is the agent's end, whatever
ended it. For what it is told it becomes `python -m ray_envcache.gc.companion ROOT WORD`, and then a shell again.
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
from typing import Literal

from ray_envcache.store.layout import Layout
from ray_envcache.system import children
from ray_envcache.system.units import parse_duration

INTERVAL = "RAY_ENVCACHE_GC_INTERVAL"
DEFAULT_INTERVAL_SECONDS = 3600.0
PATIENCE_SECONDS = 30.0
"""How long a cluster may take to end after its last release, and its workers after its agent."""

_SHELL = "/bin/sh"
# Constant: what differs are its positional parameters. Without an answer, which is the end, the word is empty.
_LISTEN = 'read -r word; exec "$@" "$word"'
# In the background, so that its parent can be reaped at once; there a shell would read from nowhere by itself, and dash
# does so even with `<&0`.
_DETACH = f"exec 3<&0; {{ {_LISTEN}; }} <&3 3<&- &"

Word = Literal["started", "released"]


def start(layout: Layout, environ: Mapping[str, str]) -> int | None:
    """Start it, detached. Never fails; returns the descriptor that `tell` needs, or None where there is none to tell.

    $RAY_ENVCACHE_GC_INTERVAL says how often the host's clusters collect at most ("1h"); 0 is always, "off" never.
    """
    # What goes wrong here must not touch whoever starts a cluster; `ray-envcache gc` says what it is.
    with suppress(OSError, ValueError, subprocess.CalledProcessError):
        interval = _interval(environ)
        if interval is None:
            return None
        its, ours = os.pipe()
        try:
            children.run_launcher([_SHELL, "-c", _DETACH, *_myself(layout)], environ=environ, stdin=its)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(its)
        if _is_time(layout, interval):
            tell(ours, "started")
        return ours
    return None


def tell(companion: int, word: Word) -> None:
    """Tell it what happened. Takes microseconds: after the last release we may be killed a moment later."""
    with suppress(OSError):  # somebody killed it: whoever comes later collects
        os.write(companion, f"{word}\n".encode())


def _myself(layout: Layout) -> list[str]:
    return ["sh", sys.executable, "-m", "ray_envcache.gc.companion", os.fspath(layout.root)]


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


def _collect(layout: Layout, patience: float) -> None:
    """Collect if it is time, in a child: so that it is seen in lists of processes for what it does."""
    interval = _interval(os.environ)
    with suppress(OSError):
        if interval is not None and _is_time(layout, interval):
            layout.last_collection.touch()
            command = [sys.executable, "-m", "ray_envcache.gc.automatic", os.fspath(layout.root), str(patience)]
            subprocess.run(command, stdin=subprocess.DEVNULL, check=False)


def _ends_within(seconds: float) -> bool:
    """Wait so long for the agent's end. What it says meanwhile is no news."""
    deadline = time.monotonic() + seconds
    while select.select([0], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not os.read(0, 4096):
            return True
    return False


def main(arguments: list[str]) -> None:
    """Do what a word of the agent asks for, and listen again; without a word it is gone."""
    root, word = arguments
    layout = Layout(Path(root))
    os.setpriority(os.PRIO_PROCESS, 0, 10)
    if not word or (word == "released" and _ends_within(PATIENCE_SECONDS)):
        _collect(layout, PATIENCE_SECONDS)
    else:
        _collect(layout, 0.0)
        os.execv(_SHELL, [_SHELL, "-c", _LISTEN, *_myself(layout)])  # noqa: S606  # nothing in it is anybody's value


if __name__ == "__main__":
    main(sys.argv[1:])
