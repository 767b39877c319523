"""Places where a test can stop the package, to meet a race on purpose. Without the variable they cost one look-up."""

from __future__ import annotations

import os
import time

FOLDER = "RAY_ENVCACHE_TEST_POINTS"
"""Names a folder of a test. A process that reaches a point waits while the file `stop-<point>` is in it."""


def reach(point: str) -> None:
    """Say in `reached-<point>` that this process is at `point`, and wait there while a test asks for it."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    with open(os.path.join(folder, f"reached-{point}"), "a", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")
    while os.path.exists(os.path.join(folder, f"stop-{point}")):
        time.sleep(0.005)
