"""Who hears how a build goes. `observer` shows it to people: a line that moves on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from ray_envcache.build.plan import Plan
from ray_envcache.store.leases import Lease
from ray_envcache.system import files
from ray_envcache.system.texts import printable

LOG_SECONDS = 10.0
"""How often a log gets a sign of life while uv says nothing."""

_logger = logging.getLogger(__name__)
_CLEAR = "\r\x1b[2K"
_SPINNER = "|/-\\"


class Observer:
    """Hears how a build goes. Methods may raise: that ends the waiting or the build."""

    def waiting(self, builder: str) -> None:
        """About once a second: another process, `builder`, builds this environment."""

    def started(self, plan: Plan) -> None:
        """A build begins."""

    def line(self, text: str) -> None:
        """Uv said something (credentials removed)."""

    def note(self, text: str) -> None:
        """Something that stays worth knowing when all is done."""
        _logger.warning(text)

    def finished(self, lease: Lease, seconds: float) -> None:
        """The environment is ready."""

    def compiling(self, staged: Path) -> None:
        """Its bytecode is compiled, into this folder until all of it is there."""


@contextmanager
def observer(stream: TextIO) -> Iterator[Observer]:
    """An observer that shows the build on `stream`: nothing is printed until there is something to wait for."""
    shown = _Shown(stream)
    try:
        yield shown
    finally:
        shown.close()


class _Shown(Observer):
    """Headlines, and what uv says.

    On a terminal that is one line that moves; in a log it is a line each, and a sign of life where uv is silent.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._moves = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._began = time.monotonic()
        self._head = self._now = ""
        self._staged: Path | None = None
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def waiting(self, builder: str) -> None:
        self._headline(f"Waiting for the environment: {builder} builds it")

    def started(self, plan: Plan) -> None:
        self._headline(plan.headline)
        if plan.reason:
            self._say(f"  {printable(plan.reason)}")

    def line(self, text: str) -> None:
        # uv lists every package at the end, which is no news.
        if not text.startswith((" + ", " - ", " ~ ")):
            self._now = printable(text.strip())
            if not self._moves:
                self._say(f"  {self._now}")

    def note(self, text: str) -> None:
        self._say(f"  {printable(text)}")

    def finished(self, lease: Lease, seconds: float) -> None:
        self.close()
        self._say(f"{'Fetched' if lease.how == 'fetched' else 'Built'} in {seconds:.1f} s: {lease.entry.venv}")

    def compiling(self, staged: Path) -> None:
        self._staged = staged
        self._headline("Compiling bytecode")

    def close(self) -> None:
        self._over.set()
        if self._ticker.ident is not None:
            self._ticker.join()
            self._write(_CLEAR if self._moves else "")

    def _headline(self, text: str) -> None:
        if text != self._head:
            self._head, self._now, self._began = text, "", time.monotonic()
            self._say(printable(text))
        if self._ticker.ident is None:
            self._ticker.start()

    def _tick(self) -> None:
        while not self._over.wait(0.1 if self._moves else LOG_SECONDS):
            if self._staged and (done := sum(len(files.names_in(folder)) for folder in self._staged.glob("*"))):
                self._now = f"{done:,} modules compiled"
            status = f"{time.monotonic() - self._began:.0f} s  {self._now}".rstrip()
            if self._moves:
                turn = _SPINNER[int(time.monotonic() * 10) % len(_SPINNER)]
                self._write(f"{_CLEAR}{turn} {status}"[: shutil.get_terminal_size().columns + len(_CLEAR) - 1])
            else:
                self._say(f"  {status}")

    def _say(self, text: str) -> None:
        self._write(f"{_CLEAR if self._moves else ''}{text}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
