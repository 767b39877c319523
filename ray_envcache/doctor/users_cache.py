"""The user's own cache of uv: how large it is, and how much of it the store's environments have too."""

from __future__ import annotations

import os
import stat

from ray_envcache.resolve import uv
from ray_envcache.store.layout import Layout
from ray_envcache.survey.uv_cache import UvCache
from ray_envcache.system import disk


def users_cache(layout: Layout) -> UvCache | None:
    """The cache that uv links from into this store; None where it is on another disk, or there is none.

    Walks through it and through all environments, 5 us for each file: a cache of 500,000 takes 3 s, cold some more.
    """
    cache = uv.cache_directory(layout.entries)
    if cache is None or not cache.is_dir():
        return None
    size, linked = 0, {}
    for _, found in disk.walk(cache):
        if stat.S_ISDIR(found.st_mode) or found.st_nlink == 1:
            size += found.st_blocks * 512
        else:
            linked[found.st_dev, found.st_ino] = found.st_blocks * 512
    in_entries = {(found.st_dev, found.st_ino) for _, found in disk.walk(layout.entries) if found.st_nlink > 1}
    shared = sum(linked[inode] for inode in linked.keys() & in_entries)
    return UvCache(os.fspath(cache), False, size + sum(linked.values()), shared)
