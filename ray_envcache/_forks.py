"""Looking at many things at once, by forks of this process. They only make it faster: without them all is done here."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_LEAST = 200
"""Items for a process: a fork, and bringing home what it found, take as long as looking at forty entries."""


def shared(work: Callable[[Sequence[T]], list[R]], items: Sequence[T], most: int) -> list[R]:
    """What `work` finds for all `items`, in their order, in parts by at most `most` processes. Pickle must take it.

    A part that a fork does not bring home, for whatever reason, is done here: so errors are those of `work`. For
    processes of one thread only: a fork has no other, but what they had locked stays so.
    """
    count = max(1, min(most, len(items) // _LEAST))
    bounds = [len(items) * number // count for number in range(count + 1)]
    mine, *parts = [items[start:end] for start, end in pairwise(bounds)]
    forks: list[_Fork] = []
    try:
        forks.extend(_Fork(work, part) for part in parts)
        found = work(mine)
        for fork, part in zip(forks, parts, strict=True):
            brought = fork.result()
            found += work(part) if brought is None else brought
    finally:
        for fork in forks:
            fork.end()
    return found


class _Fork:
    """A fork at its work."""

    def __init__(self, work: Callable[[Sequence[T]], list[R]], part: Sequence[T]) -> None:
        self._pid: int | None = None
        ours, its = os.pipe()
        self._said = os.fdopen(ours, "rb")
        with suppress(OSError):  # this user has no processes left
            self._pid = os.fork()
        if self._pid == 0:
            _serve(work, part, its)
        # Nobody else has it, so that the fork's end is the end of what it says.
        os.close(its)

    def result(self) -> list[Any] | None:
        """What it found; None where it came to an end before that."""
        import pickle  # not where there are few items

        with suppress(EOFError, pickle.UnpicklingError):
            found: list[Any] = pickle.load(self._said)  # noqa: S301  # what our own fork wrote
            return found
        return None

    def end(self) -> None:
        """Leave no process behind."""
        self._said.close()
        if self._pid is not None:
            os.kill(self._pid, signal.SIGKILL)  # not waited for yet, so the number is its own
            os.waitpid(self._pid, 0)


def _serve(work: Callable[[Sequence[T]], list[R]], part: Sequence[T], pipe: int) -> NoReturn:
    try:
        import pickle  # as above

        with os.fdopen(pipe, "wb") as file:
            pickle.dump(work(part), file, pickle.HIGHEST_PROTOCOL)
    finally:
        os._exit(0)  # whatever was raised: who waits sees that the end is missing
