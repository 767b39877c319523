"""The one door for child processes: argument lists, an explicit environment, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

GRACE_SECONDS = 1.0
"""How long a group may clean up after SIGTERM before SIGKILL."""


@dataclass(frozen=True)
class Completed:
    """What a child left: its exit status (negative: the signal that killed it) and both streams."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def killed(self) -> str:
        """The signal that ended it, in words, else ""."""
        number = -self.returncode
        return f"killed by signal {number} ({signal.strsignal(number)})" if number > 0 else ""


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    environ: Mapping[str, str],
    cwd: Path | None = None,
    on_line: Callable[[str], None] | None = None,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a child to its end, in a process group of its own; `on_line` gets each line of its stderr as it comes.

    Whatever ends the waiting (Ctrl-C, cancellation, an error in `on_line`) ends the whole group first; what a child
    started that a signal killed ends too. If *we* are killed, the child goes on and keeps what `pass_fds` gave it: a
    builder's flock thus outlives the builder for as long as somebody still writes.
    """
    with subprocess.Popen(
        [os.fspath(part) for part in argv],
        env=dict(environ),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=tuple(pass_fds),
        start_new_session=True,
    ) as child:
        try:
            done = _communicate(child, on_line or (lambda _line: None))
        except BaseException:
            kill_group(child)
            raise
        if done.killed:
            # Killed by somebody else, so that it could not end what it had started: nobody waits for that any more.
            _signal_group(child, signal.SIGKILL)
        return done


def start_detached(argv: Sequence[str | os.PathLike[str]], *, environ: Mapping[str, str]) -> None:
    """Start a process that outlives us, belongs to no terminal and inherits no descriptor.

    It is a grandchild: we reap the child that started it, so it is never our zombie. Raises CalledProcessError where
    it could not be started.
    """
    launcher = "import subprocess, sys; subprocess.Popen(sys.argv[1:], start_new_session=True)"
    run_launcher([sys.executable, "-I", "-S", "-c", launcher, *argv], environ=environ)


def run_launcher(
    argv: Sequence[str | os.PathLike[str]], *, environ: Mapping[str, str], stdin: int = subprocess.DEVNULL
) -> None:
    """Run a program to its end that starts one which outlives us: in a new session, with nothing of ours but `stdin`.

    Raises OSError where it cannot be started, CalledProcessError where it fails.
    """
    nothing = subprocess.DEVNULL
    # Raylet notices the end of its agent by the end of a pipe: a long-lived child that kept it would hold up raylet.
    subprocess.run(
        [os.fspath(part) for part in argv],
        env=dict(environ),
        cwd="/",
        stdin=stdin,
        stdout=nothing,
        stderr=nothing,
        start_new_session=True,
        check=True,
    )


def kill_group(child: subprocess.Popen[bytes]) -> None:
    """End the process group that `child` leads: SIGTERM, a moment, SIGKILL; then reap the child."""
    try:
        _signal_group(child, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_SECONDS)
    finally:
        # Also when the leader went quietly: what it started may have stayed. And also on a second Ctrl-C.
        _signal_group(child, signal.SIGKILL)
        child.wait()


def _signal_group(child: subprocess.Popen[bytes], number: signal.Signals) -> None:
    # macOS refuses, rather than not finding it, a group of which only a zombie is left.
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _communicate(child: subprocess.Popen[bytes], on_line: Callable[[str], None]) -> Completed:
    assert child.stdout is not None  # for mypy: both are pipes
    assert child.stderr is not None
    output: list[bytes] = []
    reader = threading.Thread(target=_drain, args=(child.stdout, output), daemon=True)
    reader.start()
    lines: list[str] = []
    for raw in child.stderr:
        line = raw.decode(errors="replace").rstrip("\r\n")
        lines.append(line)
        on_line(line)
    reader.join()
    return Completed(child.wait(), b"".join(output).decode(errors="replace"), "\n".join(lines))


def _drain(stream: IO[bytes], into: list[bytes]) -> None:
    into.append(stream.read())
