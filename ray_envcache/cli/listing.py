"""`list`: the environments of the store. Imports nothing that builds or collects."""

from __future__ import annotations

import operator
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import click

from ray_envcache.cli import tables
from ray_envcache.errors import FieldValueError
from ray_envcache.store import roots
from ray_envcache.store.layout import Layout
from ray_envcache.store.record import read_facts
from ray_envcache.survey import inventory, uv_cache
from ray_envcache.survey.inventory import Status
from ray_envcache.survey.uv_cache import UvCache
from ray_envcache.system.texts import from_utc, parse_duration, parse_size

Filter: TypeAlias = Callable[[Layout, Status], bool]
"""Whether to show the environment with this status; the layout is that of the user's own store."""

POSSIBLE = "size>1GB, unused>7d, used<1d (either with < or >), has:torch, has:torch==2.8.0, project:NAME"
_FORM = re.compile(r"\s*([a-z]+)\s*([<>:])(?!=)\s*(.+?)\s*", re.DOTALL)


def _idle(one: Status) -> float:
    return 0.0 if one.in_use else max(time.time() - one.last_used, 0.0)


def _age(one: Status) -> float:
    # An entry without a record was used last when its build began.
    return max(time.time() - (from_utc(one.created_at) if one.created_at else one.last_used), 0.0)


_MEASURED: Mapping[str, tuple[Callable[[Status], float], Callable[[str], float]]] = {
    "size": (lambda one: one.size_bytes, parse_size),
    "unused": (_idle, parse_duration),
    "used": (_idle, parse_duration),
}
ORDERS: Mapping[str, Callable[[Status], float]] = {"size": lambda one: -one.size_bytes, "used": _idle, "created": _age}
"""The largest, the last used, the newest first."""


@click.command("list", epilog="Example: ray-envcache list --filter 'unused>7d' --sort size")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with sizes in bytes and times in UTC.")
@click.option(
    "--filter", "chosen", multiple=True, metavar="FILTER",
    help=f"Show only these; may be repeated, all must hold: {POSSIBLE}.",
)  # fmt: skip
@click.option("--sort", type=click.Choice([*ORDERS]), help="The largest, last used or newest first.")
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="Show the first N of them.")
@click.option("-q", "--quiet", is_flag=True, help="Print keys only, for other commands.")
@click.option("--uv-cache", is_flag=True, help="Measure your own cache of uv too; takes seconds where it is large.")
def list_(*, as_json: bool, quiet: bool, **options: Any) -> None:
    """Show the environments, their users and their size.

    The least recently used ones come first, unless --sort says otherwise. Totals are those of what is shown.
    """
    if quiet and as_json:
        raise click.UsageError("--quiet prints keys, --json all there is: leave out one")
    filters = [parse_filter(text) for text in options["chosen"]]
    layout, below = roots.opened()
    everything = inventory.survey(layout, below)
    found = _chosen(layout, everything, filters, options)
    if quiet:
        for key in dict.fromkeys(one.key for one in found):
            click.echo(key)
        return
    caches = [one for one in _uv_caches(layout, users=options["uv_cache"]) if one]
    if as_json:
        places = {"root": os.fspath(layout.root), "readonly_roots": [os.fspath(one.root) for one in below]}
        envs = [tables.status_as_json(status) for status in found]
        tables.print_json({**places, "envs": envs, "uv_caches": [one._asdict() for one in caches]})
    else:
        tables.print_environments(found, of=len(everything), grouped=options["sort"] is None)
        tables.print_uv_caches(caches)
    for root in roots.missing_stores(layout, os.environ):
        click.echo(f"note: {roots.READONLY} names `{root}`, where there is no store", err=True)


def _chosen(layout: Layout, found: list[Status], filters: list[Filter], options: dict[str, Any]) -> list[Status]:
    """Those that pass all filters, in the order that was asked for, and of these the first."""
    chosen = [one for one in found if all(passes(layout, one) for passes in filters)]
    if options["sort"]:
        chosen.sort(key=ORDERS[options["sort"]])
    return chosen[: options["limit"]]


def parse_filter(text: str) -> Filter:
    """The filter that is written so. Raises FieldValueError, which names it and what may be written."""
    parts = _FORM.fullmatch(text)
    name, sign, value = parts.groups() if parts else ("", "", "")
    if (name, sign) == ("has", ":"):
        return _has(value)
    if (name, sign) == ("project", ":"):
        return lambda _, one: one.project == value
    if name in _MEASURED and sign != ":":
        measure, parse = _MEASURED[name]
        compare, limit = operator.gt if sign == ">" else operator.lt, parse(value)
        return lambda _, one: compare(measure(one), limit)
    raise FieldValueError(f"Unknown filter: `{text}`", f"write one of {POSSIBLE}")


def _has(text: str) -> Filter:
    from packaging.requirements import InvalidRequirement, Requirement  # 20 ms that `list` mostly does without
    from packaging.utils import canonicalize_name

    try:
        wanted = Requirement(text)
    except InvalidRequirement as error:
        raise FieldValueError(f"Not a package: `{text}`", "write has:torch or has:torch==2.8.0") from error
    if wanted.extras or wanted.marker or wanted.url:
        raise FieldValueError(f"Only a name and versions can be asked for: `{text}`", "write has:torch==2.8.0")
    fact = f"package {canonicalize_name(wanted.name)}"

    def has(layout: Layout, one: Status) -> bool:
        entry = layout.entry(one.path) if one.state == "ready" else None
        found = read_facts(entry).get(fact) if entry else None
        return found is not None and (not wanted.specifier or wanted.specifier.contains(found.partition(" ")[0], True))

    return has


def _uv_caches(layout: Layout, *, users: bool) -> Iterator[UvCache | None]:
    yield uv_cache.of_store(layout)
    if users:
        from ray_envcache.doctor.host import users_cache  # asks uv: not where people only look

        yield users_cache(layout)
