"""The store for programs: `ray_envcache.Store`, with what the command line does for people."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray_envcache import acquire
from ray_envcache.doctor.findings import Finding, Prefetched, ask, latest
from ray_envcache.doctor.repair import chosen
from ray_envcache.field.registration import WORKER_MODULE
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.collector import Collected, collect
from ray_envcache.gc.policy import Limits, parse_limit
from ray_envcache.hook import pinned_field
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder, Lease
from ray_envcache.survey.inventory import Status as Environment
from ray_envcache.survey.inventory import survey
from ray_envcache.survey.verification import Verified, verify

__all__ = ["Collected", "Environment", "Lease", "Prefetched", "Store", "Verified", "prefetch"]


class Store:
    """The environments of one user on one host, for programs that use them without a cluster, or look after them.

    Any number of processes may use one store at the same time. Errors are EnvCacheError.
    """

    def __init__(self, store: acquire.Store) -> None:
        self._store = store

    @classmethod
    def open(cls, root: str | os.PathLike[str] | None = None) -> Store:
        """Open the store at `root` (default: $RAY_ENVCACHE_DIR, else the user's cache directory), made if need be.

        Raises StoreError where the store cannot be private, shared between processes, or written.
        """
        return cls(acquire.Store.open(None if root is None else Path(root)))

    @property
    def root(self) -> Path:
        """Where the store is."""
        return self._store.layout.root

    def acquire(self, path: str | os.PathLike[str], **options: Any) -> Lease:
        """A lease on the environment of the project at `path`, which is built first if need be.

        The options are those of the field: `extras`, `groups`, `python` and so on. As long as the lease is held the
        environment stays. Raises EnvCacheError where the input is bad or the build fails.
        """
        spec = EnvSpec.parse({**options, "path": os.path.abspath(os.path.expanduser(path)) if path else path})
        return self._store.acquire(spec, installed_ray(), Holder("program"))

    def environments(self) -> list[Environment]:
        """All environments, the least recently used first, then those of read-only stores: what `list` shows."""
        return survey(self._store.layout, self._store.readonly)

    def collect(self, *, dry_run: bool = False, everything: bool = False, **limits: str | float | None) -> Collected:
        """Remove environments that are no longer used, as `ray-envcache gc` does; with `dry_run` say what would go.

        `limits` are `unused_for`, `max_used_space`, `min_free_space` and `reserved_space`, as "14d", "50GB" or numbers
        of seconds and bytes; None switches one off. Those left out are as the RAY_ENVCACHE_* variables say. Raises
        FieldValueError.
        """
        given = {name: parse_limit(name, value) for name, value in limits.items()}
        chosen = replace(Limits.from_environ(os.environ), everything=everything, **given)
        return collect(self._store.layout, chosen, dry_run=dry_run)

    def verify(self, *keys: str, quick: bool = False) -> list[Verified]:
        """Compare environments with what was installed, as `ray-envcache verify` does; nothing is changed.

        `keys` are starts of keys; without one all are compared. A `quick` look is at sizes and times only. Raises
        UnknownKeyError.
        """
        return [verify(entry, quick=quick) for entry in chosen(self._store, keys)]


def prefetch(
    paths: str | Iterable[str | os.PathLike[str]], address: str | None = None, *, timeout: float = 7200, **options: Any
) -> list[Prefetched]:
    """Have every node of a cluster set up the environments of projects: one `Prefetched` for each of them on each node.

    `address`: "auto", or of a GCS; None: the cluster of this program, else "auto". A node may take `timeout` seconds;
    the `options` are the field's. Raises EnvCacheError where a project is bad, or the cluster cannot be asked.
    """
    given = [paths] if isinstance(paths, str) else paths
    wanted = [os.path.abspath(os.path.expanduser(path)) for path in given]
    fields = {path: pinned_field({**options, "path": path}) for path in wanted}
    node: Any = getattr(sys.modules.get(WORKER_MODULE), "_global_node", None)
    answers: list[dict[str, Any]] = []
    ask(address or (node.gcs_address if node else "auto"), answers.append, timeout=timeout, fields=fields, follow=0)
    rows = latest(answers)
    return [Prefetched(**{**row, "findings": [Finding(**each) for each in row["findings"]]}) for row in rows]
