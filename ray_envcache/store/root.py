"""The root of a store: made private, and refused where the promises could not be kept."""

from __future__ import annotations

import os
import re
import stat
from functools import cache
from pathlib import Path

from ray_envcache.errors import StoreError
from ray_envcache.store.layout import Layout
from ray_envcache.system import disk, files

_TAG = """\
Signature: 8a477f597d28d172789f06886806bc55
# This directory holds the environments of ray-envcache. Backups may leave it out (https://bford.info/cachedir/).
"""
# PATH is separated by colons, Ray expands `$` in variables, uv writes the path into activation scripts.
_UNUSABLE = r"[\x00-\x1f\x7f:$\"'`\\]"


def prepare_root(layout: Layout) -> None:
    """Make the directories of a store where they are missing, and check that no other user may write to it.

    Raises StoreError. Costs a few system calls when all is there.
    """
    require_usable_name(layout.root)
    try:
        _make(layout)
        found = layout.root.stat()
    except OSError as error:
        full = error.errno in files.FULL_DISK
        figures = f", {disk.room_left(layout.root)}" if full else ""
        raise StoreError(
            f"Cannot use the store at `{layout.root}`: {error.strerror or error}{figures}",
            f"{'make room, or ' if full else ''}choose a place you may write to: RAY_ENVCACHE_DIR=/path/to/store",
        ) from error
    if found.st_uid != os.geteuid():
        raise StoreError(
            f"The store at `{layout.root}` belongs to user {found.st_uid}, you are user {os.geteuid()}",
            "environments run code: every user has a store of their own; choose one with RAY_ENVCACHE_DIR",
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise StoreError(
            f"Others may write to the store at `{layout.root}` (mode {stat.S_IMODE(found.st_mode):o})",
            f"chmod 700 '{layout.root}'",
        )
    _require_local(os.fspath(layout.root), found.st_dev)


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


def require_usable_name(root: Path, variable: str = "RAY_ENVCACHE_DIR") -> None:
    """Raise StoreError where no store can be at `root`, as `variable` says."""
    if bad := re.search(_UNUSABLE, os.fspath(root)):
        raise StoreError(
            f"The store's path {os.fspath(root)!r} has {bad.group()!r} in it, which PATH or shebangs cannot carry",
            f"choose another place: {variable}=/path/to/store",
        )


def is_noexec(root: Path) -> bool:
    """Whether no program or library can be loaded from there: workers would be started again for ever."""
    return bool(os.statvfs(root).f_flag & getattr(os, "ST_NOEXEC", 0))  # Linux only


@cache
def _require_local(root: str, _device: int) -> None:
    if is_noexec(Path(root)):
        raise StoreError(
            f"The store at `{root}` is mounted noexec: no program or library can be loaded from there",
            "mount it without noexec, or choose another disk: RAY_ENVCACHE_DIR=/path/to/store",
        )
    kind = disk.free_space(Path(root)).kind
    if disk.is_network(kind) and os.environ.get("RAY_ENVCACHE_ALLOW_NETWORK_FS") != "1":
        raise StoreError(
            f"The store at `{root}` is on a file system that other machines may use too ({kind}): "
            "flocks do not reliably exclude there",
            "choose a local disk: RAY_ENVCACHE_DIR; if one host alone uses it, RAY_ENVCACHE_ALLOW_NETWORK_FS=1",
        )
