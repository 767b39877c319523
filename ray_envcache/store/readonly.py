"""Read-only stores: those of images and shared disks, which $RAY_ENVCACHE_READONLY_DIRS names.

They are searched before anything is built. An entry is used in place, under a flock that the collector of its owner
sees. Nothing is ever written there, not even where we could. Environments run code: other users must not be able to
change such a store.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Mapping
from pathlib import Path

from ray_envcache.errors import StoreError
from ray_envcache.store.layout import Entry, Layout, default_root, layout_of
from ray_envcache.store.root import is_noexec, prepare_root, require_usable_name
from ray_envcache.system import flock

VARIABLE = "RAY_ENVCACHE_READONLY_DIRS"

_GONE = (FileNotFoundError, NotADirectoryError)


def opened(root: Path | None = None) -> tuple[Layout, tuple[Layout, ...]]:
    """The user's store, made where it is missing, and the read-only ones, all checked as `Store.open` checks them."""
    layout = Layout(root or default_root())
    prepare_root(layout)
    return layout, readonly_stores(layout, os.environ)


def readonly_stores(own: Layout, environ: Mapping[str, str]) -> tuple[Layout, ...]:
    """The stores that the variable names, in its order, but our own; those that are not there are passed over.

    Raises StoreError where a path cannot be one of a store, or where a store may be changed by others, or not be read.
    """
    named = _named(own, environ)
    found = tuple(layout for layout in named if _is_there(layout))
    for layout in named:
        if layout not in found:
            logging.getLogger(__name__).debug("%s names `%s`, where there is no store", VARIABLE, layout.root)
    return found


def missing_stores(own: Layout, environ: Mapping[str, str]) -> list[Path]:
    """The places that the variable names where there is no store. Raises as `readonly_stores`."""
    return [layout.root for layout in _named(own, environ) if not _is_there(layout)]


def shared_flock(entry: Entry) -> int | None:
    """A shared flock on the `in-use` file of an entry in a read-only store, as `flock.try_flock` takes it.

    Raises FileNotFoundError where the entry is not there, or not ready; StoreError where others may change it (or what
    it lies in, up to the root), and where it cannot be read or held.
    """
    layout = layout_of(entry)
    try:
        for directory in (layout.root, layout.top, layout.entries, entry.path):
            _require_trusted(layout, directory)
        # Its record is read next.
        os.close(os.open(entry.ready, os.O_RDONLY | os.O_CLOEXEC))
        return _hold(entry.in_use)
    except _GONE:
        raise
    except OSError as error:
        raise unreadable(layout, error) from error


def _hold(in_use: Path) -> int | None:
    """A shared flock or, where the file system has none but is mounted read-only, the open file alone.

    No process of this host can remove the entry then, and those of other hosts would not see a flock.
    """
    try:
        return flock.try_flock(in_use, exclusive=False)
    except _GONE:
        raise
    except OSError:
        descriptor = os.open(in_use, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        if os.fstatvfs(descriptor).f_flag & os.ST_RDONLY:
            return descriptor
        os.close(descriptor)
        raise


def unreadable(layout: Layout, error: OSError) -> StoreError:
    """The error for a read-only store that we may not, or cannot, read."""
    return StoreError(
        f"Cannot read the store at `{layout.root}`, which {VARIABLE} names: {error.strerror or error}",
        f"its owner makes it readable with chmod -R a+rX '{layout.root}'; or take it out of {VARIABLE}",
    )


def _named(own: Layout, environ: Mapping[str, str]) -> list[Layout]:
    roots = dict.fromkeys(filter(None, environ.get(VARIABLE, "").split(os.pathsep)))
    layouts = [Layout(_checked(Path(root)), readonly=True) for root in roots]
    return [layout for layout in layouts if not _is_same(layout.root, own.root)]


def _checked(root: Path) -> Path:
    require_usable_name(root, VARIABLE)
    if not root.is_absolute():
        raise StoreError(
            f"{VARIABLE} names a relative path: `{root}`",
            "an environment works only at the path where it was built: name absolute ones, with colons in between",
        )
    return root


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one == other or one.samefile(other)
    except OSError:
        return False


def _is_there(layout: Layout) -> bool:
    try:
        for directory in (layout.root, layout.top, layout.entries):
            _require_trusted(layout, directory)
        # Both to read and to enter.
        os.close(os.open(f"{layout.entries}/.", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        # Some container runtimes mount image volumes so.
        if is_noexec(layout.root):
            raise StoreError(
                f"The read-only store at `{layout.root}` is mounted noexec: no library can be loaded from there",
                f"mount it without noexec, or take it out of {VARIABLE}",
            )
    except _GONE:
        return False
    except OSError as error:
        raise unreadable(layout, error) from error
    return True


def _require_trusted(layout: Layout, directory: Path) -> None:
    # Only the root may be reached by a link: what the link leads to is what is checked.
    found = os.stat(directory, follow_symlinks=directory == layout.root)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(directory)
    if found.st_uid not in {0, os.geteuid()}:
        raise StoreError(
            f"The read-only store at `{layout.root}` cannot be trusted: `{directory}` belongs to user {found.st_uid}",
            f"environments run code: {VARIABLE} may name stores of root and your own",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StoreError(
            f"Others may write to the read-only store at `{layout.root}`: "
            f"`{directory}` has the mode {stat.S_IMODE(found.st_mode):o}",
            f"environments run code; its owner mends it with chmod -R go-w '{layout.root}'",
        )
