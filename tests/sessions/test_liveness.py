"""Session directories, made as Ray makes them, and real processes that name them or do not."""

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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.errors import TempDirError
from ray_envcache.sessions import directories, liveness
from ray_envcache.sessions.collector import collect_sessions
from ray_envcache.system import disk, files
from tests import support

NOBODY = 65534
needs_proc = pytest.mark.skipif(not Path("/proc/self/fdinfo").is_dir(), reason="needs /proc as Linux has it")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
FIRST_NAMESPACE = "pid:[4026531836]"  # of pids: that of the host, by the kernel's own constant
sees_all = pytest.mark.skipif(
    sys.platform == "linux"
    and os.readlink("/proc/self/ns/pid") != FIRST_NAMESPACE
    and disk.free_space(Path("/tmp")).kind != "overlay",
    reason="needs to see all processes that may use /tmp: in a container that shares it, what is new stays",
)
BECOME_NOBODY = "import os; os.setgroups([]); os.setgid(65534); os.setuid(65534)"


@pytest.fixture
def temp() -> Iterator[Path]:
    """A temp directory of Ray that everybody may write to; short, since sockets are bound in it."""
    with support.short_folder() as folder:
        folder.chmod(0o755)
        (folder / "ray").mkdir(mode=0o777)
        (folder / "ray").chmod(0o777)
        yield folder / "ray"


def make(temp: Path, number: int = 1, *, pid: int = support.NO_PID, age: float = 3600) -> Path:
    """A session directory that was left `age` seconds ago."""
    session = temp / f"session_2026-01-02_03-04-05_{number:06}_{pid}"
    for folder in ("sockets", "logs/old", "runtime_resources/pip"):
        (session / folder).mkdir(parents=True)
    (session / "logs" / "raylet.out").write_text("x" * 10_000)
    rest(session, age)
    return session


def rest(session: Path, age: float = 3600) -> None:
    """Let it have been untouched for `age` seconds."""
    then = time.time() - age
    for path in [session, *session.rglob("*")]:
        os.utime(path, (then, then), follow_symlinks=False)


def look(temp: Path) -> dict[str, tuple[str, str]]:
    return {one.name: (one.state, one.why) for one in liveness.survey([temp])}


def judge(session: Path) -> tuple[str, str]:
    return look(session.parent)[session.name]


def start(children: list[subprocess.Popen[str]], code: str, *arguments: str | Path, **options: Any) -> int:
    """Start Python code in a child that says when it is ready and stays."""
    return support.start_python(children, code, *arguments, **options).pid


def cli(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_envcache", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)


def test_a_session_that_nobody_names_is_dead_and_goes(temp: Path) -> None:
    """Two sessions of the dead go with all that is in them, and the report has the bytes."""
    first, second = make(temp, 1), make(temp, 2)
    assert judge(first) == judge(second) == ("dead", "no process names it")
    report = collect_sessions([temp])
    assert [one.name for one in report.removed] == [first.name, second.name]
    assert report.freed_bytes >= 20_000
    assert list(temp.iterdir()) == []


def test_a_dry_run_changes_nothing(temp: Path) -> None:
    """It says what would go."""
    session = make(temp)
    assert [one.name for one in collect_sessions([temp], dry_run=True).removed] == [session.name]
    assert session.exists()


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
    "a socket": "import socket; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1] + '/sockets/raylet'); s.listen()",
}


@needs_proc
@pytest.mark.parametrize("how", list(NAMING))
def test_whoever_names_it_keeps_it(how: str, temp: Path, children: list[subprocess.Popen[str]]) -> None:
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
    assert why == "a socket of it is open" if how == "a socket" else why.startswith(f"process {pid} (python")
    assert how in why
    assert collect_sessions([temp]).removed == []
    os.kill(pid, signal.SIGKILL)
    children[0].wait()
    assert judge(session)[0] == "dead"
    assert [one.name for one in collect_sessions([temp]).removed] == [session.name]


