"""Time until work begins: one cluster, one more worker, many clusters at once."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from functools import partial

from tests.benchmarks import machine, projects
from tests.benchmarks.alternatives import BY_HAND, FIELD, FLOOR, RUN, UV_RUN, Alternative, Kit, Work
from tests.benchmarks.bench import Bench
from tests.benchmarks.fleet import Fleet, Setting, launch
from tests.benchmarks.measure import Result, Row, Series

PHASES = (("start", "imported"), ("imported", "up"), ("up", "first"))


def first(bench: Bench, result: Result) -> None:
    """First task on a warm store, from process start."""
    found = _first(bench, result, bench.all_alternatives, "first task, warm")
    for alternative, target in ((FIELD, 1.02), (RUN, 0.95)):
        _compare(result, f"first task, warm store: {alternative} against {FLOOR}", found, alternative, FLOOR, target)
        # Ray's own start takes a second longer whenever it just misses one of its steps.
        what = f"the same, the fastest of each: {alternative}"
        _compare(result, what, found, alternative, FLOOR, target, by=Result.compare_fastest)
    for alternative in (FIELD, RUN):
        _compare_added(result, found, alternative)
    if machine.can_drop_pages() and not bench.options.smoke:
        cold = _first(bench, result, (FLOOR, UV_RUN, BY_HAND, FIELD, RUN), "first task, pages cold", cold_pages=True)
        for alternative in (FIELD, RUN):
            _compare(result, f"the same, page cache cold: {alternative} against {FLOOR}", cold, alternative, FLOOR)
    else:
        result.notes.append("page cache always warm")


def cold(bench: Bench, result: Result) -> None:
    """First task on an empty store, with uv's cache warm. Of `uv run` the driver's own .venv is there already."""
    kit = bench.kit
    ways = {
        str(UV_RUN): lambda: {"first": bench.fleet(kit, UV_RUN).wall},
        str(FIELD): lambda: {"first": bench.cold(kit, FIELD).wall},
    }
    if not bench.options.smoke:
        ways[str(RUN)] = lambda: {"first": bench.cold(kit, RUN).wall}
    found = {
        name: result.add(f"first task, empty store, {name}", "s", samples["first"])
        for name, samples in bench.repeat(result, ways).items()
    }
    for alternative in (FIELD, RUN):
        _compare(result, f"first task, empty store: {alternative} against {UV_RUN}", found, alternative, UV_RUN, 1.0)


def edit(bench: Bench, result: Result) -> None:
    """First task after a line of the project's own package was edited. Floor and `uv run` have it as an editable."""
    kit, chosen = bench.edited, (FLOOR, UV_RUN, FIELD, RUN)
    edits = itertools.count()

    def once(alternative: Alternative) -> dict[str, float]:
        projects.edit(kit.project.folder, next(edits))
        # A smoke run must not share a cluster here: it would run without an edit.
        return {"first": launch(kit, alternative, Setting()).wall}

    samples = bench.repeat(result, {str(one): partial(once, one) for one in chosen})
    found = {name: result.add(f"edited, {name}", "s", one["first"]) for name, one in samples.items()}
    for series in found.values():
        result.report(f"first task after an edit, {series.name.removeprefix('edited, ')}", series)
    for alternative in (FIELD, RUN):
        if {str(alternative), str(FLOOR)} <= found.keys():
            ours, floor = found[str(alternative)], found[str(FLOOR)]
            result.exceed(f"edit: {alternative} beyond {FLOOR}", ours, floor, 1.0)
            ours, floor = (Series(one.name, one.unit, (min(one.samples),)) for one in (ours, floor))
            result.exceed("the same, the fastest of each", ours, floor, 1.0)


def worker(bench: Bench, result: Result) -> None:
    """One more worker: an actor in a runtime_env that is new each time."""
    kit = bench.kit

    def once(alternative: Alternative) -> dict[str, float]:
        fleet = bench.fleet(kit, alternative, Setting(work=Work(more=5)))
        return {"worker": statistics.median(fleet.seconds("more"))}

    chosen = (FLOOR, FIELD) if bench.options.smoke else (FLOOR, UV_RUN, FIELD, RUN)
    samples = bench.repeat(result, {str(one): partial(once, one) for one in chosen})
    found = {name: result.add(f"one more worker, {name}", "s", one["worker"]) for name, one in samples.items()}
    for alternative in (FIELD, RUN):
        _compare(result, f"one more worker: {alternative} against {FLOOR}", found, alternative, FLOOR, 1.01)
    _compare(result, f"one more worker: {UV_RUN} against {FLOOR}", found, UV_RUN, FLOOR)


