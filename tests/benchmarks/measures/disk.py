"""What clusters leave on the disk, how often an environment is built for them, and how many files come."""

from __future__ import annotations

from functools import partial

from tests.benchmarks.alternatives import FIELD, FLOOR, RUN, Alternative
from tests.benchmarks.bench import Bench
from tests.benchmarks.fleet import Fleet, Setting
from tests.benchmarks.footprint import Footprint, measure
from tests.benchmarks.measure import BenchmarkError, Result, Row

MEGABYTE = 1e6
SPARE = 1.3
"""How much more than the environments themselves has to be free."""


def disk(bench: Bench, result: Result) -> None:
    """Disk during and after N clusters, from an empty store; temp directories here and on another file system.

    Bytes once per inode, without what uv's cache has anyway. Once each: files are no matter of chance.
    """
    places = {"same file system": False}
    if bench.host.other and not bench.options.smoke:
        places["other file system"] = True
    for place, other in places.items():
        found: dict[tuple[Alternative, int], Fleet] = {}
        for count in bench.counts():
            for alternative in (FLOOR, FIELD) if bench.options.smoke else bench.alternatives_at(count):
                if (fleet := _look(bench, result, alternative, count, other=other)) is not None:
                    found[alternative, count] = fleet
        _draw(result, found, place)
        _judge(result, found, place)


def builds(bench: Bench, result: Result) -> None:
    """Builds that N clusters cause which ask for one environment at the same moment, counted by a package in it."""
    for alternative in (FIELD,) if bench.options.smoke else (FIELD, RUN):
        for count in sorted({2, max(2, *bench.counts())}):
            fleet = bench.cold(bench.witnessed, alternative, Setting(count))
            what = f"builds, {count} clusters at once, empty store, {alternative}"
            result.rows.append(Row(what, fleet.builds, "", target=1, detail=f"{fleet.entries} in the store"))


def inodes(bench: Bench, result: Result) -> None:
    """Files and directories that a cluster creates on a warm store, beyond those that every cluster does."""
    kit = bench.kit

    def once(alternative: Alternative) -> dict[str, float]:
        fleet = bench.fleet(kit, alternative, Setting(sampled=True))
        assert fleet.temps is not None
        assert fleet.store is not None
        return {"created": fleet.temps.created + fleet.store.created, "in the store": fleet.store.created}

    chosen = (FLOOR, FIELD) if bench.options.smoke else (FLOOR, FIELD, RUN)
    samples = bench.repeat(result, {str(one): partial(once, one) for one in chosen})
    found = {name: result.add(f"files created, {name}", "", one["created"]) for name, one in samples.items()}
    for name, one in samples.items():
        result.report(
            f"files created in the store, {name}", result.add(f"in the store, {name}", "", one["in the store"])
        )
    for alternative in (FIELD, RUN):
        if {str(alternative), str(FLOOR)} <= found.keys():
            more = found[str(alternative)].median - found[str(FLOOR)].median
            detail = f"{found[str(alternative)]} against {found[str(FLOOR)]}"
            result.rows.append(Row(f"files created beyond {FLOOR}: {alternative}", more, "", target=19, detail=detail))


def _look(bench: Bench, result: Result, alternative: Alternative, count: int, *, other: bool) -> Fleet | None:
    kit = bench.kit
    place = bench.host.other if other else bench.host.disk
    assert place is not None
    if not alternative.ours and alternative is not FLOOR:
        # A full disk is no measure. Of links only little is needed, but who downloads has none.
        wanted = SPARE * count * measure([kit.finished, kit.host.disk / "driver"]).du
        if wanted > bench.host.free(place):
            result.notes.append(f"{count} x {alternative}: no room for {wanted / 1e9:.0f} GB")
            return None
    bench.say(f"disk, {count} x {alternative}")
    setting = Setting(count, other=other, sampled=True, settle=bench.settle)
    try:
        return bench.cold(kit, alternative, setting) if alternative.ours else bench.fleet(kit, alternative, setting)
    except BenchmarkError as error:
        result.failures.append(f"{count} x {alternative}: {error}")
        return None


def _added(fleet: Fleet) -> tuple[Footprint, Footprint]:
    """What was added at most, and in the end: temp directories and store together."""
    assert fleet.temps is not None
    assert fleet.store is not None
    temps, store = fleet.temps, fleet.store
    return (temps.most - temps.before) + (store.most - store.before), (temps.after - temps.before) + (
        store.after - store.before
    )


def _draw(result: Result, found: dict[tuple[Alternative, int], Fleet], place: str) -> None:
    for alternative in dict.fromkeys(one for one, _ in found):
        counts = [count for one, count in found if one is alternative]
        looks = [_added(found[alternative, count]) for count in counts]
        for moment, number in (("during", 0), ("after", 1)):
            ys = [look[number].own / MEGABYTE for look in looks]
            result.curves.append({"name": str(alternative), "what": f"MB {moment}, {place}", "x": counts, "y": ys})
            result.add(f"MB {moment}, {place}, {alternative}, by clusters", "MB", ys)


def _judge(result: Result, found: dict[tuple[Alternative, int], Fleet], place: str) -> None:
    most = max((count for _, count in found), default=0)
    for alternative in dict.fromkeys(one for one, _ in found):
        counts = [count for one, count in found if one is alternative]
        during, after = _added(found[alternative, max(counts)])
        detail = f"during {during.own / MEGABYTE:,.1f} MB; du says {after.du / MEGABYTE:,.0f} MB after"
        what = f"disk after {max(counts)} clusters, {place}, {alternative}"
        result.rows.append(Row(what, after.own / MEGABYTE, "MB", detail=detail))
        if alternative.ours:
            what = f"environments in the store after {max(counts)} clusters, {place}, {alternative}"
            result.rows.append(Row(what, found[alternative, max(counts)].entries, "", target=1))
    for alternative in (FIELD, RUN):
        if {(alternative, most), (FLOOR, most)} <= found.keys():
            temps, floor = found[alternative, most].temps, found[FLOOR, most].temps
            assert temps is not None
            assert floor is not None
            extra = ((temps.after - temps.before).own - (floor.after - floor.before).own) / MEGABYTE / most
            what = f"left in the temp directory per cluster beyond {FLOOR}, {place}, {alternative}"
            # Logs are never equally long to the byte.
            result.rows.append(Row(what, extra, "MB", target=0.1))
