"""Which sessions are alive, dead or in doubt: session directories as Ray makes them, and real processes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ray_envcache.sessions import collector
from ray_envcache.system import disk, flock, processes
from tests import support
from tests.sessions.made import (
    BECOME_NOBODY,
    NOBODY,
    cli,
    collect,
    give_to_nobody,
    judge,
    make,
    needs_proc,
    needs_root,
    rest,
    sees_all,
    start,
)


def test_a_session_that_no_process_names_is_dead_and_goes(temp: Path) -> None:
    """Two sessions of the dead go with all that is in them, and the report has the bytes."""
    first, second = make(temp, 1), make(temp, 2)
    assert judge(first) == judge(second) == ("dead", "no process names it")
    report = collect(temp)
    assert [one.name for one in report["removed"]] == [first.name, second.name]
    assert sum(one.reclaimable_bytes for one in report["removed"]) >= 20_000
    assert list(temp.iterdir()) == []


def test_a_dry_run_changes_nothing(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """It says what would go, and of each session that stays why."""
    dead, alive, young, doubtful = (make(temp, number, age=number * 3600) for number in (4, 3, 2, 1))
    (doubtful / "sockets").rmdir()
    rest(doubtful)
    pid = start(children, "", f"--session-name={alive.name}")
    assert [one.name for one in collect(temp, dry_run=True, older_than=9000)["removed"]] == [dead.name]
    shown = cli("gc", "--sessions", "-n", "--older-than", "150m", "--tmpdir", temp).stdout.splitlines()
    assert re.fullmatch(rf"Would remove {dead}, \d\d.\d kB: no process names it", shown[0])
    assert {line.partition(" (")[0] for line in shown[1:4]} == {
        f"Kept {alive}, alive: process {pid}",
        f"Kept {young}, dead but younger: no process names it",
        f"Kept {doubtful}, in doubt: only its logs are left",
    }
    assert re.fullmatch(r"Would remove 1 session, free .*; 1 alive, 1 in doubt, 1 dead but younger, 0 failed", shown[4])
    assert len(list(temp.iterdir())) == 4


NAMING = {
    "command line": "",
    "working directory": "import os; os.chdir(sys.argv[1] + '/logs'); sys.argv.clear()",
    "open file": "file = open(sys.argv[1] + '/logs/raylet.out')",
    "mapped file": """
import ctypes, os
mmap = ctypes.CDLL(None).mmap
mmap.restype, mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_size_t] + 3 * [ctypes.c_int], ctypes.c_long]
file = os.open(sys.argv[1] + "/logs/raylet.out", os.O_RDONLY)
mmap(None, 4096, 1, 2, file, 0)
os.close(file)""",
    "its socket raylet": "import socket; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1] + '/sockets/raylet'); s.listen()",
}


@needs_proc
@pytest.mark.parametrize("how", list(NAMING))
def test_a_process_that_names_it_keeps_it(how: str, temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """A process keeps a session by anything of it; when the process is dead, the session is."""
    session = make(temp)
    arguments: list[str | Path] = [session]
    code = NAMING[how]
    if how != "command line":
        # Told by stdin's side, or the command line alone would do.
        (temp / "argument").write_text(str(session))
        code = f"sys.argv[1:] = [open({str(temp / 'argument')!r}).read()]\n{code}"
        arguments = []
    pid = start(children, code, *arguments)
    rest(session)
    state, why = judge(session)
    assert state == "alive"
    assert how in why if how == "its socket raylet" else why.startswith(f"process {pid} (python") and how in why
    assert collect(temp)["removed"] == []
    os.kill(pid, signal.SIGKILL)
    children[0].wait()
    assert judge(session)[0] == "dead"
    assert [one.name for one in collect(temp)["removed"]] == [session.name]


def test_a_longer_pid_is_another_session(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """A session whose name is the beginning of a living one's is not kept by that."""
    short, long = make(temp, pid=12), make(temp, pid=123)
    start(children, "", f"--session-name={long.name}")
    assert (judge(short)[0], judge(long)[0]) == ("dead", "alive")


