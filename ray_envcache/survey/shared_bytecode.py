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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from ray_envcache.store.layout import Layout
from ray_envcache.system import testpoints

_NAME = re.compile(r"[0-9a-f]{64}\.pyc")

Inode: TypeAlias = tuple[int, int]  # device, number


def publish(staged: Path, shared: Path) -> None:
    """Offer all bytecode in `staged`, a folder for each Python, to all entries. It must be on the disk already.

    Where it cannot be offered (no room, no links) each environment keeps its own.
    """
    with suppress(OSError):
        for folder in staged.iterdir():
            offered = shared / folder.name
            offered.mkdir(parents=True, exist_ok=True)
            for name in filter(_NAME.fullmatch, os.listdir(folder)):
                with suppress(FileExistsError):
                    _offer(folder / name, offered / name)


def inodes(layout: Layout) -> frozenset[Inode]:
    """The files that have one link here."""
    return frozenset(_by_inode(layout))


def let_go(layout: Layout, tree: Path) -> None:
    """Forget the files that only `tree` has, which is about to be deleted: then their bytes are freed with it."""
    known = _by_inode(layout)
    for inode, (found, links) in _linked(tree, known).items():
        if found.st_nlink == links + 1:
            testpoints.reach("bytecode-let-go")
            with suppress(OSError):
                os.unlink(known[inode])


def freed_in_turn(layout: Layout, trees: Iterable[Path]) -> Iterator[int]:
    """Of each tree, the bytes it would free because the trees before it are gone: bytecode of theirs in common."""
    known, gone = _by_inode(layout), Counter[Inode]()
    for tree in trees:
        freed = 0
        for inode, (found, links) in _linked(tree, known).items():
            # With the trees before it, and not on its own.
            if gone[inode] and found.st_nlink == gone[inode] + links + 1:
                freed += found.st_blocks * 512
            gone[inode] += links
        yield freed


def sweep(layout: Layout) -> int:
    """Remove what no entry links to; the bytes that became free."""
    freed = sum(_remove_unlinked(path) for path in _by_inode(layout).values())
    with suppress(OSError):
        for folder in layout.bytecode.iterdir():
            with suppress(OSError):
                folder.rmdir()  # empty only
    return freed


def _offer(file: Path, name: Path) -> None:
    try:
        os.link(file, name)
    except FileNotFoundError:
        # The collector found the folder empty, and removed it.
        name.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, name)


def _by_inode(layout: Layout) -> dict[Inode, str]:
    """All shared files by inode. A directory lists the numbers, so that no file need be looked at."""
    found: dict[Inode, str] = {}
    with suppress(OSError), os.scandir(layout.bytecode) as folders:
        for folder in folders:
            with suppress(OSError), os.scandir(folder.path) as items:
                device = folder.stat(follow_symlinks=False).st_dev
                found |= {(device, item.inode()): item.path for item in items if _NAME.fullmatch(item.name)}
    return found


def _linked(tree: Path, known: dict[Inode, str]) -> dict[Inode, tuple[os.stat_result, int]]:
    """The files of `known` that `tree` has links to, and how many."""
    numbers = {number for _, number in known}
    found: dict[Inode, tuple[os.stat_result, int]] = {}
    for item in _files(tree):
        if item.inode() in numbers:
            with suppress(OSError):
                one = item.stat(follow_symlinks=False)
                inode = (one.st_dev, one.st_ino)
                if inode in known:
                    found[inode] = (one, found[inode][1] + 1 if inode in found else 1)
    return found


def _files(tree: Path) -> Iterator[os.DirEntry[str]]:
    pending = [os.fspath(tree)]
    while pending:
        with suppress(OSError), os.scandir(pending.pop()) as found:
            for item in found:
                if item.is_dir(follow_symlinks=False):
                    pending.append(item.path)
                elif item.name.endswith(".pyc"):
                    yield item


def _remove_unlinked(path: str) -> int:
    """Remove a file that has no other link; the bytes it occupied, 0 where a compiler linked to it meanwhile."""
    try:
        if os.lstat(path).st_nlink != 1:
            return 0
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        testpoints.reach("bytecode-sweep")
        os.unlink(path)
        left = os.fstat(descriptor)
    except OSError:
        return 0
    finally:
        os.close(descriptor)
    return 0 if left.st_nlink else left.st_blocks * 512
