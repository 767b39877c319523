"""What trees occupy, while clusters write to them: blocks that nobody else keeps, each inode once."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class Footprint:
    """Some trees together: inodes; bytes of their blocks, each inode once (`du`); and of those the bytes that are
    `own`, because all links to the inode are in these trees: not shared with uv's cache.

    Copies that share extents (reflinks) count in full.
    """

    inodes: int = 0
    du: int = 0
    own: int = 0

    def __sub__(self, other: Footprint) -> Footprint:
        return Footprint(self.inodes - other.inodes, self.du - other.du, self.own - other.own)

    def __add__(self, other: Footprint) -> Footprint:
        return Footprint(self.inodes + other.inodes, self.du + other.du, self.own + other.own)

    def __or__(self, other: Footprint) -> Footprint:
        """The larger of each."""
        return Footprint(max(self.inodes, other.inodes), max(self.du, other.du), max(self.own, other.own))


def measure(tops: Iterable[Path], files: set[tuple[str, int]] | None = None) -> Footprint:
    """Walk the trees; what vanishes meanwhile counts nothing. Name and inode of all that was seen go into `files`.

    By both, a file is still the same in a directory that was renamed, and another one that got a number again is not.
    """
    links: dict[tuple[int, int], list[int]] = {}
    pending = [os.fspath(top) for top in tops]
    while pending:
        with suppress(FileNotFoundError, NotADirectoryError), os.scandir(pending.pop()) as items:
            for item in items:
                with suppress(FileNotFoundError):
                    found = item.stat(follow_symlinks=False)
                    if files is not None:
                        files.add((item.name, found.st_ino))
                    is_directory = stat.S_ISDIR(found.st_mode)
                    # Of a directory there is one link that is a name.
                    wanted = 1 if is_directory else found.st_nlink
                    known = links.setdefault((found.st_dev, found.st_ino), [0, wanted, found.st_blocks * 512])
                    known[0] += 1
                    if is_directory:
                        pending.append(item.path)
    du = sum(size for _, _, size in links.values())
    return Footprint(len(links), du, sum(size for seen, wanted, size in links.values() if seen >= wanted))


class Sampler:
    """Looks at the trees again and again while the context lasts: the most that they had, and every file seen."""

    def __init__(self, tops: Iterable[Path], pause: float = 0.1) -> None:
        self._tops, self._pause = list(tops), pause
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._files: set[tuple[str, int]] = set()
        self.before = self.most = self.after = Footprint()

    def __enter__(self) -> Self:
        self.before = self.most = measure(self._tops, self._files)
        self._known = len(self._files)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.after = self._look()

    @property
    def created(self) -> int:
        """How many files and directories came that were not there before, as far as looks can tell."""
        return len(self._files) - self._known

    def _look(self) -> Footprint:
        found = measure(self._tops, self._files)
        self.most |= found
        return found

    def _sample(self) -> None:
        while not self._ended.wait(self._pause):
            self._look()
