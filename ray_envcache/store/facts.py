"""The facts of an entry: what its key is made of, in words. `explain` compares them, the filter `has:` looks in them.

The builder writes them once, into a file of their own: those of 300 packages take 40 kB, and the ready record is read
at each claim. A layer has those of the environment below it too.
"""

from __future__ import annotations

import json
from typing import TypeAlias

from ray_envcache.store.key import digest_of
from ray_envcache.store.layout import Entry
from ray_envcache.system import files

Facts: TypeAlias = dict[str, str]
"""By kind and name: {"package numpy": "2.4.1", "python version": "3.11.7"}."""


def of_settings(settings: str) -> Facts:
    """The facts of uv's settings, which are JSON. As digests: a value may hold a secret."""
    return {f"setting {name}": digest_of(value) for name, value in json.loads(settings or "{}").items()}


def write(entry: Entry, facts: Facts) -> None:
    """Note the facts of an entry that is being built."""
    files.write_json(entry.facts, {**facts}, durable=False)


def read(entry: Entry) -> Facts:
    """The facts of an entry; {} where an earlier version built it, and where the file is damaged."""
    found = files.read_json(entry.facts) or {}
    return {fact: value for fact, value in found.items() if isinstance(value, str)}
