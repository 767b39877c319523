"""Big stores: how long gc keeps users out, and how long a list takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ray_envcache.store.layout import Layout
from tests.benchmarks import fabricate, processes
from tests.benchmarks.bench import Bench
from tests.benchmarks.measure import Result


def gc(bench: Bench, result: Result) -> None:
    """The longest time that gc of an entry with 60,000 files holds any flock that users could wait for."""
    (files,) = bench.pick([60_000], [600])
    folder = bench.wide(20, real_ray=False).project.folder

    def once() -> dict[str, float]:
        with bench.host.folder() as root:
            store = root / "store"
            bench.build(folder, store)
            (entry,) = Layout(store).all_entries()
            fabricate.add_files(entry, files)
            said = json.loads(bench.host.program("collect_all.py", store, store=store))
            # Those that users could meet are among what was watched.
            assert (said["removed"], {"build", "in-use"} <= set(said["flocks"])) == (1, True), said
            return {"longest": said["longest_ms"], "whole": said["seconds"]}

    samples = bench.repeat(result, {"gc": once})["gc"]
    result.report(f"longest flock during gc of {files:,} files", result.add("longest", "ms", samples["longest"]), 5.0)
    result.report(f"gc of {files:,} files as a whole", result.add("whole", "s", samples["whole"]))


def list_entries(bench: Bench, result: Result) -> None:
    """`ray-envcache list` with 1000 entries, without the start of an interpreter that does nothing."""
    (entries,), (packages,) = bench.pick([1000], [20]), bench.pick([100], [20])
    folder, host = bench.wide(packages, real_ray=False).project.folder, bench.host
    with host.folder() as root:
        bench.finish(folder, root / "store")
        fabricate.fill(root / "store", entries)

        def command(*run: str | Path) -> Callable[[], dict[str, float]]:
            return lambda: {"ms": processes.run(run, host.environ(root / "store"), host.disk).seconds * 1000}

        script = host.python.parent / "ray-envcache"  # what people type
        ways = {"list": command(script, "list"), "python": command(host.python, "-c", "pass")}
        ways["list"]()
        samples = bench.repeat(result, {**ways, "--version": command(script, "--version")})
    found = {name: result.add(name, "ms", one["ms"]) for name, one in samples.items()}
    pairs = zip(found["list"].samples, found["python"].samples, strict=True)
    beyond = result.add("list beyond the interpreter's start", "ms", [one - other for one, other in pairs])
    result.report(f"`list` with {entries} entries, after interpreter start", beyond, 200.0)
    result.report("ray-envcache --version", found["--version"])
