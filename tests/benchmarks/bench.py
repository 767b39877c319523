"""What measures are given: the options, projects that are ready to be used, and ways to repeat things fairly."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from ray_envcache.errors import EnvCacheError
from tests import index, support
from tests.benchmarks import alternatives, processes, projects
from tests.benchmarks.alternatives import Alternative, Kit, Work
from tests.benchmarks.fleet import Fleet, Setting, entries_of, launch
from tests.benchmarks.host import Command, Host
from tests.benchmarks.measure import Alternation, BenchmarkError, Result
from tests.benchmarks.projects import Project

# What a fault in one measure may raise: the others are to be measured all the same.
_FAULTS = (BenchmarkError, EnvCacheError, AssertionError, ArithmeticError, LookupError, OSError, ValueError)
FINISHING = 900.0
"""How long compiling bytecode in the background may take: a guard."""


@dataclass(frozen=True)
class Options:
    """What the command line said. With `smoke` everything is tiny and runs once: it only shows that it runs."""

    project: str = "medium"
    repetitions: int = 5
    patience: float = 300.0
    smoke: bool = False
    clusters: int = 8
    ways: tuple[str, ...] = ()


@dataclass
class Bench:
    """One run of the suite. With `smoke`, measures share the clusters they have in common."""

    host: Host
    options: Options
    stack: ExitStack
    """What lives as long as the run."""
    _kits: dict[str, Kit] = field(default_factory=dict)
    _shared: dict[tuple[str, str, int], Fleet] = field(default_factory=dict)

    def say(self, text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)

    def pick(self, full: list[int], smoke: list[int]) -> list[int]:
        """The sizes to measure at."""
        return smoke if self.options.smoke else full

    def counts(self, *, beyond: int = 1) -> list[int]:
        """The numbers of clusters at once, doubled each time, up to the chosen one or `beyond` times that."""
        most = 1 if self.options.smoke else self.options.clusters * beyond
        return [count for count in (1, 2, 4, 8, 16, 32, 64) if count <= most]

    @property
    def all_alternatives(self) -> tuple[Alternative, ...]:
        """Those that a smoke run has time for, or that were asked for, or all."""
        few = (alternatives.FLOOR, alternatives.UV_RUN, alternatives.FIELD, alternatives.RUN)
        chosen, ways = few if self.options.smoke else alternatives.ALL, self.options.ways
        return tuple(one for one in chosen if not ways or one.letter in ways)

    def alternatives_at(self, count: int) -> list[Alternative]:
        """Those to measure with so many clusters: eight times all packages over the network tells of the network."""
        return [one for one in self.all_alternatives if count <= 4 or not one.downloads]

    @cached_property
    def kit(self) -> Kit:
        """The chosen project, ready. To be asked for before anything is timed: making it ready takes a while."""
        if self.options.smoke:
            return self.witnessed
        return self.made(self.options.project, lambda folder: projects.write(folder, projects.SIZES[folder.name]))

    @cached_property
    def witnessed(self) -> Kit:
        """A project that counts its builds in the file `builds`."""
        wheels, log = self.host.disk / "witness", self.host.disk / "builds"
        return self.made("witnessed", lambda folder: projects.write_witnessed(folder, wheels, log))

    @cached_property
    def edited(self) -> Kit:
        """The chosen project with a package of its own, which the project installs. In a smoke run there is no other."""
        packages = () if self.options.smoke else projects.SIZES[self.options.project]
        return self.made("edited", lambda folder: projects.write_edited(folder, packages))

    def wide(self, count: int, *, real_ray: bool) -> Kit:
        """A project of `count` tiny packages, and ray: the real one, or one that only says its version.

        With the latter all comes from an index on loopback, and uv has nothing heavy to do: what is left is the cost
        per package.
        """
        name = f"wide-{count}{'-ray' if real_ray else ''}"
        wheels = self.host.disk / f"wheels-{name}"

        def write(folder: Path) -> None:
            packages = tuple(f"wide-{number}" for number in range(count))
            for package in packages:
                support.make_wheel(wheels, package)
            source = f'find-links = ["{wheels}"]\n'
            if not real_ray:
                support.make_fake_ray(wheels)
                served = self.stack.enter_context(index.serve(wheels))
                source = f'[[tool.uv.index]]\nurl = "{served.url}"\ndefault = true\n'
            projects.write(folder, packages, source)

        return self.made(name, write)

    def made(self, name: str, write: Callable[[Path], None]) -> Kit:
        """A project that `write` writes, locked; with what every alternative needs, made once."""
        if name not in self._kits:
            self.say(f"preparing the project {name}")
            write(self.host.disk / name)
            self.host.uv("lock", "--project", self.host.disk / name)
            self._kits[name] = self._prepare(name)
        return self._kits[name]

    def variant(self, kit: Kit) -> Path:
        """The folder of the same project with one more package, all others as locked."""
        folder = self.host.disk / f"{kit.project.name}-and-one"
        if not folder.exists():
            self.host.uv("lock", "--project", projects.write_variant(kit.project.folder, folder))
            # Once, so that uv's cache has it.
            self.sync(folder, self.host.disk / f"{folder.name}-venv")
        return folder

    def sync(self, folder: Path, venv: Path, *options: str, cache: Path | None = None) -> float:
        """The seconds of `uv sync` of a project into a venv."""
        arguments: Command = ("sync", "--quiet", "--frozen", "--project", folder, *options)
        return self.host.uv(*arguments, cache=cache, UV_PROJECT_ENVIRONMENT=str(venv)).seconds

    def build(self, folder: Path, store: Path, cache: Path | None = None) -> float:
        """The seconds until an environment is built and handed out, interpreter start included; what follows is ended."""
        command = [self.host.python, processes.PROGRAMS / "hand_out.py", folder]
        return processes.run(command, self.host.environ(store, cache), self.host.disk).seconds

    @property
    def settle(self) -> float:
        """How long what goes on in the background may take."""
        return 0.0 if self.options.smoke else FINISHING

    def finish(self, folder: Path, store: Path) -> None:
        """Have the environment built and compiled, however long it takes."""
        self.host.envcache("build", folder, store=store, settle=FINISHING)
        if not all((entry / "compiled.json").exists() for entry in entries_of(store)):
            raise BenchmarkError(f"the bytecode of `{folder}` was not completed")

    def fleet(self, kit: Kit, alternative: Alternative, setting: Setting | None = None) -> Fleet:
        """Run so many clusters of an alternative; in a smoke run one that did all works serves all measures."""
        setting = setting or Setting()
        if not self.options.smoke:
            return launch(kit, alternative, setting)
        # One fleet with an empty store serves all too: two clusters, which is where builds could be two.
        count = 1 if setting.store is None else 2
        kind = (alternative.letter, kit.project.name, count)
        if kind not in self._shared:
            every = Work(more=1, many=2, module=kit.project.module, hold=True)
            self._shared[kind] = launch(kit, alternative, replace(setting, count=count, work=every, sampled=True))
        return self._shared[kind]

    def cold(self, kit: Kit, alternative: Alternative, setting: Setting | None = None) -> Fleet:
        """The same with an empty store."""
        with self.host.folder() as store:
            return self.fleet(kit, alternative, replace(setting or Setting(), store=store))

    def repeat(
        self, result: Result, ways: Mapping[str, Callable[[], Mapping[str, float]]]
    ) -> dict[str, dict[str, list[float]]]:
        """Samples of several ways to do the same, in alternating order; failures are noted.

        Raises BenchmarkError where all of them fail."""
        options = self.options
        alternation = Alternation(1 if options.smoke else options.repetitions, options.patience, self.say)
        found = alternation.run(ways)
        result.failures += alternation.failures
        if not found:
            raise BenchmarkError("nothing is left to be measured")
        return found

    @contextmanager
    def timed(self, result: Result) -> Iterator[None]:
        """Note how long a measure took, and that it failed as a whole if it did."""
        began = time.monotonic()
        try:
            yield
        except _FAULTS as error:
            result.failures.append(f"{type(error).__name__}: {error}")
        result.seconds = round(time.monotonic() - began, 1)

    def _prepare(self, name: str) -> Kit:
        folder, disk = self.host.disk / name, self.host.disk
        store, finished, bare = (disk / f"{name}-{kind}" for kind in ("store", "venv", "bare"))
        kit = Kit(self.host, self._described(folder), store, finished, bare, disk / "builds")
        # From here on uv's cache is warm.
        compiling = [] if self.options.smoke else ["--compile-bytecode"]
        self.sync(folder, kit.finished, *compiling)
        if name in projects.SIZES:
            self.sync(folder, kit.bare)
        if (kit.finished / "bin" / "ray").exists():
            self.sync(folder, folder / ".venv", *compiling)
            self.host.envcache("run", "--project", folder, "--", "true", store=kit.store, settle=self.settle)
        if self.options.smoke:
            self.build(folder, kit.store)
        else:
            self.finish(folder, kit.store)
        return kit

    def _described(self, folder: Path) -> Project:
        arguments = ("export", "--quiet", "--frozen", "--no-hashes", "--no-annotate", "--project", folder)
        pins = projects.pins_of(self.host.uv(*arguments).output)
        modules = {
            "medium": "pandas",
            "large": "torch",
            "small": "jinja2",
            "witnessed": "envcache_witness",
            "edited": "edited",
        }
        return Project(folder.name, folder, modules.get(folder.name, "wide_0"), pins)
