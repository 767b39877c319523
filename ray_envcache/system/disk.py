"""True bytes: what trees occupy, what deleting them would free, and what their file system has left."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias

import psutil

# Shared between hosts, or between a virtual machine and its host.
_NETWORK = frozenset(
    """
    9p acfs afpfs afs auristorfs beegfs ceph cifs coda davfs davfs2 drvfs fakeowner fhgfs gcsfuse gfs gfs2 glusterfs
    gpfs grpcfuse juicefs lustre macfuse mfs moosefs ncpfs nfs nfs4 ocfs2 orangefs osxfs osxfuse panfs prl_fs pvfs2
    quobyte seaweedfs smb2 smb3 smbfs vboxsf virtiofs vmhgfs webdav wekafs
    """.split()  # noqa: SIM905  # so many names read better as words than as lines
)
# Of the others that reach the kernel through FUSE nearly all are object stores and remote hosts: new ones each year.
_LOCAL_FUSE = frozenset({"bindfs", "encfs", "fuse-overlayfs", "fuse2fs", "gocryptfs", "mergerfs", "ntfs-3g", "unionfs"})
# Here files never share extents; elsewhere each file is asked. A wrong name in this list would promise too many bytes.
_NEVER_SHARES = frozenset({"ext2", "ext3", "ext4", "f2fs", "jfs", "ramfs", "reiserfs", "tmpfs"})

_FEW_INODES = 10_000  # an environment has so many files easily

_Extent: TypeAlias = tuple[int, int, int, int]  # its place in the file and on the disk, its length, and flags
# FIEMAP, as in linux/fiemap.h. The flags say: the last of the file; compressed, so that the length is the logical one;
# in the inode; in other files too.
_LAST, _ENCODED, _INLINE, _SHARED = 0x1, 0x8, 0x200, 0x2000
_FS_IOC_FIEMAP = 0xC020660B
_HEADER = struct.Struct("=QQIIII")  # start, length, flags, extents mapped, room for extents, reserved
_EXTENT = struct.Struct("=QQQ16xI12x")
_ROOM = 64
_VANISHED = (FileNotFoundError, NotADirectoryError)


class DiskUse(NamedTuple):
    """Bytes of one tree.

    `size`: bytes the tree occupies, each inode once. `reclaimable`: bytes that deleting it would free now. What is
    kept by a hard link outside of it, or by a reflinked copy anywhere, does not count. With `exact` False something
    could not be known and `reclaimable` is what is known: "at least".
    """

    size: int
    reclaimable: int
    exact: bool


class FileSystem(NamedTuple):
    """Bytes in all and free for this user, inodes free for this user (None: no fixed number), and the type's name.

    `kind` is the kernel's name, such as "ext4" or "fuse.sshfs"; "" where the system does not say it.
    """

    total: int
    free: int
    inodes_free: int | None
    kind: str


def measure(top: Path, linked: Collection[tuple[int, int]] = ()) -> DiskUse:
    """Measure one tree. That it is missing, or vanishes meanwhile, is no error: what is gone counts nothing.

    The inodes `linked` (device, number) have one more link, elsewhere, that goes when the tree does. Links are not
    followed and other file systems not entered. Writes nothing and raises no OSError: what cannot be read makes the
    answer inexact. Two limits: on overlayfs the files of an image count as if deleting them freed something (never
    `exact`); and space kept by a process that has a deleted file open counts as freed.
    """
    return _tally(top, linked, {}).use()


def freed_in_turn(tops: Iterable[Path], linked: Collection[tuple[int, int]] = ()) -> list[tuple[int, bool]]:
    """Of each tree, the bytes that deleting it frees once the trees before it are gone, and whether that is exact.

    `linked` and the limits are those of `measure`.
    """
    not_all_seen: dict[tuple[int, int], tuple[int, int]] = {}
    tallies = [_tally(top, linked, not_all_seen) for top in tops]
    return [(tally.reclaimable, tally.exact) for tally in tallies]


def occupied_in_turn(tops: Iterable[Path]) -> list[int]:
    """Of each tree, the bytes that become unoccupied when the trees go in this order: what no later one links to.

    All together they are what the trees occupy, each inode once.
    """
    taken: set[tuple[int, int]] = set()
    occupied = []
    for top in reversed([*tops]):
        inodes = {(found.st_dev, found.st_ino): found for _, found in walk(top)}
        occupied.append(sum(found.st_blocks * 512 for inode, found in inodes.items() if inode not in taken))
        taken.update(inode for inode, found in inodes.items() if found.st_nlink > 1)
    return occupied[::-1]


def walk(top: Path, on_error: Callable[[OSError], None] = lambda _: None) -> Iterator[tuple[str, os.stat_result]]:
    """The paths below `top`, and its own, with their inodes. Links are not followed, other file systems not entered.

    `on_error` gets what cannot be read, or is gone.
    """
    try:
        found = os.lstat(top)
    except OSError as error:
        on_error(error)
        return
    yield os.fspath(top), found
    device, pending = found.st_dev, [os.fspath(top)] if stat.S_ISDIR(found.st_mode) else []
    while pending:
        try:
            with os.scandir(pending.pop()) as items:
                for item in items:
                    with suppress(*_VANISHED):
                        found = item.stat(follow_symlinks=False)
                        yield item.path, found
                        # Asked of directories only: on overlayfs files may have another device than their directory.
                        if stat.S_ISDIR(found.st_mode) and found.st_dev == device:
                            pending.append(item.path)
        except OSError as error:  # noqa: PERF203  # each directory fails for itself
            on_error(error)


def free_space(path: Path) -> FileSystem:
    """Ask what the file system of an existing file or directory has left; quotas of users are not considered.

    Raises OSError, notably FileNotFoundError.
    """
    found = os.statvfs(path)
    # btrfs and others have no inode tables and report 0 of 0, which must not be taken for "none left".
    inodes_free = found.f_favail if found.f_files else None
    return FileSystem(found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize, inodes_free, _kind(path))


def room_left(path: Path) -> str:
    """What is free where `path` lies or would lie, for people: "12 MB are free"; with inodes where those are few."""
    found = free_space(next(place for place in [path, *path.parents] if place.exists()))
    few = found.inodes_free is not None and found.inodes_free < _FEW_INODES
    return f"{found.free / 1e6:,.0f} MB{f' and {found.inodes_free} inodes' if few else ''} are free"


def mounts() -> dict[Path, str]:
    """The mount points, bind mounts too, and the type of the file system on each: the last one, which hides others."""
    return {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}


def is_network(kind: str) -> bool:
    """Whether other hosts, or the host of this virtual machine, may use a file system of this type at the same time.

    There flocks need not exclude, and caches may be stale. A type of FUSE that we do not know counts as one.
    """
    if kind == "fuse" or kind.startswith("fuse."):
        return kind.removeprefix("fuse.") not in _LOCAL_FUSE
    return kind in _NETWORK


def _kind(path: Path) -> str:
    """The type of the file system of `path`; "" where that is not known.

    By the mount point, not by device number: a btrfs subvolume and an overlay have other ones in stat(2).
    """
    real, kinds = Path(os.path.realpath(path)), mounts()
    return next((kinds[place] for place in (real, *real.parents) if place in kinds), "")


@dataclass
class _Tally:
    """What was seen so far.

    `linked`: inodes of which not every link was seen, so that they would free nothing: links seen, bytes. `besides`:
    inodes with one more link that goes with the tree.
    """

    shares: bool = False
    exact: bool = True
    besides: Collection[tuple[int, int]] = ()
    size: int = 0
    reclaimable: int = 0
    linked: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    def add(self, path: str, found: os.stat_result) -> None:
        """Add an inode by one of its names."""
        occupied = found.st_blocks * 512
        if stat.S_ISDIR(found.st_mode):
            self.size += occupied
            self.reclaimable += occupied
            return
        key = (found.st_dev, found.st_ino)
        seen = self.linked.pop(key, (0, 0))[0] + 1
        if seen < found.st_nlink - (key in self.besides):
            self.linked[key] = (seen, occupied)
            return
        self.size += occupied
        may_share = self.shares and occupied > 0 and stat.S_ISREG(found.st_mode)
        self.reclaimable += self._own_bytes(path, occupied) if may_share else occupied

    def note(self, error: OSError) -> None:
        """Note what could not be read."""
        self.exact &= isinstance(error, _VANISHED)

    def use(self) -> DiskUse:
        size = self.size + sum(occupied for _, occupied in self.linked.values())
        return DiskUse(size, self.reclaimable, self.exact)

    def _own_bytes(self, path: str, occupied: int) -> int:
        own = 0
        try:
            for _, _, length, flags in _extents(path):
                if flags & (_SHARED | _ENCODED):
                    # The other files with it may all be of this tree. Compressed, the length is the logical one.
                    self.exact = False
                elif not flags & _INLINE:
                    own += length
        except OSError as error:
            self.note(error)
        return min(own, occupied)


def _tally(top: Path, besides: Collection[tuple[int, int]], linked: dict[tuple[int, int], tuple[int, int]]) -> _Tally:
    kind = _kind(top) if os.path.lexists(top) else ""
    tally = _Tally(kind not in _NEVER_SHARES, kind != "overlay", besides, linked=linked)
    device = None
    for path, found in walk(top, tally.note):
        device = found.st_dev if device is None else device
        if found.st_dev == device or not stat.S_ISDIR(found.st_mode):
            tally.add(path, found)
    return tally


def _extents(path: str) -> Iterator[_Extent]:
    """Iterate over the extents of a file. Raises OSError, also where the file system does not tell."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        start = 0
        while found := _parse(_ask(descriptor, start)):
            yield from found
            place, _, length, flags = found[-1]
            if flags & _LAST:
                return
            start = place + length
    finally:
        os.close(descriptor)


def _ask(descriptor: int, start: int) -> bytes:
    answer = bytearray(_HEADER.size + _ROOM * _EXTENT.size)
    _HEADER.pack_into(answer, 0, start, 2**64 - 1 - start, 0, 0, _ROOM, 0)
    fcntl.ioctl(descriptor, _FS_IOC_FIEMAP, answer, True)
    return bytes(answer)


def _parse(answer: bytes) -> list[_Extent]:
    mapped = _HEADER.unpack_from(answer)[3]
    return list(_EXTENT.iter_unpack(answer[_HEADER.size : _HEADER.size + mapped * _EXTENT.size]))
