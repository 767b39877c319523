"""What the journal has of each set-up: how it ended, for which environment, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from ray_envcache.errors import BuildError, BusyError, EnvCacheError, StoreError
from ray_envcache.store import journal
from ray_envcache.store.record import MeasuredRecord

if TYPE_CHECKING:
    from ray_envcache.field.spec import EnvSpec
    from ray_envcache.store.journal import Value
    from ray_envcache.store.layout import Entry
    from ray_envcache.store.leases import Holder, Lease

F = TypeVar("F", bound="Callable[..., Lease | None]")


def noted(set_up: F) -> F:
    """Have a method of `Store` note each set-up, once. Of a lookup that finds nothing there is none."""

    @wraps(set_up)
    def noting(store: Any, spec: EnvSpec, ray: Any, holder: Holder, *args: Any, **options: Any) -> Lease | None:
        began = time.monotonic()
        about: dict[str, Value] = {"path": spec.path, "kind": holder.kind, "cluster": holder.cluster}

        def note(ended: dict[str, Value]) -> None:
            journal.note(store.layout, "setup", seconds=round(time.monotonic() - began, 4), **about, **ended)

        try:
            lease = set_up(store, spec, ray, holder, *args, **options)
        except Exception as error:
            # No BaseException: a set-up that was cancelled has not failed.
            note({"result": _failure(error), "error": type(error).__name__})
            raise
        if lease is not None:
            note(_found(lease))
        return lease

    return cast("F", noting)


def _failure(error: Exception) -> str:
    """Whether the input was refused, which helps no later attempt either, or something failed."""
    failed = isinstance(error, BuildError | StoreError | BusyError) or getattr(error, "passing", False)
    return "refused" if isinstance(error, EnvCacheError) and not failed else "failed"


def _found(lease: Lease) -> dict[str, Value]:
    """What a set-up led to. `bytes`: of the environment and all below it, as far as they are measured."""
    entry, *below = lease.entries
    result = "lower" if lease.how == "found" and entry.readonly else lease.how
    return {
        "result": result,
        "key": entry.key,
        "base": below[0].key if below else None,
        "project": lease.project,
        "bytes": sum(map(_size, lease.entries)),
    }


def _size(entry: Entry) -> int:
    with suppress(OSError):
        record = MeasuredRecord.read(entry)
        return record.size_bytes if record and isinstance(record.size_bytes, int) else 0
    return 0
