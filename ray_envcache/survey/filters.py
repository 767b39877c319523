"""What `list --filter` takes, and the orders of `list --sort`."""

from __future__ import annotations

import operator
import re
import time
from collections.abc import Callable, Mapping
from typing import TypeAlias

from ray_envcache.errors import FieldValueError
from ray_envcache.store.layout import Layout
from ray_envcache.store.record import read_facts
from ray_envcache.survey.inventory import Status
from ray_envcache.system.texts import from_utc, parse_duration, parse_size

Filter: TypeAlias = Callable[[Layout, Status], bool]
"""Whether to show the environment with this status; the layout is that of the user's own store."""

STATES = ("ready", "building", "broken")
POSSIBLE = (
    "size>1GB, unused>7d, used<1d, created>30d (also <, >= and <=), has:torch, has:torch==2.8.0, project:NAME, "
    "state:ready, in-use, pinned"
)
_COMPARISONS = {">": operator.gt, "<": operator.lt, ">=": operator.ge, "<=": operator.le}
_FORM = re.compile(r"\s*([a-z-]+)\s*(?:(>=|<=|>|<|:)\s*(.*?))?\s*", re.DOTALL)


def parse_filter(text: str) -> Filter:
    """The filter that is written so. Raises FieldValueError, which names it and what may be written."""
    parts = _FORM.fullmatch(text)
    name, sign, value = parts.groups("") if parts else (text, "", "")
    if name in {"in-use", "pinned"} and not sign:
        return lambda _, one: one.pinned if name == "pinned" else one.in_use
    if sign == ":" and value and name in _NAMED:
        return _NAMED[name](value)
    if sign in _COMPARISONS and name in _MEASURED:
        measure, parse = _MEASURED[name]
        compare, limit = _COMPARISONS[sign], parse(value)
        return lambda _, one: bool(compare(measure(one), limit))
    raise FieldValueError(f"Unknown filter: `{text}`", f"write one of {POSSIBLE}")


def _idle(one: Status) -> float:
    return 0.0 if one.in_use else max(time.time() - one.last_used, 0.0)


def _age(one: Status) -> float:
    # An entry without a record was used last when its build began.
    return max(time.time() - (from_utc(one.created_at) if one.created_at else one.last_used), 0.0)


_MEASURED: Mapping[str, tuple[Callable[[Status], float], Callable[[str], float]]] = {
    "size": (lambda one: one.size_bytes, parse_size),
    "unused": (_idle, parse_duration),
    "used": (_idle, parse_duration),
    "created": (_age, parse_duration),
}
ORDERS: Mapping[str, Callable[[Status], float]] = {"size": lambda one: -one.size_bytes, "used": _idle, "created": _age}
"""The largest, the last used, the newest first."""


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


def _project(name: str) -> Filter:
    return lambda _, one: one.project == name


def _state(state: str) -> Filter:
    if state not in STATES:
        raise FieldValueError(f"Unknown state: `{state}`", f"write one of {', '.join(STATES)}")
    return lambda _, one: one.state == state


_NAMED: Mapping[str, Callable[[str], Filter]] = {"has": _has, "project": _project, "state": _state}
