"""Verifying an entry: each file against its hash, bytecode against the text that it was made of, links and modes.

The entry's own Python is not run, and nothing outside of the store is read.
"""

from __future__ import annotations

import base64
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ray_envcache.inside import pyc
from ray_envcache.store import leases
from ray_envcache.store.layout import Entry, layout_of
from ray_envcache.store.record import ReadyRecord
from ray_envcache.survey import listing
from ray_envcache.survey.listing import LINK, Difference, Listed
from ray_envcache.system import capacity, flock

_BYTECODE = re.compile(r"(.*/)__pycache__/([^/]+?)\.[^/.]+(?:\.opt-\w+)?\.pyc")
_LARGEST_BYTECODE = 100_000_000
_ORDER = ("record", "changed", "missing", "foreign", "link", "mode")
_WRITABLE = (stat.S_IWGRP, stat.S_IWOTH)
_AT_ONCE = 200  # files per task of a thread: a task costs as much as hashing a small file

OnProgress: TypeAlias = Callable[[int, int], None]
"""Gets how many files of an entry were just looked at, and how many it has."""


class Verified(NamedTuple):
    """What was found in one entry. `state` is "sound", "damaged" or "skipped", then `reason` says why.

    It is not `complete` where the bytecode is not compiled yet: then only files that have a hash in a RECORD count.
    `bytes` are those of all `files`, of which a quick look reads none.
    """

    entry: Entry
    project: str
    state: str
    reason: str = ""
    differences: tuple[Difference, ...] = ()
    complete: bool = False
    files: int = 0
    bytes: int = 0
    seconds: float = 0.0


def with_bases(entries: Iterable[Entry]) -> list[Entry]:
    """The entries, each once and after what it lies on."""
    found: dict[Path, Entry] = {}
    for entry in entries:
        record = ReadyRecord.read(entry)
        base = entry.base(record.base) if record else None
        found |= {one.path: one for one in (base, entry) if one}
    return [*found.values()]


def verify(entry: Entry, on_progress: OnProgress = lambda _done, _all: None, *, quick: bool = False) -> Verified:
    """Compare an entry with what is noted of it, and keep it meanwhile, which does not count as a use.

    A `quick` look believes the size and the time of a file; what is newer than the entry it reads all the same. An
    entry that is built, removed or not handed out at this moment is skipped. Raises OSError where it cannot be read,
    and as `leases.hold`.
    """
    began = time.monotonic()
    with ExitStack() as held:
        record = _keep(entry, held)
        if record is None:
            return Verified(entry, "", "skipped", _why_not(entry))
        check = _Check(entry, record, quick=quick)
        found = tuple(sorted(check.run(on_progress), key=lambda one: (_ORDER.index(one.kind), one.path)))
    size = sum(one.st_size for one in check.tree.values() if stat.S_ISREG(one.st_mode))
    state, seconds = "damaged" if found else "sound", time.monotonic() - began
    return Verified(entry, record.project, state, "", found, check.is_complete, len(check.tree), size, seconds)


def _keep(entry: Entry, held: ExitStack) -> ReadyRecord | None:
    """Hold an entry, and what it lies on; its record, None where it is not handed out."""
    lease = leases.hold(entry, ready=True, counts=False)
    if lease is None:
        return None
    held.enter_context(lease)
    record = ReadyRecord.read(entry)
    base = entry.base(record.base) if record else None
    return None if base and _keep(base, held) is None else record


def _why_not(entry: Entry) -> str:
    if not entry.path.exists():
        return "it was removed"
    if entry.building.exists() and (entry.readonly or flock.is_held(layout_of(entry).builder_flock(entry.key))):
        return "it is being built"
    if entry.retired.exists():
        return "it was found damaged and is used no more; `ray-envcache gc` removes it when its users are gone"
    return "it is handed out no more: it was not built to its end, or what it lies on has changed"


