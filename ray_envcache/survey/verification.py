"""Verifying an entry: its files and links against its seal, its bytecode against the text that it was made of.

The entry's own Python is not run, and nothing outside of the store is read.
"""

from __future__ import annotations

import csv
import math
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple, TypeAlias

from ray_envcache.inside import pyc
from ray_envcache.store import leases
from ray_envcache.store.layout import Entry, layout_of
from ray_envcache.store.record import ReadyRecord
from ray_envcache.survey import listing
from ray_envcache.survey.listing import LINK, Listed, Tree
from ray_envcache.system import capacity, flock

_ORDER = ("record", "changed", "missing", "foreign", "link", "mode")
_WRITE = 0o022
_READ = 0o555  # what `chmod -R a+rX` adds, by which others may use a store
_AT_ONCE = 200  # files per task of a thread: a task costs as much as hashing a small file

OnProgress: TypeAlias = Callable[[int, int], None]
"""Gets how many files of an entry were just looked at, and how many it has."""


class Difference(NamedTuple):
    """One thing that is not as it should be.

    `kind` is "record" (the seal is damaged), "changed", "missing", "foreign", "link" or "mode"; `path` is that below
    the venv, `package` the one that brought the file, "" where none did.
    """

    kind: str
    path: str
    detail: str
    package: str = ""


class Verified(NamedTuple):
    """What was found in one entry. `state` is "sound", "damaged" or "skipped", then `reason` says why.

    `bytes` are those of all `files`, of which a quick look reads none.
    """

    entry: Entry
    project: str
    state: str
    reason: str = ""
    differences: tuple[Difference, ...] = ()
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0


def verify(entry: Entry, on_progress: OnProgress = lambda _done, _all: None, *, quick: bool = False) -> Verified:
    """Compare an entry with its seal, and keep it meanwhile, which does not count as a use.

    A `quick` look believes the size and the time of a file; what is newer than the seal it reads all the same. An entry
    that is built, finished, removed or not handed out at this moment is skipped. Raises OSError where it cannot be
    read, and as `leases.hold`.
    """
    began = time.monotonic()
    with ExitStack() as held:
        record = _keep(entry, held)
        if record is None or not entry.compiled.exists():
            return Verified(entry, record.project if record else "", "skipped", _why_not(entry, record))
        tree = listing.tree_of(entry)
        found = [*_differences(entry, tree, on_progress, quick=quick)]
    found.sort(key=lambda one: (_ORDER.index(one.kind), one.path))
    size = sum(one.st_size for one in tree.values() if stat.S_ISREG(one.st_mode))
    state, seconds = "damaged" if found else "sound", time.monotonic() - began
    return Verified(entry, record.project, state, "", tuple(found), len(tree), size, seconds)


def _keep(entry: Entry, held: ExitStack) -> ReadyRecord | None:
    """Hold an entry, and what it lies on; its record, None where it is not handed out."""
    lease = leases.hold(entry, ready=True, counts=False)
    if lease is None:
        return None
    held.enter_context(lease)
    record = ReadyRecord.read(entry)
    base = entry.base(record.base) if record else None
    return None if base and _keep(base, held) is None else record


def _why_not(entry: Entry, record: ReadyRecord | None) -> str:
    if record:
        return "its files are listed when its bytecode is compiled, which its next use starts: use it, and try again"
    if not entry.path.exists():
        return "it was removed"
    if entry.building.exists() and (entry.readonly or flock.is_held(layout_of(entry).builder_flock(entry.key))):
        return "it is being built"
    if entry.retired.exists():
        return "it was found damaged and is used no more; `ray-envcache gc` removes it when its users are gone"
    return "it is handed out no more: it was not built to its end, or what it lies on has changed"


