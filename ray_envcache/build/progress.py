"""Who hears how a build goes. `observer` shows it to people: a line that moves on a terminal, plain lines in a log."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from ray_envcache.system.texts import printable

LOG_SECONDS = 10.0
"""How often a log gets a sign of life while uv says nothing."""

_logger = logging.getLogger(__name__)
_CLEAR = "\r\x1b[2K"
_SPINNER = "|/-\\"


class Observer:
    """Hears how a build goes. Methods may raise: that ends the waiting or the build."""

    _said = ""

    def say(self, text: str) -> None:
        """A line that stays. The same one again, right behind, is no news."""
        if text != self._said:
            self._said = text
            self._stay(text)

    def _stay(self, text: str) -> None:
        _logger.info(text)

    def line(self, text: str | Callable[[], str]) -> None:
        """A line that passes: what uv says, without credentials, or what is to be asked now and then."""


@contextmanager
def observer(stream: TextIO) -> Iterator[Observer]:
    """An observer that shows the build on `stream`: nothing is printed until there is something to wait for."""
    shown = _Shown(stream)
    try:
        yield shown
    finally:
        shown.close()


class _Shown(Observer):
    """On a terminal what passes is one line that moves; in a log it is a line each, and a sign of life in between."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._moves = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._began = time.monotonic()
        self._now: Callable[[], str] = str
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, daemon=True)

    def _stay(self, text: str) -> None:
        self._began, self._now = time.monotonic(), str
        self._write(f"{_CLEAR if self._moves else ''}{printable(text)}\n")
        if self._ticker.ident is None:
            self._ticker.start()

    def line(self, text: str | Callable[[], str]) -> None:
        if callable(text):
            self._now = text
        # uv lists every package at the end, which is no news.
        elif not text.startswith((" + ", " - ", " ~ ")):
            now = printable(text.strip())
            self._now = lambda: now
            if not self._moves:
                self._write(f"  {now}\n")

    def close(self) -> None:
        self._over.set()
        if self._ticker.ident is not None:
            self._ticker.join()
            self._write(_CLEAR if self._moves else "")

    def _tick(self) -> None:
        while not self._over.wait(0.1 if self._moves else LOG_SECONDS):
            status = f"{time.monotonic() - self._began:.0f} s  {self._now()}".rstrip()
            if self._moves:
                turn = _SPINNER[int(time.monotonic() * 10) % len(_SPINNER)]
                self._write(f"{_CLEAR}{turn} {status}"[: shutil.get_terminal_size().columns + len(_CLEAR) - 1])
            else:
                self._write(f"  {status}\n")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
