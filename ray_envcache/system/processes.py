"""Who uses an entry: read from Linux's /proc, and told to people or taken as a veto; never as leave to remove.

What is seen are the processes of this PID namespace, and paths as this mount namespace knows them: a container that
has the store under another path keeps its flocks, but is not named here. Field and file formats are those of proc(5).
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from ray_envcache.system.units import printable

_PROC = Path("/proc")
_KERNEL_THREAD = 0x00200000  # PF_KTHREAD, linux/sched.h
_DELETED = " (deleted)"

Coverage = Literal["full", "partial", "none"]
Mode = Literal["shared", "exclusive", ""]


class Process(NamedTuple):
    """A process: `started` in seconds since 1970, the beginning of its command line, the id of its user.

    `mode` is how it holds the flock it was found by, "" where none was asked for.
    """

    pid: int
    started: float
    command: str
    user: int
    mode: Mode = ""


class Use(NamedTuple):
    """That a process uses an entry, and by what: "exe", "cwd", "root", "fd" or "maps", and the path."""

    pid: int
    reason: str


@dataclass(frozen=True)
class _Seen:
    """`unreadable`: how many processes refused to be looked at (those of other users): they may hold more.

    Under /proc mounted with `hidepid` their number is unknown and counts as one.
    """

    unreadable: int = 0
    supported: bool = True

    @property
    def coverage(self) -> Coverage:
        """How much was seen: "none" where there is no /proc as Linux has it."""
        if not self.supported:
            return "none"
        return "partial" if self.unreadable else "full"


@dataclass(frozen=True)
class FlockHolders(_Seen):
    """The processes that hold a flock, by the names they were asked under; a name nobody holds is absent."""

    by_name: dict[str, list[Process]] = field(default_factory=dict)


@dataclass(frozen=True)
class Usage(_Seen):
    """The processes that use an entry, by its name, each with its first reason; a name without any is absent."""

    by_name: dict[str, list[Use]] = field(default_factory=dict)


def flock_holders(inodes: Mapping[tuple[int, int], str], root: Path) -> FlockHolders:
    """Find who holds flocks on files below `root`, given as {(st_dev, st_ino): name}, in one scan for all.

    A holder is who has the flocked open file, forked children of a dead parent included; /proc/locks would name the
    dead. Raises nothing; processes may vanish meanwhile.
    """
    if not _is_supported():
        return FlockHolders(supported=False)
    modes: dict[str, dict[int, Mode]] = {}
    prefix = _prefix(root)

    def look(pid: int) -> None:
        for name, mode in _flocks(pid, inodes, prefix):
            held = modes.setdefault(name, {})
            held[pid] = "exclusive" if mode == "exclusive" else held.get(pid, mode)

    unreadable = _look_at_all(look)
    found = {name: _describe_all(held) for name, held in modes.items()}
    return FlockHolders(unreadable, by_name={name: processes for name, processes in found.items() if processes})


def processes_using(root: Path, names: Collection[str]) -> Usage:
    """Find processes with executable, cwd, root, an open or a mapped file at or below `root/<name>`.

    The open files of the calling process do not count: a collector has the flock file of its victim open. Raises
    nothing; processes may vanish meanwhile.
    """
    if not _is_supported():
        return Usage(supported=False)
    uses: dict[str, dict[int, Use]] = {}
    prefix, known = _prefix(root), frozenset(names)

    def look(pid: int) -> None:
        for kind, path in _paths(pid, prefix):
            if name := _name_of(path.removeprefix(prefix), known):
                uses.setdefault(name, {}).setdefault(pid, Use(pid, f"{kind} {path}"))

    unreadable = _look_at_all(look)
    return Usage(unreadable, by_name={name: list(found.values()) for name, found in uses.items()})


def describe(pid: int) -> Process | None:
    """Describe a process for people, or return None where it is gone or there is no /proc.

    Of the command line the first three arguments, each cut to 60 characters (of a path the last ones): the rest, like
    the environment (which is not read), may hold what is nobody's business.
    """
    try:
        about = _read_stat(pid)
        user = Path(f"/proc/{pid}").stat().st_uid
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    shown = [_cut(os.fsdecode(argument)) for argument in arguments if argument.strip()][:3]
    command = " ".join(shown) or f"[{about.name}]"
    return Process(pid, _unix_time(about.start_ticks), printable(command), user)


def _cut(argument: str) -> str:
    return argument[-60:] if argument.startswith("/") else argument[:60]


def start_token(pid: int) -> str:
    """Return what tells a process from later ones with its pid, reboots included; "" where that is unknown."""
    try:
        return _token(_read_stat(pid))
    except OSError:
        return ""


def is_same_process(pid: int, token: str) -> bool:
    """Whether the process that had this `start_token` still runs. In doubt it does: whose token is "", or unreadable.

    A zombie does not run.
    """
    if not token or not _is_supported():
        return psutil.pid_exists(pid)
    try:
        about = _read_stat(pid)
        return _token(about) == token and not _has_ended(about)
    except PermissionError:
        return True
    except OSError:
        return False


def _token(about: _Stat) -> str:
    # Ticks since boot repeat after a reboot, hence the boot's id.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{about.start_ticks}-{boot}"


def _is_supported() -> bool:
    return Path("/proc/self/fdinfo").is_dir()


def _look_at_all(look: Callable[[int], None]) -> int:
    """Look at every process, and return how many could not be read."""
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())  # names only
    # With `hidepid` those of others are not even listed, the first process among them.
    hidden = int(1 not in pids)
    return hidden + sum(not _could_look(look, pid) for pid in pids)


def _could_look(look: Callable[[int], None], pid: int) -> bool:
    try:
        look(pid)
    except (FileNotFoundError, ProcessLookupError):
        return True  # it ended meanwhile
    except OSError:
        return _holds_nothing(pid)
    return True


def _holds_nothing(pid: int) -> bool:
    """Whether this is a thread of the kernel or a zombie: nobody may read these, and nothing is missed."""
    try:
        about = _read_stat(pid)
    except OSError as error:
        return not isinstance(error, PermissionError)  # which it is under `hidepid`; else it ended meanwhile
    return bool(about.flags & _KERNEL_THREAD) or _has_ended(about)


def _flocks(pid: int, inodes: Mapping[tuple[int, int], str], prefix: str) -> Iterator[tuple[str, Mode]]:
    for path, _ in _open_files(pid, prefix):
        # Asked through the link, not by the device in fdinfo: on btrfs that is another one than in stat(2). It also
        # answers for files that were renamed or deleted.
        with suppress(FileNotFoundError):
            found = Path(path).stat()
            name = inodes.get((found.st_dev, found.st_ino))
            if name is not None and (mode := _flock_mode(Path(path.replace("/fd/", "/fdinfo/")))):
                yield name, mode


def _flock_mode(fdinfo: Path) -> Mode:
    found = re.search(rb"^lock:.* FLOCK .* (READ|WRITE) ", fdinfo.read_bytes(), re.MULTILINE)
    if found is None:
        return ""
    return "shared" if found[1] == b"READ" else "exclusive"


def _paths(pid: int, prefix: str) -> Iterator[tuple[str, str]]:
    """Iterate over what a process has of the files below `prefix`: how, and the path."""
    links = ((kind, _readlink(f"/proc/{pid}/{kind}")) for kind in ("exe", "cwd", "root"))
    yield from ((kind, path) for kind, path in links if path.startswith(prefix))
    if pid != os.getpid():
        yield from (("fd", path) for _, path in _open_files(pid, prefix))
    yield from (("maps", path) for path in _mapped(Path(f"/proc/{pid}/maps").read_bytes(), prefix))


def _mapped(maps: bytes, prefix: str) -> Iterator[str]:
    # The kernel escapes newlines in maps, and nothing else. Most processes map nothing of ours: search before parsing.
    wanted = os.fsencode(prefix).replace(b"\n", rb"\012")
    if wanted in maps:
        for found in re.finditer(rb"^[^/\n]*(%s.*)$" % re.escape(wanted), maps, re.MULTILINE):
            yield os.fsdecode(found[1].replace(rb"\012", b"\n"))


def _name_of(path: str, names: Collection[str]) -> str | None:
    """Return the entry of a path below the root. Also if it is deleted: what runs from it is still running."""
    first = path.partition("/")[0]
    return next((name for name in (first, first.removesuffix(_DELETED)) if name in names), None)


def _open_files(pid: int, prefix: str) -> Iterator[tuple[str, str]]:
    directory = f"/proc/{pid}/fd"
    for number in os.listdir(directory):  # names only: there are thousands
        target = _readlink(f"{directory}/{number}")
        if target.startswith(prefix):
            yield f"{directory}/{number}", target


def _readlink(path: str) -> str:
    """Return what a link in /proc points to, "" where there is nothing: a closed file, a kernel thread's executable."""
    try:
        return os.readlink(path)  # a Path for each of ten thousand files takes longer than the call
    except FileNotFoundError:
        return ""


