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
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ray_envcache.inside import pyc
from ray_envcache.store import journal, leases
from ray_envcache.store.layout import Entry, Layout, layout_of
from ray_envcache.store.record import ReadyRecord
from ray_envcache.survey import listing
from ray_envcache.survey.listing import Difference, Listed, Tree
from ray_envcache.system import capacity, flock

_BYTECODE = re.compile(r"(.*/)__pycache__/([^/]+?)\.[^/.]+(?:\.opt-\w+)?\.pyc")
_LARGEST_BYTECODE = 100_000_000
_ORDER = ("record", "changed", "missing", "foreign", "link", "mode")
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
_AT_ONCE = 200  # files per task of a thread: 70,000 tasks a second would be half of the work

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


@dataclass
class Reader:
    """Reads files for several entries, and each inode only once: environments share most of what they have."""

    known: dict[tuple[object, ...], str] = field(default_factory=dict)

    def digest(self, path: str, found: os.stat_result, algorithm: str) -> str:
        """The digest of a file, as in a RECORD. Raises OSError and ValueError."""
        return self._once(algorithm, found, partial(listing.digest_of, path, algorithm))

    def proven_source(self, path: str, found: os.stat_result) -> str:
        """The digest of the text that a file of bytecode was made of, "" where that is not proven. Raises OSError."""
        return self._once("bytecode", found, partial(_proven_source, path))

    def _once(self, what: str, found: os.stat_result, read: Callable[[], str]) -> str:
        key = (what, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        if key not in self.known:
            self.known[key] = read()
        return self.known[key]


def _proven_source(path: str) -> str:
    return pyc.proven_source(b"".join(listing.chunks_of(path)))


def with_bases(entries: Iterable[Entry]) -> list[Entry]:
    """The entries, each once and after what it lies on."""
    found: dict[Path, Entry] = {}
    for entry in entries:
        record = ReadyRecord.read(entry)
        base = entry.base(record.base) if record else None
        found |= {one.path: one for one in (base, entry) if one}
    return [*found.values()]


def verify(entry: Entry, reader: Reader, on_progress: OnProgress, *, quick: bool = False) -> Verified:
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
        check = _Check(entry, record, reader, quick=quick)
        differences = sorted(check.run(on_progress), key=lambda one: (_ORDER.index(one.kind), one.path))
    state = "damaged" if differences else "sound"
    size = sum(found.st_size for found in check.tree.values() if stat.S_ISREG(found.st_mode))
    counted, seconds = len(check.tree), time.monotonic() - began
    return Verified(entry, record.project, state, "", tuple(differences), check.is_complete, counted, size, seconds)


def verify_and_note(
    layout: Layout, entry: Entry, reader: Reader, on_progress: OnProgress, *, quick: bool = False
) -> Verified:
    """As `verify`; the journal of the user's own store `layout` has the result."""
    found = verify(entry, reader, on_progress, quick=quick)
    seconds, count = round(found.seconds, 3), len(found.differences)
    journal.note(
        layout,
        "verification",
        key=entry.key,
        project=found.project,
        result=found.state,
        differences=count,
        files=found.files,
        seconds=seconds,
    )
    return found


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

    def __init__(self, entry: Entry, record: ReadyRecord, reader: Reader, *, quick: bool) -> None:
        self.entry, self.record, self.reader, self.quick = entry, record, reader, quick
        self.top = os.fspath(entry.venv)
        self.tree: Tree = listing.tree_of(entry)
        self.seal = listing.read_seal(entry)
        self.ready, self.compiled = _mtime(entry.ready) or 0.0, _mtime(entry.compiled)
        self.expected, self.damaged_lists = listing.recorded(entry, self.tree)
        self.expected |= {path: [one] for path, one in (self.seal.files if self.seal else {}).items()}

    @property
    def is_complete(self) -> bool:
        return self.seal is not None and self.compiled is not None

    def run(self, on_progress: OnProgress) -> Iterator[Difference]:
        """What is wrong, in no order."""
        yield from self.damaged_lists
        if self.seal is None and self.entry.sealed.exists():
            yield Difference("record", f"../{self.entry.sealed.name}", "the entry's own list of files is damaged")
        yield from self._missing()
        bytecode: dict[str, list[str]] = {}
        tasks: list[Callable[[], list[Difference]]] = []
        for path, found in self.tree.items():
            yield from self._mode(path, found.st_mode)
            if listing.is_bytecode(path) and stat.S_ISREG(found.st_mode):
                bytecode.setdefault(_source_of(path), []).append(path)
            elif stat.S_ISREG(found.st_mode):
                tasks.append(partial(self._file, path, found))
            elif not stat.S_ISDIR(found.st_mode):
                yield from self._special(path, found.st_mode)
        if self.is_complete:
            tasks += [partial(self._bytecode, source, paths) for source, paths in bytecode.items()]
        yield from _in_parallel(tasks, on_progress)

    def _missing(self) -> Iterator[Difference]:
        for path in self.expected.keys() - self.tree.keys():
            # Bytecode that a wheel brought has gone for that of our compiler.
            if not listing.is_bytecode(path) and not (self.seal is None and listing.is_script(path)):
                yield Difference("missing", path, "", self._package(path))
        for path in (self.seal.links if self.seal else {}).keys() - self.tree.keys():
            yield Difference("missing", path, "a link")

    def _mode(self, path: str, mode: int) -> Iterator[Difference]:
        usual = self.seal.modes if self.seal else stat.S_IWGRP
        powers = stat.S_ISUID if stat.S_ISDIR(mode) else stat.S_ISUID | stat.S_ISGID
        if stat.S_ISLNK(mode) or listing.is_uv_flock(path) or not mode & (_WRITABLE | powers) & ~usual:
            return
        yield Difference("mode", path, f"has the mode {stat.S_IMODE(mode):04o}", self._package(path))

    def _special(self, path: str, mode: int) -> Iterator[Difference]:
        """What is neither a file nor a folder: links lead where they did, and there is nothing else."""
        target = os.readlink(f"{self.top}/{path}") if stat.S_ISLNK(mode) else None
        what = "no file any more" if target is None else f"a link to `{target}`"
        if path in self.expected:
            yield Difference("changed", path, what, self._package(path))
        elif target is None or (self.seal and path not in self.seal.links):
            yield Difference("foreign", path, what)
        elif (self.seal and self.seal.links[path] != target) or not self._leads_right(path, target):
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
        if listing.is_script(path) and self.seal is None:
            return []
        if listed is None:
            return [Difference("foreign", path, "no package brought it")] if self.seal else []
        return [] if (detail := self._difference(path, found, listed)) == "" else [self._changed(path, detail)]

    def _difference(self, path: str, found: os.stat_result, listed: list[Listed]) -> str:
        """In which way a file differs from all that it might be, "" where it does not."""
        sized = [one for one in listed if one.size in {-1, found.st_size}]
        if not sized:
            return f"has {found.st_size} bytes instead of {listed[0].size}"
        if self.quick and found.st_mtime <= self.ready:
            return ""
        try:
            for one in sized:
                if self.reader.digest(f"{self.top}/{path}", found, one.digest.partition("=")[0]) == one.digest:
                    return ""
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"
        except ValueError as error:
            return f"cannot be compared: {error}"
        return "has other content"

    def _bytecode(self, source: str, paths: list[str]) -> list[Difference]:
        """What is wrong with the bytecode of a module: one file is ours, others an interpreter with options made."""
        if source not in self.expected and source not in (self.seal.links if self.seal else {}):
            return [Difference("foreign", path, "bytecode without a module") for path in paths]
        changed = [path for path in paths if not self._is_proven(path, self._digests(source))]
        if len(changed) < len(paths):
            changed = [path for path in changed if not self._is_of_an_interpreter(path, source)]
        return [self._changed(path, "is not the bytecode of its module", source) for path in changed]

    def _digests(self, source: str) -> set[str]:
        """The digests that the text of a module may have, hexadecimal; none where they are not known.

        A layer has links to modules of the environment below.
        """
        if source in self.expected:
            return {_hexadecimal(one.digest) for one in self.expected[source]}
        base = self.entry.base(self.record.base)
        with suppress(OSError):
            return {_hexadecimal(listing.digest_of(f"{base.venv}/{source}"))} if base else set()
        return set()

    def _is_proven(self, path: str, digests: set[str]) -> bool:
        found = self.tree[path]
        if self.quick and found.st_mtime <= (self.compiled or 0):
            return True
        with suppress(OSError):
            if found.st_size > _LARGEST_BYTECODE:
                return False
            made_of = self.reader.proven_source(f"{self.top}/{path}", found)
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

    with ThreadPoolExecutor(min(32, 2 * capacity.processors())) as pool:
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


def _mtime(path: Path) -> float | None:
    try:
        return os.stat(path).st_mtime
    except OSError:
        return None
