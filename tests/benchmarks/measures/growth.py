"""How cost grows: curves over clusters, entries, packages and workers; each fitted, and where it first bends."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.benchmarks import fabricate
from tests.benchmarks.alternatives import FIELD, FLOOR, Alternative, Kit, Work
from tests.benchmarks.bench import Bench
from tests.benchmarks.fleet import Setting
from tests.benchmarks.measure import Result, Row, number
from tests.benchmarks.measures.agent import created

BEND = 0.25
"""A point bends the curve if it is so far off the line through all points before it."""


@dataclass(frozen=True)
class Fit:
    """The better of `start + slope * x` and `start * x ** slope`, by the relative error of its predictions."""

    law: str
    start: float
    slope: float
    error: float

    def at(self, x: float) -> float:
        return self.start * x**self.slope if self.law == "power" else self.start + self.slope * x

    def __str__(self) -> str:
        if self.law == "power":
            return f"{number(self.start)} * x^{self.slope:.2f}, {self.error:.0%} off"
        return f"{number(self.start)} + {self.slope:.3g} * x, {self.error:.0%} off"


def fit(xs: Sequence[float], ys: Sequence[float]) -> Fit:
    """Least squares: on the values for a line, on their logarithms for a power law."""
    laws = []
    slope, start = statistics.linear_regression(xs, ys)
    laws.append(Fit("linear", start, slope, 0.0))
    if min(xs) > 0 and min(ys) > 0:
        slope, start = statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys])
        laws.append(Fit("power", math.exp(start), slope, 0.0))
    errors = {
        law: statistics.fmean(abs(law.at(x) - y) / abs(y) for x, y in zip(xs, ys, strict=True) if y) for law in laws
    }
    best = min(errors, key=lambda law: errors[law])
    return Fit(best.law, best.start, best.slope, errors[best])


def first_bend(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """The first x that is off the line through all points before it by more than a quarter; None where there is none."""
    for end in range(2, len(xs)):
        slope, start = statistics.linear_regression(xs[:end], ys[:end])
        expected = start + slope * xs[end]
        if abs(ys[end] - expected) > BEND * abs(expected):
            return xs[end]
    return None


def clusters(bench: Bench, result: Result) -> None:
    """Time until all of N clusters at once have their first result, warm."""
    kit = bench.kit

    def once(alternative: Alternative, count: int) -> dict[str, float]:
        return {"s": bench.fleet(kit, alternative, Setting(count)).wall}

    _compare_growth(bench, result, "clusters", bench.counts(beyond=2), once)


def workers(bench: Bench, result: Result) -> None:
    """Time and processor seconds until N workers have started at once."""
    kit = bench.kit

    def once(alternative: Alternative, count: int) -> dict[str, float]:
        fleet = bench.fleet(kit, alternative, Setting(work=Work(many=count)))
        return {"s": fleet.seconds("many")[0], "cpu s": fleet.cpu_between("before-many", "many")}

    _compare_growth(bench, result, "workers", bench.pick([1, 2, 4, 8, 16, 32, 64], [2]), once)


def entries(bench: Bench, result: Result) -> None:
    """`create()`, `list` and `gc --dry-run` against the number of entries in the store."""
    (packages,) = bench.pick([400], [20])
    folder, found = bench.wide(packages, real_ray=False).project.folder, _Curves(result, "entries in the store")
    with bench.host.folder() as root:
        store = root / "store"
        bench.finish(folder, store)

        def once() -> dict[str, float]:
            return {
                "create() ms": statistics.median(created(bench, folder, store, 50)),
                "list s": bench.host.envcache("list", store=store).seconds,
                "gc --dry-run s": bench.host.envcache("gc", "--dry-run", store=store).seconds,
            }

        for count in bench.pick([1, 10, 100, 1000, 5000], [1, 20]):
            fabricate.fill(store, count)
            found.add(count, bench.repeat(result, {"store": once}))
    found.close()


def packages(bench: Bench, result: Result) -> None:
    """Building, and `create()`, against the number of packages in the lock. Tiny ones: what is left is ours and uv's."""
    found = _Curves(result, "packages")
    for count in bench.pick([10, 50, 100, 200, 400, 800], [20]):
        kit = bench.wide(count, real_ray=False)
        ways = {
            "build until hand-out": partial(_build, bench, kit.project.folder),
            "uv sync": partial(_sync, bench, kit.project.folder),
            "create()": partial(_create, bench, kit),
        }
        found.add(count, bench.repeat(result, ways))
    found.close()


def _build(bench: Bench, folder: Path) -> dict[str, float]:
    with bench.host.folder() as fresh:
        return {"s": bench.build(folder, fresh / "store")}


def _sync(bench: Bench, folder: Path) -> dict[str, float]:
    with bench.host.folder() as fresh:
        return {"s": bench.sync(folder, fresh / "venv")}


def _create(bench: Bench, kit: Kit) -> dict[str, float]:
    return {"ms": statistics.median(created(bench, kit.project.folder, kit.store, 50))}


def _compare_growth(
    bench: Bench,
    result: Result,
    over: str,
    counts: list[int],
    once: Callable[[Alternative, int], Mapping[str, float]],
) -> None:
    found = _Curves(result, over)
    for count in counts:
        ways = {str(one): partial(once, one, count) for one in (FLOOR, FIELD)}
        found.add(count, bench.repeat(result, ways))
    found.close()


class _Curves:
    """Curves that grow point by point, and become rows."""

    def __init__(self, result: Result, over: str) -> None:
        self._result, self._over = result, over
        self._points: dict[str, list[tuple[float, float]]] = {}

    def add(self, count: float, samples: Mapping[str, Mapping[str, list[float]]]) -> None:
        for name, one in samples.items():
            for what, values in one.items():
                series = self._result.add(f"{name}, {what}, {count} {self._over}", what, values)
                self._points.setdefault(f"{name}, {what}", []).append((count, series.median))

    def close(self) -> None:
        for name, points in self._points.items():
            xs, ys = [x for x, _ in points], [y for _, y in points]
            self._result.curves.append({"name": name, "what": f"over {self._over}", "x": xs, "y": ys})
            if len(points) < 2:  # no line through one point
                self._result.rows.append(Row(f"{name}, {xs[0]} {self._over}", ys[0]))
                continue
            law, bend = fit(xs, ys), first_bend(xs, ys)
            detail = f"{law}; first bend: {'none' if bend is None else f'at {bend:g}'}"
            what = f"{name}: exponent over {xs[0]:g} to {xs[-1]:g} {self._over}"
            self._result.rows.append(Row(what, _exponent(xs, ys), "", detail=detail))


def _exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope in a picture with logarithmic axes: 1 is proportional, 0 constant."""
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(max(y, 1e-9)) for y in ys]).slope