def many(bench: Bench, result: Result) -> None:
    """N clusters at once: warm, and from an empty store."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for count in bench.counts():
        found = _at_once(bench, result, count)
        for name, series in found.items():
            xs, ys = curves.setdefault(name, ([], []))
            xs.append(count)
            ys.append(series.median)
        for alternative in (FIELD, RUN):
            what = f"{count} at once, warm: {alternative} against {FLOOR}"
            _compare(result, what, found, alternative, FLOOR, 1.05)
            what = f"{count} at once, warm, the fastest of each: {alternative}"
            _compare(result, what, found, alternative, FLOOR, 1.05, by=Result.compare_fastest)
        _compare_cold(bench, result, count)
    for name, (xs, ys) in curves.items():
        result.curves.append({"name": name, "what": "seconds", "x": xs, "y": ys})


def _first(
    bench: Bench, result: Result, chosen: tuple[Alternative, ...], what: str, *, cold_pages: bool = False
) -> dict[str, Series]:
    kit = bench.kit
    samples = bench.repeat(
        result, {str(one): partial(_first_once, bench, kit, one, cold_pages=cold_pages) for one in chosen}
    )
    found = {}
    for name, one in samples.items():
        found[name] = result.add(f"{what}, {name}", "s", one.pop("first"))
        result.report(f"{what}, {name}", found[name])
        for phase, values in one.items():
            result.add(f"{what}, {name}, {phase}", "s", values)
    return found


def _first_once(bench: Bench, kit: Kit, alternative: Alternative, *, cold_pages: bool) -> dict[str, float]:
    if cold_pages:
        machine.drop_pages()
    fleet: Fleet = bench.fleet(kit, alternative)
    return {"first": fleet.wall} | {f"{one} to {then}": fleet.between(one, then) for one, then in PHASES}


def _compare(
    result: Result,
    what: str,
    found: dict[str, Series],
    over: Alternative,
    under: Alternative,
    target: float | None = None,
    by: Callable[[Result, str, Series, Series, float | None], None] = Result.compare,
) -> None:
    if {str(over), str(under)} <= found.keys():
        by(result, what, found[str(over)], found[str(under)], target)


def _compare_added(result: Result, found: dict[str, Series], ours: Alternative) -> None:
    """What we add to the floor, as a part of what others add to it."""
    others = [name for name in found if name.startswith(("(b)", "(c", "(d)"))]
    if not {str(ours), str(FLOOR)} <= found.keys():
        return
    floor, mine = found[str(FLOOR)].median, found[str(ours)].median
    for name in others:
        theirs = found[name].median - floor
        if theirs <= 0:
            result.notes.append(f"{name} added nothing to {FLOOR}")
            continue
        detail = f"{mine - floor:.2f} s against {theirs:.2f} s"
        what = f"time added to {FLOOR}: {ours} against {name}"
        result.rows.append(Row(what, (mine - floor) / theirs, "x", target=0.1, detail=detail))


def _at_once(bench: Bench, result: Result, count: int) -> dict[str, Series]:
    chosen = bench.alternatives_at(count)
    ways = {str(one): partial(_wall, bench, bench.kit, one, count) for one in chosen}
    samples = bench.repeat(result, ways)
    return {name: result.add(f"{count} at once, warm, {name}", "s", one["wall"]) for name, one in samples.items()}


def _wall(bench: Bench, kit: Kit, alternative: Alternative, count: int) -> dict[str, float]:
    return {"wall": bench.fleet(kit, alternative, Setting(count)).wall}


def _compare_cold(bench: Bench, result: Result, count: int) -> None:
    """From an empty store against one build, and then the floor."""
    kit = bench.kit

    def build_then_floor() -> dict[str, float]:
        with bench.host.folder() as store:
            seconds = bench.build(kit.project.folder, store)
        return {"wall": seconds + bench.fleet(kit, FLOOR, Setting(count)).wall}

    reference = "one build, then (a)"
    ways = {reference: build_then_floor, str(FIELD): lambda: {"wall": bench.cold(kit, FIELD, Setting(count)).wall}}
    samples = bench.repeat(result, ways)
    found = {
        name: result.add(f"{count} at once, empty store, {name}", "s", one["wall"]) for name, one in samples.items()
    }
    if found.keys() >= ways.keys():
        what = f"{count} at once, empty store: {FIELD} against {reference}"
        result.compare(what, found[str(FIELD)], found[reference], 1.10)
        result.compare_fastest(f"{what}, the fastest of each", found[str(FIELD)], found[reference], 1.10)
