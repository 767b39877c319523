"""Short links to long temp directories: where they are, what they lead to, and which go."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray_envcache
from ray_envcache.errors import TempDirError
from ray_envcache.sessions import short_path
from ray_envcache.system import disk
from tests import support
from tests.sessions.made import BECOME_NOBODY, NOBODY

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
# The longest that Ray appends, by its own rules: ray._private.node and ray.dashboard.subprocesses.utils.
LONGEST = "/session_2026-01-02_03-04-05_123456_4194304/sockets/dash_TaskEventsHead"


@pytest.fixture
def long(tmp_path: Path) -> Path:
    """A directory whose path has more than 200 bytes, some of them not ASCII."""
    path = tmp_path / ("scratch space é " * 12)
    path.mkdir()
    assert len(os.fsencode(path)) > 200
    return path


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A short private place, where all links of this test are."""
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as folder:
        monkeypatch.setattr(short_path, "link_places", lambda: [Path(folder)])
        yield Path(folder)


def folder_in(place: Path) -> Path:
    return place / f"re-{os.geteuid()}"


def test_a_long_path_gets_a_short_private_link(long: Path, place: Path) -> None:
    """Every socket fits, with and without the "ray" of RAY_TMPDIR; what is written there is in the directory."""
    short = ray_envcache.short_tmpdir(long)
    for temp in (short, f"{short}/ray"):
        assert len(os.fsencode(temp + LONGEST)) <= 107
    assert type(short) is str
    assert os.readlink(short) == str(long)
    (Path(short) / "file").write_text("x")
    assert (long / "file").read_text() == "x"
    private = folder_in(place)
    assert Path(short).parent == private
    assert (stat.S_IMODE(private.stat().st_mode), private.stat().st_uid) == (0o700, os.geteuid())


def test_the_places_have_room_for_a_link() -> None:
    """The link of a user with a number of four digits is short enough in each of them."""
    for place in short_path.link_places():
        named = str(place).replace(f"/{os.geteuid()}", "/1000")
        assert len(f"{named}/re-1000/01234567") <= 107 - len(f"/ray{LONGEST}")


def test_the_longest_socket_of_ray_can_be_bound(long: Path, place: Path) -> None:
    """The limit is the kernel's: a socket with the longest name is bound through the link, and cannot be otherwise."""
    short = ray_envcache.short_tmpdir(long)
    with socket.socket(socket.AF_UNIX) as listener:
        path = f"{short}/ray{LONGEST}"
        os.makedirs(os.path.dirname(path))
        listener.bind(path)
        with pytest.raises(OSError, match="too long"):
            listener.bind(f"{long}/ray{LONGEST}")


def test_a_short_path_is_returned_itself(place: Path) -> None:
    """What is short enough is used as it is, up to the last byte, and made absolute."""
    with support.short_folder() as folder:
        exact = folder / ("x" * (short_path.MAX_BYTES - len(str(folder)) - 1))
        longer = exact.with_name(f"{exact.name}x")
        for path in (exact, longer):
            path.mkdir()
        assert ray_envcache.short_tmpdir(exact) == str(exact)
        assert len(f"{exact}/ray{LONGEST}") == short_path.SOCKET_BYTES
        assert ray_envcache.short_tmpdir(longer) != str(longer)
        # A short link of the user's own will do.
        (folder / "own").symlink_to(longer)
        assert ray_envcache.short_tmpdir(folder / "own") == str(folder / "own")


def test_one_directory_has_one_link(long: Path, place: Path) -> None:
    """However it is called; another directory has another link."""
    (other := long / "other").mkdir()
    (long.parent / "link").symlink_to(long)
    short = ray_envcache.short_tmpdir(long)
    assert ray_envcache.short_tmpdir(f"{long}/.") == ray_envcache.short_tmpdir(long.parent / "link") == short
    assert ray_envcache.short_tmpdir(other) != short
    assert len(list(folder_in(place).iterdir())) == 2