def _differences(entry: Entry, tree: Tree, on_progress: OnProgress, *, quick: bool) -> Iterator[Difference]:
    """What is wrong with an entry, in no order."""
    try:
        check = _Check(entry, quick=quick)
    except (OSError, ValueError, csv.Error) as error:
        yield Difference("record", f"../{entry.sealed.name}", f"the list of the entry's files is damaged: {error}")
        return
    yield from (Difference("missing", path, "", check.listed[path].package) for path in check.listed.keys() - tree)
    items = [*tree.items()]
    tasks = [items[first : first + _AT_ONCE] for first in range(0, len(items), _AT_ONCE)]
    # In threads: hashing and reading leave the interpreter to others meanwhile.
    with ThreadPoolExecutor(min(32, capacity.processors())) as pool:
        for task, found in zip(tasks, pool.map(check.look_at, tasks), strict=True):
            on_progress(len(task), len(items))
            yield from found


class _Check:
    """The comparison of one entry with its seal. Raises OSError, ValueError or csv.Error where that is damaged."""

    def __init__(self, entry: Entry, *, quick: bool) -> None:
        self.top, self.listed = os.fspath(entry.venv), listing.listed_in(entry)
        # A quick look believes a file that is as old as the list, and bytecode, which comes after it.
        self.sealed, self.compiled = [
            path.stat().st_mtime if quick else -math.inf for path in (entry.sealed, entry.compiled)
        ]

    def look_at(self, items: Iterable[tuple[str, os.stat_result]]) -> list[Difference]:
        """What is wrong with these files, links and folders."""
        return [one for path, found in items for one in self._look_at(path, found)]

    def _look_at(self, path: str, found: os.stat_result) -> Iterator[Difference]:
        module = listing.module_of(path) if stat.S_ISREG(found.st_mode) else ""
        listed = self.listed.get(module or path)
        if listed is None:
            if not stat.S_ISDIR(found.st_mode):
                yield Difference("foreign", path, "no package brought it")
            elif found.st_mode & _WRITE:
                yield Difference("mode", path, f"has the mode {stat.S_IMODE(found.st_mode):04o}")
            return
        try:
            what = self._of_bytecode(path, found, listed) if module else self._of_content(path, found, listed)
        except OSError as error:
            what = f"cannot be read: {error}"
        if what:
            is_link = stat.S_ISLNK(found.st_mode & listed.mode)
            yield Difference("link" if is_link else "changed", path, what, listed.package)
        elif not module and (listed.mode & ~found.st_mode or found.st_mode & ~listed.mode & ~_READ):
            modes = f"{stat.S_IMODE(found.st_mode):04o} instead of {stat.S_IMODE(listed.mode):04o}"
            yield Difference("mode", path, f"has the mode {modes}", listed.package)

    def _of_content(self, path: str, found: os.stat_result, listed: Listed) -> str:
        """In which way the content of a file or a link is not as listed, "" where it is."""
        if stat.S_IFMT(found.st_mode) != stat.S_IFMT(listed.mode):
            return f"is {stat.filemode(found.st_mode)} instead of {stat.filemode(listed.mode)}"
        if stat.S_ISREG(found.st_mode) and found.st_size != listed.size:
            return f"has {found.st_size} bytes instead of {listed.size}"
        if stat.S_ISREG(found.st_mode) and found.st_mtime <= self.sealed:
            return ""
        content = listing.content_of(f"{self.top}/{path}", found)
        if content == listed.content:
            return ""
        return f"leads to `{content[len(LINK) :]}`" if stat.S_ISLNK(found.st_mode) else "has other content"

    def _of_bytecode(self, path: str, found: os.stat_result, module: Listed) -> str:
        """In which way bytecode is not whole, or not made of the text of its module, "" where it is."""
        if found.st_mtime <= self.compiled:
            return ""
        text = pyc.proven_source(b"".join(listing.chunks_of(f"{self.top}/{path}")))
        # Behind a link is a module of the environment below, whose digest is in the seal of that.
        known = bool(text) if module.content.startswith(LINK) else module.content == listing.as_recorded(text)
        return "" if known else "is not what our compiler made of its module"
