"""The benchmark suite runs: all measures, tiny and once. What it measures here means nothing, and nobody looks at it."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import psutil
import pytest

from tests import support
from tests.benchmarks import pictures
from tests.benchmarks.measure import Alternation, BenchmarkError, Result, Series
from tests.benchmarks.measures import MEASURES
from tests.benchmarks.measures.growth import first_bend, fit

REPOSITORY = Path(__file__).parents[2]


def start(place: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.benchmarks", "--smoke", "--dir", place, *arguments]
    return subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


@pytest.mark.cluster
@pytest.mark.timeout(900)  # twenty clusters, one after the other
def test_smoke(tmp_path: Path, children: list[subprocess.Popen[str]]) -> None:
    """Every measure gives rows and samples, none fails, pictures are drawn, and nothing is left."""
    with support.short_folder() as place:
        child = start(place, "--json", tmp_path / "found.json", "--pictures", tmp_path)
        children.append(child)
        out, err = child.communicate()
        assert child.returncode == 0, f"{out}\n{err}"
        assert list(place.iterdir()) == []
    data = json.loads((tmp_path / "found.json").read_text())
    assert [one["name"] for one in data["measures"]] == list(MEASURES)
    for measure in data["measures"]:
        assert measure["failures"] == []
        assert measure["rows"], measure["name"]
        assert all(math.isfinite(row["value"]) for row in measure["rows"])
        assert all(series["samples"] for series in measure["series"])
    assert data["machine"]["versions"]["ray"] == support.RAY_VERSION
    for name in ("time.svg", "disk-same.svg"):
        assert ET.parse(tmp_path / name).getroot().tag.endswith("svg")


@pytest.mark.cluster
def test_interrupted(children: list[subprocess.Popen[str]]) -> None:
    """Ctrl-C in the middle of a measure: all processes and folders are gone."""
    with support.short_folder() as place:
        child = start(place, "--only", "list")
        children.append(child)
        family: list[psutil.Process] = []

        def is_busy() -> bool:
            family[:] = psutil.Process(child.pid).children(recursive=True)
            return len(family) >= 2 or child.poll() is not None

        support.wait_until(is_busy, "a supervised command runs")
        os.kill(child.pid, signal.SIGINT)
        _, err = child.communicate()
        assert child.returncode == 130, err
        assert all(map(support.is_gone, family))
        assert list(place.iterdir()) == []


def test_alternating_order() -> None:
    """Ways are taken forwards and backwards in turn; who is out of patience, or fails, is not repeated."""
    order: list[str] = []

    def way(name: str) -> dict[str, float]:
        order.append(name)
        if name == "c" and order.count("c") == 2:
            raise BenchmarkError("broken")
        return {"s": float(len(order))}

    ways = {name: lambda name=name: way(name) for name in "abc"}
    alternation = Alternation(3, math.inf, lambda _: None)
    found = alternation.run(ways)
    assert "".join(order) == "abc" + "cba" + "ab"
    assert [len(found[name]["s"]) for name in "abc"] == [3, 3, 1]
    assert alternation.failures == ["c: broken"]
    order.clear()
    assert len(Alternation(3, -1, lambda _: None).run({"a": ways["a"]})["a"]["s"]) == 1


def test_ratios() -> None:
    """A ratio is that of the medians; its spread that of the repetitions."""
    result = Result("one")
    result.compare("x", Series("f", "s", (2, 4, 9)), Series("a", "s", (1, 2, 3)), 2.0)
    result.compare_fastest("y", Series("f", "s", (3, 2, 9)), Series("a", "s", (8, 8, 5)), 0.3)
    row, fastest = result.rows
    assert (row.value, row.spread, row.met) == (2.0, (2.0, 3.0), True)
    assert (fastest.value, fastest.spread, fastest.met) == (0.4, None, False)


def test_laws() -> None:
    """Lines and power laws are found again, and so is the point where a line bends."""
    xs = [1.0, 2.0, 4.0, 8.0, 16.0]
    line, power = fit(xs, [3 + 2 * x for x in xs]), fit(xs, [3 * x**1.5 for x in xs])
    assert (line.law, round(line.slope, 6)) == ("linear", 2)
    assert (power.law, round(power.slope, 6)) == ("power", 1.5)
    assert first_bend(xs, [3 + 2 * x for x in xs]) is None
    assert first_bend(xs, [1, 2, 4, 16, 64]) == 8


def test_picture() -> None:
    """Names are escaped, labels do not lie on each other, and both modes have their colours."""
    lines = [pictures.Line(f"({letter}) <{letter}>", letter, [1, 2], [1, 5]) for letter in "abf"]
    text = pictures.svg(pictures.Chart("t & t", "s", "MB", lines))
    ET.fromstring(text)
    assert "prefers-color-scheme: dark" in text
    labels = [line for line in text.splitlines() if "&lt;" in line]
    assert len({line.split('y="')[1].split('"')[0] for line in labels}) == 3