def test_a_longer_pid_is_another_session(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """A session whose name is the beginning of a living one's is not kept by that."""
    short, long = make(temp, pid=12), make(temp, pid=123)
    start(children, "", f"--session-name={long.name}")
    assert (judge(short)[0], judge(long)[0]) == ("dead", "alive")


def test_a_flock_of_ours_keeps_it(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """Whoever holds a session keeps it, and frees it by dying; two may hold it at once."""
    session = make(temp)
    # Through another name, as another container may have another path.
    alias = temp.parent / "alias"
    os.rename(session, alias)
    held = [liveness.hold(alias), liveness.hold(alias)]
    os.rename(alias, session)
    assert judge(session) == ("alive", "a process holds a flock on it")
    assert collect_sessions([temp]).removed == []
    for descriptor in held:
        os.close(descriptor)
    assert len(collect_sessions([temp]).removed) == 1


@needs_root
@pytest.mark.skipif(shutil.which("unshare") is None, reason="needs unshare")
def test_a_cluster_of_another_container_keeps_it(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """Where its processes cannot be seen, a socket that answers or a fresh log keeps a session."""
    session = make(temp, age=30 * 60)

    def seen_from_a_container() -> tuple[str, str]:
        command: list[str | Path] = ["unshare", "--pid", "--net", "--fork", "--mount-proc", sys.executable]
        command += ["-m", "ray_envcache", "list", "--sessions", "--json", "--tmpdir", temp]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "unshare failed" in done.stderr:
            pytest.skip("may not unshare")
        (one,) = json.loads(done.stdout)["sessions"]
        return one["state"], one["why"]

    assert seen_from_a_container()[0] == "dead"
    (session / "logs" / "raylet.out").write_text("written a moment ago")
    state, why = seen_from_a_container()
    assert (state, "other containers" in why) == ("in doubt", True)
    start(children, NAMING["a socket"], session)
    rest(session, 30 * 60)
    assert seen_from_a_container() == ("alive", "somebody listens on its socket raylet")


def test_a_socket_file_says_nothing(temp: Path) -> None:
    """The files of sockets outlive whoever listened."""
    session = make(temp)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(session / "sockets" / "raylet"))
    rest(session)
    assert judge(session)[0] == "dead"


@sees_all
@pytest.mark.parametrize("zone", [0, 3600, -12600, 45900])
def test_a_starting_cluster_is_in_doubt(zone: float, temp: Path) -> None:
    """A session made a moment ago stays, by the clock of whatever time zone it is named; who knows better may say so."""
    named = time.strftime(f"session_%Y-%m-%d_%H-%M-%S_000001_{support.NO_PID}", time.localtime(time.time() - 5 + zone))
    session = make(temp).rename(temp / named)
    rest(session, 4)
    assert judge(session) == ("in doubt", "it was made a moment ago, its cluster may be starting")
    assert collect_sessions([temp]).removed == []
    assert [one.name for one in collect_sessions([temp], starting=0, only=[named]).removed] == [named]


@sees_all
def test_a_session_that_has_just_ended_is_dead(temp: Path) -> None:
    """Ray changes the directory at a clean end: that makes no new session of an old one."""
    named = time.strftime(f"session_%Y-%m-%d_%H-%M-%S_000001_{support.NO_PID}", time.localtime(time.time() - 2300))
    session = make(temp).rename(temp / named)
    rest(session, 1)
    assert judge(session)[0] == "dead"


def test_times_to_come(temp: Path) -> None:
    """What was written when the clock was wrong is in doubt."""
    session = make(temp, age=-500)
    assert judge(session) == ("in doubt", "it was written at a time to come")


def test_older_than_is_about_the_last_written_file(temp: Path) -> None:
    """A session stays as long as something in it is young, however old it is itself."""
    session = make(temp, age=10 * 86_400)
    log = session / "logs" / "raylet.out"
    os.utime(log, (time.time() - 7200,) * 2)
    report = collect_sessions([temp], older_than=86_400)
    assert ([one.name for one in report.kept], report.removed) == ([session.name], [])
    assert len(collect_sessions([temp], older_than=3600).removed) == 1


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
    assert collect_sessions([temp]).removed == []
    assert (session / "runtime_resources").is_dir()
    shown = cli("gc", "--sessions", "--tmpdir", temp)
    assert (shown.returncode, "1 in doubt" in shown.stdout, "\x1b" in shown.stdout) == (0, True, False)
    assert cli("list", "--sessions", "--tmpdir", temp).returncode == 0
    assert (
        json.loads(cli("list", "--sessions", "--tmpdir", temp, "--json").stdout)["sessions"][0]["state"] == "in doubt"
    )


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
    report = collect_sessions([temp])
    assert [one.name for one in report.removed] == [session.name]
    assert [one.why for one in report.in_doubt] == ["it is a symlink"]
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
    assert (state, "user 65534" in why) == ("in doubt", True)
    before = sorted(path.name for path in session.rglob("*"))
    assert collect_sessions([temp]).removed == []
    assert sorted(path.name for path in session.rglob("*")) == before


AS_NOBODY = """
import _strptime, json, os, sys
from ray_envcache import errors
from ray_envcache.cli import tables
from ray_envcache.sessions import directories, liveness
from ray_envcache.system import mentions, processes
from ray_envcache.sessions.collector import collect_sessions
from pathlib import Path
import psutil
os.setgroups([]); os.setgid(65534); os.setuid(65534)
report = collect_sessions([Path(sys.argv[1])])
print(json.dumps({name: [[one.name, one.why] for one in getattr(report, name)] for name in ("removed", "alive", "in_doubt")}))
"""


def collect_as_nobody(temp: Path) -> dict[str, list[list[str]]]:
    found: dict[str, list[list[str]]] = json.loads(support.run_python(AS_NOBODY, str(temp)))
    return found


def give_to_nobody(session: Path) -> None:
    for path in [session, *session.rglob("*")]:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


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
    assert report["in_doubt"] == [[root_dead.name, "it belongs to user 0"]]
    assert [name for name, _ in report["alive"]] == [root_alive.name]
    assert root_dead.exists()
    assert root_alive.exists()


@needs_root
@needs_proc
def test_a_process_that_refuses_to_be_looked_at(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """A Python of the same user that hides its files keeps the sessions it may belong to: those that began before it."""
    hidden = "import ctypes, os; os.setgroups([]); os.setgid(65534); os.setuid(65534); ctypes.CDLL(None).prctl(4, 0)"
    pid = start(children, hidden)
    earlier = make(temp, 1)
    later = temp / time.strftime(
        f"session_%Y-%m-%d_%H-%M-%S_000002_{support.NO_PID}", time.localtime(time.time() + 3600)
    )
    make(temp, 2).rename(later)
    give_to_nobody(earlier)
    give_to_nobody(later)
    report = collect_as_nobody(temp)
    assert report["in_doubt"] == [[earlier.name, f"process {pid} ({sys.executable[:60]}) refuses to be looked at"]]
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
        assert collect_sessions([temp]).removed == []
        assert (place / "more").exists()
    rest(session)
    assert len(collect_sessions([temp]).removed) == 1
    assert (precious / "thesis").exists()


def test_on_a_network_file_system_it_stays(temp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other hosts have the directory too, its cluster may be on any of them."""
    session, real = make(temp), disk.free_space
    monkeypatch.setattr(disk, "free_space", lambda path: real(path)._replace(kind="lustre"))
    state, why = judge(session)
    assert (state, why) == ("in doubt", "it is on a network file system (lustre): its cluster may be on another host")
    assert collect_sessions([temp]).removed == []


@sees_all
def test_what_a_session_holds(temp: Path) -> None:
    """Bytes of logs and all, and the virtual environments that Ray left."""
    session = make(temp)
    for name in ("pip/1/virtualenv", "working_dir_files/_ray_pkg_1/.venv"):
        venv = session / "runtime_resources" / name
        venv.mkdir(parents=True)
        (venv / "pyvenv.cfg").write_text("home = /usr")
        (venv / "big").write_bytes(b"x" * 500_000)
    (one,) = liveness.survey([temp])
    assert (one.venvs, one.exact) == (2, one.exact)
    assert 10_000 <= one.logs_bytes < 100_000
    assert 1_000_000 <= one.reclaimable_bytes <= one.size_bytes < 1_200_000
    shown = cli("list", "--sessions", "--tmpdir", temp).stdout
    assert re.search(r"SESSION +STATE +SIZE +AGE +LAST WRITTEN +HOLDS +WHY", shown)
    assert re.search(rf"{session.name} +dead +1\.\d MB .* 2 venvs +no process names it", shown)
    assert "1 session, 1." in shown


# session_latest


def latest(temp: Path) -> str | None:
    link = temp / "session_latest"
    return os.readlink(link) if link.is_symlink() else None


def test_latest_is_mended(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """It leads to the newest session that is left; without any it is gone."""
    alive, newest = make(temp, 1), make(temp, 2)
    (temp / "session_latest").symlink_to(newest)
    start(children, "", alive)
    collect_sessions([temp])
    assert latest(temp) == alive.name
    children[0].kill()
    children[0].wait()
    collect_sessions([temp])
    assert list(temp.iterdir()) == []


def test_latest_that_is_right_or_not_rays_is_left(temp: Path) -> None:
    """A link that leads somewhere, and a directory of that name, stay as they are."""
    session, other = make(temp, 1), make(temp, 2)
    (temp / "session_latest").symlink_to(session)
    directories.mend_latest(temp)
    assert latest(temp) == str(session)
    (temp / "session_latest").unlink()
    (temp / "session_latest").mkdir()
    shutil.rmtree(other)
    directories.mend_latest(temp)
    assert (temp / "session_latest").is_dir()


def test_links_of_the_killed_are_swept(temp: Path) -> None:
    """A link that was never renamed into place goes when it is old; others' files of such names stay."""
    old, young, file = (temp / f".session_latest.{digit * 8}" for digit in "abc")
    old.symlink_to("x")
    young.symlink_to("x")
    file.write_text("")
    os.utime(old, (0, 0), follow_symlinks=False)
    directories.mend_latest(temp)
    assert not old.is_symlink()
    assert young.is_symlink()
    assert file.exists()


# As ray._private.utils.try_to_symlink does it.
RAY_STARTS = """
import os, sys
temp = sys.argv[1]
link = os.path.join(temp, "session_latest")
for number in range(1000, 3000):
    session = os.path.join(temp, f"session_2026-01-02_03-04-05_{number:06}_77")
    os.mkdir(session)
    if os.path.exists(link):
        try:
            os.remove(link)
        except OSError:
            continue
    try:
        os.symlink(session, link)
    except OSError:
        pass
    if number != 2999:
        os.rmdir(session)
"""


def test_latest_in_a_race_with_clusters_that_start(temp: Path) -> None:
    """Whoever comes first, the link of the last cluster leads to it in the end."""
    with subprocess.Popen([sys.executable, "-c", RAY_STARTS, temp]) as child:
        while child.poll() is None:
            directories.mend_latest(temp)
    directories.mend_latest(temp)
    assert child.returncode == 0
    assert os.path.basename(latest(temp) or "") == "session_2026-01-02_03-04-05_002999_77"
    assert sorted(path.name for path in temp.iterdir() if path.name.startswith(".")) == []


# Collectors that meet others, and death in between


def frozen_at(point: str, folder: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """`ray-envcache` that stands still at a point until `stop-<point>` is gone."""
    (folder / f"stop-{point}").touch()
    command = [sys.executable, "-m", "ray_envcache", *map(str, arguments)]
    environ = {**os.environ, "RAY_ENVCACHE_TEST_POINTS": str(folder)}
    child = subprocess.Popen(command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    support.wait_until((folder / f"reached-{point}").exists, "it is there")
    return child


def test_who_comes_in_between_gets_it_back(temp: Path, tmp_path: Path, children: list[subprocess.Popen[str]]) -> None:
    """A process that names a session after the look, and before the deleting, keeps it; the other one goes."""
    wanted, other = make(temp, 1), make(temp, 2)
    collector = frozen_at("sessions-renamed", tmp_path, "gc", "--sessions", "--tmpdir", temp)
    children.append(collector)
    assert not wanted.exists()
    start(children, "", f"--session-name={wanted.name}")
    (tmp_path / "stop-sessions-renamed").unlink()
    out, _ = collector.communicate()
    assert "Removed 1 session" in out
    assert "1 alive" in out
    assert (wanted / "logs" / "raylet.out").exists()
    assert not other.exists()


def test_sigkill_between_renaming_and_deleting(
    temp: Path, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    """Another collector passes over what one has; after its death the next one finishes, and shows it before."""
    session = make(temp)
    collector = frozen_at("sessions-renamed", tmp_path, "gc", "--sessions", "--tmpdir", temp)
    children.append(collector)
    assert [one.why for one in collect_sessions([temp]).alive] != []
    collector.kill()
    collector.wait()
    assert not session.exists()
    assert judge(session) == ("dead", "a collector died over it")
    assert [one.name for one in collect_sessions([temp]).removed] == [session.name]
    assert list(temp.iterdir()) == []


PRELUDE = """
import os, signal, sys
from pathlib import Path
from ray_envcache import errors
from ray_envcache.sessions import directories, liveness
from ray_envcache.system import mentions, processes
from ray_envcache.sessions.collector import collect_sessions

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.chmod", "os.symlink", "fcntl.flock"}
remaining = int(sys.argv[1])

def count(event, arguments):
    global remaining
    if event in CHANGES:
        remaining -= 1
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
collect_sessions([Path(sys.argv[2])])
"""


@sees_all
def test_sigkill_at_every_step(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """After a SIGKILL between any two changes the living session is whole, and the next run finishes all."""
    alive = make(temp, 9)
    start(children, "", f"--session-name={alive.name}")
    number = 0
    while True:
        number += 1
        dead = [make(temp, 1), make(temp, 2)]
        (temp / "session_latest").unlink(missing_ok=True)
        (temp / "session_latest").symlink_to(f"session_2026-01-02_03-04-05_999999_{support.NO_PID}")
        done = subprocess.run([sys.executable, "-c", PRELUDE, str(number), temp], check=False)
        report = collect_sessions([temp])
        assert report.failed == []
        assert not any(session.exists() for session in dead)
        assert latest(temp) == alive.name
        left = {path.name for path in temp.iterdir() if not path.name.startswith(".session_latest.")}
        assert left == {alive.name, "session_latest"}
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL
    assert number > 15
    assert (alive / "logs" / "raylet.out").stat().st_size == 10_000


def test_collectors_at_once(temp: Path) -> None:
    """Of several collectors none fails, and in the end each session was removed."""
    for number in range(150):  # more than are taken at a time
        make(temp, number)
    command = [sys.executable, "-m", "ray_envcache", "gc", "--sessions", "--json", "--tmpdir", str(temp)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    reports = [json.loads(child.communicate()[0]) for child in running]
    assert [child.returncode for child in running] == [0, 0, 0]
    # A collector that looks at a session at this moment is a process that has its files open.
    collect_sessions([temp])
    assert list(temp.iterdir()) == []
    removed = [one["name"] for report in reports for one in report["removed"]]
    assert len(removed) == len(set(removed)) > 0


@sees_all
def test_what_cannot_be_deleted_is_reported(temp: Path) -> None:
    """The rest goes nevertheless, the exit code is 1, and the next run finds what stayed."""
    session = make(temp)
    stubborn = session / "logs" / "raylet.out"
    if os.geteuid() != 0 or subprocess.run(["chattr", "+i", stubborn], capture_output=True, check=False).returncode:
        pytest.skip("needs root and chattr")
    try:
        done = cli("gc", "--sessions", "--tmpdir", temp)
        assert done.returncode == 1
        assert f"error: Cannot remove {session.name}: Operation not permitted" in done.stderr
        (going,) = temp.iterdir()
        assert sorted(path.name for path in going.rglob("*")) == ["logs", "raylet.out"]
    finally:
        for path in temp.rglob("raylet.out"):
            subprocess.run(["chattr", "-i", path], check=True)
    assert len(collect_sessions([temp]).removed) == 1


@sees_all
def test_a_writer_does_not_stop_the_deleting(temp: Path) -> None:
    """Files that appear or vanish while a session is deleted are no crash; a second run has the rest."""
    session = make(temp).rename(temp / directories.going_name(f"session_2026-01-02_03-04-05_000001_{support.NO_PID}"))
    for number in range(2000):
        (session / "logs" / f"log-{number}").touch()
    writer = "import time\nwhile True:\n try:\n  open(f'logs/{time.time_ns()}', 'w').close()\n except OSError: break"
    descriptor = os.open(session, os.O_RDONLY)
    with subprocess.Popen([sys.executable, "-c", writer], cwd=session) as child:
        with suppress(OSError):
            files.empty_directory(descriptor)
        child.kill()
    os.close(descriptor)
    assert len(collect_sessions([temp]).removed) == 1
    assert list(temp.iterdir()) == []


def test_a_deep_tree_is_no_crash(temp: Path) -> None:
    """A tree deeper than we can go down is reported, or goes."""
    session = make(temp)
    here = os.open(session / "logs", os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    os.utime(session, (0, 0))
    done = cli("gc", "--sessions", "--tmpdir", temp)
    assert done.returncode in {0, 1}
    assert "Traceback" not in done.stderr
    subprocess.run(["rm", "-rf", *temp.iterdir()], check=True)


# Where they are, and the command line


def test_temp_directories_are_rays(tmp_path: Path) -> None:
    """RAY_TMPDIR, TMPDIR or /tmp with `ray` below, as Ray has it; a chosen one may be either of the two."""
    ray_tmpdir, tmpdir = tmp_path / "a", tmp_path / "b"
    for folder in (ray_tmpdir, tmpdir):
        (folder / "ray").mkdir(parents=True)
    environ = {"RAY_TMPDIR": str(ray_tmpdir), "TMPDIR": str(tmpdir)}
    assert directories.temp_dirs(None, environ) == [ray_tmpdir / "ray"]
    if sys.platform.startswith("linux"):
        assert directories.temp_dirs(None, {"TMPDIR": str(tmpdir)}) == [tmpdir / "ray"]
    assert directories.temp_dirs(None, {"RAY_TMPDIR": str(tmp_path)}) == []
    assert directories.temp_dirs(tmpdir, environ) == [tmpdir, tmpdir / "ray"]
    assert directories.temp_dirs(tmpdir / "ray", environ) == [tmpdir / "ray"]
    (tmp_path / "link").symlink_to(tmpdir / "ray")
    assert directories.temp_dirs(tmp_path / "link", environ) == [tmpdir / "ray"]
    with pytest.raises(TempDirError, match="No directory"):
        directories.temp_dirs(tmp_path / "missing", environ)


CLI_AS_NOBODY = """
import _strptime, contextlib, io, os, sys
from ray_envcache.cli import main
from ray_envcache.sessions import run_directory, short_path
given = sys.argv[1:]
def call(*arguments):
    sys.argv = ["ray-envcache", *arguments]
    try:
        main.main()
        return 0
    except SystemExit as end:
        return end.code or 0
# Once as root, and unheard, for all that is imported late: the other user may not read where it lies.
with contextlib.redirect_stdout(io.StringIO()):
    for verb in ("list", "gc"):
        call(verb, "--sessions", "--json", "--tmpdir", "/proc/self")
os.setgroups([]); os.setgid(65534); os.setuid(65534)
sys.stderr = sys.stdout
print(call(*given))
"""


def cli_as_nobody(*arguments: str | Path, **environ: str) -> list[str]:
    """What the command line says to another user; the last line is its status."""
    return support.run_python(CLI_AS_NOBODY, *map(str, arguments), environ=environ).splitlines()


@needs_root
@pytest.mark.parametrize("verb", ["list", "gc"])
@pytest.mark.parametrize(("outer", "inner"), [(0o700, None), (0o755, 0o700), (0o700, 0o700), (0o755, 0o755)])
def test_directories_of_other_users_runs(temp: Path, verb: str, outer: int, inner: int | None) -> None:
    """What others called like a run, whatever its modes, stops nobody; those of one's own are looked into."""
    foreign, own = (temp.parent / f"{directories.RUN_PREFIX}{name}" for name in ("aaaaaaaa", "bbbbbbbb"))
    for folder in (foreign, own):
        (folder / "ray").mkdir(parents=True)
    session = make(own / "ray")
    for path in (own, own / "ray"):
        os.chown(path, NOBODY, NOBODY)
    give_to_nobody(session)
    if inner is None:
        (foreign / "ray").rmdir()
    else:
        make(foreign / "ray", 2)
        (foreign / "ray").chmod(inner)
    foreign.chmod(outer)
    for arguments in (("--tmpdir", temp.parent), ()):
        said = cli_as_nobody(verb, "--sessions", "--json", *arguments, RAY_TMPDIR=str(temp.parent))
        assert said[-1] == "0", said
        report = json.loads("\n".join(said[:-1]))
        assert str(own / "ray") in report["temp_dirs"]
        assert str(foreign / "ray") not in report["temp_dirs"]
    assert session.exists() is (verb == "list")


@needs_root
def test_a_temp_directory_that_may_not_be_looked_into(temp: Path) -> None:
    """The one that was chosen, or Ray's in it, is an error that names it; so is a default that hides one."""
    for forbidden, arguments in (
        (temp.parent, ("--tmpdir", temp.parent)),
        (temp.parent, ()),
        (temp, ("--tmpdir", temp.parent)),
        (temp, ()),
    ):
        mode = forbidden.stat().st_mode
        forbidden.chmod(0o700)
        said = cli_as_nobody("list", "--sessions", *arguments, RAY_TMPDIR=str(temp.parent))
        assert (said[0], said[-1]) == (f"error: You may not look into the temp directory `{forbidden}`", "2")
        forbidden.chmod(mode)


@needs_root
def test_links_that_may_not_be_looked_at_are_not_mended(temp: Path) -> None:
    """Where Ray's directory belongs to somebody else, nothing is mended, and that is no error."""
    temp.chmod(0o700)
    code = """
    import os, sys
    from pathlib import Path
    from ray_envcache.sessions import directories
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    directories.mend_latest(Path(sys.argv[1]))
    """
    support.run_python(code, str(temp))


def test_json_has_the_schema(temp: Path) -> None:
    """Exactly the documented fields, bytes as integers, UTC times; of a dead one, a kept one and one in doubt."""
    make(temp, 1, age=-500)
    make(temp, 2)
    make(temp, 3, age=10 * 86_400)
    data = json.loads(cli("list", "--sessions", "--json", "--tmpdir", temp).stdout)
    assert (data["schema_version"], data["temp_dirs"]) == (1, [str(temp)])
    for one in data["sessions"]:
        assert set(one) == {
            "name", "path", "state", "why", "size_bytes", "reclaimable_bytes", "exact", "logs_bytes", "venvs",
            "started_at", "last_written_at", "user",
        }  # fmt: skip
        assert isinstance(one["size_bytes"], int)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", one["last_written_at"])
    command: list[str | Path] = ["gc", "--sessions", "--older-than", "1d", "--json", "--tmpdir", temp]
    for flags in (["-n"], []):
        report = json.loads(cli(*command, *flags).stdout)
        assert [len(report[name]) for name in ("removed", "kept", "alive", "in_doubt")] == [1, 1, 0, 1]
        assert (report["dry_run"], report["failed"]) == (bool(flags), [])
        assert report["freed_bytes"] == report["removed"][0]["reclaimable_bytes"]
    assert "Removed 0 sessions, freed 0 B; 0 alive, 1 in doubt, 1 dead but younger, 0 failed" in (
        cli(*[part for part in command if part != "--json"]).stdout
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["gc", "--older-than", "1d"],
        ["gc", "--tmpdir", "/tmp"],
        ["list", "--tmpdir", "/tmp"],
        ["gc", "--sessions", "--all"],
        ["gc", "--sessions", "--unused-for", "1d"],
        ["gc", "--sessions", "--older-than", "soon"],
        ["gc", "--sessions", "--tmpdir", "/nowhere"],
        ["list", "--sessions", "--tmpdir", "/etc/passwd"],
    ],
)
def test_usage_errors(arguments: list[str]) -> None:
    """Options that do not go together, and directories that are none, are errors of usage."""
    done = cli(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "rror: " in done.stderr


def test_no_temp_directory_is_no_error(tmp_path: Path) -> None:
    """Where no cluster has ever run there is nothing to do; the store is not asked for."""
    done = cli("gc", "--sessions", RAY_TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Removed 0 sessions, freed 0 B")
    listed = cli("list", "--sessions", RAY_TMPDIR=str(tmp_path))
    assert listed.stdout.startswith("0 sessions")
    assert listed.stderr == "Looked in nowhere: no directory of Ray's is there\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="compares with /proc")
def test_mentions_without_proc(
    temp: Path, children: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there is no /proc, command lines, working directories and open files are seen as well."""
    from ray_envcache.system import mentions

    named, opened, neither = make(temp, 1), make(temp, 2), make(temp, 3)
    start(children, "", f"--session-name={named.name}")
    # In two parts, or the command line would name it.
    start(children, f"file = open({str(opened)[:-1]!r} + '{opened.name[-1]}/logs/raylet.out')")
    monkeypatch.setattr(mentions, "_has_proc", lambda: False)
    found = mentions.find_mentions(liveness.NAMED).by_name
    assert {named.name, opened.name} <= found.keys()
    assert neither.name not in found
