"""True bytes of real files, compared with what file systems say once the files are gone."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ray_envcache.system import disk

KIB = 1024
FICLONE = 0x40049409  # linux/fs.h


def write(path: Path, size: int = 64 * KIB) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(os.urandom(size))
        os.fsync(file.fileno())
    return path


def clone(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as read, target.open("wb") as written:
        fcntl.ioctl(written, FICLONE, read.fileno())
        os.fsync(written.fileno())


def run(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs `{command[0]}` to work here: {done.stderr.strip()[-200:]}")


RECORDED = bytes.fromhex(
    "0000000000000000 ffffffffffffffff 00000000 02000000 40000000 00000000"
    "0000000000000000 0000d00300000000 00f0010000000000" + 32 * "0" + "00200000" + 24 * "0"
    + "00f0010000000000 0000d20300000000 0010000000000000" + 32 * "0" + "01000000" + 24 * "0"
)  # fmt: skip

Mount = Callable[[str], Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """Mount a small new file system of a kind, or skip where that is impossible."""
    places: list[Path] = []

    def make(kind: str) -> Path:
        place = tmp_path / f"mounted {kind}"
        place.mkdir()
        if kind == "tmpfs":
            run("mount", "-t", kind, "-o", "size=32m", "none", place)
        else:
            image = tmp_path / f"{kind}.img"
            with image.open("wb") as file:
                file.truncate(512 * KIB * KIB)
            maker = shutil.which(f"mkfs.{kind}") or pytest.skip(f"needs mkfs.{kind}")
            run(maker, "-q", image)
            run("mount", "-o", "loop", image, place)
        places.append(place)
        return place

    yield make
    for place in reversed(places):
        subprocess.run(["umount", place], check=True)


@pytest.fixture(params=["btrfs", "xfs"])
def reflinking(request: pytest.FixtureRequest, mount: Mount) -> Path:
    return mount(request.param)


def settled(look: Callable[[], int]) -> int:
    """What `look` sees once it changes no more: xfs frees in the background."""
    last, quiet = look(), 0
    while quiet < 10:
        time.sleep(0.05)
        now = look()
        last, quiet = now, quiet + 1 if now == last else 0
    return last


def freed_by_removing(top: Path) -> int:
    def free() -> int:
        os.sync()
        found = os.statvfs(top.parent)
        return found.f_bfree * found.f_frsize

    before = settled(free)
    shutil.rmtree(top)
    return settled(free) - before


def test_plain_files_count_their_blocks(tmp_path: Path) -> None:
    """A tree of plain files occupies its blocks, directories included, and would free them all."""
    paths = [tmp_path, write(tmp_path / "a").parent, write(tmp_path / "b" / "c", 5), tmp_path / "a", tmp_path / "b"]
    size = sum(path.stat().st_blocks * 512 for path in {*paths})
    assert disk.measure(tmp_path) == disk.DiskUse(size, size, exact=True)


def test_holes_occupy_nothing(tmp_path: Path) -> None:
    """A sparse file counts what it occupies, not its length."""
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 30)
    assert disk.measure(tmp_path).size < 1 << 20


def test_links_inside_count_once(tmp_path: Path) -> None:
    """A file with all its links inside of the tree counts once, and would be freed."""
    first = write(tmp_path / "first")
    before = disk.measure(tmp_path)
    (tmp_path / "second").hardlink_to(first)
    assert disk.measure(tmp_path) == before


def test_a_link_outside_frees_nothing(tmp_path: Path) -> None:
    """A file that is hard-linked from outside, such as uv's cache, occupies space but frees none."""
    cached = write(tmp_path / "cache" / "x.so")
    (tmp_path / "entry").mkdir()
    empty = disk.measure(tmp_path / "entry").size
    (tmp_path / "entry" / "x.so").hardlink_to(cached)
    use = disk.measure(tmp_path / "entry")
    assert (use.size, use.reclaimable) == (empty + 64 * KIB, empty)
    cached.unlink()
    assert disk.measure(tmp_path / "entry").reclaimable == empty + 64 * KIB