def test_a_flock_keeps_it(temp: Path) -> None:
    """A flock on a session keeps it until it is released; two processes may have one at once."""
    session = make(temp)
    # Through another name, as another container may have another path.
    alias = temp.parent / "alias"
    os.rename(session, alias)
    held = [flock.try_flock(alias, exclusive=False), flock.try_flock(alias, exclusive=False)]
    os.rename(alias, session)
    assert judge(session) == ("alive", "a process holds a flock on it")
    assert collect(temp)["removed"] == []
    for descriptor in held:
        assert descriptor is not None
        os.close(descriptor)
    assert len(collect(temp)["removed"]) == 1


@needs_root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_cluster_of_another_container_keeps_it(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """Where its processes cannot be seen, a socket that answers or a fresh log keeps a session."""
    session = make(temp, age=30 * 60)

    def seen_from_a_container() -> tuple[str, str]:
        command: list[str | Path] = ["unshare", "--pid", "--net", "--fork", "--mount-proc", sys.executable]
        command += ["-m", "ray_envcache", "gc", "--sessions", "-n", "--json", "--tmpdir", temp]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "unshare failed" in done.stderr:
            pytest.skip("may not unshare")
        report = json.loads(done.stdout)
        (found,) = filter(None, (report[state] for state in ("removed", "alive", "in_doubt")))
        return found[0]["state"], found[0]["why"]

    assert seen_from_a_container()[0] == "removed"
    (session / "logs" / "raylet.out").write_text("written a moment ago")
    state, why = seen_from_a_container()
    assert (state, "other containers" in why) == ("in doubt", True)
    start(children, NAMING["its socket raylet"], session)
    rest(session, 30 * 60)
    assert seen_from_a_container() == ("alive", "a process listens on its socket raylet")


def test_a_socket_file_says_nothing(temp: Path) -> None:
    """The files of sockets outlive the process that listened."""
    session = make(temp)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(session / "sockets" / "raylet"))
    rest(session)
    assert judge(session)[0] == "dead"


@sees_all
@pytest.mark.parametrize("ended", [0, 2300])
def test_a_starting_cluster_is_in_doubt(ended: float, temp: Path) -> None:
    """A session made, or ended, a moment ago stays for a minute, unless the caller knows better."""
    began = time.localtime(time.time() - 5 - ended)
    named = time.strftime(f"session_%Y-%m-%d_%H-%M-%S_000001_{support.NO_PID}", began)
    session = make(temp).rename(temp / named)
    rest(session, 4)
    assert judge(session) == ("in doubt", "it was changed a moment ago, its cluster may be starting")
    assert collect(temp)["removed"] == []
    assert [one.name for one in collect(temp, starting=0)["removed"]] == [named]
    session = make(temp).rename(temp / named)
    rest(session, 61)
    assert judge(session)[0] == "dead"


def test_times_to_come(temp: Path) -> None:
    """What was written when the clock was wrong is in doubt."""
    session = make(temp, age=-500)
    assert judge(session) == ("in doubt", "it was changed a moment ago, its cluster may be starting")


def test_older_than_is_about_the_last_written_file(temp: Path) -> None:
    """A session stays as long as something in it is young, however old it is itself."""
    session = make(temp, age=10 * 86_400)
    log = session / "logs" / "raylet.out"
    os.utime(log, (time.time() - 7200,) * 2)
    report = collect(temp, older_than=86_400)
    assert ([one.name for one in report["kept"]], report["removed"]) == ([session.name], [])
    assert len(collect(temp, older_than=3600)["removed"]) == 1


def liar(name: str) -> Callable[[Path], Path]:
    def rename(session: Path) -> Path:
        return session.rename(session.with_name(name))

    return rename


def without_logs(session: Path) -> Path:
    shutil.rmtree(session / "logs")
    return session


def linked_sockets(session: Path) -> Path:
    (session / "sockets").rmdir()
    (session / "sockets").symlink_to("logs")
    return session


LIES = {
    "no such month": liar(f"session_2026-13-02_03-04-05_000001_{support.NO_PID}"),
    "no number": liar("session_2026-01-02_03-04-05"),
    "more behind it": liar(f"session_2026-01-02_03-04-05_000001_{support.NO_PID}.backup"),
    "a newline": liar(f"session_2026-01-02_03-04-05_000001_{support.NO_PID}\n"),
    "not UTF-8": liar(os.fsdecode(b"session_\xff[bold]\x1b[2J")),
    "to come": liar(f"session_2999-01-02_03-04-05_000001_{support.NO_PID}"),
    "before all time": liar(f"session_0000-00-00_00-00-00_000001_{support.NO_PID}"),
    "the link's name": liar("session_latest"),
    "no folders": without_logs,
    "a link for a folder": linked_sockets,
}


