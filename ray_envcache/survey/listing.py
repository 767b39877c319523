"""What should be in the venv of an entry: the RECORDs of its packages say it of their files, its seal of all else.

uv notes the hash of each file of a package in the package's RECORD. Without a hash are the RECORDs themselves, what
`uv venv` writes, our own files, and what a wheel forgot to list; of scripts some are replaced. The compiler notes all
these, and the links, in the seal, a list of the same form, before it compiles. Only files that a walk through the venv
finds are ever read, and no link is followed: it does not matter what a RECORD names.
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
LINK = "link="
_RECORD = re.compile(r"(lib/[^/]+/site-packages)/([^/]+)\.dist-info/RECORD")
_CHUNK = 1 << 20


class Listed(NamedTuple):
    """What a file should be: its digest as a RECORD has it ("sha256=..."), its size (-1: any), and its package.

    Of a link, of which only the seal speaks, the digest is LINK and where it leads.
    """

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


def tree_of(entry: Entry) -> Tree:
    """All that is in the venv. Links are not followed. Raises OSError where a folder cannot be read."""

    def fail(error: OSError) -> None:
        raise error

    start = len(os.fspath(entry.venv)) + 1
    return {path[start:]: found for path, found in disk.walk(entry.venv, fail) if path[start:]}


def expected_in(entry: Entry, tree: Tree) -> tuple[dict[str, list[Listed]], list[Difference]]:
    """What RECORDs and seal say, and which of them are damaged. Of what several packages bring each may be right."""
    listed: dict[str, list[Listed]] = {}
    damaged: list[Difference] = []
    lists = [(path, parts[1], parts[2].partition("-")[0]) for path in tree if (parts := _RECORD.fullmatch(path))]
    for path, folder, package in lists:
        if stat.S_ISREG(tree[path].st_mode):
            own: dict[str, Listed] = {}
            try:
                for name, one in _rows(entry.venv / path, folder, package):
                    if own.setdefault(name, one) != one:
                        raise ValueError(f"has two different lines for {name}")  # noqa: TRY301
            except (ValueError, OSError, csv.Error) as error:
                damaged.append(Difference("record", path, f"the package's list of files is damaged: {error}", package))
            for name, one in own.items():
                listed.setdefault(name, []).append(one)
    try:
        listed |= {path: [one] for path, one in _rows(entry.sealed, "", "")}
    except FileNotFoundError:
        pass  # not compiled yet
    except (ValueError, OSError, csv.Error) as error:
        damaged.append(Difference("record", f"../{entry.sealed.name}", f"the entry's own list is damaged: {error}"))
    return listed, damaged


def _rows(record: Path, folder: str, package: str) -> Iterator[tuple[str, Listed]]:
    """The lines that have a hash, by path below the venv. Raises ValueError, OSError and csv.Error."""
    if (length := os.lstat(record).st_size) > RECORD_BYTES:
        raise ValueError(f"has {length} bytes")
    text = b"".join(chunks_of(record)).decode(errors="strict" if package else "surrogateescape")
    for row in csv.reader(io.StringIO(text, newline="")):
        name, digest, size = row if len(row) == 3 else ("", "", "")
        path = os.path.normpath(os.path.join(folder, name))
        if not name or path in {".", ".."} or path.startswith(("/", "../")):
            raise ValueError(f"names no file of the environment: {','.join(row)[:100]!r}")
        if digest:
            yield path, Listed(digest if digest.startswith(LINK) else digest.rstrip("="), int(size or -1), package)


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
    tree, text = tree_of(entry), io.StringIO()
    listed, _ = expected_in(entry, tree)
    lines = csv.writer(text)
    for path, found in tree.items():
        if stat.S_ISLNK(found.st_mode):
            lines.writerow((path, LINK + os.readlink(entry.venv / path), ""))
        elif stat.S_ISREG(found.st_mode) and not is_bytecode(path) and (is_script(path) or path not in listed):
            lines.writerow((path, digest_of(entry.venv / path), found.st_size))
    files.write_whole(entry.sealed, text.getvalue().encode(errors="surrogateescape"), mode=0o600, replace=True)


def is_bytecode(path: str) -> bool:
    """Whether a path is one of bytecode that Python, or our compiler, makes."""
    return path.endswith(".pyc") and "/__pycache__/" in path


def is_script(path: str) -> bool:
    """Whether a path is one of a script: of these we replace some."""
    return path.startswith("bin/")