def test_what_trees_free_one_after_the_other(tmp_path: Path) -> None:
    """A file that several trees link to is freed with the last of them, unless something else links to it."""
    shared, kept = write(tmp_path / "one" / "shared"), write(tmp_path / "kept", 8 * KIB)
    for name, source in (("two/shared", shared), ("one/kept", kept), ("two/kept", kept), ("two/again", shared)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).hardlink_to(source)
    one, two = tmp_path / "one", tmp_path / "two"
    folder = one.stat().st_blocks * 512
    assert disk.freed_in_turn([one, two]) == [(folder, True), (folder + 64 * KIB, True)]
    assert disk.freed_in_turn([two]) == [(folder, True)]
    found = kept.stat()
    ours = [(found.st_dev, found.st_ino)]
    assert disk.freed_in_turn([two, one], ours) == [(folder, True), (folder + 72 * KIB, True)]


def test_trees_that_go_one_after_the_other(tmp_path: Path) -> None:
    """A file that several trees link to becomes unoccupied with the last of them; together each inode counts once."""
    shared, pair = write(tmp_path / "one" / "shared"), write(tmp_path / "two" / "pair", 8 * KIB)
    for name, source in (("two/shared", shared), ("three/shared", shared), ("three/pair", pair), ("two/again", pair)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).hardlink_to(source)
    write(tmp_path / "two" / "own", 4 * KIB)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    folder = one.stat().st_blocks * 512
    assert disk.occupied_in_turn([one, two, three]) == [folder, folder + 4 * KIB, folder + 72 * KIB]
    assert disk.occupied_in_turn([three, one, two]) == [folder, folder, folder + 76 * KIB]
    assert disk.occupied_in_turn([tmp_path / "missing", one]) == [0, folder + 64 * KIB]


def test_symlinks_are_not_followed(tmp_path: Path) -> None:
    """What a symlink points to does not count, be it a file, a directory, a circle or nothing."""
    write(tmp_path / "outside" / "big", 1 << 20)
    (tmp_path / "tree").mkdir()
    for name, target in (("d", "../outside"), ("f", "../outside/big"), ("circle", "."), ("dangling", "nowhere")):
        (tmp_path / "tree" / name).symlink_to(target)
    assert disk.measure(tmp_path / "tree").size < 64 * KIB


def test_a_symlink_as_top_is_not_followed(tmp_path: Path) -> None:
    """A tree that is a symlink counts as the symlink."""
    write(tmp_path / "outside" / "big", 1 << 20)
    (tmp_path / "top").symlink_to("outside")
    assert disk.measure(tmp_path / "top").size < 64 * KIB


def test_a_missing_tree_is_empty(tmp_path: Path) -> None:
    """What is not there occupies nothing, which is exact."""
    assert disk.measure(tmp_path / "missing") == disk.DiskUse(0, 0, exact=True)


def test_a_file_is_a_tree_too(tmp_path: Path) -> None:
    """A single file can be measured."""
    assert disk.measure(write(tmp_path / "file")) == disk.DiskUse(64 * KIB, 64 * KIB, exact=True)


def test_a_tree_may_vanish_meanwhile(tmp_path: Path) -> None:
    """Somebody else's deletion under its hands breaks no measurement."""
    for n in range(40):
        (tmp_path / "tree" / str(n)).mkdir(parents=True)
        for m in range(50):
            (tmp_path / "tree" / str(n) / str(m)).touch()
    uses: list[disk.DiskUse] = []
    thread = threading.Thread(target=shutil.rmtree, args=(tmp_path / "tree",))
    thread.start()
    while thread.is_alive():
        uses.append(disk.measure(tmp_path / "tree"))
    thread.join()
    assert all(use.exact for use in uses)
    assert disk.measure(tmp_path / "tree").size == 0


