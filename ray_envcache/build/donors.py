"""Bytecode for a new environment without reading a line of it: from earlier ones that have the very same files.

uv links a package's files from its cache into every environment, so most modules of a new one are inodes of an earlier
one too, and what that one compiled is right for them. Reading and hashing the text instead takes three times longer.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ray_envcache.inside import pyc
from ray_envcache.store.layout import Entry, Layout

_MOST = 3  # donors: each that lacks a package costs two looks per directory


@dataclass(frozen=True)
class Donor:
    """The packages of a finished environment, and when it was ready (nanoseconds)."""

    packages: str
    ready: int


@dataclass(frozen=True)
class Donors:
    """Environments to take from, and the inodes of all bytecode that is shared: other bytecode is nobody's word."""

    packages: str
    """Of the new environment."""
    known: Collection[int] = frozenset()
    donors: Sequence[Donor] = ()
    own: str = ""
    """Where our own Python has its packages: some of them have the same text, and it has compiled what it imported."""

    def twin_of(self, module: str) -> str:
        """The path at which our own Python would have this module; "" where it has none."""
        return pyc.twin_of(module, self.packages, self.own)

    def give(self, directory: str, modules: Sequence[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
        """Link the bytecode of modules in a directory that donors have; returns the others."""
        for donor in self.donors:
            if modules:
                with suppress(OSError):  # it lacks the directory, or is being removed
                    modules = self._take(donor, donor.packages + directory[len(self.packages) :], modules)
        return [*modules]

    def _take(self, donor: Donor, there: str, modules: Sequence[os.DirEntry[str]]) -> list[os.DirEntry[str]]:
        texts, compiled = _inodes(there), _inodes(f"{there}/__pycache__")
        left: list[os.DirEntry[str]] = []
        for module in modules:
            file = pyc.place_of(f"{there}/{module.name}")
            is_same = texts.get(module.name) == module.inode() and compiled.get(os.path.basename(file)) in self.known
            # Whoever edits a file of uv's cache in place edits it in all environments.
            is_same = is_same and module.stat(follow_symlinks=False).st_mtime_ns < donor.ready
            if not (is_same and pyc.put_if_there(file, pyc.place_of(module.path))):
                left.append(module)
        return left


NOBODY = Donors("")


def donors_for(layout: Layout, entry: Entry, shared: Path, own: str = "") -> Donors:
    """The latest finished environments of the store, other than `entry`, that it may have files in common with.

    `own` is where our own Python has its packages.
    """
    packages = entry.site_packages
    inside, device = packages.relative_to(entry.path), os.stat(packages).st_dev
    found: list[Donor] = []
    for other in layout.all_entries():
        with suppress(OSError):  # it is being removed, or is one of another Python
            site = other.path / inside
            # The same number on another file system is another file.
            if other.path != entry.path and other.compiled.exists() and os.stat(site).st_dev == device:
                found.append(Donor(os.fspath(site), os.stat(other.ready).st_mtime_ns))
    found.sort(key=lambda donor: donor.ready, reverse=True)
    known = _inodes(os.fspath(shared)).values() if found else ()
    return Donors(os.fspath(packages), frozenset(known), found[:_MOST], own)


def _inodes(directory: str) -> dict[str, int]:
    try:
        with os.scandir(directory) as items:
            return {item.name: item.inode() for item in items}
    except FileNotFoundError:
        return {}
