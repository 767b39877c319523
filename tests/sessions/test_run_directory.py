"""The temp directory of one run: what keeps it, what is left of it, on full disks too; without clusters."""

from __future__ import annotations

import ast
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.sessions import directories, run_directory, short_path
from ray_envcache.sessions.run_directory import RunTmpdir, sweep
from ray_envcache.system import flock
from tests import support
from tests.sessions.made import collect, sees_all

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
SESSION = f"session_2026-01-02_03-04-05_000001_{support.NO_PID}"


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A temp directory whose path is too long for Ray."""
    top = tmp_path / ("long" * 20)
    top.mkdir()
    return top


@pytest.fixture(autouse=True)
def links(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the short links of these tests are."""
    with support.short_folder() as folder:
        monkeypatch.setattr(short_path, "link_places", lambda: [folder])
        yield folder / f"re-{os.geteuid()}"


@pytest.fixture
def place(top: Path) -> RunTmpdir:
    return RunTmpdir.make(str(top), {})


def leave_session(temp: Path, name: str = SESSION) -> Path:
    """A session directory as a dead cluster leaves it."""
    session = temp / name
    for folder in ("sockets", "logs", "runtime_resources"):
        (session / folder).mkdir(parents=True)
    (session / "logs" / "raylet.out").write_text("why it failed")
    for path in [session, *session.rglob("*")]:
        os.utime(path, (1, 1))
    return session


def inherit(children: list[subprocess.Popen[str]], place: RunTmpdir) -> subprocess.Popen[str]:
    """A program that has the flock, as that of `run` has, and ends when its stdin does."""
    return support.start_python(children, "", pass_fds=place.descriptors)


def end(child: subprocess.Popen[str]) -> None:
    child.kill()
    child.communicate()


def kill(place: RunTmpdir) -> None:
    """What the kernel does for a runner that is killed."""
    (descriptor,) = place.descriptors
    os.close(descriptor)


def sweep_later(top: Path, *, later: float = run_directory.UNUSED_SECONDS + 60) -> None:
    """What `gc --sessions --tmpdir` does once the sessions of the dead are gone, a day later."""
    then = time.time() - later
    for folder in top.iterdir():
        os.utime(folder, (then, then))
    sweep(directories.run_dirs(top, {}))


# What keeps it


def test_a_living_run_keeps_its_directory(top: Path, place: RunTmpdir, children: list[subprocess.Popen[str]]) -> None:
    """It stays between two clusters, with and without `run` itself, for as long as the program lives."""
    program = inherit(children, place)
    place.temp.mkdir()
    sweep_later(top)
    assert place.temp.is_dir()
    kill(place)
    sweep_later(top)
    assert os.path.samefile(place.short, place.folder)
    end(program)
    sweep_later(top)
    assert list(top.iterdir()) == []


@pytest.mark.parametrize("ray", [True, False])
def test_what_a_killed_run_left_goes(top: Path, place: RunTmpdir, ray: bool) -> None:  # noqa: FBT001
    """The directory of a killed run goes, whether or not a cluster was started in it; not while a session is in it."""
    if ray:
        session = leave_session(place.temp)
        kill(place)
        sweep_later(top)
        assert session.is_dir()
        shutil.rmtree(session)
    else:
        kill(place)
    sweep_later(top)
    assert list(top.iterdir()) == []


def test_a_young_directory_stays(top: Path, place: RunTmpdir) -> None:
    """For a day: a run that has just made it has no flock yet."""
    place.temp.mkdir()
    kill(place)
    sweep_later(top, later=run_directory.UNUSED_SECONDS - 60)
    assert place.temp.is_dir()
    sweep_later(top)
    assert list(top.iterdir()) == []


def test_the_link_goes_with_the_directory(top: Path, place: RunTmpdir, links: Path) -> None:
    """At the end of a run nothing is left of it anywhere."""
    assert [os.readlink(link) for link in links.iterdir()] == [str(place.folder)]
    place.close(pytest.fail, failed=False, keep=False)
    assert (list(top.iterdir()), list(links.iterdir())) == ([], [])


