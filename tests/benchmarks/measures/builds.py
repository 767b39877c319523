"""Building an environment: until it is handed out, until its bytecode is complete, and what bytecode is worth."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.benchmarks import machine
from tests.benchmarks.alternatives import BARE, FIELD, FLOOR, Alternative, Kit, Work
from tests.benchmarks.bench import FINISHING, Bench
from tests.benchmarks.fleet import Setting, entries_of
from tests.benchmarks.host import Command
from tests.benchmarks.measure import Result, Series
from tests.benchmarks.processes import Supervised

CHECK = 0.7
"""Seconds that the check of a new environment may take beyond what uv takes."""


def build(bench: Bench, result: Result) -> None:
    """Building until the environment is handed out, against `uv sync` of the same lock into an empty directory."""
    folder = bench.kit.project.folder
    for state in ("warm",) if bench.options.smoke else ("warm", "cold"):
        ways: dict[str, Callable[[], dict[str, float]]] = {
            "uv sync": partial(_sync, bench, folder, state),
            "ray-envcache": partial(_build, bench, folder, state),
        }
        samples = bench.repeat(result, ways)
        if samples.keys() < ways.keys():
            continue
        found = {
            name: result.add(f"{name} until hand-out, uv's cache {state}", "s", one["build"])
            for name, one in samples.items()
        }
        ours, theirs = found["ray-envcache"], found["uv sync"]
        result.compare(f"build until hand-out, uv's cache {state}, against `uv sync`", ours, theirs)
        allowed = Series(ours.name, ours.unit, tuple(one - CHECK for one in ours.samples))
        result.compare(f"the same, {CHECK} s for the check allowed", allowed, theirs, 1.1)
    if bench.options.smoke:
        result.notes.append("uv's cache always warm")


def bytecode(bench: Bench, result: Result) -> None:
    """Until bytecode is complete, with all but one package in an earlier environment, against uv's compiling all."""
    # In a smoke run others may need the processor, and the compiler gives way to everybody.
    kit = bench.wide(20, real_ray=False) if bench.options.smoke else bench.kit
    variant = bench.variant(kit)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "uv sync --compile-bytecode": partial(_sync_compiled, bench, variant),
        "ray-envcache build": partial(_build_compiled, bench, kit, variant),
    }
    samples = bench.repeat(result, ways)
    found = {name: result.add(f"{name}, until compiled", "s", one["seconds"]) for name, one in samples.items()}
    for series in found.values():
        result.report(series.name, series)
    if found.keys() == ways.keys():
        theirs, ours = found["uv sync --compile-bytecode"], found["ray-envcache build"]
        what = "until bytecode is complete, one package is new, against `uv sync --compile-bytecode`"
        result.compare(what, ours, theirs, 0.1)


def first_import(bench: Bench, result: Result) -> None:
    """The first import of a big package in a fresh worker, against a venv without bytecode."""
    _imports(bench, result, "pages warm", cold_pages=False)
    if machine.can_drop_pages() and not bench.options.smoke:
        _imports(bench, result, "pages cold", cold_pages=True)


def _imports(bench: Bench, result: Result, state: str, *, cold_pages: bool) -> None:
    kit = bench.kit

    def once(alternative: Alternative) -> dict[str, float]:
        if cold_pages:
            machine.drop_pages()
        work = Work(module=kit.project.module, env_vars=alternative.environ)
        return {"import": bench.fleet(kit, alternative, Setting(work=work)).seconds("import")[0]}

    chosen = (FLOOR, FIELD) if bench.options.smoke else (FLOOR, BARE, FIELD)
    samples = bench.repeat(result, {str(one): partial(once, one) for one in chosen})
    found = {
        name: result.add(f"import {kit.project.module}, {state}, {name}", "s", one["import"])
        for name, one in samples.items()
    }
    for series in found.values():
        result.report(series.name, series)


def _sync(bench: Bench, folder: Path, state: str) -> dict[str, float]:
    with bench.host.folder() as fresh:
        cache = fresh / "uv" if state == "cold" else None
        return {"build": bench.sync(folder, fresh / "venv", cache=cache)}


def _build(bench: Bench, folder: Path, state: str) -> dict[str, float]:
    with bench.host.folder() as fresh:
        cache = fresh / "uv" if state == "cold" else None
        return {"build": bench.build(folder, fresh / "store", cache)}


def _sync_compiled(bench: Bench, folder: Path) -> dict[str, float]:
    with bench.host.folder() as fresh:
        return {"seconds": bench.sync(folder, fresh / "venv", "--compile-bytecode")}


def _build_compiled(bench: Bench, kit: Kit, folder: Path) -> dict[str, float]:
    host = bench.host
    with host.folder() as store:
        bench.finish(kit.project.folder, store)
        earlier = set(entries_of(store))
        command: Command = [host.python, "-m", "ray_envcache", "build", folder]
        with Supervised(command, host.environ(store), host.disk, FINISHING) as child:
            start = child.wait_for("start")
            offset = time.time() - time.monotonic()
            child.wait_for("exit")
            child.wait_for("end")
        (new,) = set(entries_of(store)) - earlier
        # Its mtime says when: nobody has to look often enough to see it come.
        return {"seconds": (new / "compiled.json").stat().st_mtime - offset - start.moment}
