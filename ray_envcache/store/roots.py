"""The roots of stores: the user's own, which is made, and read-only ones; refused where no promise could be kept.

Read-only stores are those of images and shared disks, which $RAY_ENVCACHE_READONLY_DIRS names. They are searched before
anything is built. An entry is used in place, under a flock that the collector of its owner sees. Nothing is ever
written there, not even where we could. Environments run code: other users must not be able to change any of these
stores.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path

from ray_envcache.errors import ReadOnlyError, StoreError
from ray_envcache.store.layout import Entry, Layout, default_root, layout_of
from ray_envcache.system import disk, files, flock

OWN = "RAY_ENVCACHE_DIR"
READONLY = "RAY_ENVCACHE_READONLY_DIRS"

_TAG = """\
Signature: 8a477f597d28d172789f06886806bc55
# This directory holds the environments of ray-envcache. Backups may leave it out (https://bford.info/cachedir/).
"""
# PATH is separated by colons, Ray expands `$` in variables, uv writes the path into activation scripts.
_UNUSABLE = r"[\x00-\x1f\x7f:$\"'`\\]"
_GONE = (FileNotFoundError, NotADirectoryError)


def opened(root: Path | None = None) -> tuple[Layout, tuple[Layout, ...]]:
    """The user's store, made where it is missing, and the read-only ones, all checked as `Store.open` checks them."""
    layout = Layout(Path(os.path.abspath(root)) if root else default_root())
    prepare_root(layout)
    return layout, readonly_stores(layout, os.environ)


def prepare_root(layout: Layout) -> None:
    """Make the directories of a store where they are missing, and check that no other user may write to it.

    Raises StoreError. Costs a few system calls when all is there.
    """
    _require_usable_name(layout.root, OWN)
    try:
        _make(layout)
        device = _require_trusted(layout, layout.root, {os.geteuid()})
    except OSError as error:
        full = error.errno in files.FULL_DISK
        figures = f", {disk.room_left(layout.root)}" if full else ""
        raise StoreError(
            f"Cannot use the store at `{layout.root}`: {error.strerror or error}{figures}",
            f"{'make room, or ' if full else ''}choose a place you may write to: {OWN}=/path/to/store",
        ) from error
    _require_local(os.fspath(layout.root), device)


def _make(layout: Layout) -> None:
    if not layout.flocks.is_dir():
        layout.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        layout.top.mkdir(mode=0o700, exist_ok=True)
        for directory in layout.directories():
            directory.mkdir(mode=0o700, exist_ok=True)
        # Here, so that the collector makes no file: it must work where there is no inode left.
        layout.collector_flock.touch(mode=0o600)
    if not _is_tagged(layout.cachedir_tag):
        layout.cachedir_tag.write_text(_TAG, encoding="ascii")


def _is_tagged(tag: Path) -> bool:
    # By its size: a full disk, or a SIGKILL, may have left an empty one.
    try:
        return tag.stat().st_size >= len(_TAG)
    except FileNotFoundError:
        return False


def _require_usable_name(root: Path, variable: str) -> None:
    if bad := re.search(_UNUSABLE, os.fspath(root)):
        raise StoreError(
            f"The store's path {os.fspath(root)!r} has {bad.group()!r} in it, which PATH or shebangs cannot carry",
            f"choose another place: {variable}=/path/to/store",
        )