def test_what_is_not_as_a_run_leaves_it_stays(top: Path) -> None:
    """Saved logs stay, and what is only called like the directory of a run."""
    names = ("aaaaaaaa", "bbbbbbbb", "cccccccc", "results1", "mine")
    logs, mixed, public, results, mine = (top / f"{directories.RUN_PREFIX}{name}" for name in names)
    for folder in (logs, mixed, public, results, mine):
        (folder / "ray").mkdir(parents=True)
        folder.chmod(0o700)
    (logs / "logs").mkdir()
    (mixed / "ray" / "thesis").touch()
    (mixed / "ray" / "session_latest").symlink_to("nowhere")
    public.chmod(0o755)
    (results / "ray").rmdir()
    (results / "model").touch()
    sweep_later(top)
    left = {str(path.relative_to(top))[len(directories.RUN_PREFIX) :] for path in top.rglob("*")}
    assert left == {
        "aaaaaaaa", "aaaaaaaa/logs", "bbbbbbbb", "bbbbbbbb/ray", "bbbbbbbb/ray/thesis", "cccccccc", "cccccccc/ray",
        "results1", "results1/model", "mine", "mine/ray",
    }  # fmt: skip


def test_what_the_program_wrote_stays(place: RunTmpdir) -> None:
    """Files of the program below $RAY_TMPDIR, and in the folder of Ray's sessions, stay at the end and are named."""
    folder, said = place.folder, list[str]()
    leave_session(place.temp)
    for name in ("results", "ray/prom_metrics_service_discovery.json"):
        (folder / name).mkdir()
        (folder / name / "model").write_text("hours of work")
    (place.temp / "checkpoint\n").write_text("hours of work")
    place.close(said.append, failed=False, keep=False)
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == [
        "ray", "ray/checkpoint\n", "ray/prom_metrics_service_discovery.json",
        "ray/prom_metrics_service_discovery.json/model", "results", "results/model",
    ]  # fmt: skip
    names = "ray/checkpoint?, ray/prom_metrics_service_discovery.json, results"
    assert said == [f"kept: {folder} (what Ray did not make: {names})"]


def test_what_the_program_wrote_survives_a_killed_run(top: Path, place: RunTmpdir) -> None:
    """A sweep removes what Ray made in the directory of a killed run, and leaves the rest, run or no run."""
    place.temp.mkdir()
    (place.temp / "session_latest").symlink_to("nowhere")
    (place.temp / "checkpoint").write_text("hours of work")
    kill(place)
    for _ in range(2):
        sweep_later(top)
        assert [path.name for path in place.folder.rglob("*")] == ["ray", "checkpoint"]


# In the words of Ray itself, whose names may change.
MAKE_WHAT_RAY_MAKES = """
import os, runpy, sys
import ray
os.environ["RAY_TMPDIR"] = sys.argv[1]
from ray._common.utils import get_default_ray_temp_dir, get_ray_address_file
from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE, SESSION_LATEST
temp = get_default_ray_temp_dir()
os.makedirs(temp)
os.symlink("nowhere", os.path.join(temp, SESSION_LATEST))
for name in (get_ray_address_file(temp), PROMETHEUS_SERVICE_DISCOVERY_FILE, "tmp_" + PROMETHEUS_SERVICE_DISCOVERY_FILE):
    open(os.path.join(temp, name), "w").close()
# By its path: its package needs pyarrow.
with runpy.run_path(os.path.join(os.path.dirname(ray.__file__), "air/_internal/filelock.py"))["TempFileLock"]("data"):
    print(sorted(name for _, folders, files in os.walk(sys.argv[1]) for name in folders + files))
"""


def test_what_ray_makes_beside_its_sessions_goes(top: Path, place: RunTmpdir) -> None:
    """All that Ray makes below $RAY_TMPDIR beside sessions is removed at the end of a run, with the directory."""
    made = ast.literal_eval(support.run_python(MAKE_WHAT_RAY_MAKES, str(place.folder)))
    assert len(made) == 7
    place.close(pytest.fail, failed=False, keep=False)
    assert list(top.iterdir()) == []


