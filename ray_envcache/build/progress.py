"""Showing people how a build goes: a live line on a terminal, plain lines elsewhere, nothing where nothing is built."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from ray_envcache.system.units import parse_size

if TYPE_CHECKING:
    from rich.progress import Progress

    from ray_envcache.build.builder import Observer
    from ray_envcache.build.plan import Plan
    from ray_envcache.store.leases import Lease

PLAIN_SECONDS = 10.0
"""How often a build that says nothing says that it lives, where there is no terminal."""

_STARTS = re.compile(
    r"\s*(?P<verb>Downloading|Building|Updating|Cloning) (?P<what>\S+)"
    r"(?: \((?P<size>[0-9]{1,6}(?:\.[0-9]+)?[KMGT]?i?B)\))?"
)
_ENDS = re.compile(r"\s*(?:Downloaded|Built|Updated|Cloned) (?P<what>\S+)")
_STEPS = re.compile(r"\s*(?P<what>(?:Prepared|Installed) \d+ packages? in \S+)")


@dataclass
class Steps:
    """What uv's lines say about a build: sizes in bytes, of the packages large enough for uv to announce them."""

    doing: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    done: set[str] = field(default_factory=set)
    last: str = "preparing"

    def feed(self, line: str) -> bool:
        """Take in a line; True where it says something worth a line of its own."""
        if begins := _STARTS.match(line):
            self.doing[begins["what"]] = begins["verb"].lower()
            self.sizes[begins["what"]] = parse_size(begins["size"]) if begins["size"] else 0
            return bool(begins["size"])
        if ends := _ENDS.match(line):
            self.doing.pop(ends["what"], None)
            self.done.add(ends["what"])
        elif step := _STEPS.match(line):
            self.doing.clear()
            self.last = "checking" if step["what"].startswith("Installed") else "installing"
            return True
        return False

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())

    @property
    def done_bytes(self) -> int:
        return sum(self.sizes.get(what, 0) for what in self.done)

    def __str__(self) -> str:
        if not self.doing:
            return self.last
        what, verb = next(iter(self.doing.items()))
        more = f" and {len(self.doing) - 1} more" if len(self.doing) > 1 else ""
        return f"{verb} {what}{more}"


@contextmanager
def observer(stream: TextIO) -> Iterator[Observer]:
    """An observer that shows the build on `stream`: nothing is printed until there is something to wait for."""
    shown = _Live(stream) if stream.isatty() else _Plain(stream)
    try:
        yield shown
    finally:
        shown.close()


class _Plain:
    """Plain lines, for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._steps = Steps()
        self._began = time.monotonic()
        self._over = threading.Event()
        self._ticker: threading.Thread | None = None
        self._waiting = ""

    def waiting(self, builder: str) -> None:
        if not self._waiting:
            self._say(f"Waiting for the environment: {builder} builds it")
        self._waiting = builder

    def started(self, plan: Plan) -> None:
        self._say(plan.headline)
        self._began = time.monotonic()
        self._ticker = threading.Thread(target=self._tick, daemon=True)
        self._ticker.start()

    def line(self, text: str) -> None:
        if self._steps.feed(text):
            self._say(f"  {text.strip()}")

    def finished(self, lease: Lease, seconds: float) -> None:
        self._say(f"Built in {seconds:.1f} s: {lease.entry.venv}")

    def close(self) -> None:
        self._over.set()
        if self._ticker is not None:
            self._ticker.join()

    def _tick(self) -> None:
        while not self._over.wait(PLAIN_SECONDS):
            self._say(f"  {time.monotonic() - self._began:.0f} s: {self._steps}")

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class _Live:
    """One line that moves, on a terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._steps = Steps()
        self._progress: Progress | None = None
        self._headline = ""

    def waiting(self, builder: str) -> None:
        self._show(f"Waiting for {builder}", None)

    def started(self, plan: Plan) -> None:
        self._headline = plan.headline
        self._show(self._headline, None)

    def line(self, text: str) -> None:
        self._steps.feed(text)
        total = self._steps.total_bytes
        self._show(f"{self._headline} · {self._steps}", (self._steps.done_bytes, total) if total else None)

    def finished(self, lease: Lease, seconds: float) -> None:
        self.close()
        print(f"Built in {seconds:.1f} s: {lease.entry.venv}", file=self._stream, flush=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _show(self, text: str, share: tuple[int, int] | None) -> None:
        if self._progress is None:
            self._progress = _live_line(self._stream)
            self._progress.add_task(text, total=None)
            self._progress.start()
        done, total = share or (0, None)
        self._progress.update(self._progress.task_ids[0], description=text, completed=done, total=total)


def _live_line(stream: TextIO) -> Progress:
    from rich.console import Console  # only where a build is shown on a terminal
    from rich.progress import BarColumn, DownloadColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(20),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(file=stream), transient=True)
