"""Unmodified Ray programs: `ray-envcache run -- python main.py`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from ray_envcache.sessions.collector import collect_sessions
from ray_envcache.sessions.directories import temp_dirs
from ray_envcache.survey.inventory import survey
from tests import support
from tests.cluster.conftest import NEWEST, Host, uv_binary

pytestmark = [pytest.mark.cluster, pytest.mark.parametrize("python", [NEWEST], indirect=True)]

# A framework that nobody may change: it starts a cluster of its own, deep inside.
FRAMEWORK = """
import json, os, sys
import ray

def main(arguments):
    ray.init(num_cpus=2, include_dashboard=False)

    @ray.remote
    def load(number):
        import framework.words
        return framework.words.WORD * number

    @ray.remote
    def join(*parts):
        import importlib.util
        return "".join(parts), sys.executable, importlib.util.find_spec("ray_envcache") is None

    text, python, alone = ray.get(join.remote(*[load.remote(number) for number in range(3)]))
    session = ray._private.worker._global_node.get_session_dir_path()
    print(json.dumps({"text": text, "python": python, "alone": alone, "session": session, "pid": os.getpid()}), flush=True)
    if "wait" in arguments:
        sys.stdin.read()
    if "fail" in arguments:
        raise SystemExit(3)
    ray.shutdown()
"""


@pytest.fixture
def program(host: Host) -> Path:
    """The folder of a project with a package in src layout and a program."""
    folder = host.folder / "program"
    (folder / "src" / "framework").mkdir(parents=True)
    (folder / "src" / "framework" / "__init__.py").write_text(FRAMEWORK)
    (folder / "src" / "framework" / "words.py").write_text("WORD = 'x'\n")
    (folder / "main.py").write_text("import framework, sys\nframework.main(sys.argv[1:])\n")
    (folder / "backend.py").write_text((support.SRC_BACKEND + support.EDITABLE_BACKEND).format(name="framework"))
    version = support.run_python("import ray; print(ray.__version__)", python=host.python).strip()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "framework"\nversion = "1.0"\nrequires-python = ">=3.10"\n'
        f'dependencies = ["ray=={version}"]\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    support.run_uv("lock", cwd=folder)
    return folder


def start(host: Host, program: Path, *arguments: str, options: tuple[str | Path, ...] = ()) -> subprocess.Popen[str]:
    command = [host.python, "-m", "ray_envcache", "run", *options, "--", *arguments]
    environ = host.environ(UV_PYTHON=sys.executable)
    child = subprocess.Popen(
        command,
        cwd=program,
        env=environ,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    host.started.append(child)
    return child


def run(host: Host, program: Path, *arguments: str, options: tuple[str | Path, ...] = ()) -> tuple[int, str, str]:
    child = start(host, program, *arguments, options=options)
    out, err = child.communicate()
    return child.returncode, out, err


def said(child: subprocess.Popen[str]) -> dict[str, str]:
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line, child.communicate()
    found: dict[str, str] = json.loads(line)
    return found


@pytest.fixture
def disk(host: Host) -> Iterator[Path]:
    """A small file system of its own, with a long path, for sessions."""
    place = host.folder / ("long" * 40)
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", "-l", place], check=False)


def test_four_at_once_on_a_small_disk(host: Host, program: Path, disk: Path) -> None:
    """One environment, four clusters, edits that show at once; the disk holds little during and nothing after."""
    (program / "src" / "framework" / "words.py").write_text("WORD = 'edited'\n")
    children = [start(host, program, "python", "main.py", options=("--tmpdir", disk)) for _ in range(4)]
    most = 0
    while any(child.poll() is None for child in children):
        usage = os.statvfs(disk)
        most = max(most, (usage.f_blocks - usage.f_bfree) * usage.f_frsize)
    results = [(child.returncode, *child.communicate()) for child in children]
    assert [status for status, _, _ in results] == [0] * 4, results
    found = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    assert {one["text"] for one in found} == {"edited" * 3}
    assert {one["alone"] for one in found} == {True}
    assert len({one["python"] for one in found}) == 1
    assert found[0]["python"].startswith(str(host.layout.entries))
    assert most < 60_000_000
    assert list(disk.iterdir()) == []
    # The environment, and the layer of the program's own package.
    assert len(list(host.layout.all_entries())) == 2

    def in_use() -> list[set[str]]:
        users = [{user.kind for user in status.users} for status in survey(host.layout) if status.in_use]
        return [kinds for kinds in users if not kinds <= {"bytecode"}]

    # On a busy machine Ray's workers end a moment after their driver.
    support.wait_until(lambda: in_use() == [], "nothing runs from it")


def test_shell_script_with_uv_run(host: Host, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that starts its program by `uv run`: driver and workers are in the environment, and no `.venv` appears."""
    monkeypatch.setenv("PATH", f"{os.path.dirname(uv_binary())}:{os.environ['PATH']}")
    (program / "train.sh").write_text("set -e\nuv run python main.py\ncd src && uv run python ../main.py\n")
    status, out, err = run(host, program, "bash", "train.sh")
    assert status == 0, err
    found = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    assert [one["text"] for one in found] == ["xxx", "xxx"]
    assert {one["python"].partition("/v1/")[0] for one in found} == {str(host.layout.root)}
    assert not (program / ".venv").exists()


