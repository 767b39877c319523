"""Session directories as Ray makes them, and real processes that name them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.sessions.collector import collect_sessions, judge_sessions
from ray_envcache.sessions.directories import Session
from ray_envcache.system import disk
from tests import support

# A user of this process only: what processes of a user refuse keeps all sessions of that user.
NOBODY = 30_000 + os.getpid() % 30_000
needs_proc = pytest.mark.skipif(not Path("/proc/self/fdinfo").is_dir(), reason="needs /proc as Linux has it")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
FIRST_NAMESPACE = "pid:[4026531836]"  # of pids: that of the host, by the kernel's own constant
sees_all = pytest.mark.skipif(
    sys.platform == "linux"
    and os.readlink("/proc/self/ns/pid") != FIRST_NAMESPACE
    and disk.free_space(Path("/tmp")).kind != "overlay",
    reason="needs to see all processes that may use /tmp: in a container that shares it, what is new stays",
)


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
    return {one.name: (one.state, one.why) for one in judge_sessions([temp])}


def judge(session: Path) -> tuple[str, str]:
    return look(session.parent)[session.name]


def collect(temp: Path, **options: Any) -> dict[str, list[Session]]:
    """Remove the sessions of the dead; what became of all, by their states."""
    found: dict[str, list[Session]] = defaultdict(list)
    for one in collect_sessions([temp], **options):
        found[one.state].append(one)
    return found


def start(children: list[subprocess.Popen[str]], code: str, *arguments: str | Path, **options: Any) -> int:
    """Start Python code in a child that says when it is ready and stays."""
    return support.start_python(children, code, *arguments, **options).pid


def cli(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ray_envcache", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)


BECOME_NOBODY = f"os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})"


def give_to_nobody(session: Path) -> None:
    for path in [session, *session.rglob("*")]:
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
