"""A framework that nobody wants to change: it starts a Ray cluster of its own, deep inside."""

from __future__ import annotations

import sys

import ray


def main() -> None:
    """Add up a few thousand numbers, far too elaborately."""
    ray.init(num_cpus=2)
    part = ray.remote(_part)
    print(f"the sum is {sum(ray.get([part.remote(number) for number in range(4)])):,}, found by {sys.executable}")
    ray.shutdown()


def _part(number: int) -> int:
    import numpy as np

    return int(np.arange(number * 1000, (number + 1) * 1000).sum())
