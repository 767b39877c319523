"""Short links to long temp directories, and what removes them."""

from __future__ import annotations

import os
import pickle
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray_envcache
from ray_envcache.errors import TempDirError
from ray_envcache.sessions import short_path
from ray_envcache.system import disk
from tests import support

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
def place() -> Iterator[Path]:
    """A short private place for links."""
    with tempfile.TemporaryDirectory(prefix="p", dir="/tmp") as folder:
        yield Path(folder)


def links(place: Path) -> list[Path]:
    return sorted(place.glob("re-*"))


def hold_in_a_child(target: Path, place: Path, *, then: str = "sys.stdin.read()") -> subprocess.Popen[str]:
    """A process that has a link, and prints it."""
    code = f"""
import sys
from pathlib import Path
from ray_envcache.sessions import short_path
link = short_path.make_link(sys.argv[1], [Path(sys.argv[2])])
print(link, flush=True)
{then}
"""
    command: list[str | Path] = [sys.executable, "-c", code, target, place]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def first_line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def test_a_long_path_gets_a_short_private_link(long: Path) -> None:
    """Every socket fits, with and without the "ray" of RAY_TMPDIR; what is written there is in the directory."""
    with ray_envcache.short_tmpdir(long) as short:
        for temp in (short, f"{short}/ray"):
            assert len(os.fsencode(temp + LONGEST)) <= 107
        assert isinstance(short, str)
        assert os.path.samefile(short, long)
        (Path(short) / "file").write_text("x")
        private = Path(short).parent
        assert (stat.S_IMODE(private.stat().st_mode), private.stat().st_uid) == (0o700, os.geteuid())
    assert not private.exists()
    assert (long / "file").read_text() == "x"


def test_the_longest_socket_of_ray_can_be_bound(long: Path) -> None:
    """The limit is the kernel's: a socket with the longest name is bound through the link, and cannot be otherwise."""
    with ray_envcache.short_tmpdir(long) as short, socket.socket(socket.AF_UNIX) as listener:
        path = f"{short}/ray{LONGEST}"
        os.makedirs(os.path.dirname(path))
        listener.bind(path)
        with pytest.raises(OSError, match="too long"):
            listener.bind(f"{long}/ray{LONGEST}")


def test_a_short_path_is_returned_itself() -> None:
    """What is short enough is used as it is, up to the last byte, and made absolute."""
    with support.short_folder() as folder:
        exact = folder / ("x" * (short_path.MAX_BYTES - len(str(folder)) - 1))
        longer = exact.with_name(f"{exact.name}x")
        for path in (exact, longer):
            path.mkdir()
        short = ray_envcache.short_tmpdir(exact)
        assert (short, short.fileno(), short.release()) == (str(exact), None, True)
        assert len(f"{exact}/ray{LONGEST}") == short_path.SOCKET_BYTES
        with ray_envcache.short_tmpdir(longer) as linked:
            assert linked != str(longer)
        # A short link of the user's own will do.
        (folder / "own").symlink_to(longer)
        assert ray_envcache.short_tmpdir(folder / "own") == str(folder / "own")


def test_each_call_has_a_link_of_its_own(long: Path) -> None:
    """A release removes the link of its own call only; a second one does nothing."""
    first, second = ray_envcache.short_tmpdir(long), ray_envcache.short_tmpdir(long)
    assert first != second
    assert first.release()
    assert first.release()
    assert os.path.samefile(second, long)
    assert second.release()
    assert not os.path.lexists(second)


def test_in_another_process_it_is_a_plain_string(long: Path) -> None:
    """A copy that travels with a task neither keeps nor removes the link."""
    with ray_envcache.short_tmpdir(long) as short:
        copy = pickle.loads(pickle.dumps(short))
        assert (type(copy), copy) == (str, str(short))


def test_a_link_stays_while_a_process_names_it(long: Path, place: Path, children: list[subprocess.Popen[str]]) -> None:
    """A cluster that outlives its driver keeps the link; when it is dead, the next one sweeps it."""
    short = short_path.make_link(str(long), [place])
    cluster = support.start_python(children, "", f"--temp-dir={short}/ray")
    assert not short.release(patience=0.2)
    assert os.path.samefile(short, long)
    end(cluster)
    assert short.release()
    assert links(place) == []


def test_links_of_the_dead_are_swept(long: Path, place: Path) -> None:
    """The link of a killed process goes with the next call; that of a living one stays."""
    dead, alive = hold_in_a_child(long, place), hold_in_a_child(long, place)
    first_line(dead)
    kept = Path(first_line(alive))
    os.kill(dead.pid, signal.SIGKILL)
    dead.communicate()
    assert len(links(place)) == 2
    short_path.sweep_links([place])
    assert links(place) == [kept.parent]
    alive.communicate()  # ends by itself
    assert (alive.returncode, links(place)) == (0, [])


