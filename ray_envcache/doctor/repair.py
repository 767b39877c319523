"""Repairing a damaged entry: a sound one is built beside it and checked, then the damaged one is handed out no more.

Who runs from the damaged one keeps it to the end; then a collector removes it. Killed at any step, a repair leaves the
damaged entry as it was, or beside a new one: then the next repair goes on from there.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from ray_envcache.acquire import Store
from ray_envcache.build import bytecode, layers
from ray_envcache.build.builder import Builder
from ray_envcache.build.plan import Plan, plan_of
from ray_envcache.build.progress import Observer
from ray_envcache.checkout.project import Project
from ray_envcache.errors import BuildError, EnvCacheError, UnknownKeyError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import interpreter, uv, uv_errors
from ray_envcache.resolve.interpreter import AnyRay
from ray_envcache.store import journal
from ray_envcache.store.key import leading_to
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder, claim
from ray_envcache.store.record import ReadyRecord
from ray_envcache.store.roots import require_own
from ray_envcache.survey import inventory, shared_bytecode
from ray_envcache.survey.verification import Verified, module_of, verify
from ray_envcache.system import testpoints


class Repaired(NamedTuple):
    """A repair: new users get `sound`, and `users` still run from the damaged entry.

    `unpacked` are packages of which uv's cache had the damaged files too, `bytecode` is how many files of the store's
    shared bytecode were damaged.
    """

    damaged: Entry
    sound: Entry
    users: tuple[Holder, ...]
    unpacked: tuple[str, ...]
    bytecode: int


def chosen(store: Store, keys: Sequence[str]) -> list[Entry]:
    """The entries of these keys, or all that are ready, and what they lie on; an environment before its layers.

    Raises UnknownKeyError.
    """
    # The newest build of a key first: it takes the place of an older one that is damaged too.
    ready = (one for one in store.entries() if one.ready.exists())
    found: dict[Entry, None] = {}  # a set that keeps the order
    for entry in [one for key in keys for one in store.find(key)] if keys else ready:
        record = ReadyRecord.read(entry)
        base = entry.base(record.base) if record else None
        found |= dict.fromkeys([base, entry] if base else [entry])
    return [*found]


def repair(store: Store, found: Verified, ray: AnyRay, observer: Observer) -> Repaired:
    """Replace an entry that was found damaged.

    Raises ReadOnlyError, BuildError where it cannot be built again or the new one is damaged too, and the errors of a
    build. Then the damaged entry is handed out as before.
    """
    layout, entry, began = store.layout, found.entry, time.monotonic()
    require_own(entry, "verify --repair")
    changed = [entry.venv / one.path for one in found.differences if module_of(one.path)]
    with ExitStack() as held:
        plan = _planned_again(layout, entry, ray, held)
        forgotten = shared_bytecode.forget(layout, changed)
        unpacked = _clean_uv_cache(layout, found, observer)
        testpoints.reach("repair-cleaned")
        lease = held.enter_context(Builder(layout, plan, Holder("repair"), observer, after=entry.number).lease())
        testpoints.reach("repair-built")
        bytecode.finish(layout, lease.entry, background=False)
        _require_sound(lease.entry)
        testpoints.reach("repair-checked")
        entry.ready.unlink(missing_ok=True)  # it may be gone altogether: a collector was faster
    testpoints.reach("repair-retired")
    seconds = round(time.monotonic() - began, 3)
    journal.note(layout, "repair", key=entry.key, project=found.project, seconds=seconds)
    return Repaired(entry, lease.entry, inventory.status(layout, entry).users, unpacked, forgotten)


def _planned_again(layout: Layout, entry: Entry, ray: AnyRay, held: ExitStack) -> Plan:
    """The plan of an entry, from the files that it was built from. Raises BuildError where they lead elsewhere."""
    record = ReadyRecord.read(entry)
    if record is None:
        what = f"The environment {entry.name} was removed, or repaired by another process"
        raise UnknownKeyError(what, "ray-envcache list shows the rest")
    base = entry.base(record.base)
    if base and (below := claim(base, layout, Holder("repair"))):
        held.enter_context(below)
    reason = "the store has no note of what it was built from"
    texts = {json.dumps(one.field, sort_keys=True) for one in leading_to((base or entry).key, layout) if one.field}
    for value in map(json.loads, sorted(texts)):
        try:
            spec = EnvSpec.parse(value)
            spec = spec._replace(digest=None, content=None, python=spec.python or record.base_python)
            for plan in _plans(spec, base, ray):
                if plan.key == entry.key:
                    return plan
            reason = f"the files in `{plan.folder}` lead to another one by now"
        except EnvCacheError as error:  # noqa: PERF203  # each field value fails for itself
            reason = error.message
    raise BuildError(
        f"The environment {entry.name} cannot be built again: {reason}",
        f"`ray-envcache build {record.source}` builds what the project needs now; "
        f"`ray-envcache rm {entry.short}` removes the damaged one when its users are gone",
    )


def _plans(spec: EnvSpec, base: Entry | None, ray: AnyRay) -> Iterator[Plan]:
    """What a field value means now: an environment or, on `base`, a layer with local packages, editable or not."""
    executable, project = interpreter.base_executable(spec.python), Project.locate(Path(spec.path), spec.package)
    plan = plan_of(spec, project, executable, ray, check_current=False)
    if base is None:
        yield plan
    else:
        yield from (layers.layer_plan(spec, plan, base, editable=editable) for editable in (False, True))


def _clean_uv_cache(layout: Layout, found: Verified, observer: Observer) -> tuple[str, ...]:
    """Have uv unpack those packages anew of which its cache may have the damaged files; the names of those it had.

    A file has a hard link for each environment that it is in, and one in the cache. uv takes what is in its cache for
    whole; `--reinstall` and `--refresh` leave a wheel from a folder as it is there (uv 0.13).
    """
    before = _links(found)
    if not before:
        return ()
    cache = uv.cache_directory(found.entry.path) or layout.uv_cache
    done = uv.run(["cache", "clean", *before], cwd=Path("/"), cache=cache, on_line=observer.line)
    uv_errors.expect_success(done, BuildError, f"uv cannot remove {', '.join(before)} from its cache", "try again")
    after = _links(found)
    return tuple(name for name in before if after[name] < before[name])


def _links(found: Verified) -> Counter[str]:
    """How many other links the damaged files of each package have, where they have any."""
    links = Counter[str]()
    for one in found.differences:
        if one.package and not module_of(one.path):
            with suppress(OSError):
                links[one.package] += os.lstat(found.entry.venv / one.path).st_nlink - 1
    return +links


def _require_sound(entry: Entry) -> None:
    """Raise BuildError where a new entry differs from what its packages say; then it is not handed out."""
    found = verify(entry)
    if found.state == "damaged":
        entry.ready.unlink(missing_ok=True)
        first = found.differences[0]
        raise BuildError(
            f"The new environment is damaged too: `{first.path}` {first.detail}",
            f"uv's cache may be damaged: uv cache clean {first.package}, and the same command again",
        )
