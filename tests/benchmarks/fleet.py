"""Clusters of one alternative, started at the same moment, each in a temp directory of its own."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.benchmarks.alternatives import Alternative, Kit, Work
from tests.benchmarks.footprint import Sampler
from tests.benchmarks.measure import BenchmarkError
from tests.benchmarks.processes import Event, Supervised
from tests.support import count_builds

_AGENT = "ray::RuntimeEnvAgent"


@dataclass
class Fleet:
    """What so many clusters did. Times in seconds from the start of the first process."""

    clusters: list[Supervised] = field(default_factory=list)
    agents: list[dict[str, float]] = field(default_factory=list)
    """Of each cluster's agent, while it holds: MB of memory."""
    temps: Sampler | None = None
    """What the temp directories had, where it was sampled."""
    store: Sampler | None = None
    entries: int = 0
    """How many environments were in the store in the end."""
    builds: int = 0
    """How many environments were built, of a project that counts them."""

    @property
    def wall(self) -> float:
        """Until all clusters had the result of their first task."""
        return max(self.moments("first")) - min(self.moments("start"))

    def moments(self, name: str) -> list[float]:
        return [event.moment for cluster in self.clusters for event in cluster.all(name)]

    def seconds(self, name: str) -> list[float]:
        """What drivers say an event took."""
        return [float(event.more["seconds"]) for event in self._events(name)]

    def between(self, first: str, then: str) -> float:
        """The time between two events of the first cluster."""
        return self.moments(then)[0] - self.moments(first)[0]

    def cpu_between(self, first: str, then: str) -> float:
        """The processor seconds of all clusters between two events of each."""
        return sum(event.cpu for event in self._events(then)) - sum(event.cpu for event in self._events(first))

    def _events(self, name: str) -> list[Event]:
        return [event for cluster in self.clusters for event in cluster.all(name)]


@dataclass(frozen=True)
class Setting:
    """Where and how a fleet runs. `store` and `cache`: other ones than the warm ones. `other`: temp directories on the
    other file system. `sampled`: the disk is watched, which takes time from everybody. `settle`: seconds for what goes
    on in the background after a cluster's end.
    """

    count: int = 1
    work: Work = field(default_factory=Work)
    store: Path | None = None
    cache: Path | None = None
    other: bool = False
    sampled: bool = False
    settle: float = 0.0


def launch(kit: Kit, alternative: Alternative, setting: Setting) -> Fleet:
    """Run a fleet to its end. Raises BenchmarkError where a cluster fails; then all are ended."""
    store, built = setting.store or kit.store, count_builds(kit.log)
    with ExitStack() as stack:
        temps = [stack.enter_context(kit.host.folder(other=setting.other)) for _ in range(setting.count)]
        fleet = Fleet()
        if setting.sampled:
            # Left before the folders go: what is there after the end counts too.
            fleet.temps = stack.enter_context(Sampler(temps))
            fleet.store = stack.enter_context(Sampler([store] if alternative.ours else []))
        with ExitStack() as running:
            fleet.clusters = [running.enter_context(_cluster(kit, alternative, setting, temp)) for temp in temps]
            _follow(fleet, hold=setting.work.hold)
        fleet.entries = len(entries_of(store))
    fleet.builds = count_builds(kit.log) - built
    return fleet


def _cluster(kit: Kit, alternative: Alternative, setting: Setting, temp: Path) -> Supervised:
    command = alternative.make(kit, temp, setting.work)
    environ = kit.host.environ(setting.store or kit.store, setting.cache, temp) | dict(alternative.environ)
    return Supervised(command, environ, kit.project.folder, setting.settle)


def _follow(fleet: Fleet, *, hold: bool) -> None:
    for cluster in fleet.clusters:
        cluster.wait_for("first")
    if hold:
        for cluster in fleet.clusters:
            cluster.wait_for("holding")
        fleet.agents = [_memory_of_agent(cluster.pid) for cluster in fleet.clusters]
        for cluster in fleet.clusters:
            cluster.go_on()
    for cluster in fleet.clusters:
        cluster.wait_for("exit")
        cluster.wait_for("end")


def _memory_of_agent(pid: int) -> dict[str, float]:
    for process in psutil.Process(pid).children(recursive=True):
        with suppress(psutil.Error):
            if process.cmdline()[:1] == [_AGENT]:
                found = process.memory_full_info()
                return {"rss": found.rss / 1e6, "pss": found.pss / 1e6, "uss": found.uss / 1e6}
    raise BenchmarkError("the cluster has no runtime env agent")


def entries_of(store: Path) -> list[Path]:
    """The entries of a store, without a word of the package under test."""
    return sorted(path for path in (store / "v1" / "entries").glob("*-*") if path.is_dir())