def test_what_cannot_be_read_is_not_exact(tmp_path: Path) -> None:
    """A directory that refuses to be read makes the answer a lower bound."""
    write(tmp_path / "tree" / "closed" / "file")
    (tmp_path / "tree" / "closed").chmod(0)
    # Root may read everything: look as somebody else, who must be able to get here.
    code = """
import os, pathlib, sys
from ray_envcache.system import disk
os.chdir(sys.argv[1])
if os.geteuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)
print(disk.measure(pathlib.Path("tree")).exact)
"""
    root = Path(disk.__file__).parents[2]
    command = [sys.executable, "-c", code, os.fspath(tmp_path)]
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    finally:
        (tmp_path / "tree" / "closed").chmod(0o700)
    assert done.stdout == "False\n"


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Names may be any bytes."""
    write(Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n name")))
    assert disk.measure(tmp_path).size >= 64 * KIB


def test_other_file_systems_are_not_entered(mount: Mount) -> None:
    """What is mounted in a tree belongs to another file system, the mount point included."""
    place = mount("tmpfs")
    before = disk.measure(place.parent).size
    write(place / "file", 1 << 20)
    assert disk.measure(place.parent).size == before
    assert disk.measure(place).size == 1 << 20


@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_reclaimable_is_what_deletion_frees(mount: Mount, kind: str) -> None:
    """What is promised is what the file system has more after the deletion, hard links to outside or not."""
    place = mount(kind)
    cached = write(place / "cache" / "x.so", 3 << 20)
    for n in range(50):
        write(place / "entry" / str(n % 7) / str(n), 10_000 * n)
    (place / "entry" / "x.so").hardlink_to(cached)
    (place / "entry" / "twice").hardlink_to(place / "entry" / "1" / "1")
    use = disk.measure(place / "entry")
    assert use.exact
    assert use.reclaimable == freed_by_removing(place / "entry")
    assert use.size - use.reclaimable == 3 << 20


def test_reflinks_to_outside_free_nothing(reflinking: Path) -> None:
    """Extents that the cache shares are not freed with the entry, and an own file next to them is: at least that."""
    cached = write(reflinking / "cache", 8 << 20)
    clone(cached, reflinking / "entry" / "cloned")
    write(reflinking / "entry" / "own", 4 << 20)
    use = disk.measure(reflinking / "entry")
    assert not use.exact
    assert use.reclaimable == pytest.approx(4 << 20, abs=64 * KIB)
    assert use.size == pytest.approx(12 << 20, abs=64 * KIB)
    # Bytes of trees of their own, which the file system keeps for itself, come and go: a sixteenth of what we look for.
    assert freed_by_removing(reflinking / "entry") == pytest.approx(use.reclaimable, abs=256 * KIB)


def test_reflinks_are_freed_once_the_other_is_gone(reflinking: Path) -> None:
    """Without the cached file the same bytes are the entry's own."""
    cached = write(reflinking / "cache", 8 << 20)
    clone(cached, reflinking / "entry" / "cloned")
    cached.unlink()
    os.sync()
    found = settled(lambda: disk.measure(reflinking / "entry").reclaimable)
    assert found == pytest.approx(8 << 20, abs=64 * KIB)


def test_reflinks_within_are_a_lower_bound(reflinking: Path) -> None:
    """Where files of a tree share extents nobody tells whether others do too: at least nothing."""
    first = write(reflinking / "entry" / "first", 8 << 20)
    clone(first, reflinking / "entry" / "second")
    use = disk.measure(reflinking / "entry")
    assert not use.exact
    assert use.reclaimable < 64 * KIB


def test_many_extents_are_all_seen(reflinking: Path) -> None:
    """A file in more pieces than one answer of the kernel holds is measured to its end."""
    path = reflinking / "entry" / "pieces"
    path.parent.mkdir()
    with path.open("wb") as file:
        for n in range(200):
            file.seek(n * 64 * KIB)
            file.write(os.urandom(16 * KIB))
        os.fsync(file.fileno())
    assert len(list(disk._extents(os.fspath(path)))) > disk._ROOM
    use = disk.measure(path.parent)
    # xfs allocates ahead of who writes: what it has is told by the blocks, not by what was written.
    assert use.reclaimable == pytest.approx(path.stat().st_blocks * 512, abs=64 * KIB)


def test_a_recorded_answer_is_understood() -> None:
    """The answer btrfs gave for a clone of which the last 4 KiB were then overwritten."""
    assert disk._parse(RECORDED) == [
        (0, 63_963_136, 126_976, disk._SHARED),
        (126_976, 64_094_208, 4096, disk._LAST),
    ]


def test_where_nobody_tells_it_is_a_lower_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system that may share extents but does not tell, such as ZFS, files promise nothing."""
    write(tmp_path / "file")
    directory = tmp_path.stat().st_blocks * 512

    def refuse(*_: object) -> bytes:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(disk, "_kind", lambda _: "zfs")
    monkeypatch.setattr(disk, "_ask", refuse)
    assert disk.measure(tmp_path) == disk.DiskUse(directory + 64 * KIB, directory, exact=False)


def test_compressed_extents_are_a_lower_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a compressed extent only the logical length is told, which promises too much."""
    write(tmp_path / "file")
    monkeypatch.setattr(disk, "_kind", lambda _: "btrfs")
    monkeypatch.setattr(disk, "_extents", lambda _: iter([(0, 4096, 64 * KIB, disk._ENCODED | disk._LAST)]))
    use = disk.measure(tmp_path / "file")
    assert (use.reclaimable, use.exact) == (0, False)


