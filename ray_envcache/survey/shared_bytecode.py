"""Bytecode that all environments of the store share: one file per text of a module and per Python, linked into each.

What a Python compiles depends on the text alone. So a file is named after the text (its sha256), and is right wherever
that text is installed, whichever package brought it there. Only the Python that will load a file has compiled it; none
comes from a package. The path inside of it is set anew by every import (`_fix_co_filename` in CPython), so that
tracebacks name the right environment.

The kernel counts the links: a file to which no entry links is not needed. There are no flocks, for no interleaving does
harm. A compiler that finds no file compiles; and a file that loses its name here while a compiler links to it is
compiled once more by the next.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from ray_envcache.store.layout import Layout
from ray_envcache.system import disk, testpoints

_NAME = re.compile(r"[0-9a-f]{64}\.pyc")

Inode: TypeAlias = tuple[int, int]  # device, number


def publish(staged: Path, shared: Path) -> None:
    """Offer all bytecode in `staged`, a folder for each Python, to all entries. It must be on the disk already.

    Where it cannot be offered (no room, no links, an empty folder that the collector just removed) each environment
    keeps its own.
    """
    with suppress(OSError):
        for folder in staged.iterdir():
            offered = shared / folder.name
            offered.mkdir(parents=True, exist_ok=True)
            for name in filter(_NAME.fullmatch, os.listdir(folder)):
                with suppress(FileExistsError):
                    os.link(folder / name, offered / name)


def inodes(layout: Layout) -> frozenset[Inode]:
    """The files that have one link here."""
    return frozenset(_by_inode(layout))


def let_go(layout: Layout, tree: Path) -> None:
    """Forget the files that only `tree` has, which is about to be deleted: then their bytes are freed with it."""
    known, links = _by_inode(layout), Counter[Inode]()
    for _, found in disk.walk(tree):
        inode = (found.st_dev, found.st_ino)
        if inode in known:
            links[inode] += 1
            if found.st_nlink == links[inode] + 1:
                testpoints.reach("bytecode-let-go")
                with suppress(OSError):
                    os.unlink(known[inode])


def forget(layout: Layout, damaged: Iterable[Path]) -> int:
    """Offer the files that entries have at these places no more, without writing into them; how many were offered."""
    known, forgotten = _by_inode(layout), 0
    for path in damaged:
        with suppress(OSError):
            found = os.lstat(path)
            if shared := known.pop((found.st_dev, found.st_ino), None):
                os.unlink(shared)
                forgotten += 1
    return forgotten


def sweep(layout: Layout) -> int:
    """Remove what no entry links to; the bytes that became free."""
    freed = sum(_remove_unlinked(path) for path in _by_inode(layout).values())
    with suppress(OSError):
        for folder in layout.bytecode.iterdir():
            with suppress(OSError):
                folder.rmdir()  # empty only
    return freed


def _by_inode(layout: Layout) -> dict[Inode, str]:
    """All shared files by inode. A directory lists the numbers, so that no file need be looked at."""
    found: dict[Inode, str] = {}
    with suppress(OSError), os.scandir(layout.bytecode) as folders:
        for folder in folders:
            with suppress(OSError), os.scandir(folder.path) as items:
                device = folder.stat(follow_symlinks=False).st_dev
                found |= {(device, item.inode()): item.path for item in items if _NAME.fullmatch(item.name)}
    return found


def _remove_unlinked(path: str) -> int:
    """Remove a file that has no other link; the bytes it occupied."""
    with suppress(OSError):
        found = os.lstat(path)
        if found.st_nlink == 1:
            testpoints.reach("bytecode-sweep")
            os.unlink(path)
            return found.st_blocks * 512
    return 0