def test_failed_run_keeps_its_logs_and_its_status(host: Host, program: Path) -> None:
    """The exit code is the program's; the session goes, its logs stay and are named."""
    status, out, err = run(host, program, "python", "main.py", "fail")
    assert status == 3
    session = json.loads(out.splitlines()[-1])["session"]
    (line,) = [line for line in err.splitlines() if "logs of the failed run" in line]
    logs = Path(line.partition(": ")[2].partition(": ")[2])
    assert (logs / "raylet.out").exists()
    assert logs.parent.name == os.path.basename(session)
    assert list(host.temp.rglob("sockets")) == []


def test_keep_session(host: Host, program: Path) -> None:
    """Whoever wants it keeps all of it."""
    status, _, err = run(host, program, "python", "main.py", options=("--keep-session",))
    assert status == 0
    assert "--keep-session" in err
    assert len([path for path in host.temp.rglob("session_*/logs") if "latest" not in str(path)]) == 1


def test_signals_and_the_end(host: Host, program: Path) -> None:
    """A signal reaches the program, and the program's end by a signal is ours; nothing of the cluster is left."""
    child = start(host, program, "python", "main.py", "wait")
    pid = int(said(child)["pid"])
    family = psutil.Process(pid).children(recursive=True)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate()
    # Ray's own handlers in a driver: that of Python makes it the exit status; on a busy machine, three times of ten, that
    # of the core is the one to be called, and aborts.
    aborted = child.returncode == -signal.SIGABRT and "*** SIGTERM received" in err
    assert aborted or child.returncode in {signal.SIGTERM, -signal.SIGTERM, 128 + signal.SIGTERM}, err
    support.wait_until(lambda: support.is_gone(pid), "the program is gone")
    support.wait_until(lambda: all(map(support.is_gone, family)), "its cluster is gone")
    assert list(host.temp.rglob("sockets")) == []


def test_killed_run_leaves_the_program_alone(host: Host, program: Path) -> None:
    """After SIGKILL of us the program goes on and holds its environment; what it leaves goes with `gc --sessions`."""
    child = start(host, program, "python", "main.py", "wait")
    about = said(child)
    other = start(host, program, "python", "main.py", "wait")
    session = said(other)["session"]
    child.kill()
    child.wait()
    pid = int(about["pid"])
    assert psutil.pid_exists(pid)
    collected = subprocess.check_output(
        [host.python, "-m", "ray_envcache", "gc", "--all"], env=host.environ(), text=True
    )
    assert "2 in use" in collected
    support.kill_tree(pid)

    def gone() -> bool:
        # As `gc --sessions --tmpdir` does, which leaves a session of the last minute in doubt: it might be starting.
        found = collect_sessions(temp_dirs(host.temp, {}), starting=0)
        return ("removed", os.path.basename(about["session"])) in [(one.state, one.name) for one in found]

    support.wait_until(gone, "the dead session was removed")
    # The other one is undisturbed.
    assert os.path.isdir(session)
    assert other.poll() is None
    assert other.stdin is not None
    other.stdin.close()
    assert other.wait(60) == 0
    assert not os.path.exists(session)


# A driver that lives on keeps its session: it has a log open.
BETWEEN = """
import subprocess, sys
CLUSTER = '''
import json, ray
ray.init(num_cpus=1, include_dashboard=False)
print(json.dumps({"session": ray._private.worker._global_node.get_session_dir_path()}), flush=True)
'''
for _ in range(2):
    subprocess.run([sys.executable, "-c", CLUSTER], check=True)
    sys.stdin.readline()
"""


