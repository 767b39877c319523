"""Room on the disk, before a build begins."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from ray_envcache.build import venv_files
from ray_envcache.build.plan import EnvironmentPlan
from ray_envcache.build.uv_calls import disk_full
from ray_envcache.gc.collector import make_room
from ray_envcache.resolve import uv
from ray_envcache.store.layout import Layout
from ray_envcache.system import disk

UNPACKED = 3.0
"""Bytes on the disk per byte to download: wheels of numpy, pandas, scipy and torch unpack to 1.7 to 3.8 times."""


def ensure_room(layout: Layout, plan: EnvironmentPlan) -> None:
    """Collect idle environments where the disk may be too small for this one.

    Raises DiskFullError where even the download has no room afterwards. Where only the unpacked packages may have none
    the build is tried: then uv says so.
    """
    download = plan.download_size
    if _free(layout) >= download * UNPACKED or _is_cached(layout, plan):
        return
    make_room(layout, int(download * UNPACKED))
    if _free(layout) < download:
        raise disk_full(layout.entries, download)


def _free(layout: Layout) -> int:
    return disk.free_space(layout.entries).free


def _is_cached(layout: Layout, plan: EnvironmentPlan) -> bool:
    """Whether uv has everything unpacked in a cache it can link from: then the environment needs next to nothing."""
    cache = uv.cache_directory(layout.entries)
    if cache is None:
        return False
    # On a disk without any room there is none to ask either: then it counts as not cached.
    with suppress(OSError), tempfile.TemporaryDirectory() as folder:
        pylock = Path(folder) / "pylock.toml"
        pylock.write_text(venv_files.pylock_text(plan.resolved), encoding="utf-8")
        dry = ["pip", "sync", "--dry-run", "--offline", "--preview-features=pylock", "--break-system-packages"]
        target = [f"--python={plan.interpreter.executable}", f"--target={folder}/target"]
        done = uv.run([*dry, *target, pylock], cwd=plan.folder, cache=cache)
        return done.returncode == 0 and "Would download" not in done.stderr
    return False
