"""The processes of this machine: what each is called, which files it names.

Linux is read through /proc (formats: proc(5)), other systems through psutil. Only processes of this PID namespace are
seen, and paths as this mount namespace knows them. So an answer may keep something, but never lets it go.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import psutil

from ray_envcache.system.texts import printable

_INITIAL_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, linux/proc_ns.h
_COMMAND_LINE, _OPEN_FILE, _MAPPED_FILE = "its command line", "an open file", "a mapped file"
_INTERPRETER = "its interpreter"
_EXEC_SECONDS = 1.0
_LINKS = {"cwd": "its working directory", "exe": "its executable", "root": "its root"}

_Texts = Iterator[tuple[str, bytes]]
"""What shows that a process names a file: how it does, and the text in which the name is."""


class Process(NamedTuple):
    """A process: `started` in seconds since 1970, `command` the beginning of its command line, `user` the real one."""

    pid: int
    name: str
    started: float
    command: str
    user: int


@dataclass
class Mentions:
    """For each name a sentence about the first process that has it; `unseen` are the processes that cannot be read."""

    by_name: dict[str, str] = field(default_factory=dict)
    unseen: list[Process] = field(default_factory=list)


def describe(pid: int) -> Process | None:
    """Describe a process for people, or return None where it has ended.

    Of the command line it shows three arguments of 60 characters each; of a path these are the last ones. The other
    arguments, and the environment, may hold secrets.
    """
    try:
        process = psutil.Process(pid)
        shown = [_cut(argument) for argument in process.cmdline() if argument.strip()][:3]
        name = printable(process.name())
        command = printable(" ".join(shown)) or f"[{name}]"
        return Process(pid, name, process.create_time(), command, process.uids().real)
    except psutil.Error:
        return None


def _cut(argument: str) -> str:
    return argument[-60:] if argument.startswith("/") else argument[:60]


def find_mentions(pattern: re.Pattern[bytes]) -> Mentions:
    """Find the matches of `pattern` in command lines, directories, open and mapped files.

    The processes of all users are searched, but not the calling one.
    """
    found = Mentions()
    for pid in (pid for pid in psutil.pids() if pid != os.getpid()):
        try:
            for name, how in _matches(_texts(pid), pattern):
                if name not in found.by_name and (process := describe(pid)):
                    found.by_name[name] = f"process {pid} ({process.name}) names it: {how}"
        except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):  # noqa: PERF203  # each process fails for itself
            pass  # it has ended, or is a thread of the kernel
        except (OSError, psutil.Error):
            found.unseen += filter(None, [describe(pid)])
    return found


def _matches(texts: _Texts, pattern: re.Pattern[bytes]) -> Iterator[tuple[str, str]]:
    """Yield each name that `pattern` finds, and how the process names it."""
    for how, text in texts:
        for name in pattern.findall(text):
            yield os.fsdecode(name), how


def processes_using(root: Path, names: Collection[str]) -> dict[str, dict[int, str]]:
    """Find the processes that run from one of the directories `root/<name>`, are in it, or have a file of it.

    Returns for each such name the pids, with how each uses it. A name in a command line is no use. Neither is an open
    file of the calling process: a collector has the flock file of its victim open.
    """
    prefix = re.escape(os.fsencode(root.resolve())) + b"/"
    known = b"|".join(re.escape(os.fsencode(name)) for name in names)
    # The look-behind refuses longer paths that end in ours. It comes second: a pattern that begins with plain text is
    # searched a hundred times faster, and a worker has 100 kB of mapped files.
    pattern = re.compile(rb"%b(?<!\S%b)(%b)(?=/| \(deleted\)$|$)" % (prefix, prefix, known), re.MULTILINE)
    users: dict[str, dict[int, str]] = {}
    for pid in psutil.pids():
        with suppress(OSError, psutil.Error):  # it has ended, or may not be read
            for name, how in _matches(_uses(pid), pattern):
                users.setdefault(name, {}).setdefault(pid, how)
    return users


def sees_all_processes() -> bool:
    """Whether all processes of this host can be seen: False in a container with a PID namespace of its own."""
    try:
        return not _has_proc() or os.readlink("/proc/self/ns/pid") == _INITIAL_NAMESPACE
    except OSError:
        return False


def _has_proc() -> bool:
    return os.path.isdir("/proc/self/fdinfo")


def _texts(pid: int) -> _Texts:
    """Yield all in which a process may name a file, first what every user may read. Raises OSError, psutil.Error."""
    if not _has_proc():
        yield from _texts_of_psutil(pid)
        return
    yield _COMMAND_LINE, _command_line(pid)
    for link, how in _LINKS.items():
        yield how, _readlink(f"/proc/{pid}/{link}")
    directory = f"/proc/{pid}/fd"
    for number in os.listdir(directory):  # names only: a raylet has thousands
        yield _OPEN_FILE, _readlink(f"{directory}/{number}")
    yield _MAPPED_FILE, Path(f"/proc/{pid}/maps").read_bytes()


def _command_line(pid: int) -> bytes:
    """Return the arguments of a process, NUL after each. Raises OSError.

    In the midst of exec a process has the new executable and no arguments yet: a cluster that is being started would
    seem to name nothing. Threads of the kernel and the dead have no executable either.
    """
    give_up = time.monotonic() + _EXEC_SECONDS
    while not (text := Path(f"/proc/{pid}/cmdline").read_bytes()) and time.monotonic() < give_up:
        if not _readlink(f"/proc/{pid}/exe"):
            break
        time.sleep(0.001)
    return text


def _uses(pid: int) -> _Texts:
    """Yield everything by which a process uses files. Raises OSError, psutil.Error."""
    for how, text in _texts(pid):
        if how != _COMMAND_LINE and not (how == _OPEN_FILE and pid == os.getpid()):
            yield how, text
        if how == _LINKS["exe"] and is_python(text):
            yield _INTERPRETER, os.fsencode(_started_by(pid))


def is_python(executable: bytes) -> bool:
    """Whether a program of this name is a Python."""
    return os.path.basename(executable).startswith((b"python", b"pypy"))


def _started_by(pid: int) -> str:
    """The path by which a Python was started, found as Python itself finds it: by argv[0] and PATH; "" if unknown.

    In a venv it is a link, and `exe` shows the base Python. Ray's workers change their argv[0] ("ray::IDLE"): there it
    is VIRTUAL_ENV, which the agent sets.
    """
    try:
        process = psutil.Process(pid)
        first = next(iter(process.cmdline()), "/")  # it ended
        environ = {} if "/" in first else process.environ()
        candidates = [os.path.join(folder, first) for folder in environ.get("PATH", "").split(":") if folder]
        by_name = next(filter(os.path.isfile, candidates), f"{environ.get('VIRTUAL_ENV', '')}/bin/python")
        started = os.path.join(process.cwd(), first) if "/" in first else by_name
    except psutil.Error:
        return ""
    return os.path.join(os.path.realpath(os.path.dirname(started)), os.path.basename(started))


def _texts_of_psutil(pid: int) -> _Texts:
    process = psutil.Process(pid)
    yield _COMMAND_LINE, os.fsencode("\0".join(process.cmdline()))
    yield _LINKS["cwd"], os.fsencode(process.cwd())
    yield _LINKS["exe"], os.fsencode(process.exe())
    for file in process.open_files():
        yield _OPEN_FILE, os.fsencode(file.path)


def _readlink(path: str) -> bytes:
    """Return where a link in /proc leads, b"" where it leads nowhere: a closed file, a kernel thread's executable."""
    try:
        return os.fsencode(os.readlink(path))
    except FileNotFoundError:
        return b""


@cache
def boot_id() -> str:
    """Return what tells this run of the machine's kernel from the next; "" where the system has no such thing."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return ""


def ray_session(pid: int) -> str:
    """Return the name of the Ray session whose raylet started a process, "" where it has no living raylet."""
    with suppress(psutil.Error):
        for parent in psutil.Process(pid).parents():
            for argument in parent.cmdline():
                if parent.name() == "raylet" and argument.startswith(("--session-name=", "--session_name=")):
                    return argument.partition("=")[2]
    return ""
