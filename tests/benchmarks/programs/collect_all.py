"""A collection of everything in the store, with a watch on every exclusive flock: prints how long each was held.

`fcntl.flock` and `os.close` are watched from outside, so the answer does not rest on what the package says of itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path
from typing import IO

from ray_envcache.gc.collector import collect
from ray_envcache.gc.policy import Limits
from ray_envcache.store.layout import Layout

_held: dict[int, tuple[str, float]] = {}
_holds: list[tuple[str, float]] = []
_flock, _close = fcntl.flock, os.close


def flock(file: int | IO[str], operation: int) -> None:
    _flock(file, operation)
    # A file object is one that we write ourselves, under a name that nobody else knows.
    if operation & fcntl.LOCK_EX and isinstance(file, int):
        _held[file] = (os.readlink(f"/proc/self/fd/{file}"), time.perf_counter())


def close(descriptor: int) -> None:
    path, since = _held.pop(descriptor, ("", 0.0))
    _close(descriptor)
    if path:
        _holds.append((path, (time.perf_counter() - since) * 1000))


def main(root: Path) -> None:
    fcntl.flock, os.close = flock, close  # type: ignore[assignment]
    began = time.perf_counter()
    report = collect(Layout(root), Limits(everything=True))
    seconds = time.perf_counter() - began
    # The flock of the one collector keeps out other collectors, nobody else.
    users = [(os.path.basename(path), taken) for path, taken in _holds if Path(path) != Layout(root).collector_flock]
    longest = max(taken for _, taken in users)
    names = sorted({name.rpartition(".")[2] for name, _ in users})
    print(json.dumps({"removed": len(report.removed), "seconds": seconds, "longest_ms": longest, "flocks": names}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
