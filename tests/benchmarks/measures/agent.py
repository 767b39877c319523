"""What we cost Ray's agent, and the workers that it starts."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from tests.benchmarks import fabricate
from tests.benchmarks.alternatives import FIELD, FLOOR, UV_RUN, Alternative, Work
from tests.benchmarks.bench import Bench
from tests.benchmarks.fleet import Setting
from tests.benchmarks.measure import Result, Row, Series


def create(bench: Bench, result: Result) -> None:
    """`create()` on a warm store with 1000 entries, for a lock with 400 packages, in fresh processes."""
    (packages,), (entries,) = bench.pick([400], [20]), bench.pick([1000], [20])
    folder = bench.wide(packages, real_ray=False).project.folder
    found, first = [], []
    with bench.host.folder() as root:
        bench.finish(folder, root / "store")
        fabricate.fill(root / "store", entries)
        for _ in range(1 if bench.options.smoke else bench.options.repetitions):
            calls = created(bench, folder, root / "store", 10 if bench.options.smoke else 200)
            first.append(calls[0])
            found += calls
    series = result.add("create()", "ms", found)
    spread = (min(found), max(found))
    detail = f"{len(found)} calls, {entries} entries, {packages} packages"
    result.rows.append(Row("create(), warm, median", series.median, "ms", spread, 1.0, detail=detail))
    result.rows.append(Row("create(), warm, p99", series.quantile(0.99), "ms", None, 5.0, detail=detail))
    result.report("create(), the first call of a process", result.add("first create()", "ms", first))


def created(bench: Bench, folder: Path, store: Path, calls: int) -> list[float]:
    """Milliseconds of each call of `create()` in a fresh process."""
    said = bench.host.program("plugin_create.py", folder, str(calls), store=store)
    return [float(one) for one in json.loads(said)]


def plugin(bench: Bench, result: Result) -> None:
    """Importing the plugin in an agent that has imported what is Ray's own."""

    def once() -> dict[str, float]:
        said = json.loads(bench.host.program("plugin_import.py", store=bench.host.disk / "no-store"))
        return {name: said[name] for name in ("ray", "plugin")}

    # What is imported for the first time on this machine is compiled first.
    once()
    samples = bench.repeat(result, {"import": once})["import"]
    result.report("importing the plugin in the agent", result.add("plugin", "ms", samples["plugin"]), 15.0)
    result.report("importing what is Ray's own there", result.add("ray", "ms", samples["ray"]))


def memory(bench: Bench, result: Result) -> None:
    """Memory of the agent while a cluster holds, with us and without. PSS: shared pages in parts."""
    kit = bench.kit

    def once(alternative: Alternative) -> dict[str, float]:
        return bench.fleet(kit, alternative, Setting(work=Work(hold=True))).agents[0]

    samples = bench.repeat(result, {str(one): partial(once, one) for one in (FLOOR, FIELD)})
    for kind, target in (("pss", 10.0), ("uss", None), ("rss", None)):
        found = {name: result.add(f"{kind} of the agent, {name}", "MB", one[kind]) for name, one in samples.items()}
        if len(found) == 2:  # both
            ours, theirs = found[str(FIELD)], found[str(FLOOR)]
            what = f"memory of the agent beyond {FLOOR}, {kind.upper()}"
            detail = f"{ours} against {theirs}"
            result.rows.append(Row(what, ours.median - theirs.median, "MB", target=target, detail=detail))


def cpu(bench: Bench, result: Result) -> None:
    """Processor seconds of 32 workers that start at once, 400 packages: of all processes of the cluster."""
    if bench.options.smoke:
        kit, workers = bench.kit, 2
    else:
        kit, workers = bench.wide(400, real_ray=True), 32

    def once(alternative: Alternative) -> dict[str, float]:
        fleet = bench.fleet(kit, alternative, Setting(work=Work(many=workers)))
        return {"cpu": fleet.cpu_between("before-many", "many"), "wall": fleet.seconds("many")[0]}

    samples = bench.repeat(result, {str(one): partial(once, one) for one in (FLOOR, UV_RUN, FIELD)})
    found: dict[str, dict[str, Series]] = {
        what: {
            name: result.add(f"{what} of {workers} workers, {name}", "s", one[what]) for name, one in samples.items()
        }
        for what in ("cpu", "wall")
    }
    for what, series in found.items():
        if len(series) == 3:  # all
            said = f"{what} seconds of {workers} workers at once"
            target = 1.02 if what == "cpu" else None
            result.compare(f"{said}: {FIELD} against {FLOOR}", series[str(FIELD)], series[str(FLOOR)], target)
            result.compare(f"{said}: {UV_RUN} against {FLOOR}", series[str(UV_RUN)], series[str(FLOOR)])
