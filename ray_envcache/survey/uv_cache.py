"""uv's cache inside of a store: it is there where the user's own lies on another file system.

The files of entries are hard links to unpacked wheels in it ("archives"). An archive to which no entry links any more
only saves a download. While uv runs it holds a shared flock on `.lock`; what is removed here is removed under the
exclusive one, which is only tried. uv takes an archive that a note names to be there: so its notes go first, then the
link by which they are found, then the archive, and uv unpacks or downloads the wheel again.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

from ray_envcache.store.layout import Layout
from ray_envcache.survey.shared_bytecode import Inode
from ray_envcache.system import disk, files
from ray_envcache.system.flock import tried_flock

OnError = Callable[[str, OSError], None]

_FLOCK, _ARCHIVES = ".lock", "archive-v"
_NOTES = (".rev", ".http")  # of wheels from this host, and from others


class UvCache(NamedTuple):
    """A cache of uv, in bytes: what it occupies, and how much of that environments have too.

    `own` is the one in the store, which the collector keeps small; the other is the user's.
    """

    path: str
    own: bool
    size_bytes: int
    shared_bytes: int


def of_store(layout: Layout) -> UvCache | None:
    """The cache in the store, None where there is none. To measure 100,000 files takes half a second."""
    if not layout.uv_cache.is_dir():
        return None
    use = disk.measure(layout.uv_cache)
    return UvCache(os.fspath(layout.uv_cache), True, use.size, use.size - use.reclaimable)


def inodes(layout: Layout) -> frozenset[Inode]:
    """The files of all archives: they have one link here."""
    found = (one for archive in _archives(layout) for _, one in disk.walk(archive))
    return frozenset((one.st_dev, one.st_ino) for one in found)


def retire(layout: Layout, on_error: OnError, *, since: float = 0.0, before: float = math.inf) -> None:
    """Put archives to which no entry links into the trash; none while uv runs. `on_error` gets what stays.

    Only those where the last link came or went from `since` on and earlier than `before`, in Unix seconds.
    """
    left = [path for path in _archives(layout) if _is_left(path, since, before)]
    if not left:
        return
    with _alone(layout) as alone:
        # Looked at again: uv may have linked to some meanwhile.
        left = [path for path in left if _is_left(path, since, before)] if alone is not None else []
        for path in [*_leading_to(left, layout), *left]:
            _retire(path, layout, on_error)


def retire_all(layout: Layout, on_error: OnError) -> None:
    """Put all of it into the trash; nothing while uv runs. The flock's file stays: a uv may be waiting for it."""
    if not layout.uv_cache.is_dir():
        return
    with _alone(layout) as alone:
        for path in layout.uv_cache.iterdir() if alone is not None else []:
            if path.name != _FLOCK:
                _retire(path, layout, on_error)


def _archives(layout: Layout) -> list[Path]:
    return [path for path in layout.uv_cache.glob(f"{_ARCHIVES}*/*") if path.is_dir() and not path.is_symlink()]


def _leading_to(archives: list[Path], layout: Layout) -> Iterator[Path]:
    """The links to these archives, each after uv's notes of it, which lie beside it."""
    names = {archive.name for archive in archives}
    kinds = (kind for kind in layout.uv_cache.iterdir() if kind.is_dir() and not kind.name.startswith(_ARCHIVES))
    for link in (path for kind in kinds for path in kind.rglob("*") if path.is_symlink()):
        if os.path.basename(os.readlink(link)) in names:
            yield from filter(Path.exists, (link.with_name(link.name + note) for note in _NOTES))
            yield link


def _is_left(archive: Path, since: float, before: float) -> bool:
    # The kernel sets ctime when a file gets or loses a link.
    changed = 0.0
    for _, found in disk.walk(archive):
        if not stat.S_ISDIR(found.st_mode):
            if found.st_nlink > 1:
                return False
            changed = max(changed, found.st_ctime)
    return since <= changed < before


def _retire(path: Path, layout: Layout, on_error: OnError) -> None:
    with suppress(OSError):
        files.to_trash(path, layout.trash)
        return
    try:
        # No room for a name, or a disk of its own. Under the flock: half an archive would be taken for a whole one.
        files.remove_tree(path)
    except OSError as error:
        on_error(path.name, error)


def _alone(layout: Layout) -> AbstractContextManager[int | None]:
    path = layout.uv_cache / _FLOCK
    try:
        path.touch()
    except OSError as error:
        if error.errno not in files.FULL_DISK:
            raise
        # uv makes the file. Where it is missing, and the disk has no room for it, the cache stays as it is.
        return nullcontext()
    return tried_flock(path)
