"""The packages of an entry, from its pylock.toml and its ready record; those of a layer are what it lies on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from ray_envcache.checkout import toml
from ray_envcache.errors import LockfileError
from ray_envcache.store.key import digest_of
from ray_envcache.store.layout import Entry
from ray_envcache.store.record import ReadyRecord


class Package(NamedTuple):
    """One package. `artifact` tells its file, commit or source from another one of the same version.

    One that is `inherited` is used from the cluster's own Python.
    """

    version: str
    artifact: str
    inherited: bool = False

    def __str__(self) -> str:
        return f"{self.version or self.artifact[:19]}{' (inherited)' if self.inherited else ''}"


def of_entry(entry: Entry, record: ReadyRecord) -> dict[str, Package]:
    """The packages by name, without those of a layer itself. None of them where its pylock.toml cannot be read."""
    if record.base:
        base = entry.base(record.base)
        below = ReadyRecord.read_any(base) if base else None
        return of_entry(base, below) if base and below else {}
    tables: list[dict[str, Any]] = []
    with suppress(LockfileError):  # it has none where all is inherited; a damaged one is no reason to fail
        tables = toml.read(entry.pylock, "").get("packages", [])
    return of_tables(tables, (record.inputs or {}).get("outside", ()))


def of_tables(tables: Iterable[Mapping[str, Any]], outside: Iterable[Any] = ()) -> dict[str, Package]:
    """The packages of these tables in pylock form by name, and those `outside`, as the key of an environment has them.

    Two tables give equal packages where they give equal keys.
    """
    found = {table["name"]: Package(table.get("version", ""), _artifact(table)) for table in tables}
    inherited = (one for one in outside if not isinstance(one, str))
    return found | {name: Package(version, json.dumps(rest), True) for name, version, *rest in inherited}


def _artifact(table: Mapping[str, Any]) -> str:
    """The digest of the artifact, or its commit; else all that is known of its origin."""
    kind = next((kind for kind in ("wheels", "sdist", "archive", "vcs", "directory") if kind in table), "")
    found = table[kind][0] if kind == "wheels" else table.get(kind, {})
    hashes = found.get("hashes") or {}
    sha = hashes.get("sha256") or json.dumps(hashes, sort_keys=True) if hashes else found.get("commit-id")
    # As a digest: a URL may hold a token.
    sha = sha or digest_of(json.dumps(table, sort_keys=True, default=str))
    return f"{sha} {found.get('subdirectory', '')}".strip()
