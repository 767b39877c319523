"""Samples, repeated in alternating order, and what they say: medians, spreads, ratios within one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


class BenchmarkError(Exception):
    """A command of a measure failed; its message has what it said."""


@dataclass(frozen=True)
class Series:
    """The samples of one alternative in one measure, in the order in which they were taken."""

    name: str
    unit: str
    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def quantile(self, share: float) -> float:
        """The smallest sample that so large a share of them does not exceed."""
        ordered = sorted(self.samples)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def __str__(self) -> str:
        spread = f" ({number(min(self.samples))}..{number(max(self.samples))})" if len(self.samples) > 1 else ""
        return f"{number(self.median)}{spread}"


@dataclass(frozen=True)
class Row:
    """One line of the table: what was found, against its target where it has one."""

    what: str
    value: float
    unit: str = ""
    spread: tuple[float, float] | None = None
    target: float | None = None
    goal: str = "at most"
    detail: str = ""

    @property
    def met(self) -> bool | None:
        if self.target is None:
            return None
        return self.value <= self.target if self.goal == "at most" else self.value >= self.target


@dataclass
class Result:
    """What a measure found: rows for the table, all samples, curves (name, x, y), and what could not be measured."""

    name: str
    rows: list[Row] = field(default_factory=list)
    series: list[Series] = field(default_factory=list)
    curves: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        rows = [{**asdict(row), "met": row.met} for row in self.rows]
        return {**asdict(self), "rows": rows}

    def add(self, name: str, unit: str, samples: Sequence[float]) -> Series:
        """Keep samples that a row is made of."""
        series = Series(name, unit, tuple(samples))
        self.series.append(series)
        return series

    def compare(self, what: str, over: Series, under: Series, target: float | None = None) -> None:
        """A row with the ratio of two medians; its spread is that of the ratios within each repetition."""
        pairs = [one / other for one, other in zip(over.samples, under.samples, strict=False) if other]
        spread = (min(pairs), max(pairs)) if len(pairs) > 1 else None
        detail = f"{over} against {under} {over.unit}, n = {len(pairs)}"
        self.rows.append(Row(what, over.median / under.median, "x", spread, target, detail=detail))

    def compare_fastest(self, what: str, over: Series, under: Series, target: float | None = None) -> None:
        """A row with the ratio of the fastest samples: what is left where something foreign adds a second or none."""
        best = min(over.samples), min(under.samples)
        detail = f"{number(best[0])} against {number(best[1])} {over.unit}"
        self.rows.append(Row(what, best[0] / best[1], "x", None, target, detail=detail))

    def exceed(self, what: str, over: Series, under: Series, target: float | None = None) -> None:
        """A row with the difference of two medians; its spread is that of the differences within each repetition."""
        pairs = [one - other for one, other in zip(over.samples, under.samples, strict=False)]
        spread = (min(pairs), max(pairs)) if len(pairs) > 1 else None
        detail = f"{over} against {under} {over.unit}, n = {len(pairs)}"
        self.rows.append(Row(what, over.median - under.median, over.unit, spread, target, detail=detail))

    def report(self, what: str, series: Series, target: float | None = None) -> None:
        """A row with a median."""
        spread = (min(series.samples), max(series.samples)) if len(series.samples) > 1 else None
        self.rows.append(Row(what, series.median, series.unit, spread, target, detail=f"n = {len(series.samples)}"))


def number(value: float) -> str:
    """A figure with three digits that mean something."""
    if value == 0:
        return "0"
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f}"


Sample = Mapping[str, float]


@dataclass
class Alternation:
    """Repeats ways of doing the same in alternating order: forwards, backwards, forwards.

    A way that has taken longer than `patience` seconds in all is not repeated further: the number of its samples says
    so. One that fails is left out from then on, and `failures` says why.
    """

    repetitions: int
    patience: float
    say: Callable[[str], None]
    failures: list[str] = field(default_factory=list)

    def run(self, ways: Mapping[str, Callable[[], Sample]]) -> dict[str, dict[str, list[float]]]:
        """The samples of each way, by what was sampled."""
        found: dict[str, dict[str, list[float]]] = {name: {} for name in ways}
        taken = dict.fromkeys(ways, 0.0)
        failed: set[str] = set()
        for repetition in range(self.repetitions):
            order = list(ways) if repetition % 2 == 0 else list(ways)[::-1]
            for name in order:
                if name in failed or (repetition > 0 and taken[name] > self.patience):
                    continue
                began = time.monotonic()
                self.say(f"{name}, {repetition + 1} of {self.repetitions}")
                try:
                    sample = ways[name]()
                except BenchmarkError as error:
                    failed.add(name)
                    self.failures.append(f"{name}: {error}")
                    continue
                taken[name] += time.monotonic() - began
                for what, value in sample.items():
                    found[name].setdefault(what, []).append(value)
        return {name: samples for name, samples in found.items() if samples}