def test_what_the_program_leaves_keeps_the_directory(
    top: Path, place: RunTmpdir, children: list[subprocess.Popen[str]]
) -> None:
    """A process in the background that outlives the command keeps directory and link, and a message says so."""
    background = inherit(children, place)
    place.temp.mkdir()
    said: list[str] = []
    place.close(said.append, failed=False, keep=False)
    assert [str(place.folder) in text and "gc --sessions" in text for text in said] == [True]
    sweep_later(top)
    assert os.path.samefile(place.short, place.folder)
    end(background)
    sweep_later(top)
    assert list(top.iterdir()) == []


def test_without_flocks(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without flocks a run works as well, and no sweep takes its directory."""
    real = flock.try_flock

    def refused(path: Path, **options: Any) -> int | None:
        if path.name.startswith(directories.RUN_PREFIX):
            raise OSError(errno.EBADF, "as NFS does for directories")
        return real(path, **options)

    monkeypatch.setattr(flock, "try_flock", refused)
    place = RunTmpdir.make(str(top), {})
    sweep_later(top)
    assert place.folder.is_dir()
    place.close(pytest.fail, failed=False, keep=False)
    assert list(top.iterdir()) == []


# Full disks, and others that refuse


def test_logs_of_a_failed_run_stay(top: Path, place: RunTmpdir) -> None:
    """They stay where they are, their place is said, all else of the session goes; a sweep leaves them."""
    session = leave_session(place.temp)
    said: list[str] = []
    place.close(said.append, failed=True, keep=False)
    assert said == [f"logs of the failed run: {session / 'logs'}"]
    sweep_later(top)
    assert [one.why for one in collect(place.temp)["in doubt"]] == ["only its logs are left"]
    assert [path.name for path in place.folder.rglob("*")] == ["ray", SESSION, "logs", "raylet.out"]


@sees_all
def test_a_session_without_logs_goes_whole(tmp_path: Path) -> None:
    """Where a killed collector has deleted the logs already, none are kept."""
    (tmp_path / f"going-{SESSION}" / "sockets").mkdir(parents=True)
    assert [one.name for one in collect(tmp_path, keep_logs=True)["removed"]] == [SESSION]
    assert list(tmp_path.iterdir()) == []


@needs_root
def test_a_failed_run_on_a_small_disk(tmp_path: Path) -> None:
    """On a disk without an inode left the logs are saved as well, and the rest of the session goes."""
    disk = tmp_path / "disk"
    with support.small_disk(disk):
        place = RunTmpdir.make(str(disk), {})
        leave_session(place.temp)
        for number in range(os.statvfs(disk).f_favail):
            (disk / f"ballast-{number}").touch()
        with pytest.raises(OSError, match="No space left"):
            (place.folder / "x").mkdir()
        said: list[str] = []
        place.close(said.append, failed=True, keep=False)
        assert said == [f"logs of the failed run: {place.temp / SESSION / 'logs'}"]
        assert [path.name for path in place.folder.rglob("*")] == ["ray", SESSION, "logs", "raylet.out"]


@pytest.mark.parametrize("failing", ["collect_sessions", "judge_sessions"])
def test_cleaning_up_raises_nothing(place: RunTmpdir, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    """Each failure is one message, nothing is removed unseen, and the directory is let go."""

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    session = leave_session(place.temp)
    monkeypatch.setattr(run_directory, failing, fail)
    said: list[str] = []
    place.close(said.append, failed=True, keep=False)
    assert said == [f"not all of the temp directory could be removed: {place.folder} (Input/output error)"]
    assert (session / "logs" / "raylet.out").exists()
    assert flock.is_free(place.folder)


def test_nothing_takes_a_session_that_a_process_joined(
    place: RunTmpdir, monkeypatch: pytest.MonkeyPatch, children: list[subprocess.Popen[str]]
) -> None:
    """A process that joins between the judgement and the deleting keeps its session."""
    session = leave_session(place.temp)
    real = flock.try_flock

    def join(path: Path, **options: Any) -> int | None:
        held = real(path, **options)
        if "flags" in options and not children:  # the collector, not one that only asks
            children.append(subprocess.Popen(["sleep", "600"], cwd=session, text=True))
        return held

    monkeypatch.setattr(flock, "try_flock", join)
    collect(place.temp, starting=0, keep_logs=True)
    assert (session / "runtime_resources").exists()
    end(children[0])
    place.close(lambda _: None, failed=False, keep=False)
