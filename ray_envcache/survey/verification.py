"""Verifying an entry: its files and links against its seal, its bytecode against the text that it was made of.

The seal is the list of all files and links that a venv should have, and of what each should be. The compiler writes it
before it compiles. The digest of a file is the one that its package notes in RECORD, so that damage between
installation and seal is found too; what has none there is hashed. Bytecode is not in the list: it brings its own
proof, see `pyc`. Only what a walk through the venv finds is ever read, and no link is followed. The entry's own Python
is not run.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ray_envcache.inside import pyc
from ray_envcache.store import leases
from ray_envcache.store.layout import Entry
from ray_envcache.store.record import ReadyRecord
from ray_envcache.system import disk, files

Tree: TypeAlias = dict[str, os.stat_result]  # by path below the venv

LINK = "link="
_RECORD = re.compile(r"(lib/[^/]+/site-packages)/([^/]+)\.dist-info/RECORD")
_BYTECODE = re.compile(r"(.*/)__pycache__/([^/]+?)\.[^/.]+(?:\.opt-\w+)?\.pyc")
_CHUNK = 1 << 18
_ORDER = ("record", "changed", "missing", "foreign", "link", "mode")
_WRITE = 0o022
_READ = 0o555  # what `chmod -R a+rX` adds, by which others may use a store
_THREADS = 4
_AT_ONCE = 200  # files per task of a thread: a task costs as much as hashing a small file

_UNFINISHED = "it is not finished: its bytecode is being compiled, or will be from its next use on; try again then"
_NOT_THERE = "it is being built, or broken, or was removed: `ray-envcache list` shows which"

OnProgress: TypeAlias = Callable[[int, int], None]
"""Gets how many files of an entry were just looked at, and how many it has."""


class Listed(NamedTuple):
    """What a file or a link should be: its content as `content_of` tells it, size, mode, and the package it is of."""

    content: str
    size: int
    mode: int
    package: str


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

    A `quick` look reads only what is newer than the finished entry. One that is built, finished, removed or not handed
    out at this moment is skipped. Raises OSError where a folder cannot be read, and as `leases.hold`.
    """
    began = time.monotonic()
    with leases.hold(entry, ready=True, counts=False) or nullcontext() as lease:
        record = ReadyRecord.read(entry) if lease else None
        if record is None or not entry.compiled.exists():
            return Verified(entry, record.project if record else "", "skipped", _UNFINISHED if record else _NOT_THERE)
        tree = tree_of(entry)
        found = [*_differences(entry, tree, on_progress, quick=quick)]
    found.sort(key=lambda one: (_ORDER.index(one.kind), one.path))
    size = sum(one.st_size for one in tree.values() if stat.S_ISREG(one.st_mode))
    state, seconds = "damaged" if found else "sound", time.monotonic() - began
    return Verified(entry, record.project, state, "", tuple(found), len(tree), size, seconds)


def _differences(entry: Entry, tree: Tree, on_progress: OnProgress, *, quick: bool) -> Iterator[Difference]:
    """What is wrong with an entry, in no order."""
    try:
        listed = listed_in(entry)
    except (OSError, ValueError, csv.Error) as error:
        yield Difference("record", f"../{entry.sealed.name}", f"the list of the entry's files is damaged: {error}")
        return
    yield from (Difference("missing", path, "", listed[path].package) for path in listed.keys() - tree)
    check = _Check(os.fspath(entry.venv), listed, entry.compiled.stat().st_mtime if quick else -math.inf)
    items = [*tree.items()]
    tasks = [items[first : first + _AT_ONCE] for first in range(0, len(items), _AT_ONCE)]
    # In threads: hashing and reading leave the interpreter to others meanwhile.
    with ThreadPoolExecutor(_THREADS) as pool:
        for task, found in zip(tasks, pool.map(check.differences, tasks), strict=True):
            on_progress(len(task), len(items))
            yield from found


class _Check(NamedTuple):
    """The comparison of a venv with its list. Files with times up to `believed` are not read."""

    venv: str
    listed: dict[str, Listed]
    believed: float

    def differences(self, items: Iterable[tuple[str, os.stat_result]]) -> list[Difference]:
        """What is wrong with these files, links and folders."""
        return [one for path, found in items for one in self._differences(path, found)]

    def _differences(self, path: str, found: os.stat_result) -> Iterator[Difference]:
        module = module_of(path) if stat.S_ISREG(found.st_mode) else ""
        listed = self.listed.get(module or path)
        # Folders and bytecode are not in the list: others may not write to them.
        mode = listed.mode if listed and not module else found.st_mode & ~_WRITE
        if listed is None and not stat.S_ISDIR(found.st_mode):
            yield Difference("foreign", path, "no package brought it")
        elif listed and (what := self._change(path, found, listed, module)):
            is_link = stat.S_ISLNK(found.st_mode) and stat.S_ISLNK(listed.mode)
            yield Difference("link" if is_link else "changed", path, what, listed.package)
        elif mode & ~found.st_mode or found.st_mode & ~mode & ~_READ:
            modes = f"{stat.S_IMODE(found.st_mode):04o} instead of {stat.S_IMODE(mode):04o}"
            yield Difference("mode", path, f"has the mode {modes}", listed.package if listed else "")

    def _change(self, path: str, found: os.stat_result, listed: Listed, module: str) -> str:
        """In which way a file or a link, or the bytecode of a module, is not as listed, "" where it is."""
        if not module and stat.S_IFMT(found.st_mode) != stat.S_IFMT(listed.mode):
            return f"is {stat.filemode(found.st_mode)} instead of {stat.filemode(listed.mode)}"
        if not module and found.st_size != listed.size and stat.S_ISREG(found.st_mode):
            return f"has {found.st_size} bytes instead of {listed.size}"
        if found.st_mtime <= self.believed and stat.S_ISREG(found.st_mode):
            return ""
        try:
            return (
                self._change_of_bytecode(path, module, listed)
                if module
                else self._change_of_content(path, found, listed)
            )
        except OSError as error:
            return f"cannot be read: {error}"

    def _change_of_content(self, path: str, found: os.stat_result, listed: Listed) -> str:
        content = content_of(f"{self.venv}/{path}", found)
        if content == listed.content:
            return ""
        return f"leads to `{content[len(LINK) :]}`" if content.startswith(LINK) else "has other content"

    def _change_of_bytecode(self, path: str, module: str, listed: Listed) -> str:
        data = b"".join(chunks_of(f"{self.venv}/{path}"))
        text = pyc.proven_source(data)
        # Behind a link is a module of the environment below, whose digest is in the seal of that.
        if text if listed.content.startswith(LINK) else listed.content == as_recorded(text):
            return ""
        # Root may write there: an interpreter that imports beside the compiler, or with -O, makes its own, which has
        # the time and the size of its module.
        is_own = data[4:16] == pyc.stamp_of(f"{self.venv}/{module}")
        return "" if is_own else "is not what our compiler made of its module"