def _prefix(root: Path) -> str:
    return f"{root.resolve()}".rstrip("/") + "/"


def _describe_all(held: Mapping[int, Mode]) -> list[Process]:
    processes = ((describe(pid), mode) for pid, mode in held.items())
    return [process._replace(mode=mode) for process, mode in processes if process is not None]


class _Stat(NamedTuple):
    name: str
    state: str
    flags: int
    threads: int
    start_ticks: int


def _read_stat(pid: int) -> _Stat:
    """Read /proc/<pid>/stat. Raises OSError, also for a process that ends while it is read."""
    # The name is in parentheses and may contain some, and spaces: the other fields begin after the last one.
    name, _, rest = Path(f"/proc/{pid}/stat").read_bytes().partition(b"(")[2].rpartition(b")")
    fields = rest.split()
    return _Stat(os.fsdecode(name), fields[0].decode(), int(fields[6]), int(fields[17]), int(fields[19]))


def _has_ended(about: _Stat) -> bool:
    # A first thread that ended before the others is a zombie too, but the process goes on.
    return about.state in {"Z", "X"} and about.threads <= 1


def _unix_time(start_ticks: int) -> float:
    booted = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return round(booted + start_ticks / os.sysconf("SC_CLK_TCK"), 2)


@cache
def boot_id() -> str:
    """Tells one run of the machine's kernel from the next; "" where the system has no such thing."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """The name of our pid namespace, "" where the system has none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def ray_session(pid: int) -> str:
    """The Ray session whose raylet started this process, "" where it has no raylet (any more)."""
    with suppress(psutil.Error):
        for parent in psutil.Process(pid).parents():
            for argument in parent.cmdline():
                if parent.name() == "raylet" and argument.startswith(("--session-name=", "--session_name=")):
                    return argument.partition("=")[2]
    return ""