@pytest.mark.parametrize("lie", list(LIES))
def test_a_name_that_lies_is_left_alone(lie: str, temp: Path) -> None:
    """What is not certainly a session of Ray stays, and the table can be printed."""
    session = LIES[lie](make(temp))
    rest(session)
    assert judge(session)[0] == "in doubt"
    assert collect(temp)["removed"] == []
    assert (session / "runtime_resources").is_dir()
    shown = cli("gc", "--sessions", "--tmpdir", temp)
    assert (shown.returncode, "1 in doubt" in shown.stdout, "\x1b" in shown.stdout) == (0, True, False)
    (one,) = json.loads(cli("gc", "--sessions", "--tmpdir", temp, "--json").stdout)["in_doubt"]
    assert one["state"] == "in doubt"


def test_a_link_is_never_followed(temp: Path, tmp_path: Path) -> None:
    """Neither a session that is a symlink, nor links in one, lead to anything outside."""
    precious = make(tmp_path, 9)
    (precious / "logs" / "thesis").write_text("irreplaceable")
    rest(precious)
    (temp / f"session_2026-01-02_03-04-05_000001_{support.NO_PID}").symlink_to(precious)
    session = make(temp, 2)
    (session / "logs" / "old" / "link").symlink_to(precious)
    (session / "logs" / "file").symlink_to(precious / "logs" / "thesis")
    (session / "runtime_resources" / "pip").rmdir()
    (session / "runtime_resources" / "pip").symlink_to(precious, target_is_directory=True)
    rest(session)
    report = collect(temp)
    assert [one.name for one in report["removed"]] == [session.name]
    assert [one.why for one in report["in doubt"]] == ["it is a symlink"]
    assert (precious / "logs" / "thesis").read_text() == "irreplaceable"
    assert sorted(path.name for path in precious.iterdir()) == ["logs", "runtime_resources", "sockets"]


@needs_root
@pytest.mark.parametrize("what", [".", "logs/raylet.out", "logs/old", "runtime_resources/pip/link"])
def test_files_of_another_user_keep_it(what: str, temp: Path) -> None:
    """A session with anything of another user stays whole, for root too."""
    session = make(temp)
    (session / "runtime_resources" / "pip" / "link").symlink_to("nowhere")
    os.chown(session / what, NOBODY, NOBODY, follow_symlinks=False)
    rest(session)
    state, why = judge(session)
    assert (state, f"user {NOBODY}" in why) == ("in doubt", True)
    before = sorted(path.name for path in session.rglob("*"))
    assert collect(temp)["removed"] == []
    assert sorted(path.name for path in session.rglob("*")) == before


AS_NOBODY = """
import _strptime, json, os, sys
from ray_envcache import errors
from ray_envcache.cli import tables
from ray_envcache.sessions import directories
from ray_envcache.system import processes
from ray_envcache.sessions.collector import collect_sessions
from pathlib import Path
import psutil
BECOME_NOBODY
found = collect_sessions([Path(sys.argv[1])])
print(json.dumps({state: [[one.name, one.why] for one in found if one.state == state] for state in ("removed", "alive", "in doubt")}))
"""


def collect_as_nobody(temp: Path) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = json.loads(
        support.run_python(AS_NOBODY.replace("BECOME_NOBODY", BECOME_NOBODY), str(temp))
    )
    return found