def tree_of(entry: Entry) -> Tree:
    """All that is in the venv. Links are not followed. Raises OSError where a folder cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    start = len(os.fspath(entry.venv)) + 1
    return {path[start:]: found for path, found in disk.walk(entry.venv, fail) if path[start:]}


def seal(entry: Entry) -> None:
    """List what is in a fresh venv, unless that was done before. Raises OSError."""
    if entry.sealed.exists():
        return
    tree, text = tree_of(entry), io.StringIO()
    recorded, lines = _recorded(entry, tree), csv.writer(text)
    for path, found in tree.items():
        if stat.S_ISLNK(found.st_mode) or (stat.S_ISREG(found.st_mode) and not module_of(path)):
            content, size, package = recorded.pop(path, ("", "", ""))
            content = content or content_of(entry.venv / path, found)
            lines.writerow((path, content, size or found.st_size, f"{found.st_mode:o}", package))
    # What should be there, and was gone before we came.
    lines.writerows((path, content, size or 0, 0, package) for path, (content, size, package) in recorded.items())
    files.write_whole(entry.sealed, text.getvalue().encode(errors="surrogateescape"), mode=0o600, replace=True)


def listed_in(entry: Entry) -> dict[str, Listed]:
    """What the seal lists, by path below the venv. Raises OSError, ValueError or csv.Error where it is damaged."""
    modes = 0o177777  # other numbers `stat` refuses
    rows = _rows(entry.sealed)
    return {path: Listed(text, int(size), int(mode, 8) & modes, package) for path, text, size, mode, package in rows}


def _recorded(entry: Entry, tree: Tree) -> dict[str, tuple[str, str, str]]:
    """Digest, size and package of all that RECORDs list, by path below the venv.

    Digest and size are "" where they have to be asked of the file: where a RECORD has none, or not those of sha256,
    where several packages bring the file, and of scripts, some of which we replace.
    """
    recorded: dict[str, tuple[str, str, str]] = {}
    for record, found in tree.items():
        if (parts := _RECORD.fullmatch(record)) and stat.S_ISREG(found.st_mode):
            with suppress(ValueError, csv.Error):  # no list of files from here on: those are hashed
                for name, digest, size in _rows(entry.venv / record):
                    path = os.path.normpath(os.path.join(parts[1], name))
                    is_known = digest.startswith("sha256=") and size.isdecimal() and path not in recorded
                    noted = (digest.rstrip("="), size) if is_known and not path.startswith("bin/") else ("", "")
                    if not path.startswith((".", "/")):  # in the venv
                        recorded[path] = (*noted, parts[2].partition("-")[0])
    return {path: noted for path, noted in recorded.items() if not module_of(path)}


def _rows(path: Path) -> Iterator[list[str]]:
    text = b"".join(chunks_of(path)).decode(errors="surrogateescape")
    return csv.reader(io.StringIO(text, newline=""))


def chunks_of(path: str | Path) -> Iterator[bytes]:
    """The content of a regular file. Raises OSError, also where a link lies there by now."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        while data := os.read(descriptor, _CHUNK):
            yield data
    finally:
        os.close(descriptor)


def content_of(path: str | Path, found: os.stat_result) -> str:
    """The digest of a file, as a RECORD has it, or where a link leads: "link=...". Raises OSError."""
    if stat.S_ISLNK(found.st_mode):
        return LINK + os.readlink(path)
    digest = hashlib.sha256(usedforsecurity=False)
    for data in chunks_of(path):
        digest.update(data)
    return as_recorded(digest.hexdigest())


def as_recorded(digest: str) -> str:
    """A hexadecimal digest of sha256 as a RECORD has it."""
    return f"sha256={base64.urlsafe_b64encode(bytes.fromhex(digest)).decode().rstrip('=')}"


def module_of(path: str) -> str:
    """The path of the module whose bytecode lies at `path`; "" where that is no place of bytecode."""
    parts = _BYTECODE.fullmatch(path)
    return f"{parts[1]}{parts[2]}.py" if parts else ""
