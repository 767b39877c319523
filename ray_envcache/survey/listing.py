"""The seal of an entry: the list of all files and links that its venv should have, and of what each should be.

The compiler writes it before it compiles. The digest of a file is the one that its package notes in RECORD, so that
damage between installation and seal is found too; what has none there is hashed. Bytecode is not in the list: it brings
its own proof, see `pyc`. Only what a walk through the venv finds is ever read, and no link is followed.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeAlias

from ray_envcache.store.layout import Entry
from ray_envcache.system import disk, files

Tree: TypeAlias = dict[str, os.stat_result]  # by path below the venv

LINK = "link="
_RECORD = re.compile(r"(lib/[^/]+/site-packages)/([^/]+)\.dist-info/RECORD")
_BYTECODE = re.compile(r"(.*/)__pycache__/([^/]+?)\.[^/.]+(?:\.opt-\w+)?\.pyc")
_CHUNK = 1 << 18


class Listed(NamedTuple):
    """What a file or a link should be: its content as `content_of` tells it, size, mode, and the package it is of."""

    content: str
    size: int
    mode: int
    package: str


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
                for path, digest, size in rows_of(entry.venv / record, parts[1]):
                    is_known = digest.startswith("sha256=") and size.isdecimal() and path not in recorded
                    noted = (digest, size) if is_known and not path.startswith("bin/") else ("", "")
                    recorded[path] = (*noted, parts[2].partition("-")[0])
    return {path: noted for path, noted in recorded.items() if not module_of(path)}


def rows_of(record: Path, folder: str) -> Iterator[tuple[str, str, str]]:
    """The files that a RECORD lists, by path below the venv, with digest and size; the RECORD lies below `folder`.

    What is not in the venv is passed over. Raises OSError, ValueError or csv.Error where the RECORD is damaged.
    """
    for name, digest, size in _rows(record):
        path = os.path.normpath(os.path.join(folder, name))
        if not path.startswith((".", "/")):
            yield path, digest.rstrip("="), size


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
