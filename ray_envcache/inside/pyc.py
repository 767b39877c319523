"""Bytecode of one module: its name among what is shared, where it comes from, and how it gets to its place.

Imports the standard library only: the check of a new environment loads this file there, where the package is not.
"""

from __future__ import annotations

import errno
import hashlib
import marshal
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import MAGIC_NUMBER, cache_from_source, source_hash

_UNCHECKED = (1).to_bytes(4, "little")  # flags of PEP 552: hash-based, never checked
# No more links to this file; not this file system; no links there, or not to files like this one.
_NO_LINK = frozenset({errno.EMLINK, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP})


@dataclass(frozen=True)
class Places:
    """Where bytecode comes from and goes to: `shared` by all entries, and `staged` until it is on the disk."""

    shared: str  # strings: joined thousands of times
    staged: str


@cache
def tag() -> str:
    """Tells apart what compiles differently: implementation, version, build, and options of the interpreter."""
    # Optimized or not, with columns for tracebacks or without: a sample shows it.
    sample = compile("assert a.b", "", "exec", dont_inherit=True)
    made = [sample.co_code, sample.co_linetable, sys.flags.optimize]
    identity = [sys.implementation.name, sys.version, MAGIC_NUMBER, *made]
    return f"{sys.implementation.cache_tag}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}"


def name_of(text: bytes) -> str:
    """The file name of the bytecode of a module with this text."""
    return f"{hashlib.sha256(text).hexdigest()}.pyc"


@cache
def _ending() -> str:
    return os.path.basename(cache_from_source("m.py"))[1:]


def place_of(path: str) -> str:
    """Where workers look for the bytecode of the module at `path`, wherever PYTHONPYCACHEPREFIX has us look."""
    directory, _, name = path.rpartition("/")
    return f"{directory}/__pycache__/{name[: -len('.py')]}{_ending()}"


def give(path: str, places: Places) -> None:
    """Give the module at `path` bytecode: linked, where some module with its text has it, else compiled and staged.

    It gets none where it cannot be compiled. Raises OSError.
    """
    os.makedirs(os.path.dirname(place_of(path)), exist_ok=True)
    if not link(path, places):
        _compile(path, places)


def link(path: str, places: Places) -> bool:
    """Link the bytecode that was made of the text of the module at `path`; False where there is none."""
    name, target = name_of(_read(path)), place_of(path)
    for folder in (places.shared, places.staged):
        with suppress(FileNotFoundError):
            _put(f"{folder}/{name}", target)
            return True
    return False


def _compile(path: str, places: Places) -> None:
    text = _read(path)
    try:
        code = marshal.dumps(compile(text, path, "exec", dont_inherit=True))
    except Exception:  # noqa: BLE001  # as py_compile: foreign text can fail in any way
        return
    os.makedirs(places.staged, exist_ok=True)
    staged = f"{places.staged}/{name_of(text)}"
    # The environment never changes, so its bytecode is never checked against the source (PEP 552, unchecked hashes):
    # an import then costs one `stat` less.
    _write_whole(staged, MAGIC_NUMBER + _UNCHECKED + source_hash(text) + code)
    _put(staged, place_of(path))


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def _put(file: str, target: str) -> None:
    """Make `target` the same file as `file`, or a copy where there can be no link, in place of what is there.

    Raises FileNotFoundError where there is no `file`, and OSError.
    """
    try:
        os.link(file, target)
    except FileExistsError:
        if not os.path.samestat(os.lstat(file), os.lstat(target)):
            _replace(file, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        _replace(file, target)


def _write_whole(path: str, data: bytes) -> None:
    unproven = f"{path}.{os.getpid()}"
    try:
        # Read-only: a write in place would change it for all environments.
        descriptor = os.open(unproven, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o444)
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(unproven, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(unproven)
        raise


def _replace(file: str, target: str) -> None:
    unproven = f"{target}.unproven"
    with suppress(FileNotFoundError):
        os.unlink(unproven)
    try:
        os.link(file, unproven)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        _copy(file, unproven)
    os.replace(unproven, target)


def _copy(file: str, target: str) -> None:
    try:
        shutil.copyfile(file, target)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(target)
        raise