class _Check:
    """The comparison of one entry."""

    def __init__(self, entry: Entry, record: ReadyRecord, *, quick: bool) -> None:
        self.entry, self.record, self.quick = entry, record, quick
        self.top, self.tree = os.fspath(entry.venv), listing.tree_of(entry)
        self.expected, self.damaged_lists = listing.expected_in(entry, self.tree)
        self.ready, self.compiled = _mtime(entry.ready), _mtime(entry.compiled)
        self.is_sealed = entry.sealed.exists()
        self.is_complete = self.is_sealed and self.compiled > 0
        modes = [found.st_mode for found in self.tree.values() if stat.S_ISREG(found.st_mode)]
        # A umask lets others write to many files: those that uv has unpacked under it.
        self.usual = sum(bit for bit in _WRITABLE if 10 * sum(bool(mode & bit) for mode in modes) > len(modes))

    def run(self, on_progress: OnProgress) -> Iterator[Difference]:
        """What is wrong, in no order."""
        yield from self.damaged_lists
        for path in self.expected.keys() - self.tree.keys():
            # Bytecode that a wheel brought has gone for that of our compiler.
            if not listing.is_bytecode(path) and (self.is_sealed or not listing.is_script(path)):
                yield Difference("missing", path, "", self._package(path))
        bytecode: dict[str, list[str]] = {}
        tasks: list[Callable[[], list[Difference]]] = []
        for path, found in self.tree.items():
            yield from self._mode(path, found.st_mode)
            if not stat.S_ISREG(found.st_mode):
                yield from [] if stat.S_ISDIR(found.st_mode) else self._special(path, found.st_mode)
            elif listing.is_bytecode(path):
                bytecode.setdefault(_source_of(path), []).append(path)
            else:
                tasks.append(partial(self._file, path, found))
        if self.is_complete:
            tasks += [partial(self._bytecode, source, paths) for source, paths in bytecode.items()]
        yield from _in_parallel(tasks, on_progress)

    def _mode(self, path: str, mode: int) -> Iterator[Difference]:
        # A folder may have its group from the one above. uv lets all write to its flock in each venv.
        unusual = (sum(_WRITABLE) | stat.S_ISUID | (0 if stat.S_ISDIR(mode) else stat.S_ISGID)) & ~self.usual
        if mode & unusual and not stat.S_ISLNK(mode) and path != ".lock":
            yield Difference("mode", path, f"has the mode {stat.S_IMODE(mode):04o}", self._package(path))

    def _special(self, path: str, mode: int) -> Iterator[Difference]:
        """What is neither a file nor a folder: links lead where they did, and there is nothing else."""
        target = os.readlink(f"{self.top}/{path}") if stat.S_ISLNK(mode) else ""
        what = f"a link to `{target}`" if target else "no file, folder or link"
        noted = next((one.digest for one in self.expected.get(path, ())), "")
        if noted and not noted.startswith(LINK):
            yield self._changed(path, what)
        elif not target or (self.is_sealed and not noted):
            yield Difference("foreign", path, what)
        elif (noted and noted != LINK + target) or not self._leads_right(path, target):
            yield Difference("link", path, f"leads to `{target}`")
        elif not os.path.lexists(os.path.join(self.top, os.path.dirname(path), target)):
            yield Difference("missing", path, f"`{target}`, to which this link leads")

    def _leads_right(self, path: str, target: str) -> bool:
        """Whether a link leads to a neighbour, the base Python, or its own place in what this environment lies on."""
        if "/" not in target:
            return target not in {"", ".", ".."}
        if listing.is_script(path) and os.path.basename(path).startswith("python"):
            return os.path.realpath(target) == os.path.realpath(self.record.base_python)
        return any(_is_same(target, place) for place in self._places_below(path))

    def _places_below(self, path: str) -> Iterator[str]:
        if base := self.entry.base(self.record.base):
            yield f"{base.venv}/{path}"
        else:
            _, found, name = path.partition("/site-packages/")
            for info in {os.path.dirname(file) for file, _, _ in self.record.inherited}:
                yield f"{os.path.dirname(info)}/{name if found else ''}"

    def _file(self, path: str, found: os.stat_result) -> list[Difference]:
        listed = self.expected.get(path)
        if not self.is_sealed and (listed is None or listing.is_script(path)):
            return []
        if listed is None:
            return [Difference("foreign", path, "no package brought it")]
        return [self._changed(path, what)] if (what := self._difference(path, found, listed)) else []

    def _difference(self, path: str, found: os.stat_result, listed: list[Listed]) -> str:
        """In which way a file differs from all that it might be, "" where it does not."""
        sized = [one.digest for one in listed if one.size in {-1, found.st_size}]
        if not sized:
            return f"has {found.st_size} bytes instead of {listed[0].size}"
        if self.quick and found.st_mtime <= self.ready:
            return ""
        try:
            same = any(listing.digest_of(f"{self.top}/{path}", one.partition("=")[0]) == one for one in sized)
        except (OSError, ValueError) as error:
            return f"cannot be compared: {error}"
        return "" if same else "has other content"

    def _bytecode(self, source: str, paths: list[str]) -> list[Difference]:
        """What is wrong with the bytecode of a module: one file is ours, others an interpreter with options made."""
        if source not in self.expected:
            return [Difference("foreign", path, "bytecode without a module") for path in paths]
        changed = [path for path in paths if not self._is_proven(path, self._digests(source))]
        if len(changed) < len(paths):
            changed = [path for path in changed if not self._is_of_an_interpreter(path, source)]
        return [self._changed(path, "is not the bytecode of its module", source) for path in changed]

    def _digests(self, source: str) -> set[str]:
        """The digests that the text of a module may have, hexadecimal; none where they are not known.

        A layer has links to modules of the environment below.
        """
        noted = {one.digest for one in self.expected[source]}
        if any(one.startswith(LINK) for one in noted):
            base, noted = self.entry.base(self.record.base), set()
            with suppress(OSError):
                noted = {listing.digest_of(f"{base.venv}/{source}")} if base else set()
        return set(map(_hexadecimal, noted))

    def _is_proven(self, path: str, digests: set[str]) -> bool:
        found = self.tree[path]
        if self.quick and found.st_mtime <= self.compiled:
            return True
        with suppress(OSError):
            data = b"".join(listing.chunks_of(f"{self.top}/{path}")) if found.st_size < _LARGEST_BYTECODE else b""
            made_of = pyc.proven_source(data)
            return made_of in digests if digests else bool(made_of)
        return False

    def _is_of_an_interpreter(self, path: str, source: str) -> bool:
        """Whether an interpreter made this bytecode of the module as it is: it has its size and time (PEP 3147)."""
        with suppress(OSError):
            header, found = b"".join(listing.chunks_of(f"{self.top}/{path}"))[:16], self.tree.get(source)
            times = (int(found.st_mtime) & 0xFFFF_FFFF, found.st_size & 0xFFFF_FFFF) if found else ()
            return header[4:] == b"".join(number.to_bytes(4, "little") for number in (0, *times))
        return False

    def _changed(self, path: str, detail: str, source: str = "") -> Difference:
        return Difference("changed", path, detail, self._package(source or path))

    def _package(self, path: str) -> str:
        return next((one.package for one in self.expected.get(path, ())), "")


