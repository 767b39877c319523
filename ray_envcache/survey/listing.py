"""What should be in the venv of an entry: the RECORDs of its packages say it of their files, its seal of all else.

uv notes the hash of each file of a package in the package's RECORD. Without a hash are the RECORDs themselves, what
`uv venv` writes, our own files, and what a wheel forgot to list; of scripts some are replaced. The compiler notes all
these, and the links, in the seal, before it compiles. Only files that a walk through the venv finds are ever read, and
no link is followed: it does not matter what a RECORD names.
"""

from __future__ import annotations

import base64
import csv
import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ray_envcache.store.layout import Entry
from ray_envcache.system import disk, files

Tree: TypeAlias = dict[str, os.stat_result]  # by path below the venv

RECORD_BYTES = 50_000_000
"""Of more no RECORD is read: that of torch has 1.5 MB."""
_RECORD = re.compile(r"(lib/[^/]+/site-packages)/([^/]+)\.dist-info/RECORD")
_SCHEMA = 1
_CHUNK = 1 << 20


class Listed(NamedTuple):
    """What a file should be: its digest as a RECORD has it ("sha256=..."), its size (-1: any), and its package."""

    digest: str
    size: int
    package: str = ""


class Difference(NamedTuple):
    """One thing that is not as it should be.

    `kind` is "record" (a list of files is damaged), "changed", "missing", "foreign", "link" or "mode"; `path` is that
    below the venv, `package` the one that brought the file, "" where none did.
    """

    kind: str
    path: str
    detail: str
    package: str = ""


class Seal(NamedTuple):
    """What is noted of an entry: its files without a hash in a RECORD, its links, and which modes its files had."""

    files: dict[str, Listed]
    links: dict[str, str]
    modes: int


def tree_of(entry: Entry) -> Tree:
    """All that is in the venv. Links are not followed. Raises OSError where a folder cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    start = len(os.fspath(entry.venv)) + 1
    return {path[start:]: found for path, found in disk.walk(entry.venv, fail) if path[start:]}


def recorded(entry: Entry, tree: Tree) -> tuple[dict[str, list[Listed]], list[Difference]]:
    """What the RECORDs say of files, and what is wrong with these RECORDs.

    Packages may bring the same file: each may be right.
    """
    listed: dict[str, list[Listed]] = {}
    differences: list[Difference] = []
    for path, found in tree.items():
        if (parts := _RECORD.fullmatch(path)) and stat.S_ISREG(found.st_mode):
            package = parts[2].partition("-")[0]
            own: dict[str, Listed] = {}
            try:
                if found.st_size > RECORD_BYTES:
                    raise ValueError(f"has {found.st_size} bytes")  # noqa: TRY301
                for name, one in _rows(entry.venv / path, parts[1], package):
                    if own.setdefault(name, one) != one:
                        raise ValueError(f"has two different lines for {name}")  # noqa: TRY301
            except (ValueError, OSError, csv.Error) as error:
                differences.append(
                    Difference("record", path, f"the package's list of files is damaged: {error}", package)
                )
            for name, one in own.items():
                listed.setdefault(name, []).append(one)
    return listed, differences


def _rows(record: Path, folder: str, package: str) -> Iterator[tuple[str, Listed]]:
    """The files that have a hash, by path below the venv. Raises ValueError, OSError and csv.Error."""
    text = b"".join(chunks_of(record)).decode()
    for row in csv.reader(io.StringIO(text, newline="")):
        name, digest, size = row if len(row) == 3 else ("", "", "")
        path = os.path.normpath(os.path.join(folder, name))
        if not name or path in {".", ".."} or path.startswith(("/", "../")):
            raise ValueError(f"names no file of the environment: {','.join(row)[:100]!r}")
        if digest:
            yield path, Listed(digest.rstrip("="), int(size or -1), package)


def chunks_of(path: str | Path) -> Iterator[bytes]:
    """The content of a regular file; raises OSError where it is something else, a link above all."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "no regular file", os.fspath(path))
        while data := os.read(descriptor, min(found.st_size + 1, _CHUNK)):
            yield data
    finally:
        os.close(descriptor)


def digest_of(path: str | Path, algorithm: str = "sha256") -> str:
    """The digest of a file as a RECORD has it. Raises OSError, and ValueError for an unknown algorithm."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    for data in chunks_of(path):
        digest.update(data)
    return f"{algorithm}={base64.urlsafe_b64encode(digest.digest()).decode().rstrip('=')}"


def seal(entry: Entry) -> None:
    """Note what is in a fresh venv, unless that was done before. Raises OSError."""
    if entry.sealed.exists():
        return
    tree = tree_of(entry)
    listed, _ = recorded(entry, tree)
    regular = [path for path, found in tree.items() if stat.S_ISREG(found.st_mode)]
    alone = [path for path in regular if not is_bytecode(path) and (is_script(path) or path not in listed)]
    noted = {
        "files": {path: (digest_of(entry.venv / path), tree[path].st_size) for path in alone},
        "links": {path: os.readlink(entry.venv / path) for path, found in tree.items() if stat.S_ISLNK(found.st_mode)},
        "modes": _usual_modes([tree[path].st_mode for path in regular if not is_uv_flock(path)]),
    }
    files.write_json(entry.sealed, {"schema_version": _SCHEMA, **noted}, durable=False)


def _usual_modes(modes: list[int]) -> int:
    """Who else may write to files by a umask: all users to most of them, or the group to some, as caches are mixed."""
    by_group = any(mode & stat.S_IWGRP for mode in modes)
    by_all = 2 * sum(bool(mode & stat.S_IWOTH) for mode in modes) > len(modes)
    return (stat.S_IWGRP if by_group else 0) | (stat.S_IWOTH if by_all else 0)


def read_seal(entry: Entry) -> Seal | None:
    """The seal of an entry; None where it has none that is whole."""
    data = files.read_json(entry.sealed) or {}
    try:
        listed = {path: Listed(str(digest), int(size)) for path, (digest, size) in data["files"].items()}
        return Seal(listed, dict(data["links"]), int(data["modes"])) if data["schema_version"] == _SCHEMA else None
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def is_bytecode(path: str) -> bool:
    """Whether a path is one of bytecode that Python, or our compiler, makes."""
    return path.endswith(".pyc") and "/__pycache__/" in path


def is_script(path: str) -> bool:
    """Whether a path is one of a script: of these we replace some."""
    return path.startswith("bin/")


def is_uv_flock(path: str) -> bool:
    """Whether a path is that of uv's flock, which all users may write to wherever uv makes a venv."""
    return path == ".lock"
