"""Collectors of sessions that meet others, and death in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from ray_envcache.sessions import directories
from ray_envcache.system import files, testpoints
from tests import support
from tests.sessions.made import cli, collect, judge, make, sees_all, start


def latest(temp: Path) -> str | None:
    link = temp / "session_latest"
    return os.readlink(link) if link.is_symlink() else None


def test_latest_goes_where_it_dangles(temp: Path, children: list[subprocess.Popen[str]]) -> None:
    """A collection removes a link to what it removed, and leaves one that leads to a living session."""
    alive, dead = make(temp, 1), make(temp, 2)
    start(children, "", alive)
    (temp / "session_latest").symlink_to(alive)
    make(temp, 3)
    collect(temp)
    assert latest(temp) == str(alive)
    (temp / "session_latest").unlink()
    (temp / "session_latest").symlink_to(dead)
    collect(temp)
    assert [path.name for path in temp.iterdir()] == [alive.name]


def test_latest_that_is_not_rays_is_left(temp: Path) -> None:
    """A directory of that name stays as it is."""
    (temp / "session_latest").mkdir()
    directories.remove_dangling_latest(temp)
    assert (temp / "session_latest").is_dir()


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


def test_what_another_user_puts_in_its_place_stays(temp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All users may rename there: only the directory that was judged is deleted."""
    session = make(temp)
    renamed = temp / f"going-{session.name}"

    def replace(_point: str) -> None:
        renamed.rename(temp / "away")
        renamed.mkdir()
        (renamed / "thesis").touch()

    monkeypatch.setattr(testpoints, "reach", replace)
    assert [one.why for one in collect(temp)["in doubt"]] == ["it was replaced by another directory"]
    assert sorted(str(path.relative_to(temp)) for path in temp.glob("*/*")) == [
        "away/logs", "away/runtime_resources", "away/sockets", f"{session.name}/thesis",
    ]  # fmt: skip


def test_sigkill_between_renaming_and_deleting(
    temp: Path, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    """Another collector passes over what one has; after its death the next one finishes, and shows it before."""
    session = make(temp)
    collector = frozen_at("sessions-renamed", tmp_path, "gc", "--sessions", "--tmpdir", temp)
    children.append(collector)
    assert [one.why for one in collect(temp)["alive"]] != []
    collector.kill()
    collector.wait()
    assert not session.exists()
    assert judge(session) == ("dead", "no process names it")
    assert [one.name for one in collect(temp)["removed"]] == [session.name]
    assert list(temp.iterdir()) == []


PRELUDE = """
import os, signal, sys
from pathlib import Path
from ray_envcache import errors
from ray_envcache.sessions import directories
from ray_envcache.system import processes
from ray_envcache.sessions.collector import collect_sessions

CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.chmod", "fcntl.flock"}
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
        report = collect(temp)
        assert report["failed"] == []
        assert not any(session.exists() for session in dead)
        assert [path.name for path in temp.iterdir()] == [alive.name]
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
    collect(temp)
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
    assert len(collect(temp)["removed"]) == 1


@sees_all
def test_a_writer_does_not_stop_the_deleting(temp: Path) -> None:
    """Files that appear or vanish while a session is deleted are no crash; a second run has the rest."""
    session = make(temp).rename(temp / f"going-session_2026-01-02_03-04-05_000001_{support.NO_PID}")
    for number in range(2000):
        (session / "logs" / f"log-{number}").touch()
    writer = "import time\nwhile True:\n try:\n  open(f'logs/{time.time_ns()}', 'w').close()\n except OSError: break"
    descriptor = os.open(session, os.O_RDONLY)
    with subprocess.Popen([sys.executable, "-c", writer], cwd=session) as child:
        with suppress(OSError):
            files.empty_directory(descriptor)
        child.kill()
    os.close(descriptor)
    assert len(collect(temp)["removed"]) == 1
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
