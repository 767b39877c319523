"""Two Ray clusters, one after the other, share one environment: the first builds it, the second finds it.

uv run python examples/quickstart.py
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ray
import uv

import ray_envcache  # importing registers the field


@ray.remote
def throw(dice: int) -> tuple[str, str]:
    """Run in a worker, from the environment of the project; the driver itself has neither package."""
    import humanize
    import numpy as np

    return sys.executable, humanize.intcomma(int(np.random.default_rng().integers(1, 7, dice).sum()))


def run_cluster(number: int, pyproject: Path) -> None:
    """Start a cluster, run one task in the environment, stop the cluster; say what it cost."""
    store = ray_envcache.Store.open()
    before = {one.path for one in store.environments()}
    began = time.monotonic()
    # "local": a cluster of our own, also where another one runs on this host, or its remains are found.
    env = {"envcache": str(pyproject)}
    ray.init("local", runtime_env=env, num_cpus=1, include_dashboard=False, log_to_driver=False)
    python, total = ray.get(throw.remote(1_000_000))
    seconds = time.monotonic() - began
    ray.shutdown()
    found = store.environments()
    built = {one.path for one in found} - before
    print(f"\ncluster {number}: environment {'built' if built else 'reused'}; start to first result {seconds:.1f} s")
    print(f"  a million dice:  {total}")
    print(f"  environments:    {len(found)}, {sum(one.size_bytes for one in found) / 1e6:,.0f} MB")
    print(f"  interpreter:     {python}\n", flush=True)


def main() -> None:
    """Lock the example project, run two clusters, and show the store."""
    with tempfile.TemporaryDirectory() as folder:
        pyproject = Path(shutil.copy(Path(__file__).parent / "project" / "pyproject.toml", folder))
        subprocess.run([uv.find_uv_bin(), "lock", "--quiet", "--python", sys.executable], cwd=folder, check=True)
        for number in (1, 2):
            run_cluster(number, pyproject)
        print("$ ray-envcache list", flush=True)
        subprocess.run([sys.executable, "-m", "ray_envcache", "list"], check=True)


if __name__ == "__main__":
    main()
