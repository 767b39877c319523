"""uv's cache inside of a store: it is there where the user's own lies on another file system.

The files of entries are hard links to unpacked wheels in it ("archives"). An archive to which no entry links any more
only saves a download. While uv runs it holds a shared flock on `.lock`; what is removed here is removed under the
exclusive one, which is only tried. Of a local wheel uv does not ask whether its archive is still there: so the links
and notes that lead to an archive go before it, and uv unpacks or downloads the wheel again.
"""

from __future__ import annotations

import math
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ray_envcache.store.layout import Layout
from ray_envcache.survey.shared_bytecode import Inode
from ray_envcache.system import disk, files, flock

OnError = Callable[[str, OSError], None]

_FLOCK, _ARCHIVES = ".lock", "archive-v"
_NOTE_BYTES = 4096  # notes have 500


class UvCache(NamedTuple):
    """A cache of uv, in bytes: what it occupies, and how much of that environments have too.

    `own` is the one in the store, which the collector keeps small; the other is the user's.
    """

    path: str
    own: bool
    size_bytes: int
    shared_bytes: int


def of_store(layout: Layout, max_age: float) -> UvCache | None:
    """The cache in the store, None where there is none. What was measured in the last `max_age` seconds is believed.

    To measure 100,000 files takes half a second.
    """
    if not layout.uv_cache.is_dir():
        return None
    with suppress(FileNotFoundError):  # not measured yet, or collected since
        is_fresh = 0 <= time.time() - layout.uv_cache_size.stat().st_mtime < max_age
        noted = files.read_json(layout.uv_cache_size) or {}
        if is_fresh and noted.keys() == {*UvCache._fields}:
            return UvCache(**noted)
    use = disk.measure(layout.uv_cache)
    found = UvCache(os.fspath(layout.uv_cache), True, use.size, use.size - use.reclaimable)
    with suppress(OSError):  # on a full disk it is measured again next time
        files.write_json(layout.uv_cache_size, found._asdict(), durable=False)
    return found


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
        left = [path for path in left if _is_left(path, since, before)] if alone else []
        for path in [*_leading_to(left, layout), *left]:
            _retire(path, layout, on_error)
    layout.uv_cache_size.unlink(missing_ok=True)


def retire_all(layout: Layout, on_error: OnError) -> None:
    """Put all of it into the trash; nothing while uv runs. The flock's file stays: a uv may be waiting for it."""
    if not layout.uv_cache.is_dir():
        return
    with _alone(layout) as alone:
        for path in layout.uv_cache.iterdir() if alone else []:
            if path.name != _FLOCK:
                _retire(path, layout, on_error)
    layout.uv_cache_size.unlink(missing_ok=True)


def _archives(layout: Layout) -> list[Path]:
    return [path for path in layout.uv_cache.glob(f"{_ARCHIVES}*/*") if path.is_dir() and not path.is_symlink()]


def _leading_to(archives: list[Path], layout: Layout) -> list[Path]:
    """The links to archives, and uv's notes that have their names: these are random, so that no other file has them."""
    if not archives:
        return []
    names = {os.fsencode(archive.name) for archive in archives}
    lengths = {len(name) for name in names}
    kinds = [kind for kind in layout.uv_cache.iterdir() if kind.is_dir() and not kind.name.startswith(_ARCHIVES)]

    def leads_there(path: Path) -> bool:
        text = _text_of(path)
        return any(text[at : at + length] in names for length in lengths for at in range(len(text) - length + 1))

    return [path for kind in kinds for path in kind.rglob("*") if leads_there(path)]


def _text_of(path: Path) -> bytes:
    """What a link leads to, or the content of a file that may be a note; of others nothing."""
    with suppress(OSError):
        if path.is_symlink():
            return os.fsencode(os.readlink(path))
        if path.is_file() and path.stat().st_size <= _NOTE_BYTES:
            return path.read_bytes()
    return b""


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


@contextmanager
def _alone(layout: Layout) -> Iterator[bool]:
    descriptor = None
    try:
        descriptor = flock.try_flock(layout.uv_cache / _FLOCK, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    except OSError as error:
        # uv makes the file. Where it is missing, and the disk has no room for it, the cache stays as it is.
        if error.errno not in files.FULL_DISK:
            raise
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            os.close(descriptor)