def test_overlays_are_never_exact(mount: Mount) -> None:
    """On overlayfs, where containers live, nobody tells whether a file came with the image."""
    place = mount("tmpfs")
    for name in ("lower", "upper", "work", "merged"):
        (place / name).mkdir()
    write(place / "lower" / "dir" / "file")
    options = ",".join(f"{name}dir={place / name}" for name in ("lower", "upper", "work"))
    run("mount", "-t", "overlay", "overlay", "-o", options, place / "merged")
    try:
        use = disk.measure(place / "merged" / "dir")
        kind = disk.free_space(place / "merged").kind
    finally:
        subprocess.run(["umount", place / "merged"], check=True)
    assert (use.size, use.exact, kind) == (64 * KIB, False, "overlay")


def test_free_space_is_that_of_statvfs(mount: Mount) -> None:
    """Bytes and inodes are those of this user, and the type has its name, also below a path with a space."""
    place = mount("tmpfs")
    found = disk.free_space(place)
    assert (found.total, found.free, found.kind) == (32 << 20, 32 << 20, "tmpfs")
    write(place / "file", 1 << 20)
    after = disk.free_space(place / "file")
    assert found.free - after.free == 1 << 20
    assert (found.inodes_free or 0) - (after.inodes_free or 0) == 1


def test_no_inode_table_is_not_a_full_one(mount: Mount) -> None:
    """A file system without a fixed number of inodes does not look full."""
    found = disk.free_space(mount("btrfs"))
    assert (found.inodes_free, found.kind) == (None, "btrfs")


def test_the_mount_on_top_counts(mount: Mount, tmp_path: Path) -> None:
    """Of mounts that hide each other, and through bind mounts and symlinks, the type is that of the visible one."""
    hidden = mount("ext4")
    run("mount", "-t", "tmpfs", "none", hidden)
    try:
        (tmp_path / "link").symlink_to(hidden)
        assert disk.free_space(tmp_path / "link").kind == "tmpfs"
    finally:
        subprocess.run(["umount", hidden], check=True)
    (tmp_path / "bound").mkdir()
    run("mount", "--bind", hidden, tmp_path / "bound")
    try:
        assert disk.free_space(tmp_path / "bound").kind == "ext4"
    finally:
        subprocess.run(["umount", tmp_path / "bound"], check=True)


def test_free_space_of_a_missing_path_is_an_error(tmp_path: Path) -> None:
    """There is no file system to ask about where there is no path."""
    with pytest.raises(FileNotFoundError):
        disk.free_space(tmp_path / "missing")


NETWORK = """
nfs nfs4 cifs smb3 9p ceph lustre fuse.sshfs fuse.glusterfs virtiofs fuse.ceph-fuse fuse.goofys fuse.blobfuse2
fuse.mountpoint-s3 fuse.dfuse fuse.hdfs fuse.cvmfs2 fuse.grpcfuse grpcfuse osxfs fuse.osxfs fakeowner drvfs fuse
fuse.brand-new macfuse smbfs webdav
"""


@pytest.mark.parametrize("kind", NETWORK.split())
def test_file_systems_that_other_machines_may_use(kind: str) -> None:
    """Those of networks, those that a virtual machine has from its host, and all of FUSE that we do not know."""
    assert disk.is_network(kind)


LOCAL = "ext4 xfs btrfs tmpfs overlay zfs apfs hfs fuseblk fuse.fuse-overlayfs fuse.ntfs-3g fuse.mergerfs"


@pytest.mark.parametrize("kind", ["", *LOCAL.split()])
def test_local_file_systems(kind: str) -> None:
    """Local file systems, those of FUSE among them, are not refused; nor is one of which the system says nothing."""
    assert not disk.is_network(kind)


def test_kind_by_the_mount_point(mount: Mount) -> None:
    """The mount point above a path says which file system it is on, links resolved."""
    place = mount("tmpfs")
    (place / "folder").mkdir()
    link = place.parent / "link"
    link.symlink_to(place / "folder")
    assert disk.free_space(link).kind == "tmpfs"
    assert disk.free_space(Path("/proc/self")).kind == "proc"
