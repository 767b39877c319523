"""Flocks: real processes exclude each other, and the kernel frees what the dead held."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from threading import Timer

import pytest

from ray_envcache.system import flock
from tests import support

Start = Callable[..., subprocess.Popen[str]]

HOLD = """
import sys, time
from pathlib import Path
from ray_envcache.system import flock
held = flock.try_flock(Path(sys.argv[1]), exclusive=sys.argv[2] == "exclusive")
print("held" if held is not None else "in the way", flush=True)
time.sleep(600)
"""


@pytest.fixture
def start(children: list[subprocess.Popen[str]]) -> Start:
    """Start a Python program, and wait for the first line it prints."""

    def start(code: str, *arguments: str | Path, says: str = "held") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        children.append(child)
        assert child.stdout is not None
        assert child.stdout.readline().strip() == says
        return child

    return start


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "flock"
    path.touch()
    return path


def can_take(path: Path, *, exclusive: bool) -> bool:
    descriptor = flock.try_flock(path, exclusive=exclusive)
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is not None


@pytest.mark.parametrize(
    ("held", "wanted", "possible"),
    [
        ("shared", "shared", True),
        ("shared", "exclusive", False),
        ("exclusive", "shared", False),
        ("exclusive", "exclusive", False),
    ],
)
def test_exclusion(path: Path, start: Start, held: str, wanted: str, possible: bool) -> None:  # noqa: FBT001
    """Only shared flocks go together, and a process that is killed holds none."""
    holder = start(HOLD, path, held)
    assert can_take(path, exclusive=wanted == "exclusive") is possible
    holder.kill()
    holder.wait()
    assert can_take(path, exclusive=True)


def test_try_never_waits(path: Path, start: Start) -> None:
    """A thousand vain tries end, and leave no descriptor open."""
    start(HOLD, path, "exclusive")
    before = len(os.listdir("/dev/fd"))
    assert not any(can_take(path, exclusive=number % 2 == 0) for number in range(1000))
    assert len(os.listdir("/dev/fd")) == before


def test_same_process_excludes_itself(path: Path) -> None:
    """Two descriptors of one process exclude each other, and closing one does not free the other's flock."""
    mine = flock.try_flock(path, exclusive=True)
    assert mine is not None
    assert not can_take(path, exclusive=False)
    path.open().close()
    assert flock.is_held(path)
    os.close(mine)
    assert not flock.is_held(path)


def check_held_by_child(path: Path, parent: subprocess.Popen[str]) -> None:
    """The flock outlives the parent, who prints the pid of its child, and ends with the child."""
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert flock.is_held(path)
    os.kill(child, signal.SIGKILL)
    support.wait_until(lambda: not flock.is_held(path), "the flock is free")


def test_fork_keeps(path: Path, start: Start) -> None:
    """A forked child keeps the flock when its parent is killed, and frees it by its own end."""
    parent = start(
        """
        import os, sys, time
        from pathlib import Path
        from ray_envcache.system import flock
        held = flock.try_flock(Path(sys.argv[1]), exclusive=True)
        child = os.fork()
        if child:
            print("held", flush=True)
            print(child, flush=True)
        time.sleep(600)
        """,
        path,
    )
    check_held_by_child(path, parent)


def test_exec_drops(path: Path, start: Start) -> None:
    """A program started by the holder does not inherit the flock by accident."""
    holder = start(
        """
        import subprocess, sys
        from pathlib import Path
        from ray_envcache.system import flock
        held = flock.try_flock(Path(sys.argv[1]), exclusive=True)
        child = subprocess.Popen(["sleep", "600"], close_fds=False)
        print("held", flush=True)
        print(child.pid, flush=True)
        child.wait()
        """,
        path,
    )
    assert holder.stdout is not None
    sleeper = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    try:
        assert not flock.is_held(path)
    finally:
        os.kill(sleeper, signal.SIGKILL)


def test_is_held(path: Path, start: Start) -> None:
    """`is_held` sees an exclusive flock; a shared one, or no file, is nobody's."""
    assert not flock.is_held(path)
    assert not flock.is_held(path.with_name("missing"))
    shared = flock.try_flock(path, exclusive=False)
    assert shared is not None
    assert not flock.is_held(path)
    os.close(shared)
    start(HOLD, path, "exclusive")
    assert flock.is_held(path)


