"""A host that has nothing fetches the environment from a bucket, and asks no index."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from tests.benchmarks import processes
from tests.benchmarks.bench import Bench
from tests.benchmarks.host import Command
from tests.benchmarks.measure import Result, Series
from tests.remote import gateway

ALLOWED = 1.0
"""Seconds for the check of an environment, and to ask the bucket."""
_NO_INDEX = "http://127.0.0.1:9/simple"


def fetch(bench: Bench, result: Result) -> None:
    """Fetching from an S3 server on this host until hand-out, all bytecode included, against `uv sync`; all else empty."""
    kit = bench.wide(20, real_ray=False) if bench.options.smoke else bench.kit
    if not gateway.JUICEFS.exists():
        result.failures.append("needs juicefs")
        return
    with bench.host.folder() as place, gateway.serve(place / "s3") as bucket:
        for what in ("publishing", "publishing once more"):
            seconds = _publish(bench, kit.project.folder, kit.store, bucket)
            result.report(what, result.add(what, "s", [seconds]))
        ways = {
            "uv sync": partial(_sync, bench, kit.project.folder),
            "ray-envcache": partial(_fetch, bench, kit.project.folder, bucket),
        }
        samples = bench.repeat(result, ways)
    found = {name: result.add(f"{name} until hand-out, all empty", "s", one["s"]) for name, one in samples.items()}
    if found.keys() == ways.keys():
        ours, theirs = found["ray-envcache"], found["uv sync"]
        result.compare("fetching until hand-out, against `uv sync`", ours, theirs)
        allowed = Series(ours.name, ours.unit, tuple(one - ALLOWED for one in ours.samples))
        result.compare("the same, a second for check and bucket allowed", allowed, theirs, 1.5)


def _publish(bench: Bench, folder: Path, store: Path, bucket: dict[str, str]) -> float:
    command: Command = [bench.host.python, "-m", "ray_envcache", "push", folder, "--to", bucket["RAY_ENVCACHE_REMOTE"]]
    return processes.run(command, bench.host.environ(store) | bucket, bench.host.disk).seconds


def _sync(bench: Bench, folder: Path) -> dict[str, float]:
    with bench.host.folder() as fresh:
        return {"s": bench.sync(folder, fresh / "venv", cache=fresh / "uv")}


def _fetch(bench: Bench, folder: Path, bucket: dict[str, str]) -> dict[str, float]:
    with bench.host.folder() as fresh:
        environ = bench.host.environ(fresh / "store", fresh / "uv") | bucket | {"UV_DEFAULT_INDEX": _NO_INDEX}
        command: Command = [bench.host.python, processes.PROGRAMS / "hand_out.py", folder]
        return {"s": processes.run(command, environ, bench.host.disk).seconds}
