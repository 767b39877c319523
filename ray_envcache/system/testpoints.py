"""Places where a test can freeze us, to meet a race on purpose. Without the variable they cost one look-up."""

from __future__ import annotations

import os
import time

FOLDER = "RAY_ENVCACHE_TEST_POINTS"
"""A folder of a test. A file `stop-<point>` in it freezes whoever reaches that point until the file is gone."""


def reach(point: str) -> None:
    """Say that we are at `point`, and wait there if a test asks for it."""
    folder = os.environ.get(FOLDER)
    if folder is None:
        return
    with open(os.path.join(folder, f"reached-{point}"), "a", encoding="ascii") as file:
        file.write(f"{os.getpid()}\n")
    while os.path.exists(os.path.join(folder, f"stop-{point}")):
        time.sleep(0.005)