def test_missing_file(path: Path) -> None:
    """A missing file is an error, or made private where that is asked for."""
    missing = path.with_name("missing")
    with pytest.raises(FileNotFoundError):
        flock.try_flock(missing, exclusive=True)
    descriptor = flock.try_flock(missing, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    assert descriptor is not None
    assert missing.stat().st_mode & 0o077 == 0
    os.close(descriptor)


def test_link_is_refused(path: Path) -> None:
    """A link in place of a flock's file is refused, not followed."""
    link = path.with_name("link")
    link.symlink_to(path)
    with pytest.raises(OSError, match="link"):
        flock.try_flock(link, exclusive=False)


def test_failed_flock_leaks_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trouble of the file system is passed on, and no descriptor stays open."""

    def failing(*_: object) -> None:
        raise OSError(37, "No locks available")

    before = len(os.listdir("/dev/fd"))
    monkeypatch.setattr(fcntl, "flock", failing)
    with pytest.raises(OSError, match="No locks"):
        flock.try_flock(path, exclusive=False)
    assert len(os.listdir("/dev/fd")) == before


def test_still_names(path: Path) -> None:
    """A path names the file behind a descriptor until it is removed, replaced or moved away."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert flock.still_names(path, descriptor)
        path.rename(path.with_name("moved"))
        assert not flock.still_names(path, descriptor)
        path.touch()
        assert not flock.still_names(path, descriptor)
        path.unlink()
        path.symlink_to("moved")
        assert not flock.still_names(path, descriptor)
        path.with_name("moved").replace(path)
        assert flock.still_names(path, descriptor)
        path.unlink()
        assert not flock.still_names(path, descriptor)
    finally:
        os.close(descriptor)


def _no_waiting() -> None:
    raise AssertionError("nobody holds it")


def test_exclusive(path: Path) -> None:
    """While it is held nobody else gets it; afterwards it is free, and its file stays."""
    with flock.exclusive_flock(path, _no_waiting) as descriptor:
        assert flock.still_names(path, descriptor)
        assert flock.is_held(path)
    assert path.exists()
    assert not flock.is_held(path)


def test_exclusive_is_freed_by_an_error(path: Path) -> None:
    """An error inside frees it, and comes out as it was."""
    with pytest.raises(KeyboardInterrupt), flock.exclusive_flock(path, _no_waiting):
        raise KeyboardInterrupt
    assert not flock.is_held(path)


def test_exclusive_waits(path: Path, start: Start) -> None:
    """It tells that it waits, and gets the flock when its holder is killed."""
    holder = start(HOLD, path, "exclusive")
    waited = []

    def on_wait() -> None:
        waited.append(time.monotonic())
        holder.kill()
        holder.wait()

    with flock.exclusive_flock(path, on_wait):
        assert flock.is_held(path)
    assert waited


def test_exclusive_gives_up(path: Path, start: Start) -> None:
    """What `on_wait` raises ends the waiting, leaves the holder alone and no descriptor open."""
    start(HOLD, path, "exclusive")
    before = len(os.listdir("/dev/fd"))

    def on_wait() -> None:
        raise TimeoutError("enough")

    with pytest.raises(TimeoutError, match="enough"), flock.exclusive_flock(path, on_wait):
        pytest.fail("it is held elsewhere")
    assert flock.is_held(path)
    assert len(os.listdir("/dev/fd")) == before


def test_tried(path: Path) -> None:
    """It is held inside, and free again behind."""
    with flock.tried_flock(path) as descriptor:
        assert descriptor is not None
        assert flock.is_held(path)
    assert flock.is_free(path)


@pytest.mark.parametrize("seconds", [0, 0.3])
def test_tried_in_vain(path: Path, start: Start, seconds: float) -> None:
    """Where another process holds it, it waits as long as it may, no longer, and says so by None."""
    start(HOLD, path, "shared")
    began = time.monotonic()
    with flock.tried_flock(path, seconds=seconds) as descriptor:
        assert descriptor is None
    assert seconds <= time.monotonic() - began < seconds + 5


def test_tried_until_it_is_free(path: Path, start: Start) -> None:
    """A flock that is freed within the time is had."""
    holder = start(HOLD, path, "exclusive")
    Timer(0.2, holder.kill).start()
    with flock.tried_flock(path, seconds=60) as descriptor:
        assert descriptor is not None


def test_children_keep_it(path: Path, start: Start) -> None:
    """A child that was given the descriptor holds the flock on when its parent is killed, until it ends itself."""
    parent = start(
        """
        import os, sys
        from pathlib import Path
        from ray_envcache.system import children, flock
        with flock.exclusive_flock(Path(sys.argv[1]), print) as flock:
            children.run(["sh", "-c", 'echo held $$ >&2; exec sleep 600'], environ=os.environ, pass_fds=[flock],
                         on_line=lambda line: print(*line.split(), sep="\\n", flush=True))
        """,
        path,
    )
    check_held_by_child(path, parent)


def test_stress(path: Path, tmp_path: Path) -> None:
    """Processes that count under the flock lose no count, and never meet inside."""
    counter, inside = tmp_path / "counter", tmp_path / "inside"
    counter.write_text("0")
    code = """
        import sys
        from pathlib import Path
        from ray_envcache.system import flock
        path, counter, inside = map(Path, sys.argv[1:])
        for _ in range(30):
            with flock.exclusive_flock(path, lambda: None):
                inside.touch(exist_ok=False)
                counter.write_text(str(int(counter.read_text()) + 1))
                inside.unlink()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, (path, counter, inside))]
    started = [subprocess.Popen(command) for _ in range(4)]
    assert [child.wait() for child in started] == [0] * 4
    assert counter.read_text() == "120"
