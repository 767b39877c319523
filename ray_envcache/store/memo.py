"""Memos: which environment certain inputs lead to, so that a warm lookup asks neither uv nor the lockfile.

A memo is named after the digest of everything that a lookup depends on, so it never becomes wrong; at worst it names an
environment that was removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from ray_envcache.store.key import digest_of
from ray_envcache.store.layout import Entry, Layout, layout_of
from ray_envcache.system import files
from ray_envcache.system.files import is_unchanged

_SCHEMA = 5
"""Raised when the same inputs lead to another environment, or a memo is read differently."""


@dataclass(frozen=True)
class Memo:
    """What is known for some inputs. `entry`: the environment's name, as `Layout.name_of` gives it.

    `local` are the packages that a layer on top of it has: name, folder (from that of the project), editable.
    `files` are artifacts on this host whose hashes the lockfile does not have, with their `file_identity`: with any,
    the memo speaks for the project in `folder` alone, and only while none of them is replaced. `build_settings` are
    those of the project, which are in the key of a layer. `field` is the field value that led here.
    """

    entry: str
    folder: str
    local: list[tuple[str, str, bool]]
    files: dict[str, tuple[int, int]]
    build_settings: str
    field: dict[str, Any]

    def holds(self, folder: str) -> bool:
        """Whether the memo is true of the project in this folder ("" where that is not known)."""
        if not self.files:
            return True
        return self.folder == folder and all(is_unchanged(path, was) for path, was in self.files.items())


def name_of(inputs: Sequence[Any]) -> str:
    """The name of the memo for these inputs, which JSON must be able to write."""
    return digest_of([_SCHEMA, *inputs])[:32]


def recall(name: str, folder: str, own: Layout, readonly: Sequence[Layout]) -> tuple[Memo, Entry] | None:
    """The memo in the own store, else in a read-only one, with its environment; None where none holds for `folder`."""
    for layout in (own, *readonly):
        memo = _read(layout, name)
        entry = layout.entry(memo.entry) if memo and memo.holds(folder) else None
        # An environment of a read-only store counts only while that store is searched.
        if memo and entry and (not entry.readonly or layout_of(entry) in readonly):
            return memo, entry
    return None


def leading_to(key: str, layout: Layout) -> list[Memo]:
    """The memos that lead to an environment of this key."""
    found = [memo for path in layout.memo.glob("*.json") if (memo := _read(layout, path.stem))]
    return [memo for memo in found if (entry := layout.entry(memo.entry)) and entry.key == key]


def remember(name: str, layout: Layout, memo: Memo) -> None:
    """Write a memo. On a full or read-only disk there is none, and the next lookup takes a second longer."""
    with suppress(OSError):
        files.write_json(layout.memo_of(name), asdict(memo), durable=False)


def _read(layout: Layout, name: str) -> Memo | None:
    data = files.read_json(layout.memo_of(name)) or {}
    try:
        local = [(str(name), str(path), bool(editable)) for name, path, editable in data["local"]]
        known = {path: (int(size), int(changed)) for path, (size, changed) in data["files"].items()}
        asked = dict(data.get("field") or {})  # memos of earlier versions have none
        return Memo(str(data["entry"]), str(data["folder"]), local, known, str(data["build_settings"]), asked)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
