"""Who names something: in a command line, by a file that is open or mapped, a directory one is in, a socket.

On Linux read from /proc, whose formats are those of proc(5); elsewhere what psutil tells. That a name is not found says
as much as we were let to look: who could not be looked at is in `unseen`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ray_envcache.system import processes

_INITIAL_NAMESPACE = "pid:[4026531836]"  # PROC_PID_INIT_INO, linux/proc_ns.h


@dataclass
class Mentions:
    """The first that names each name: "process 7 (raylet --log_dir=...), by its command line". `unseen`: see above."""

    by_name: dict[str, str] = field(default_factory=dict)
    unseen: list[processes.Process] = field(default_factory=list)


def find_mentions(pattern: re.Pattern[bytes]) -> Mentions:
    """What matches of `pattern` are named, by any process of any user but our own. Raises nothing."""
    found = Mentions()
    if not _has_proc():
        return _ask_psutil(pattern, found)
    networks: set[str] = set()
    pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())  # names only
    for pid in pids:
        if pid != os.getpid():
            _look_at(pid, pattern, found)
    for pid in pids:  # last: they name no process
        _look_at_sockets(pid, pattern, found, networks)
    return found


def sees_all_processes() -> bool:
    """Whether no process of this host is hidden from us in another pid namespace, as from within a container."""
    try:
        return os.readlink("/proc/self/ns/pid") == _INITIAL_NAMESPACE
    except OSError:
        return not _has_proc()


def _has_proc() -> bool:
    return Path("/proc/self/fdinfo").is_dir()


def _look_at(pid: int, pattern: re.Pattern[bytes], found: Mentions) -> None:
    try:
        for kind, text in _texts(pid):
            _note(pid, pattern.findall(text), kind, found)
    except (FileNotFoundError, ProcessLookupError):
        return  # it ended meanwhile, or is of the kernel
    except OSError:
        if process := processes.describe(pid):
            found.unseen.append(process._replace(user=_user(pid)))


def _user(pid: int) -> int:
    """The real user; whose files a process has in /proc says less: they are root's where looking is refused."""
    with suppress(OSError):
        if uid := re.search(rb"^Uid:\s*(\d+)", Path(f"/proc/{pid}/status").read_bytes(), re.MULTILINE):
            return int(uid[1])
    return -1


def _texts(pid: int) -> Iterator[tuple[str, bytes]]:
    """All that may name something. What everybody may read comes first."""
    proc = f"/proc/{pid}"
    yield "its command line", Path(f"{proc}/cmdline").read_bytes()
    yield "its working directory", _readlink(f"{proc}/cwd")
    yield "its executable", _readlink(f"{proc}/exe")
    yield "its root", _readlink(f"{proc}/root")
    for number in os.listdir(f"{proc}/fd"):  # names only: there are thousands
        yield "an open file", _readlink(f"{proc}/fd/{number}")
    yield "a mapped file", Path(f"{proc}/maps").read_bytes()


def _readlink(path: str) -> bytes:
    """Where a link in /proc points to, empty where there is nothing: a closed file, a kernel thread's executable."""
    try:
        return os.fsencode(os.readlink(path))  # a Path for each of ten thousand files takes longer than the call
    except FileNotFoundError:
        return b""


def _look_at_sockets(pid: int, pattern: re.Pattern[bytes], found: Mentions, networks: set[str]) -> None:
    """Sockets by their names, once for each network namespace: the kernel shows those of all users to everybody."""
    with suppress(OSError):
        network = os.readlink(f"/proc/{pid}/ns/net")
        if network not in networks:
            networks.add(network)
            for name in pattern.findall(Path(f"/proc/{pid}/net/unix").read_bytes()):
                found.by_name.setdefault(os.fsdecode(name), "a socket of it is open")


def _note(pid: int, names: Iterable[bytes], kind: str, found: Mentions) -> None:
    for name in map(os.fsdecode, names):
        if name not in found.by_name and (process := processes.describe(pid)):
            found.by_name[name] = f"process {pid} ({_first_word(process.command)}) names it: {kind}"


def _first_word(command: str) -> str:
    return os.path.basename(command.split(" ", maxsplit=1)[0])


def _ask_psutil(pattern: re.Pattern[bytes], found: Mentions) -> Mentions:
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            command = process.cmdline()
            files = [process.cwd(), process.exe(), *(file.path for file in process.open_files())]
        except psutil.AccessDenied:
            with suppress(psutil.Error):
                found.unseen.append(
                    processes.Process(process.pid, process.create_time(), process.name(), process.uids().real)
                )
        except psutil.Error:
            continue  # it ended meanwhile
        else:
            names = pattern.findall(os.fsencode("\n".join([*command, *files])))
            for name in map(os.fsdecode, names):
                found.by_name.setdefault(name, f"process {process.pid} ({process.name()}) names it")
    return found