def test_between_two_clusters(host: Host, program: Path) -> None:
    """A program that has no cluster at the moment keeps its temp directory, also when `run` was killed."""
    place = host.folder / ("long" * 40)
    place.mkdir()
    (program / "main.py").write_text(BETWEEN)
    child = start(host, program, "python", "main.py", options=("--tmpdir", place))
    session = Path(said(child)["session"])
    (run_folder,) = place.iterdir()
    child.kill()
    child.wait()
    command: list[str | Path] = [host.python, "-m", "ray_envcache", "gc", "--sessions", "--json", "--tmpdir", place]

    def collect() -> list[str]:
        # Whatever changed a moment ago would be left for the next time.
        for path in (*run_folder.glob("ray/session_*"), run_folder / "ray", run_folder):
            with suppress(FileNotFoundError):
                os.utime(path, (0, 0), follow_symlinks=False)
        report = json.loads(subprocess.check_output(command, env=host.environ(), text=True))
        return [one["name"] for one in report["removed"]]

    support.wait_until(lambda: collect() == [session.name], "the first session is dead")
    assert collect() == []
    assert child.stdin is not None
    print(file=child.stdin, flush=True)
    second = Path(said(child)["session"])
    assert second.parent == session.parent
    support.wait_until(lambda: collect() == [second.name], "the second session is dead")
    assert run_folder.exists()
    child.stdin.close()
    support.wait_until(lambda: collect() == [] and not run_folder.exists(), "nothing is left")


LEAVE_SESSION = """
session=$RAY_TMPDIR/ray/session_2026-01-02_03-04-05_000001_79
mkdir -p $session/logs $session/sockets
echo why > $session/logs/raylet.out
"""


def test_the_status_of_a_failed_run(host: Host, program: Path) -> None:
    """It stays the program's on a full disk, where the logs are saved all the same, and where nothing can be said."""
    place = host.folder / "disk"
    with support.small_disk(place):
        # Files are made until there is no inode for another.
        full = "cd $session; i=0; while touch $i 2> /dev/null; do i=$((i + 1)); done"
        script = f"{LEAVE_SESSION}\n{full}\nexit 7"
        status, _, err = run(host, program, "bash", "-c", script, options=("--tmpdir", place))
        assert status == 7, err
        (logs,) = place.glob("ray-run-*/ray/session_*/logs")
        assert f"logs of the failed run: {logs}\n" in err
        assert (logs / "raylet.out").exists()
        assert [path.name for path in logs.parent.iterdir()] == ["logs"]
    with open("/dev/full", "w") as nowhere:
        command = (host.python, "-m", "ray_envcache", "run", "--", "bash", "-c", f"{LEAVE_SESSION}\nexit 7")
        environ = host.environ(UV_PYTHON=sys.executable)
        assert subprocess.run(command, cwd=program, env=environ, stderr=nowhere, check=False).returncode == 7


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["nonsense"], 127, "No such command: `nonsense`"),
        (["./data.txt"], 127, "Cannot run|No such command"),
        (["bash", "-c", "exit 7"], 7, ""),
        (["bash", "-c", "kill -9 $$"], -9, ""),
        (["bash", "-c", "cat; echo $VIRTUAL_ENV"], 0, ""),
    ],
)
def test_commands(host: Host, program: Path, arguments: list[str], status: int, says: str) -> None:
    """Any command: its status is ours, by signal too; a missing one is 127."""
    import re

    (program / "data.txt").write_text("no program")
    (program / "data.txt").chmod(0o755)
    found, out, err = run(host, program, *arguments)
    assert found == status, err
    assert re.search(says, err)
    assert "Traceback" not in err
    if "VIRTUAL_ENV" in arguments[-1]:
        assert out.strip().startswith(str(host.layout.entries))
    assert list(host.temp.iterdir()) == []


def test_bad_input_before_the_command_starts(host: Host, program: Path) -> None:
    """No project, no lockfile, an outdated one, a temp directory that is missing: status 2, and no command ran."""
    witness = host.folder / "ran"
    command = ("touch", str(witness))
    (host.folder / "empty").mkdir()
    cases: list[tuple[Path, tuple[str | Path, ...], str]] = [
        (host.folder / "empty", (), "No project"),
        (program, ("--project", host.folder / "empty"), "No pyproject.toml"),
        (program, ("--tmpdir", host.folder / "nowhere"), "nowhere"),
    ]
    for folder, options, says in cases:
        status, _, err = run(host, folder, *command, options=options)
        assert (status, says in err) == (2, True), err
        assert "hint: " in err
    text = (program / "pyproject.toml").read_text()
    (program / "pyproject.toml").write_text(text.replace("dependencies = [", "dependencies = ['six', "))
    status, _, err = run(host, program, *command)
    assert (status, "no longer matches" in err) == (2, True), err
    (program / "uv.lock").unlink()
    status, _, err = run(host, program, *command)
    assert (status, "run `uv lock`" in err) == (2, True), err
    assert not witness.exists()
    assert not list(host.temp.iterdir())
