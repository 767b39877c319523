"""Session directories and temp directories of real clusters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from tests import support
from tests.cluster.conftest import NEWEST, Host

pytestmark = pytest.mark.cluster

# Says where its session is, and which process ran a task; then stays until its stdin ends.
CLUSTER = """
import json, sys
import ray
ray.init(num_cpus=1, log_to_driver=False)
worker = ray.get(ray.remote(lambda: __import__("os").getpid()).remote())
print(json.dumps([ray._private.worker._global_node.get_session_dir_path(), worker]), flush=True)
sys.stdin.read()
ray.shutdown()
"""


def cli(host: Host, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [host.python, "-m", "ray_envcache", *arguments]
    return subprocess.run(command, env=host.environ(**environ), capture_output=True, text=True, check=False)


def gc(host: Host, *arguments: str) -> dict[str, Any]:
    done = cli(host, "gc", "--sessions", "--json", *arguments)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return {name: [one["name"] for one in report[name]] for name in ("removed", "kept", "alive", "in_doubt")}


def judged(host: Host) -> dict[str, tuple[str, str]]:
    """What a collection would make of each session, and why."""
    report = json.loads(cli(host, "gc", "--sessions", "--json", "-n").stdout)
    found = [one for state in ("removed", "kept", "alive", "in_doubt") for one in report[state]]
    return {one["name"]: (one["state"], one["why"]) for one in found}


class Cluster(NamedTuple):
    driver: subprocess.Popen[str]
    session: Path
    worker: int


def start(host: Host) -> Cluster:
    driver = host.start(CLUSTER)
    assert driver.stdout is not None
    line = driver.stdout.readline()
    if not line:
        pytest.fail(driver.communicate()[1])
    session, worker = json.loads(line)
    return Cluster(driver, Path(session), worker)


def age(session: Path) -> None:
    """Make it look as if its cluster had started some time ago: a young session is in doubt."""
    os.utime(session, (0, 0))


def processes_of(session: Path) -> list[int]:
    """The processes that have files of a session open, or name it, found in another way than the package does."""
    done = subprocess.run(["find", "/proc", "-maxdepth", "3", "-path", "/proc/[0-9]*/fd/*", "-lname", f"*{session.name}*"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    opened = {int(line.split("/")[2]) for line in done.stdout.splitlines()}
    # One that was killed in the middle of its start, or has not ended quite, has no such file.
    named = {one.pid for one in psutil.process_iter(["cmdline"]) if session.name in str(one.info["cmdline"])}
    return sorted(opened | named)


def test_alive_stays_and_dead_goes(host: Host) -> None:
    """Of two clusters at once one is killed with all its processes: its session goes, the other works on."""
    killed, first, _ = start(host)
    stays, second, _ = start(host)
    age(first)
    age(second)
    assert {name: state for name, (state, _) in judged(host).items()} == {first.name: "alive", second.name: "alive"}
    assert gc(host)["removed"] == []
    support.kill_tree(killed.pid)
    support.wait_until(lambda: not processes_of(first), "its processes are gone")
    assert judged(host)[first.name][0] == "removed"
    assert (first / "sockets" / "raylet").exists()  # which says nothing
    assert gc(host) == {"removed": [first.name], "kept": [], "alive": [second.name], "in_doubt": []}
    assert not first.exists()
    assert (first.parent / "session_latest").resolve() == second
    stays.communicate()
    assert stays.returncode == 0
    # A clean shutdown leaves it, too.
    assert second.exists()
    age(second)
    assert gc(host)["removed"] == [second.name]
    assert [path.name for path in first.parent.iterdir() if "session" in path.name] == []


@pytest.mark.parametrize("python", [NEWEST], indirect=True)
def test_orphans_keep_their_session(host: Host) -> None:
    """While one process that a dead cluster left has its log open, the session stays; then it goes."""
    driver, session, worker = start(host)
    age(session)
    # In a session of its own: a worker itself ends soon after its raylet, stopped or not.
    log = next((session / "logs").glob(f"worker-*-{worker}.out"))
    with log.open("a") as file:
        orphan = subprocess.Popen(["sleep", "600"], stdout=file, start_new_session=True)
    try:
        support.kill_tree(driver.pid)
        driver.wait()
        support.wait_until(lambda: processes_of(session) == [orphan.pid], "the others are gone")
        state, why = judged(host)[session.name]
        assert (state, f"process {orphan.pid} (sleep" in why) == ("alive", True)
        assert gc(host)["removed"] == []
    finally:
        orphan.kill()
        orphan.wait()
    support.wait_until(lambda: not processes_of(session), "its processes are gone")
    assert gc(host)["removed"] == [session.name]


@pytest.mark.parametrize("python", [NEWEST], indirect=True)
def test_sigkill_of_a_collector_beside_a_living_cluster(host: Host) -> None:
    """What a killed collector leaves is finished by the next, and the cluster beside it is not disturbed."""
    driver, dead, _ = start(host)
    support.kill_tree(driver.pid)
    support.wait_until(lambda: not processes_of(dead), "its processes are gone")
    stays, alive, _ = start(host)
    age(dead)
    age(alive)
    points = host.folder / "points"
    points.mkdir()
    (points / "stop-sessions-renamed").touch()
    command: list[str | Path] = [host.python, "-m", "ray_envcache", "gc", "--sessions"]
    with subprocess.Popen(command, env=host.environ(RAY_ENVCACHE_TEST_POINTS=str(points))) as collector:
        support.wait_until((points / "reached-sessions-renamed").exists, "it is half way")
        collector.kill()
    assert not dead.exists()
    assert gc(host) == {"removed": [dead.name], "kept": [], "alive": [alive.name], "in_doubt": []}
    stays.communicate()
    assert stays.returncode == 0


@pytest.mark.parametrize("python", [NEWEST], indirect=True)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_cluster_of_another_user_is_not_touched(host: Host) -> None:
    """Whether it lives or is dead: a user's gc leaves a session of another user, and says so."""
    driver, session, _ = start(host)
    age(session)
    host.temp.chmod(0o755)
    # Once as root, and unheard, for all that is imported late: the other user may not read where it lies.
    code = """
    import contextlib, io, os, sys
    from ray_envcache.cli import main
    from ray_envcache.sessions import short_path
    command = ["ray-envcache", "gc", "--sessions", "--tmpdir", sys.argv[1]]
    sys.argv = [*command, "--dry-run"]
    with contextlib.redirect_stdout(io.StringIO()):
        main.main()
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    sys.argv = command
    main.main()
    """
    temp = str(session.parent)
    said = support.run_python(code, temp, python=sys.executable)
    assert said.startswith("Removed 0 sessions, freed 0 B; 1 alive")
    support.kill_tree(driver.pid)
    support.wait_until(lambda: not processes_of(session), "its processes are gone")
    said = support.run_python(code, temp, python=sys.executable)
    assert f"Kept {session}, in doubt: it belongs to user 0" in said
    # And the other way round: root's does not touch a user's.
    shutil.chown(session, 65534)
    assert gc(host)["in_doubt"] == [session.name]
    assert (session / "logs" / "raylet.out").exists()


