"""The one door for child processes: argument lists, an explicit environment, and no process left behind."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from ray_envcache.errors import EnvCacheError

GRACE_SECONDS = 1.0
"""How long a group may clean up after SIGTERM before SIGKILL."""


OnLine = Callable[[str], None]


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


def _as_text(output: bytes) -> str:
    return output.decode(errors="replace")


def run(
    argv: Sequence[str | os.PathLike[str]],
    *,
    environ: Mapping[str, str],
    cwd: Path | None = None,
    on_line: OnLine | None = None,
    pass_fds: Sequence[int] = (),
    decode: Callable[[bytes], str] = _as_text,
    seconds: float | None = None,
) -> Completed:
    """Run a child to its end, in a process group of its own. `on_line` gets each line of its stderr as it comes.

    Its stdout is read by `decode`, by default as UTF-8 text with a mark in place of every byte that is none. If its end
    comes not within `seconds`, its group is killed and TimeoutError raised.

    Ctrl-C, cancellation or an error in `on_line` ends the whole group first; what a child started that a signal killed
    ends too. If *we* are killed, the child goes on and keeps what `pass_fds` gave it: a
    builder's flock thus outlives the builder until uv has written its last file. Raises EnvCacheError where the exit
    status of children cannot be had.
    """
    with ExitStack() as stack:
        stack.enter_context(_status_of_children())
        child = stack.enter_context(
            subprocess.Popen(
                [os.fspath(part) for part in argv],
                env=dict(environ),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[_above_streams(descriptor, stack) for descriptor in pass_fds],
                start_new_session=True,
            )
        )
        try:
            return _communicate(child, decode, seconds, on_line)
        except BaseException:
            # Once it was waited for, its number may be another process's.
            if child.returncode is None:
                _kill_group(child)
            raise


@contextmanager
def _status_of_children() -> Iterator[None]:
    """Have the kernel keep the exit status of children, where the program that started us had it throw them away.

    An ignored SIGCHLD is inherited. Then `wait` says 0 for every failure, also to uv about its own children.
    """
    if signal.getsignal(signal.SIGCHLD) is not signal.SIG_IGN:
        yield
    elif threading.current_thread() is not threading.main_thread():
        raise EnvCacheError(
            "This process ignores SIGCHLD, so it cannot know whether uv succeeds",
            "call signal.signal(signal.SIGCHLD, signal.SIG_DFL) in the main thread first",
        )
    else:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield
        finally:
            signal.signal(signal.SIGCHLD, signal.SIG_IGN)


def _above_streams(descriptor: int, stack: ExitStack) -> int:
    """The descriptor, or a copy until the stack unwinds where its number is that of a stream in the child.

    A process that was started with closed streams gets their numbers for its files.
    """
    if descriptor > 2:
        return descriptor
    copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    stack.callback(os.close, copy)
    return copy


def start_detached(argv: Sequence[str | os.PathLike[str]], *, environ: Mapping[str, str]) -> None:
    """Start a process that outlives us, leads a group of its own, belongs to no terminal and inherits no descriptor.

    It is a grandchild: we reap the child that started it, so it is never our zombie. Raises CalledProcessError where
    it could not be started.
    """
    # Not by the module subprocess, whose import would take as long as everything else. A Python ignores SIGPIPE; what
    # it or our parent (nohup, a supervisor) ignores or blocks would stay so in the new process.
    usual = sorted(int(number) for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP})
    spawn = f"os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, setpgroup=0, setsigdef={usual}, setsigmask=[])"
    launcher = f"import os, sys; {spawn}"
    run_launcher([sys.executable, "-I", "-S", "-c", launcher, *argv], environ=environ)


def run_launcher(
    argv: Sequence[str | os.PathLike[str]], *, environ: Mapping[str, str], stdin: int = subprocess.DEVNULL
) -> None:
    """Run a program to its end that starts one which outlives us: in a new session, with nothing of ours but `stdin`.

    Raises OSError where it cannot be started, CalledProcessError where it fails.
    """
    nothing = subprocess.DEVNULL
    # Raylet notices the end of its agent by the end of a pipe: a long-lived child that kept it would hold up raylet.
    with _status_of_children():
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


def _kill_group(child: subprocess.Popen[bytes]) -> None:
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


def _communicate(
    child: subprocess.Popen[bytes],
    decode: Callable[[bytes], str],
    seconds: float | None,
    on_line: OnLine | None,
) -> Completed:
    assert child.stdout is not None  # for mypy: both are pipes
    assert child.stderr is not None
    stdout, output = child.stdout, list[bytes]()
    reader = threading.Thread(target=lambda: output.append(stdout.read()), daemon=True)
    reader.start()
    timer = threading.Timer(seconds or 0, _kill_if_alive, [child])
    timer.daemon = True
    lines: list[str] = []
    try:
        if seconds is not None:
            timer.start()
        for raw in child.stderr:
            line = _as_text(raw).rstrip("\r\n")
            lines.append(line)
            if on_line is not None:
                on_line(line)
        reader.join()
        status = _wait(child)
        is_over = timer.finished.is_set()
    finally:
        timer.cancel()
    done = Completed(status, decode(b"".join(output)), "\n".join(lines))
    if done.killed:
        # It could not end what it had started, and we are the only ones who wait for that.
        _signal_group(child, signal.SIGKILL)
    if is_over:
        raise TimeoutError(f"a child was not done after {seconds:g} seconds: {child.args!r:.300}")
    return done


def _kill_if_alive(child: subprocess.Popen[bytes]) -> None:
    if child.returncode is None:
        _signal_group(child, signal.SIGKILL)


def _wait(child: subprocess.Popen[bytes]) -> int:
    """The exit status. `Popen.wait` would say 0 where a handler of SIGCHLD was faster to reap the child."""
    try:
        _, status = os.waitpid(child.pid, 0)
    except ChildProcessError:
        child.returncode = 0  # never to be signalled: its number may be another process's
        raise EnvCacheError(
            f"Another part of this program took the exit status of a child: {child.args!r:.300}",
            "a handler of SIGCHLD must reap only the children that it knows",
        ) from None
    child.returncode = os.waitstatus_to_exitcode(status)
    return child.returncode


def clean_environ() -> dict[str, str]:
    """Our environment without what would turn one Python into another."""
    foreign = {"PYTHONHOME", "PYTHONPATH", "PYTHONSTARTUP", "VIRTUAL_ENV", "CONDA_PREFIX", "__PYVENV_LAUNCHER__"}
    return {name: value for name, value in os.environ.items() if name not in foreign}
