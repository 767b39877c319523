"""Which files processes name, asked about real child processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from ray_envcache.system import processes

pytestmark = pytest.mark.skipif(not Path("/proc/self/fdinfo").is_dir(), reason="needs /proc as Linux has it")

Child = subprocess.Popen[str]
Spawn = Callable[..., Child]

FLOCK = """
import fcntl
file = open(sys.argv[1])
fcntl.flock(file, getattr(fcntl, sys.argv[2]))
"""


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Start Python code in a child that then says what it has to say, and waits; all are killed and reaped."""
    children: list[Child] = []

    def start(code: str, *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> Child:
        text = f"import os, sys\nsaid = ''\n{textwrap.dedent(code)}\nprint(said, flush=True)\nsys.stdin.read()"
        child = subprocess.Popen(
            [sys.executable, "-c", text, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=cwd,
            env=env,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        # The group: a forked grandchild must not outlive the test either.
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.communicate()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with spaces and what looks like an expression in its name."""
    root = tmp_path / "a root with (odd) name.*"
    for name in ("one", "two"):
        (root / name / "lib").mkdir(parents=True)
        (root / name / "in-use").touch()
        (root / name / "lib" / "x.so").write_bytes(b"x" * 8192)
    return root


def said(child: Child) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def uses(root: Path) -> dict[str, str]:
    """How each directory is used, by its first user."""
    found = processes.processes_using(root, ["one", "two"])
    return {name: sentence(*next(iter(users.items()))) for name, users in found.items()}


def sentence(pid: int, how: str) -> str:
    return f"process {pid} {how}"


def eventually(condition: Callable[[], bool]) -> bool:
    """Guards against a hang only: the kernel may take a moment to tear a killed process down."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_working_directory_counts(root: Path, spawn: Spawn) -> None:
    """A process that merely has its working directory in an entry uses it."""
    child = spawn("", cwd=root / "one" / "lib")
    said(child)
    assert uses(root) == {"one": sentence(child.pid, "its working directory")}


def test_root_directory_counts(root: Path, spawn: Spawn) -> None:
    """A process with its root directory in an entry uses it."""
    if os.geteuid() != 0:
        pytest.skip("needs the right to chroot")
    child = spawn("os.chroot(sys.argv[1])", root / "one")
    said(child)
    assert uses(root) == {"one": sentence(child.pid, "its root")}


def test_open_file_counts_also_deleted(root: Path, spawn: Spawn) -> None:
    """An open file counts, and still does after it was deleted."""
    path = root / "two" / "lib" / "x.so"
    child = spawn("file = open(sys.argv[1])", path)
    said(child)
    assert uses(root) == {"two": sentence(child.pid, "an open file")}
    path.unlink()
    assert uses(root) == {"two": sentence(child.pid, "an open file")}


def test_deleted_entry_directory_counts(root: Path, spawn: Spawn) -> None:
    """A process in an entry's own directory uses it, even once that is deleted."""
    child = spawn("", cwd=root / "one")
    said(child)
    shutil.rmtree(root / "one")
    assert uses(root) == {"one": sentence(child.pid, "its working directory")}


def test_mapped_but_closed_file_counts(root: Path, spawn: Spawn) -> None:
    """A mapped file counts though its descriptor is closed, as with every loaded library."""
    path = root / "one" / "lib" / "x.so"
    code = """
    import mmap
    with open(sys.argv[1], "rb") as file:
        held = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    for fd in os.listdir("/proc/self/fd"):
        if int(fd) > 2:
            try:
                os.close(int(fd))
            except OSError:
                pass
    """
    child = spawn(code, path)
    said(child)
    assert uses(root) == {"one": sentence(child.pid, "a mapped file")}
    path.unlink()
    assert uses(root) == {"one": sentence(child.pid, "a mapped file")}


def test_executable_below_the_root_counts(root: Path) -> None:
    """A binary that runs from an entry uses it, without a flock and without Python: raylet and gcs_server do."""
    sleeper = root / "two" / "sleeper"
    shutil.copy(shutil.which("sleep") or "", sleeper)
    with subprocess.Popen([sleeper, "600"]) as child:
        try:
            assert eventually(lambda: uses(root) == {"two": sentence(child.pid, "its executable")})
        finally:
            child.kill()


def test_one_process_may_use_several(root: Path, spawn: Spawn) -> None:
    """Each directory that a process uses is found, with the first reason."""
    child = spawn("file = open(sys.argv[1])", root / "two" / "in-use", cwd=root / "one")
    said(child)
    assert uses(root) == {
        "one": sentence(child.pid, "its working directory"),
        "two": sentence(child.pid, "an open file"),
    }


def test_neighbours_do_not_count(root: Path, spawn: Spawn, tmp_path: Path) -> None:
    """Names that merely begin alike, a longer path that ends in ours, the root, and command lines are no use."""
    neighbours = [root / "one-more", root.with_name(root.name + "er") / "one", Path(f"{tmp_path}/copy{root}/one")]
    for place in (*neighbours, root):
        place.mkdir(parents=True, exist_ok=True)
        said(spawn("", root / "one" / "lib", cwd=place))
    assert uses(root) == {}


def test_a_root_behind_a_symlink_is_found(root: Path, spawn: Spawn, tmp_path: Path) -> None:
    """The root may be named through a symlink; the kernel knows the real path."""
    link = tmp_path / "link"
    link.symlink_to(root)
    child = spawn(FLOCK, link / "one" / "in-use", "LOCK_SH")
    said(child)
    assert uses(link) == {"one": sentence(child.pid, "an open file")}


def test_own_open_files_are_no_veto_but_own_directory_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that has its victim's flock file open does not veto itself, unless it runs in there."""
    with (root / "one" / "in-use").open():
        assert uses(root) == {}
        monkeypatch.chdir(root / "one")
        assert uses(root)["one"].startswith(f"process {os.getpid()} ")


def test_processes_of_others_are_no_error(spawn: Spawn) -> None:
    """Those that may not be read are skipped by `processes_using`, and told by `find_mentions`."""
    if os.geteuid() != 0:
        pytest.skip("needs the right to become another user")
    code = """
    import re
    from pathlib import Path
    # Imported before the user changes: the other one may not read this checkout.
    from ray_envcache.system import processes
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    found = processes.processes_using(Path("/tmp/x"), {"one"})
    said = found, os.getppid() in [one.pid for one in processes.find_mentions(re.compile(b"x/y/z")).unseen]
    """
    child = spawn(code, cwd=Path(processes.__file__).parents[2])
    assert said(child) == "({}, True)"


def test_without_proc(root: Path, spawn: Spawn, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc, working directories and open files are seen as well."""
    inside, opened = spawn("", cwd=root / "one"), spawn("file = open(sys.argv[1])", root / "two" / "in-use")
    assert [said(child) for child in (inside, opened)] == ["", ""]
    monkeypatch.setattr(processes, "_has_proc", lambda: False)
    assert uses(root) == {
        "one": sentence(inside.pid, "its working directory"),
        "two": sentence(opened.pid, "an open file"),
    }


def test_describe_shows_little_of_the_command_line(spawn: Spawn) -> None:
    """Three arguments, each cut at 60 characters, control characters disarmed, nothing of the environment."""
    child = spawn("# \x1b[31m" + "x" * 100, "fourth-secret", env={**os.environ, "SECRET": "hidden"})
    said(child)
    process = processes.describe(child.pid)
    assert process is not None
    assert process.command.isprintable()
    assert len(process.command) <= 3 * 60 + 2
    assert "secret" not in process.command
    assert "hidden" not in process.command
    assert process.user == os.getuid()
    assert abs(process.started - time.time()) < 60  # in seconds since 1970, not since boot; a minute for slow hosts


def test_describe_tells_a_program_by_the_end_of_its_path(tmp_path: Path) -> None:
    """However deep a program lies, its name is shown."""
    deep = tmp_path / ("deep" * 20) / "gcs_server"
    deep.parent.mkdir()
    shutil.copy("/bin/sleep", deep)
    with subprocess.Popen([deep, "600"]) as child:
        # The kernel shows the command line a moment after the program has begun.
        shown = eventually(
            lambda: getattr(processes.describe(child.pid), "command", "").endswith("deep/gcs_server 600")
        )
        child.kill()
    assert shown


def test_describe_what_has_ended(spawn: Spawn) -> None:
    """A process that has ended is not described, reaped or not."""
    child = spawn("")
    said(child)
    child.kill()
    assert eventually(lambda: processes.describe(child.pid) is None)
    child.wait()
    assert processes.describe(child.pid) is None


def test_describe_the_nameless(spawn: Spawn) -> None:
    """A process without a command line, as a thread of the kernel, is shown by its name."""
    child = spawn("""
    import ctypes
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    libc = ctypes.CDLL(None)
    ctypes.memset(int(fields[45]), 0, int(fields[46]) - int(fields[45]))  # its arguments, proc(5)
    libc.prctl(15, b") Z 1 (x")
    """)
    said(child)
    assert getattr(processes.describe(child.pid), "command", "") == "[) Z 1 (x]"


def test_a_process_in_the_midst_of_exec_names_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has no arguments of it for a moment, often when `Popen` returns: a sweep then took what it names."""
    many = ["x"] * 100_000  # they make the moment longer
    for number in range(10):
        with subprocess.Popen([sys.executable, "-c", "input()", f"re-{number}", *many], stdin=subprocess.PIPE) as child:
            monkeypatch.setattr("psutil.pids", lambda pid=child.pid: [pid])
            found = processes.find_mentions(re.compile(rb"re-\d+")).by_name
            child.kill()
        assert list(found) == [f"re-{number}"]


def test_processes_may_come_and_go(root: Path) -> None:
    """A scan survives processes that end while it reads them."""
    churn = "import subprocess, sys\nwhile True: subprocess.run(['true'])"
    with subprocess.Popen([sys.executable, "-c", churn], start_new_session=True) as child:
        try:
            found = [processes.processes_using(root, {"one"}) for _ in range(50)]
        finally:
            os.killpg(child.pid, signal.SIGKILL)
    assert found == [{}] * 50