SHORT = """
import json, os, sys
import ray, ray_envcache
short = ray_envcache.short_tmpdir(sys.argv[1])
if sys.argv[2] == "argument":
    ray.init(num_cpus=1, log_to_driver=False, _temp_dir=short)
else:
    os.environ["RAY_TMPDIR"] = short
    ray.init(num_cpus=1, log_to_driver=False)
assert ray.get(ray.remote(lambda: 42).remote()) == 42
session = ray._private.worker._global_node.get_session_dir_path()
sockets = [os.path.join(session, "sockets", name) for name in os.listdir(os.path.join(session, "sockets"))]
ray.shutdown()
print(json.dumps([short, session, sockets]))
"""


@pytest.mark.parametrize("how", ["argument", "variable"])
def test_a_cluster_in_a_long_temp_directory(host: Host, tmp_path: Path, how: str) -> None:
    """With 200 bytes of path a cluster runs through a short link, and the session is where it should be."""
    scratch = tmp_path / ("long scratch path " * 12)
    scratch.mkdir()
    short, session, sockets = host.run(SHORT, scratch, how)
    names = {os.path.basename(path) for path in sockets}
    assert {"raylet", "plasma_store"} <= names
    for name in {*names, "dash_TaskEventsHead"}:
        assert len(os.fsencode(f"{session}/sockets/{name}")) <= 107
    real = scratch / os.path.relpath(session, short)
    assert (real / "logs" / "raylet.out").exists()
    assert (real.parent / "session_latest").resolve() == real
    age(real)
    assert gc(host, "--tmpdir", str(scratch))["removed"] == [real.name]
    assert not (real.parent / "session_latest").is_symlink()
    os.unlink(short)


@pytest.mark.parametrize("python", [NEWEST], indirect=True)
def test_without_the_link_ray_refuses(host: Host, tmp_path: Path) -> None:
    """What the link is for: such a path without it ends in Ray's error about sockets."""
    scratch = tmp_path / ("long scratch path " * 12)
    scratch.mkdir()
    driver = host.start(CLUSTER, RAY_TMPDIR=str(scratch))
    assert "AF_UNIX" in driver.communicate()[1]