def test_a_cluster_keeps_the_link_of_its_dead_driver(
    long: Path, place: Path, children: list[subprocess.Popen[str]]
) -> None:
    """No sweep takes a link that a living process names, even if another process made it."""
    driver = hold_in_a_child(long, place)
    short = first_line(driver)
    cluster = support.start_python(children, "", f"--temp-dir={short}")
    end(driver)
    short_path.sweep_links([place])
    assert os.path.samefile(short, long)
    end(cluster)
    short_path.sweep_links([place])
    assert links(place) == []


def test_a_child_process_does_not_release(long: Path, place: Path) -> None:
    """A forked child that ends by way of atexit leaves the link to its parent."""
    fork = (
        "import os\nif os.fork() == 0: sys.exit()\nos.wait(); print(os.path.exists(link), flush=True); sys.stdin.read()"
    )
    child = hold_in_a_child(long, place, then=fork)
    first_line(child)
    assert first_line(child) == "True"
    child.communicate()
    assert links(place) == []


def test_a_program_that_takes_our_place_keeps_the_link(long: Path, place: Path) -> None:
    """With its descriptor inherited a link survives exec, and is swept after that program's end."""
    then = (
        "import os\nos.set_inheritable(link.fileno(), True)\n"
        "os.execv(sys.executable, ['python', '-c', 'print(1, flush=True); input()'])"
    )
    child = hold_in_a_child(long, place, then=then)
    short = first_line(child)
    assert first_line(child) == "1"
    short_path.sweep_links([place])
    assert os.path.samefile(short, long)
    end(child)
    short_path.sweep_links([place])
    assert links(place) == []


def test_foreign_things_are_not_swept(long: Path, place: Path) -> None:
    """Only a private directory of ours with nothing but the link in it is swept."""
    (place / "re-aaaaaaaa").mkdir()
    (place / "re-aaaaaaaa").chmod(0o755)
    (place / "re-bbbbbbbb").mkdir(mode=0o700)
    (place / "re-bbbbbbbb" / "thesis").touch()
    (place / "re-bbbbbbbb" / "t").symlink_to("thesis")
    (place / "re-cccccccc").symlink_to(long)
    (place / "re-dddddddd").touch()
    (place / "re-training").mkdir(mode=0o700)
    (place / "re-training" / "t").write_text("hours of work")
    (place / "re-eeeeeeee").mkdir(mode=0o700)  # its process died before the link was made
    short_path.sweep_links([place])
    assert [path.name[3] for path in links(place)] == ["a", "b", "c", "d", "t"]
    assert (place / "re-training" / "t").read_text() == "hours of work"
    assert (place / "re-bbbbbbbb" / "t").exists()


def test_rays_link_through_ours_goes(long: Path) -> None:
    """Ray's link to the latest session leads through ours; it goes with that, or before the next cluster."""
    session = long / "ray" / "session_2026-01-02_03-04-05_123456_77"
    session.mkdir(parents=True)
    latest = session.with_name("session_latest")
    with ray_envcache.short_tmpdir(long) as short:
        latest.symlink_to(f"{short}/ray/{session.name}")
    assert not latest.is_symlink()
    latest.symlink_to("/tmp/re-deadbeef/t/ray/session_2026-01-02_03-04-05_000000_66")
    with ray_envcache.short_tmpdir(long):
        assert not latest.is_symlink()


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
        os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            short_path.short_tmpdir(sys.argv[1])
        except errors.TempDirError as error:
            print(error)
        """
        said = support.run_python(code, str(folder))
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


def test_network_file_system(long: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temp directory that other hosts have too is refused, unless the user answers for it."""
    real = disk.free_space
    monkeypatch.setattr(disk, "free_space", lambda path: real(path)._replace(kind="nfs4"))
    with pytest.raises(TempDirError, match=r"on a network file system \(nfs4\)"):
        ray_envcache.short_tmpdir(long)
    monkeypatch.setenv("RAY_ENVCACHE_ALLOW_NETWORK_FS", "1")
    assert ray_envcache.short_tmpdir(long).release()


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
    os.chown(place, 65534, 65534)
    with pytest.raises(TempDirError, match="it belongs to user 65534"):
        short_path.make_link(str(long), [place])
    os.chown(place, 0, 0)
    with short_path.make_link(str(long), [Path("/nowhere"), place]) as short:
        assert Path(short).parent.parent == place


def test_racing_with_sweeps(long: Path, place: Path) -> None:
    """A link stays with the process that made it, although others sweep all the time."""
    sweeper = "import sys\nfrom pathlib import Path\nfrom ray_envcache.sessions import short_path\nwhile True: short_path.sweep_links([Path(sys.argv[1])])"
    with subprocess.Popen([sys.executable, "-c", sweeper, place]) as child:
        for _ in range(100):
            short = short_path.make_link(str(long), [place])
            assert os.path.samefile(short, long)
            assert short.release()
        child.kill()
    short_path.sweep_links([place])
    assert links(place) == []
