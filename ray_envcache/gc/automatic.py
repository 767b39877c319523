"""One collection without a command: `python -m ray_envcache.gc.automatic ROOT DELAY`, which `companion` starts."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from ray_envcache.gc import companion
from ray_envcache.gc.collector import collect
from ray_envcache.gc.policy import Limits
from ray_envcache.store.layout import Layout


def main(arguments: list[str]) -> int:
    """Wait DELAY seconds, then collect, unless another process did so within the interval."""
    root, delay = arguments
    layout = Layout(Path(root))
    os.setpriority(os.PRIO_PROCESS, 0, 10)
    time.sleep(float(delay))
    if companion.is_time(layout, os.environ):
        with suppress(OSError):  # on a disk without inodes the next cluster collects once more
            layout.last_collection.touch()
        collect(layout, Limits.from_environ(os.environ))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
