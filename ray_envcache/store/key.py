"""The identity of an environment, and the memos of which one certain inputs lead to.

By a memo a warm lookup asks neither uv nor the lockfile. It is named after the digest of everything that a lookup
depends on, so it never becomes wrong; at worst it names an environment that was removed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from ray_envcache.store.layout import Entry, Layout, layout_of
from ray_envcache.store.record import read_record, write_record
from ray_envcache.system.files import is_unchanged

if TYPE_CHECKING:
    from ray_envcache.resolve.interpreter import Interpreter
    from ray_envcache.resolve.lockfile import ResolvedPackage, ResolvedSet

SCHEMA = 2
"""Increased when equal inputs give other bytes on disk."""

MEMO_SCHEMA = 6
"""Raised when the same inputs lead to another environment, or a memo is read differently."""

LAYER_SCHEMA = 3
"""Raised when the same inputs of a layer would give other bytes on disk."""

KEY_LENGTH = 32
"""Hex digits of a key: 128 bits, short enough for shebangs and for people."""


def compute_key(resolved: ResolvedSet, interpreter: Interpreter, outside: Sequence[Any] = ()) -> str:
    """The key of the environment with these packages, for this interpreter.

    Everything that changes what is installed changes the key, and nothing else does: not comments, not the order of a
    file, not artifacts for other platforms, not the project's name or place. `outside` is what it uses from elsewhere.
    """
    packages = [[package.name, package.version, package.kind, content_of(package)] for package in resolved.packages]
    identity = {
        "schema": SCHEMA,
        "packages": sorted(packages),
        "interpreter": interpreter.identity(),
        "build_settings": resolved.build_settings if resolved.is_built_here else "",
        "outside": list(outside),
    }
    return digest_of(identity)[:KEY_LENGTH]


def layer_key(base: str, content: str, build_settings: str) -> str:
    """The key of the layer with this content, built with these settings, on the environment with the key `base`.

    The settings stand in the root of the workspace, which is often no package of the layer.
    """
    identity = {"schema": LAYER_SCHEMA, "layer on": base, "content": content, "build_settings": build_settings}
    return digest_of(identity)[:KEY_LENGTH]


def digest_of(data: Any) -> str:
    """sha256 over canonical JSON: unambiguous, unlike hashes over joined strings."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def content_of(package: ResolvedPackage) -> list[str]:
    """What tells the artifact of a package from another one: its digest, else all that is known of its origin."""
    if not package.digest:
        return [json.dumps(package.artifact, sort_keys=True, default=str)]
    # One commit, or one archive, may hold several projects.
    return [package.digest, package.artifact.get(package.kind, {}).get("subdirectory", "")]


class Memo(NamedTuple):
    """What is known for some inputs. `entry`: the environment's name, as `Layout.name_of` gives it.

    `local` are the packages that a layer on top of it has: name, folder (from that of the project), editable.
    `files` are artifacts on this host whose hashes the lockfile does not have, with size and mtime in ns: with any, the
    memo speaks for the project in `folder` alone, and only while none of them is replaced. `build_settings` are those
    of the project, which are in the key of a layer. `field` is the field value that led here.
    """

    entry: str
    folder: str
    local: tuple[tuple[str, str, bool], ...]
    files: tuple[tuple[str, int, int], ...]
    build_settings: str
    field: dict[str, Any]

    def holds(self, folder: str) -> bool:
        """Whether the memo is true of the project in this folder ("" where that is not known)."""
        if not self.files:
            return True
        return self.folder == folder and all(is_unchanged(path, (size, mtime)) for path, size, mtime in self.files)


def memo_name(inputs: Sequence[Any]) -> str:
    """The name of the memo for these inputs, which JSON must be able to write."""
    return digest_of([MEMO_SCHEMA, *inputs])[:32]


def recall(name: str, folder: str, own: Layout, readonly: Sequence[Layout]) -> tuple[Memo, Entry] | None:
    """The memo in the own store, else in a read-only one, with its environment; None where none holds for `folder`."""
    for layout in (own, *readonly):
        memo = read_record(Memo, layout.memo_of(name))
        entry = layout.entry(memo.entry) if memo and memo.holds(folder) else None
        # An environment of a read-only store counts only while that store is searched.
        if memo and entry and (not entry.readonly or layout_of(entry) in readonly):
            if layout is own:
                with suppress(OSError):
                    os.utime(layout.memo_of(name))  # the collector keeps those that were recalled last
            return memo, entry
    return None


def leading_to(key: str, layout: Layout) -> list[Memo]:
    """The memos that lead to an environment of this key."""
    found = [memo for path in layout.memo.glob("*.json") if (memo := read_record(Memo, path))]
    return [memo for memo in found if (entry := layout.entry(memo.entry)) and entry.key == key]


def remember(name: str, layout: Layout, memo: Memo) -> None:
    """Write a memo. On a full or read-only disk there is none, and the next lookup takes a second longer."""
    with suppress(OSError):
        write_record(layout.memo_of(name), memo)
