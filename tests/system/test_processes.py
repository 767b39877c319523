"""Who uses an entry, asked about real child processes."""

from __future__ import annotations

import ast
import os
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
    """A root with spaces, a newline and what looks like an expression in its name."""
    root = tmp_path / "a root\nwith (odd) name"
    for name in ("one", "two"):
        (root / name / "lib").mkdir(parents=True)
        (root / name / "in-use").touch()
        (root / name / "lib" / "x.so").write_bytes(b"x" * 8192)
    return root


def said(child: Child) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def comm(pid: str) -> bytes:
    path = Path("/proc") / pid / "comm"
    return path.read_bytes() if path.exists() else b""


def inode(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def flock_pids(root: Path) -> dict[str, set[int]]:
    inodes = {inode(root / name / "in-use"): name for name in ("one", "two")}
    found = processes.flock_holders(inodes, root)
    return {name: {process.pid for process in found_ones} for name, found_ones in found.by_name.items()}


def reasons(root: Path, pid: int) -> dict[str, str]:
    found = processes.processes_using(root, {"one", "two"})
    return {name: use.reason for name, uses in found.by_name.items() for use in uses if use.pid == pid}


def eventually(condition: Callable[[], bool]) -> bool:
    """Guards against a hang only: the kernel may take a moment to tear a killed process down."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_shared_holders_are_named(root: Path, spawn: Spawn) -> None:
    """Everybody who holds a shared flock is named with pid, user, mode, start time and command."""
    children = [spawn(FLOCK, root / "one" / "in-use", "LOCK_SH") for _ in range(2)]
    assert [said(child) for child in children] == ["", ""]
    found = processes.flock_holders({inode(root / "one" / "in-use"): "one"}, root)
    assert found.coverage in {"full", "partial"}  # in a sandbox not even root may read everybody
    assert {process.pid for process in found.by_name["one"]} == {child.pid for child in children}
    process = found.by_name["one"][0]
    assert (process.mode, process.user) == ("shared", os.getuid())
    assert process.command.startswith(f"{sys.executable[-60:]} -c import os")
    assert abs(process.started - time.time()) < 60  # in seconds since 1970, not since boot; a minute for slow hosts


def test_exclusive_holder_is_told_apart(root: Path, spawn: Spawn) -> None:
    """An exclusive flock is reported as such, under the name of its file only."""
    child = spawn(FLOCK, root / "two" / "in-use", "LOCK_EX")
    said(child)
    found = processes.flock_holders({inode(root / n / "in-use"): n for n in ("one", "two")}, root).by_name
    assert [(name, process.pid, process.mode) for name, [process] in found.items()] == [("two", child.pid, "exclusive")]


def test_an_open_file_is_no_flock(root: Path, spawn: Spawn) -> None:
    """Who has the file open without a flock does not hold it."""
    said(spawn("file = open(sys.argv[1])", root / "one" / "in-use"))
    assert flock_pids(root) == {}


def test_fork_keeps_the_flock_of_a_dead_parent(root: Path, spawn: Spawn) -> None:
    """A forked child is named after its parent, who took the flock, was killed."""
    fork = FLOCK + "\npid = os.fork()\nif pid == 0:\n    import signal\n    signal.pause()\nsaid = pid"
    parent = spawn(fork, root / "one" / "in-use", "LOCK_SH")
    forked = int(said(parent))
    assert flock_pids(root) == {"one": {parent.pid, forked}}
    parent.kill()
    parent.wait()
    assert flock_pids(root) == {"one": {forked}}


def test_sigkill_frees(root: Path, spawn: Spawn) -> None:
    """A killed holder is no holder, also while nobody has reaped it."""
    child = spawn(FLOCK, root / "one" / "in-use", "LOCK_SH")
    said(child)
    child.kill()
    assert eventually(lambda: flock_pids(root) == {})


def test_renamed_and_deleted_files_are_matched_by_inode(root: Path, spawn: Spawn) -> None:
    """A flock is found although its file was renamed or deleted meanwhile."""
    path = root / "one" / "in-use"
    known = {inode(path): "one"}
    child = spawn(FLOCK, path, "LOCK_SH")
    said(child)
    path = path.rename(root / "one" / "moved")
    assert [p.pid for p in processes.flock_holders(known, root).by_name["one"]] == [child.pid]
    path.unlink()
    assert [p.pid for p in processes.flock_holders(known, root).by_name["one"]] == [child.pid]


def test_working_directory_counts(root: Path, spawn: Spawn) -> None:
    """A process that merely has its working directory in an entry uses it."""
    child = spawn("", cwd=root / "one" / "lib")
    said(child)
    assert reasons(root, child.pid) == {"one": f"cwd {root}/one/lib"}


def test_root_directory_counts(root: Path, spawn: Spawn) -> None:
    """A process with its root directory in an entry uses it."""
    if os.geteuid() != 0:
        pytest.skip("needs the right to chroot")
    child = spawn("os.chroot(sys.argv[1])", root / "one")
    said(child)
    assert reasons(root, child.pid) == {"one": f"root {root}/one"}


def test_open_file_counts_also_deleted(root: Path, spawn: Spawn) -> None:
    """An open file counts, and still does after it was deleted."""
    path = root / "two" / "lib" / "x.so"
    child = spawn("file = open(sys.argv[1])", path)
    said(child)
    assert reasons(root, child.pid) == {"two": f"fd {path}"}
    path.unlink()
    assert reasons(root, child.pid) == {"two": f"fd {path} (deleted)"}


def test_deleted_entry_directory_counts(root: Path, spawn: Spawn) -> None:
    """A process in an entry's own directory uses it, even once that is deleted."""
    child = spawn("", cwd=root / "one")
    said(child)
    shutil.rmtree(root / "one")
    assert reasons(root, child.pid) == {"one": f"cwd {root}/one (deleted)"}


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
    assert reasons(root, child.pid) == {"one": f"maps {path}"}
    path.unlink()
    assert reasons(root, child.pid) == {"one": f"maps {path} (deleted)"}


def test_executable_below_the_root_counts(root: Path) -> None:
    """A binary that runs from an entry uses it, without a flock and without Python: raylet and gcs_server do."""
    sleeper = root / "two" / "sleeper"
    shutil.copy(shutil.which("sleep") or "", sleeper)
    with subprocess.Popen([sleeper, "600"]) as child:
        try:
            assert eventually(lambda: reasons(root, child.pid) == {"two": f"exe {sleeper}"})
        finally:
            child.kill()


def test_one_process_may_use_several_entries(root: Path, spawn: Spawn) -> None:
    """Each entry a process uses is told, with the first reason."""
    child = spawn("file = open(sys.argv[1])", root / "two" / "in-use", cwd=root / "one")
    said(child)
    assert reasons(root, child.pid) == {"one": f"cwd {root}/one", "two": f"fd {root}/two/in-use"}


def test_neighbours_do_not_count(root: Path, spawn: Spawn) -> None:
    """Names that merely begin alike, unknown names and the root itself are no use of an entry."""
    (root / "one-more").mkdir()
    root.with_name(root.name + "er").joinpath("one").mkdir(parents=True)
    for place in (root / "one-more", root, root.with_name(root.name + "er") / "one"):
        child = spawn("", cwd=place)
        said(child)
        assert reasons(root, child.pid) == {}


def test_a_root_behind_a_symlink_is_found(root: Path, spawn: Spawn, tmp_path: Path) -> None:
    """The root may be named through a symlink; the kernel knows the real path."""
    link = tmp_path / "link"
    link.symlink_to(root)
    child = spawn(FLOCK, link / "one" / "in-use", "LOCK_SH")
    said(child)
    assert child.pid in flock_pids(link)["one"]
    assert reasons(link, child.pid) == {"one": f"fd {root}/one/in-use"}


def test_own_open_files_are_no_veto_but_own_directory_is(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A collector that has its victim's flock file open does not veto itself, unless it runs in there."""
    with (root / "one" / "in-use").open():
        assert reasons(root, os.getpid()) == {}
        monkeypatch.chdir(root / "one")
        assert reasons(root, os.getpid()) == {"one": f"cwd {root}/one"}


def test_processes_of_others_reduce_the_coverage(spawn: Spawn) -> None:
    """Who may not read the processes of others is told how many they are."""
    if os.geteuid() != 0:
        pytest.skip("needs the right to become somebody else")
    code = """
    from pathlib import Path
    # Imported before the user changes, who may not read this checkout.
    from ray_envcache.system import processes
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    found = [processes.processes_using(Path("/tmp/x"), {"one"}), processes.flock_holders({}, Path("/tmp/x"))]
    said = [(one.coverage, one.unreadable) for one in found]
    """
    child = spawn(code, cwd=Path(processes.__file__).parents[2])
    (coverage, unreadable), (also, _) = ast.literal_eval(said(child))
    assert (coverage, also) == ("partial", "partial")
    assert unreadable > 0


def test_threads_of_the_kernel_are_not_missed() -> None:
    """That nobody may read the threads of the kernel does not reduce the coverage."""
    threads = [int(pid) for pid in ["2"] if comm(pid) == b"kthreadd\n"]
    if not threads:
        pytest.skip("needs a /proc that shows the threads of the kernel")
    assert all(map(processes._holds_nothing, threads))
    assert not processes._holds_nothing(os.getpid())


def test_without_proc_nothing_is_covered(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no /proc the answer is not "nobody" but "not covered"."""
    monkeypatch.setattr(processes, "_is_supported", lambda: False)
    assert processes.flock_holders({(1, 2): "one"}, root).coverage == "none"
    assert processes.processes_using(root, {"one"}).coverage == "none"


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


def test_describe_tells_a_program_by_the_end_of_its_path(tmp_path: Path) -> None:
    """However deep it lies."""
    deep = tmp_path / ("deep" * 20) / "gcs_server"
    deep.parent.mkdir()
    shutil.copy("/bin/sleep", deep)
    with subprocess.Popen([deep, "600"]) as child:
        process = processes.describe(child.pid)
        child.kill()
    assert process is not None
    assert process.command.endswith("deep/gcs_server 600")


def test_describe_what_is_gone_or_nameless(spawn: Spawn) -> None:
    """A zombie has no command line and is shown by name; once reaped it is None."""
    child = spawn("")
    said(child)
    child.kill()
    assert eventually(lambda: "[" in getattr(processes.describe(child.pid), "command", ""))
    child.wait()
    assert processes.describe(child.pid) is None


def test_identity_survives_no_death(spawn: Spawn) -> None:
    """A token names one process for its life: not a zombie, nor another process, nor the same ticks of another boot."""
    child = spawn("")
    said(child)
    token = processes.start_token(child.pid)
    assert processes.is_same_process(child.pid, token)
    assert not processes.is_same_process(os.getppid(), token)
    assert not processes.is_same_process(child.pid, token.partition("-")[0] + "-another-boot")
    child.kill()
    assert eventually(lambda: not processes.is_same_process(child.pid, token))
    child.wait()
    assert not processes.is_same_process(child.pid, token)
    assert processes.start_token(child.pid) == ""


def test_in_doubt_a_process_is_alive(spawn: Spawn) -> None:
    """Without a token only a missing pid proves the end."""
    child = spawn("")
    said(child)
    assert processes.is_same_process(child.pid, "")
    child.kill()
    child.wait()
    assert not processes.is_same_process(child.pid, "")


def test_names_with_parentheses_do_not_confuse(spawn: Spawn) -> None:
    """A process may call itself anything: the fields of its stat are found nevertheless."""
    child = spawn("open('/proc/self/comm', 'w').write(') Z 1 (x')")
    said(child)
    assert processes._read_stat(child.pid).name == ") Z 1 (x"
    assert processes._read_stat(child.pid).state in {"S", "R"}


def test_processes_may_come_and_go(root: Path) -> None:
    """A scan survives processes that vanish under its hands."""
    churn = "import subprocess, sys\nwhile True: subprocess.run(['true'])"
    with subprocess.Popen([sys.executable, "-c", churn], start_new_session=True) as child:
        try:
            found = [processes.processes_using(root, {"one"}) for _ in range(50)]
        finally:
            os.killpg(child.pid, signal.SIGKILL)
    assert all(usage.by_name == {} for usage in found)
