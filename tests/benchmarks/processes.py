"""The one door for child processes: each with its whole tree supervised, measured and ended."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import psutil

from tests.benchmarks.measure import BenchmarkError

if TYPE_CHECKING:
    from typing_extensions import Self

PROGRAMS = Path(__file__).parent / "programs"
MARK = "@bench "
PATIENCE = 3600.0
"""A guard against a hang, nothing else."""


class Meter(Protocol):
    """Counts the processor seconds of a tree of processes, the dead included."""

    @property
    def directory(self) -> str:
        """The cgroup to enter, "-" for none."""

    def watch(self, pid: int) -> None: ...

    def seconds(self) -> float: ...

    def close(self) -> None: ...


class CgroupMeter:
    """Exact: the kernel adds up what everybody in the cgroup ever used."""

    def __init__(self, parent: Path) -> None:
        self._path = parent / f"ray-envcache-benchmark-{secrets.token_hex(6)}"
        self._path.mkdir()

    @property
    def directory(self) -> str:
        return os.fspath(self._path)

    def watch(self, pid: int) -> None:
        """Nothing to do: whoever is started in a cgroup stays there."""

    def seconds(self) -> float:
        with suppress(OSError):
            return int((self._path / "cpuacct.usage").read_text()) / 1e9
        text = (self._path / "cpu.stat").read_text()
        return int(text.split("usage_usec ")[1].split()[0]) / 1e6

    def close(self) -> None:
        for _ in range(100):
            try:
                self._path.rmdir()
            except OSError:  # noqa: PERF203  # the kernel takes a moment to forget the dead
                time.sleep(0.02)
            else:
                return


class PollingMeter:
    """Where there is no cgroup to be had: all processes below, looked at often. Misses what lives for milliseconds."""

    directory = "-"

    def __init__(self) -> None:
        self._seen: dict[tuple[int, float], float] = {}
        self._ended = threading.Event()

    def watch(self, pid: int) -> None:
        threading.Thread(target=self._poll, args=(psutil.Process(pid),), daemon=True).start()

    def seconds(self) -> float:
        return sum(self._seen.copy().values())

    def close(self) -> None:
        self._ended.set()

    def _poll(self, top: psutil.Process) -> None:
        while not self._ended.wait(0.02):
            with suppress(psutil.Error):
                for process in top.children(recursive=True):
                    with suppress(psutil.Error):
                        times = process.cpu_times()
                        self._seen[process.pid, process.create_time()] = times.user + times.system


def cgroup_parent() -> Path | None:
    """A directory of the kernel in which we may make cgroups that count processor time, None where there is none."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
        mine = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return None
    for _, controllers, path in sorted(mine, key=lambda one: "cpuacct" not in one[1]):
        for _, mount, kind, options, *_ in mounts:
            legacy = kind == "cgroup" and "cpuacct" in controllers.split(",") and "cpuacct" in options.split(",")
            if legacy or (kind == "cgroup2" and not controllers):
                place = Path(mount + path)
                if os.access(place / "cgroup.procs", os.W_OK) and os.access(place, os.W_OK):
                    return place
    return None


def new_meter() -> Meter:
    parent = cgroup_parent()
    if parent is not None:
        with suppress(OSError):
            return CgroupMeter(parent)
    return PollingMeter()


@dataclass(frozen=True)
class Event:
    """What a supervised program said: a moment of the monotonic clock, processor seconds of its tree so far, more."""

    name: str
    moment: float
    cpu: float
    more: dict[str, Any]


@dataclass
class Supervised:
    """A command with its tree. Use it as a context manager: at its end nothing of the tree is left."""

    command: Sequence[str | os.PathLike[str]]
    environ: Mapping[str, str]
    cwd: Path
    settle: float = 0.0
    events: list[Event] = field(default_factory=list)
    output: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._meter = new_meter()
        self._changed = threading.Condition()
        supervisor = [
            sys.executable,
            "-I",
            "-S",
            str(PROGRAMS / "supervise.py"),
            str(os.getpid()),
            self._meter.directory,
        ]
        self._child = subprocess.Popen(
            [*supervisor, str(self.settle), *(os.fspath(part) for part in self.command)],
            env=dict(self.environ),
            cwd=self.cwd,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._meter.watch(self._child.pid)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._child.poll() is None and not any(event.name == "exit" for event in self.events):
            self._child.terminate()
        self._child.wait()
        # Nobody is left who could hold the other end.
        self._reader.join()
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self._meter.close()

    @property
    def pid(self) -> int:
        return self._child.pid

    def go_on(self) -> None:
        """Let a program go on that holds."""
        assert self._child.stdin is not None
        with suppress(BrokenPipeError):
            self._child.stdin.write("\n")
            self._child.stdin.flush()

    def wait_for(self, name: str) -> Event:
        """The first event of that name. Raises BenchmarkError where the command ends without it."""
        with self._changed:
            self._changed.wait_for(lambda: self.find(name) or self.find("end"), PATIENCE)
        event = self.find(name)
        if event is None or (name == "exit" and event.more["status"] != 0):
            said = "\n".join(self.output[-15:])
            raise BenchmarkError(f"`{' '.join(map(str, self.command))[:100]}` ended without `{name}`:\n{said}")
        return event

    def find(self, name: str) -> Event | None:
        return next((event for event in self.events if event.name == name), None)

    def all(self, name: str) -> list[Event]:
        return [event for event in self.events if event.name == name]

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            if MARK in line:
                self._note(json.loads(line.partition(MARK)[2]))
            else:
                self.output.append(line.rstrip())
        with self._changed:
            if self.find("end") is None:
                self.events.append(Event("end", time.monotonic(), 0.0, {}))
            self._changed.notify_all()

    def _note(self, said: dict[str, Any]) -> None:
        event = Event(said.pop("event"), said.pop("moment"), self._meter.seconds(), said)
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()


@dataclass(frozen=True)
class Done:
    """A command that ended well: its wall time, processor seconds of its tree until then, and what it printed."""

    seconds: float
    cpu: float
    output: str


def run(command: Sequence[str | os.PathLike[str]], environ: Mapping[str, str], cwd: Path, settle: float = 0.0) -> Done:
    """Run a command to its end, and what it leaves behind in the background for `settle` seconds more.

    Raises BenchmarkError where it fails.
    """
    with Supervised(command, environ, cwd, settle) as child:
        start, done = child.wait_for("start"), child.wait_for("exit")
        child.wait_for("end")
    return Done(done.moment - start.moment, done.cpu - start.cpu, "\n".join(child.output))