def _require_trusted(layout: Layout, directory: Path, owners: Collection[int]) -> int:
    """Raise StoreError where other users than the owners may change a directory of a store; return its device."""
    # Only the root may be reached by a link: what the link leads to is what is checked.
    found = os.stat(directory, follow_symlinks=directory == layout.root)
    if not stat.S_ISDIR(found.st_mode):
        raise NotADirectoryError(directory)
    if found.st_uid not in owners:
        raise StoreError(
            f"The store at `{layout.root}` cannot be trusted: `{directory}` belongs to user {found.st_uid}",
            f"environments run code: {OWN} names a store of your own, {READONLY} stores of root and your own",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StoreError(
            f"Others may write to the store at `{layout.root}`: `{directory}` has mode {stat.S_IMODE(found.st_mode):o}",
            f"environments run code; its owner mends it with chmod -R go-w '{layout.root}'",
        )
    return found.st_dev


def _require_exec(root: Path, variable: str) -> None:
    """Raise StoreError where no program or library can be loaded from: workers would be started again for ever."""
    if os.statvfs(root).f_flag & getattr(os, "ST_NOEXEC", 0):  # Linux only
        raise StoreError(
            f"The store at `{root}` is mounted noexec: no program or library can be loaded from there",
            f"mount it without noexec, or choose another place: {variable}",
        )


@cache
def _require_local(root: str, _device: int) -> None:
    _require_exec(Path(root), OWN)
    kind = disk.free_space(Path(root)).kind
    if disk.is_network(kind) and os.environ.get("RAY_ENVCACHE_ALLOW_NETWORK_FS") != "1":
        raise StoreError(
            f"The store at `{root}` is on a file system that other machines may use too ({kind}): "
            "flocks do not reliably exclude there",
            f"choose a local disk: {OWN}; if one host alone uses it, RAY_ENVCACHE_ALLOW_NETWORK_FS=1",
        )


def readonly_stores(own: Layout, environ: Mapping[str, str]) -> tuple[Layout, ...]:
    """The stores that the variable names, in its order, but our own; those that are not there are passed over.

    Raises StoreError where a path cannot be one of a store, or where a store may be changed by others, or not be read.
    """
    return tuple(layout for layout in _named(own, environ) if _is_there(layout))


def missing_stores(own: Layout, environ: Mapping[str, str]) -> list[Path]:
    """The places that the variable names where there is no store. Raises as `readonly_stores`."""
    return [layout.root for layout in _named(own, environ) if not _is_there(layout)]


def require_own(entry: Entry, command: str) -> None:
    """Raise ReadOnlyError for an entry of a read-only store, which only its owner may change, by this command."""
    if entry.readonly:
        root = layout_of(entry).root
        raise ReadOnlyError(
            f"The environment {entry.name} stays as it is: the store at `{root}` is read-only here",
            f"its owner can: {OWN}={root} ray-envcache {command} {entry.short}",
        )


def shared_flock(entry: Entry) -> int | None:
    """A shared flock on the `in-use` file of an entry in a read-only store, as `flock.try_flock` takes it.

    Raises FileNotFoundError where the entry is not there, or not ready; StoreError where others may change it (or what
    it lies in, up to the root), and where it cannot be read or held.
    """
    layout = layout_of(entry)
    try:
        _require_all_trusted(layout, entry.path)
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
        f"Cannot read the store at `{layout.root}`, which {READONLY} names: {error.strerror or error}",
        f"its owner makes it readable with chmod -R a+rX '{layout.root}'; or take it out of {READONLY}",
    )


def _named(own: Layout, environ: Mapping[str, str]) -> list[Layout]:
    roots = dict.fromkeys(filter(None, environ.get(READONLY, "").split(os.pathsep)))
    layouts = [Layout(_checked(Path(root)), readonly=True) for root in roots]
    return [layout for layout in layouts if not _is_same(layout.root, own.root)]


def _checked(root: Path) -> Path:
    _require_usable_name(root, READONLY)
    if not root.is_absolute():
        raise StoreError(
            f"{READONLY} names a relative path: `{root}`",
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
        _require_all_trusted(layout)
        # Both to read and to enter.
        os.close(os.open(f"{layout.entries}/.", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        # Some container runtimes mount image volumes so.
        _require_exec(layout.root, READONLY)
    except _GONE:
        return False
    except OSError as error:
        raise unreadable(layout, error) from error
    return True


def _require_all_trusted(layout: Layout, *more: Path) -> None:
    """Raise as `_require_trusted` where one of the directories down to the entries, and `more`, may be changed."""
    for directory in (layout.root, layout.top, layout.entries, *more):
        _require_trusted(layout, directory, {0, os.geteuid()})
