"""Where the bytes of a file lie on the disk, and which of them other files have too: FIEMAP, as in linux/fiemap.h."""

from __future__ import annotations

import fcntl
import os
import struct
from collections.abc import Iterator
from typing import TypeAlias

Extent: TypeAlias = tuple[int, int, int, int]
"""Its place in the file and on the disk, its length (bytes), and flags."""

LAST, ENCODED, INLINE, SHARED = 0x1, 0x8, 0x200, 0x2000
"""Flags: the last of the file; compressed, so that the length is the logical one; in the inode; in other files too."""

_FS_IOC_FIEMAP = 0xC020660B
_HEADER = struct.Struct("=QQIIII")  # start, length, flags, extents mapped, room for extents, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")
_ROOM = 64


def extents_of(path: str) -> Iterator[Extent]:
    """Iterate over the extents of a file. Raises OSError, also where the file system does not tell."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        start = 0
        while found := _parse(_ask(descriptor, start)):
            yield from found
            place, _, length, flags = found[-1]
            if flags & LAST:
                return
            start = place + length
    finally:
        os.close(descriptor)


def _ask(descriptor: int, start: int) -> bytes:
    answer = bytearray(_HEADER.size + _ROOM * _EXTENT.size)
    _HEADER.pack_into(answer, 0, start, 2**64 - 1 - start, 0, 0, _ROOM, 0)
    fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, answer, True)
    return bytes(answer)


def _parse(answer: bytes) -> list[Extent]:
    mapped = _HEADER.unpack_from(answer)[3]
    return list(_EXTENT.iter_unpack(answer[_HEADER.size : _HEADER.size + mapped * _EXTENT.size]))