@needs_root
@needs_proc
def test_another_user_touches_only_his_own(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """Of three dead or living sessions a user removes his own dead one, although most processes refuse to be looked at."""
    root_dead, root_alive, own = make(temp, 1), make(temp, 2), make(temp, 3)
    (own / "logs" / "old").chmod(0o555)  # frozen, as some package managers leave them
    give_to_nobody(own)
    start(children, "", f"--session-name={root_alive.name}")
    report = collect_as_nobody(temp)
    assert [name for name, _ in report["removed"]] == [own.name]
    assert report["in doubt"] == [[root_dead.name, "it belongs to user 0"]]
    assert [name for name, _ in report["alive"]] == [root_alive.name]
    assert root_dead.exists()
    assert root_alive.exists()


@needs_root
@needs_proc
def test_a_process_that_refuses_to_be_looked_at(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """A Python of the same user that hides its files keeps the sessions it may belong to: those that began before it."""
    hidden = f"import ctypes, os; {BECOME_NOBODY}; ctypes.CDLL(None).prctl(4, 0)"
    pid = start(children, hidden)
    earlier = make(temp, 1)
    later = temp / time.strftime(
        f"session_%Y-%m-%d_%H-%M-%S_000002_{support.NO_PID}", time.localtime(time.time() + 3600)
    )
    make(temp, 2).rename(later)
    give_to_nobody(earlier)
    give_to_nobody(later)
    report = collect_as_nobody(temp)
    assert report["in doubt"] == [
        [earlier.name, f"process {pid} ({os.path.basename(sys.executable)}) refuses to be looked at"]
    ]
    assert [name for name, _ in report["removed"]] == [later.name]


@contextmanager
def mounted(place: Path, *options: str | Path) -> Iterator[None]:
    command: list[str | Path] = ["mount", *options, place]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("may not mount")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", place], check=True)


@needs_root
@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_a_mount_in_it_keeps_it(kind: str, temp: Path, tmp_path: Path) -> None:
    """What is mounted below a session is not deleted with it, be it the same file system once more."""
    session, precious = make(temp), tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_text("irreplaceable")
    place = session / "runtime_resources" / "with a blank"
    place.mkdir()
    options: list[str | Path] = ["-t", "tmpfs", "tmpfs"] if kind == "tmpfs" else ["--bind", precious]
    with mounted(place, *options):
        (place / "more").write_text("")
        rest(session)
        state, why = judge(session)
        assert (state, "mounted in it" in why) == ("in doubt", True)
        assert collect(temp)["removed"] == []
        assert (place / "more").exists()
    rest(session)
    assert len(collect(temp)["removed"]) == 1
    assert (precious / "thesis").exists()


@needs_root
def test_a_mount_behind_a_link_keeps_it(temp: Path, tmp_path: Path) -> None:
    """What is mounted in a session is seen also where the temp directory is named by a link to it."""
    session, precious = make(temp), tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis").write_text("irreplaceable")
    link = temp.parent / "link"
    link.symlink_to(temp.parent)
    with mounted(session / "runtime_resources" / "pip", "--bind", precious):
        rest(session)
        assert [one.why[:24] for one in collect(link / "ray")["in doubt"]] == ["a file system is mounted"]
        assert (precious / "thesis").exists()


def test_on_a_network_file_system_it_stays(temp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other hosts have the directory too, its cluster may be on any of them."""
    session, real = make(temp), disk.free_space
    monkeypatch.setattr(disk, "free_space", lambda path: real(path)._replace(kind="lustre"))
    state, why = judge(session)
    assert (state, why) == ("in doubt", "it is on a network file system (lustre): its cluster may be on another host")
    assert collect(temp)["removed"] == []


@sees_all
def test_what_a_session_holds(temp: Path) -> None:
    """Bytes of all that is in it."""
    session = make(temp)
    for name in ("pip/1/virtualenv", "working_dir_files/_ray_pkg_1/.venv"):
        venv = session / "runtime_resources" / name
        venv.mkdir(parents=True)
        (venv / "pyvenv.cfg").write_text("home = /usr")
        (venv / "big").write_bytes(b"x" * 500_000)
    (one,) = collector.judge_sessions([temp])
    assert 1_000_000 <= one.reclaimable_bytes <= one.size_bytes < 1_200_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compares with /proc")
def test_mentions_without_proc(
    temp: Path, children: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no /proc, command lines, working directories and open files are seen as well."""
    named, opened, neither = make(temp, 1), make(temp, 2), make(temp, 3)
    start(children, "", f"--session-name={named.name}")
    # In two parts, or the command line would name it.
    start(children, f"file = open({str(opened)[:-1]!r} + '{opened.name[-1]}/logs/raylet.out')")
    monkeypatch.setattr(processes, "_has_proc", lambda: False)
    found = processes.find_mentions(collector.NAMED).by_name
    assert {named.name, opened.name} <= found.keys()
    assert neither.name not in found
