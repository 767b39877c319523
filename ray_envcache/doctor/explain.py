"""Would it be a new environment, and why? Asks uv and the interpreter as a build does, and changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ray_envcache.build import layers
from ray_envcache.build.plan import Plan, plan_of
from ray_envcache.checkout.project import Project
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import interpreter
from ray_envcache.resolve.interpreter import AnyRay
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.record import ReadyRecord
from ray_envcache.survey.nearest import Nearest, nearest

_NOTHING_ALIKE = "new: the store has nothing to compare it with"


@dataclass(frozen=True)
class Part:
    """The environment of `project`, or the layer with the local packages on it: its key, and where it is.

    Where `path` is None it would be new. Then `reason` says why in one line, and `nearest` is what the store has
    instead, None where it has nothing of the kind.
    """

    project: str
    key: str
    path: str | None
    reason: str | None = None
    nearest: Nearest | None = None


def explain(spec: EnvSpec, ray: AnyRay, stores: Iterable[Layout]) -> list[Part]:
    """What `Store.acquire` would find in these stores: the environment, and the layer on it where there is one.

    `spec.path` is absolute. A layer on a new environment is new for the same reason, and compared with nothing. Raises
    as `plan_of`, and LockfileError.
    """
    stores, executable = tuple(stores), interpreter.base_executable(spec.python)
    plan = plan_of(spec, Project.locate(Path(spec.path), spec.package), executable, ray, check_current=True)
    found = _ready(plan.key, stores)
    parts = [_part(plan, found, stores)]
    if plan.resolved.local and spec.install_project:
        on = layers.layer_plan(spec, plan, found or stores[0].first_entry(plan.key), editable=False)
        parts.append(_part(on, _ready(on.key, stores), stores))
    return parts


def _part(plan: Plan, found: Entry | None, stores: Iterable[Layout]) -> Part:
    if found:
        return Part(plan.project, plan.key, os.fspath(found.path))
    near = nearest(stores, plan.project, plan.facts())
    return Part(plan.project, plan.key, None, near.reason(plan.project) if near else _NOTHING_ALIKE, near)


def _ready(key: str, stores: Iterable[Layout]) -> Entry | None:
    """The entry of this key that would be handed out."""
    return next((one for store in stores for one in store.entries_of(key) if ReadyRecord.read(one)), None)
