"""What the command line inherits from the process that starts it: streams, working directory, home, locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from tests import support

pytestmark = pytest.mark.host

COMMAND = f"exec {sys.executable} -m ray_envcache"


def shell(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", script], env={**os.environ, **environ}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("closed", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(store: Store, tmp_path: Path, wheels: Path, closed: str) -> None:
    """With standard streams closed commands do their work, exit as usual, and write nothing into the store's files."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    assert shell(f"{COMMAND} build {project} {closed}").returncode == 0
    (entry,) = store.layout.all_entries()
    assert entry.ready.exists()
    assert entry.in_use.read_bytes() == b""
    assert shell(f"{COMMAND} run --project {project.parent} -- sh -c 'exit 7' {closed}").returncode == 7
    assert shell(f"{COMMAND} build {tmp_path}/nowhere {closed}").returncode == 1
    assert shell(f"{COMMAND} purge {closed}").returncode == 2


def test_run_leaves_a_closed_stream_closed(store: Store, tmp_path: Path, wheels: Path) -> None:
    """A program under `run` finds its streams as the caller left them: a closed one is closed."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    script = "import os, sys; sys.exit(3 if sys.stderr is None else 4)"
    assert shell(f'{COMMAND} run --project {project.parent} -- python -c "{script}" 2>&-').returncode == 3


def test_ignored_sigchld(store: Store, tmp_path: Path, wheels: Path) -> None:
    """A caller that ignores SIGCHLD, as some supervisors do, gets the exit codes of children all the same."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [
        sys.executable,
        "-m",
        "ray_envcache",
        "run",
        "--project",
        str(project.parent),
        "--",
        "sh",
        "-c",
        "exit 7",
    ]
    assert subprocess.run([sys.executable, "-c", ignoring, *command], check=False).returncode == 7


@pytest.mark.parametrize("arguments", ["build .", "run -- true", "run --project x -- true", "doctor x"])
def test_working_directory_is_gone(store: Store, tmp_path: Path, arguments: str) -> None:
    """In a working directory that was removed a relative path is an error of usage that says so."""
    done = shell(f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && {COMMAND} {arguments}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "The working directory was removed\nhint: cd to a directory that exists\n" in done.stderr


@pytest.mark.parametrize("arguments", ["list", "dir", "gc", "doctor", "gc --sessions"])
def test_without_working_directory_and_home(store: Store, tmp_path: Path, arguments: str) -> None:
    """Commands without a path need neither a working directory nor a home, and speak in any locale."""
    script = f"mkdir {tmp_path}/gone && cd {tmp_path}/gone && rmdir {tmp_path}/gone && {COMMAND} {arguments}"
    done = shell(script, HOME=f"{tmp_path}/no/home", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
