"""The one door for child processes: argument lists, an explicit environment, and nobody left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Protocol

GRACE_SECONDS = 1.0
"""How long a group may clean up after SIGTERM before SIGKILL."""


OnLine = Callable[[str], None]
Decode = Callable[[bytes], str]


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


class Finish(Protocol):
    """Waits for the end of a child; meanwhile `on_line` gets each line of its stderr as it comes."""

    def __call__(self, on_line: OnLine | None = None) -> Completed: ...


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    environ: Mapping[str, str],
    cwd: Path | None = None,
    on_line: OnLine | None = None,
    pass_fds: Sequence[int] = (),
    decode: Decode | None = None,
) -> Completed:
    """Run a child to its end, as `running` does. `on_line` as for `Finish`."""
    with running(argv, environ=environ, cwd=cwd, pass_fds=pass_fds, decode=decode) as finish:
        return finish(on_line)


@contextmanager
def running(
    argv: Sequence[str | os.PathLike[str]],
    *,
    environ: Mapping[str, str],
    cwd: Path | None = None,
    pass_fds: Sequence[int] = (),
    decode: Decode | None = None,
) -> Iterator[Finish]:
    """Run a child beside us, in a process group of its own; what the context gets waits for its end.

    Its stdout is read by `decode`, by default as UTF-8 text with a mark in place of every byte that is none.

    Whatever ends the context (Ctrl-C, cancellation, an error in `on_line`) ends the whole group first; what a child
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
            yield partial(_communicate, child, decode or _as_text)
        except BaseException:
            # Once it was waited for, its number may be somebody else's.
            if child.returncode is None:
                kill_group(child)
            raise


def start_detached(argv: Sequence[str | os.PathLike[str]], *, environ: Mapping[str, str]) -> None:
    """Start a process that outlives us, leads a group of its own, belongs to no terminal and inherits no descriptor.

    It is a grandchild: we reap the child that started it, so it is never our zombie. Raises CalledProcessError where
    it could not be started.
    """
    # Not by the module subprocess, whose import would take as long as everything else.
    launcher = "import os, sys; os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, setpgroup=0)"
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


def _as_text(output: bytes) -> str:
    return output.decode(errors="replace")


def _communicate(child: subprocess.Popen[bytes], decode: Decode, on_line: OnLine | None = None) -> Completed:
    assert child.stdout is not None  # for mypy: both are pipes
    assert child.stderr is not None
    output: list[bytes] = []
    reader = threading.Thread(target=_drain, args=(child.stdout, output), daemon=True)
    reader.start()
    lines: list[str] = []
    for raw in child.stderr:
        line = _as_text(raw).rstrip("\r\n")
        lines.append(line)
        if on_line is not None:
            on_line(line)
    reader.join()
    done = Completed(child.wait(), decode(b"".join(output)), "\n".join(lines))
    if done.killed:
        # Killed by somebody else, so that it could not end what it had started: nobody waits for that any more.
        _signal_group(child, signal.SIGKILL)
    return done


def _drain(stream: IO[bytes], into: list[bytes]) -> None:
    into.append(stream.read())


def clean_environ() -> dict[str, str]:
    """Our environment without what would turn one Python into another."""
    foreign = {"PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "CONDA_PREFIX", "__PYVENV_LAUNCHER__"}
    return {name: value for name, value in os.environ.items() if name not in foreign}