def test_made_by_many_at_once(long: Path, place: Path) -> None:
    """All processes that ask at the same time get the link."""
    code = """
import sys
from pathlib import Path
from ray_envcache.sessions import short_path
input()
for number in range(200):
    print(short_path.make_link(f"{sys.argv[1]}/{number}", [Path(sys.argv[2])]))
"""
    command: list[str | Path] = [sys.executable, "-c", code, long, place]
    children = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for child in children:
        assert child.stdin is not None
        print(file=child.stdin, flush=True)
    said = [child.communicate()[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0, 0]
    assert said[0] == said[1] == said[2]
    assert [os.readlink(link) for link in said[0]] == [f"{long}/{number}" for number in range(200)]


def test_a_link_to_another_directory_is_not_taken(long: Path, place: Path) -> None:
    """Where another directory has the name, the next place is taken, and without one it is an error."""
    (wrong := Path(ray_envcache.short_tmpdir(long))).unlink()
    wrong.symlink_to("/etc")
    with pytest.raises(TempDirError, match=f"{wrong.parent.name}/{wrong.name} in it leads to /etc"):
        ray_envcache.short_tmpdir(long)
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as next_place:
        short = short_path.make_link(str(long), [place, Path(next_place)])
        assert os.readlink(short) == str(long)
        assert Path(short).parent == folder_in(Path(next_place))
    wrong.unlink()
    wrong.mkdir()
    with pytest.raises(TempDirError, match="Invalid argument"):
        ray_envcache.short_tmpdir(long)


def test_links_that_lead_nowhere_go(long: Path, place: Path) -> None:
    """A week after their last use. What leads to a directory, and what is no link, stays for as long as it likes."""
    week_ago = time.time() - short_path.UNUSED_SECONDS - 60
    targets = [long / name for name in ("gone", "gone lately", "there")]
    for target in targets:
        target.mkdir()
    links = [Path(ray_envcache.short_tmpdir(target)) for target in targets]
    for target in targets[:2]:
        target.rmdir()
    (thesis := folder_in(place) / "thesis").touch()
    for path in (links[0], links[2], thesis):
        os.utime(path, (week_ago, time.time()), follow_symlinks=False)
    last = Path(ray_envcache.short_tmpdir(long))
    assert {*folder_in(place).iterdir()} == {links[1], links[2], thesis, last}


# Bad input


def test_missing_and_no_directory(tmp_path: Path) -> None:
    """A temp directory that is not there, or a file, is an error that says what to do."""
    with pytest.raises(TempDirError, match="No such file or directory\nhint: mkdir -p '"):
        ray_envcache.short_tmpdir(tmp_path / "missing")
    (tmp_path / "file").touch()
    with pytest.raises(TempDirError, match="Not a directory\nhint: name a directory"):
        ray_envcache.short_tmpdir(tmp_path / "file")
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(TempDirError, match="No such file"):
        ray_envcache.short_tmpdir(tmp_path / "link")
    assert TempDirError.exit_code == 2


@needs_root
def test_unwritable(tmp_path: Path) -> None:
    """A temp directory where the user may not write is refused, long or short."""
    with support.short_folder() as folder:
        folder.chmod(0o755)
        code = """
        import os, random, sys, tempfile
        from ray_envcache import errors
        from ray_envcache.sessions import directories, short_path
        from ray_envcache.system import processes
        BECOME_NOBODY
        try:
            short_path.short_tmpdir(sys.argv[1])
        except errors.TempDirError as error:
            print(error)
        """
        said = support.run_python(code.replace("BECOME_NOBODY", BECOME_NOBODY), str(folder))
    assert said == (
        f"Cannot use the temp directory `{folder}`: Permission denied\nhint: choose a directory you may write to\n"
    )


@needs_root
@pytest.mark.parametrize("ballast", [1, 4 << 20])
def test_full_disk(tmp_path: Path, ballast: int) -> None:
    """A disk without room for a cluster's logs is refused, with what is free; the directory stays empty."""
    small = tmp_path / "disk"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", small], capture_output=True, check=False)
    if mount.returncode != 0:
        pytest.skip("may not mount")
    try:
        (small / "ballast").write_bytes(b"x" * ballast)
        with pytest.raises(TempDirError, match=r"is full: (4 MB are free|No space left).*\nhint: `ray-envcache gc"):
            ray_envcache.short_tmpdir(small)
        assert [path.name for path in small.iterdir()] == ["ballast"]
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_network_file_system(long: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temp directory that other hosts have too is refused, unless the user answers for it."""
    real = disk.free_space
    monkeypatch.setattr(disk, "free_space", lambda path: real(path)._replace(kind="nfs4"))
    with pytest.raises(TempDirError, match=r"on a network file system \(nfs4\)"):
        ray_envcache.short_tmpdir(long)
    monkeypatch.setenv("RAY_ENVCACHE_ALLOW_NETWORK_FS", "1")
    assert os.path.samefile(ray_envcache.short_tmpdir(long), long)


def test_no_place_for_a_link(long: Path, tmp_path: Path) -> None:
    """Without a short, safe and writable place the error names all that were tried, and why not."""
    with support.short_folder() as unsafe:
        unsafe.chmod(0o777)
        places = [tmp_path, Path("/nowhere"), unsafe, Path("/proc")]
        with pytest.raises(TempDirError) as caught:
            short_path.make_link(str(long), places)
        assert list(unsafe.iterdir()) == []
    message = caught.value.message
    for part in (f"{tmp_path} (too long)", "/nowhere (No such", f"{unsafe} (others may rename", "/proc ("):
        assert part in message
    assert caught.value.hint


@needs_root
def test_a_place_of_another_user_is_refused(long: Path, place: Path) -> None:
    """The owner of a place could replace the link, so that must be root or the user."""
    os.chown(place, NOBODY, NOBODY)
    with pytest.raises(TempDirError, match=f"it belongs to user {NOBODY}"):
        short_path.make_link(str(long), [place])
    os.chown(place, 0, 0)
    short = short_path.make_link(str(long), [Path("/nowhere"), place])
    assert Path(short).parent == folder_in(place)


@pytest.mark.parametrize("theirs", ["foreign", "open", "link", "file"])
def test_a_folder_that_is_not_ours_alone_is_passed_over(long: Path, place: Path, theirs: str) -> None:
    """What another user made under the name of our folder only leads to the next place."""
    folder = folder_in(place)
    if theirs == "link":
        folder.symlink_to(long)
    elif theirs == "file":
        folder.touch()
    else:
        folder.mkdir(mode=0o700)
        if theirs == "open":
            folder.chmod(0o770)
        elif os.geteuid() != 0:
            pytest.skip("needs root")
        else:
            os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(TempDirError, match=f"{place} \\("):
        short_path.make_link(str(long), [place])
    assert list(long.iterdir()) == []
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as next_place:
        assert os.readlink(short_path.make_link(str(long), [place, Path(next_place)])) == str(long)
