"""One collection that nobody asked for: `python -m ray_envcache.gc.automatic ROOT SECONDS`.

So long it waits for those who are just ending, if they keep something that is due.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from ray_envcache.gc.collector import collect, has_due
from ray_envcache.gc.policy import Limits
from ray_envcache.store.layout import Layout


def run(layout: Layout, limits: Limits, patience: float) -> None:
    """Collect; again, while something is due, for it may only be kept by a cluster that ends.

    Whether it was in use is not asked: who kept it a moment ago, a user or another collector, may be gone by now.
    """
    deadline = time.monotonic() + patience
    collect(layout, limits)
    while time.monotonic() < deadline and has_due(layout, limits):
        time.sleep(1)
        collect(layout, limits)


def main(arguments: list[str]) -> int:
    """Serve `companion`."""
    root, patience = arguments
    run(Layout(Path(root)), Limits.from_environ(os.environ), float(patience))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
