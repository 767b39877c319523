"""The command `explain`: would it be a new environment, and why."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ray_envcache.cli import tables
from ray_envcache.cli.build import field_options, spec_of
from ray_envcache.doctor.explain import explain
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import readonly
from ray_envcache.store.layout import SHOWN_DIGITS
from ray_envcache.survey.nearest import Difference


@click.command("explain", epilog="Example: ray-envcache explain .")
@field_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.argument("path", type=click.Path())
def explain_(*, as_json: bool, **options: Any) -> None:
    """Show whether `build` would make a new environment, and why.

    PATH and the options are those of `build`. Of a new environment it names the nearest one in the store, and what
    differs: packages, Python, ray, options, settings of uv; of a new layer the local packages whose content changed.
    Builds nothing; the exit code is 0 in both cases.
    """
    own, below = readonly.opened()
    found = explain(spec_of(**options), installed_ray(), (own, *below))
    new = found.new
    if as_json:
        tables.print_json({"new": new is not None, **asdict(found)})
    elif new is None:
        layer = f"layer {found.layer.key[:SHOWN_DIGITS]} on " if found.layer else ""
        tables.say(f"{found.project} is there: {layer}{found.environment.key[:SHOWN_DIGITS]}")
    else:
        tables.say(f"{found.project} would be {new.reason}")
        if near := new.nearest:
            tables.say(f"Compared with {near.key[:SHOWN_DIGITS]} of {near.project}:")
            rows = [[one.kind, one.name, _shown(one, one.was), _shown(one, one.now)] for one in near.differences]
            tables.print_table(("KIND", "NAME", "THERE", "WANTED"), rows, numeric=())


def _shown(one: Difference, value: str | None) -> str:
    # The beginnings of digests tell them apart.
    is_digest = value and one.kind in {"artifact", "content", "setting"}
    return "-" if value is None else f"{value[:SHOWN_DIGITS]}…" if is_digest else value
