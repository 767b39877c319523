"""Showing people how a build goes: one moving line on a terminal, plain lines in a log."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from ray_envcache.build.builder import Observer
from ray_envcache.build.plan import Plan
from ray_envcache.store.leases import Lease
from ray_envcache.system.texts import printable

LOG_SECONDS = 10.0
"""How often a log gets a sign of life while uv says nothing."""

_CLEAR = "\r\x1b[2K"
_SPINNER = "|/-\\"


@contextmanager
def observer(stream: TextIO) -> Iterator[Observer]:
    """An observer that shows the build on `stream`: nothing is printed until there is something to wait for."""
    moves = stream.isatty() and os.environ.get("TERM") != "dumb"
    shown = _Terminal(stream) if moves else _Log(stream)
    try:
        yield shown
    finally:
        shown.close()


class _Log:
    """Plain lines, for logs and pipes: what uv says, and a sign of life where it says nothing for long."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._began = time.monotonic()
        self._head = self._now = ""
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, args=(LOG_SECONDS,), daemon=True)

    def waiting(self, builder: str) -> None:
        self._headline(f"Waiting for the environment: {builder} builds it")

    def started(self, plan: Plan) -> None:
        self._headline(plan.headline)

    def line(self, text: str) -> None:
        # uv lists every package at the end, which is no news.
        if not text.startswith((" + ", " - ", " ~ ")):
            self._now = printable(text.strip())
            self._show()

    def finished(self, lease: Lease, seconds: float) -> None:
        self.close()
        self._say(f"Built in {seconds:.1f} s: {lease.entry.venv}")

    def close(self) -> None:
        self._over.set()
        if self._ticker.is_alive():
            self._ticker.join()

    def _headline(self, text: str) -> None:
        if text != self._head:
            self._head, self._now, self._began = text, "", time.monotonic()
            self._say(printable(text))
        if self._ticker.ident is None:
            self._ticker.start()

    def _tick(self, seconds: float) -> None:
        while not self._over.wait(seconds):
            self._remind()

    def _show(self) -> None:
        self._say(f"  {self._now}")

    def _remind(self) -> None:
        self._say(f"  {self._status()}")

    def _status(self) -> str:
        return f"{time.monotonic() - self._began:.0f} s  {self._now}".rstrip()

    def _say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class _Terminal(_Log):
    """Headlines, and below them one line that moves: the seconds, and what uv said last."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._ticker = threading.Thread(target=self._tick, args=(0.1,), daemon=True)

    def close(self) -> None:
        super().close()
        if self._ticker.ident is not None:
            self._write(_CLEAR)

    def _show(self) -> None:
        """Leave it to the ticker, which shows the last of many lines."""

    def _remind(self) -> None:
        turn = _SPINNER[int(time.monotonic() * 10) % len(_SPINNER)]
        self._write(f"{_CLEAR}{turn} {self._status()}"[: shutil.get_terminal_size().columns + len(_CLEAR) - 1])

    def _say(self, text: str) -> None:
        self._write(f"{_CLEAR}{text}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