def _in_parallel(tasks: list[Callable[[], list[Difference]]], on_progress: OnProgress) -> Iterator[Difference]:
    """Run all tasks in threads: hashing and reading leave the interpreter to others meanwhile."""
    waiting = iter(tasks)
    chunks = list(iter(lambda: list(islice(waiting, _AT_ONCE)), []))

    def run(chunk: Iterable[Callable[[], list[Difference]]]) -> tuple[int, list[Difference]]:
        found = [task() for task in chunk]
        return len(found), [one for each in found for one in each]

    with ThreadPoolExecutor(min(32, capacity.processors())) as pool:
        for done, differences in pool.map(run, chunks):
            on_progress(done, len(tasks))
            yield from differences


def _source_of(path: str) -> str:
    parts = _BYTECODE.fullmatch(path)
    return f"{parts[1]}{parts[2]}.py" if parts else ""


def _hexadecimal(digest: str) -> str:
    algorithm, _, text = digest.partition("=")
    with suppress(ValueError):
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)).hex() if algorithm == "sha256" else ""
    return ""


def _is_same(one: str, other: str) -> bool:
    """Whether two paths name the same thing, maybe spelled differently; a link itself, not what it leads to."""
    try:
        return one == other or os.path.samestat(os.lstat(one), os.lstat(other))
    except OSError:
        return False


def _mtime(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return 0.0
