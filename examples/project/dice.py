"""Throw dice on a Ray cluster: on the one that runs on this host, else on one of its own.

python dice.py  # with ray and ray-envcache; the folder needs its uv.lock (`uv lock`)
"""

from __future__ import annotations

import os
import platform
import sys

import ray

import ray_envcache  # importing registers the field

FOLDER = os.path.dirname(os.path.abspath(__file__))


@ray.remote(scheduling_strategy="SPREAD")
def throw(dice: int) -> tuple[str, int]:
    """Run in a worker of some node, from the environment of this project."""
    import numpy as np

    return f"{platform.node()}: {sys.executable}", int(np.random.default_rng().integers(1, 7, dice).sum())


def main() -> None:
    """Throw a million dice, and say which interpreters did."""
    ray.init(runtime_env=ray_envcache.runtime_env(FOLDER))
    thrown = ray.get([throw.remote(100_000) for _ in range(10)])
    print(f"a million dice: {sum(eyes for _, eyes in thrown):,}")
    for interpreter in sorted({interpreter for interpreter, _ in thrown}):
        print(interpreter)


if __name__ == "__main__":
    main()
