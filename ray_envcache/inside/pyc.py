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
_HEADER = 16  # bytes before the code, also PEP 552
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


def read(path: str) -> bytes:
    """The content of a file."""
    with open(path, "rb", buffering=0) as file:
        return file.readall()


@cache
def _ending() -> str:
    return os.path.basename(cache_from_source("m.py"))[1:]


def place_of(path: str) -> str:
    """Where workers look for the bytecode of the module at `path`, wherever PYTHONPYCACHEPREFIX has us look."""
    directory, _, name = path.rpartition("/")
    return f"{directory}/__pycache__/{name[: -len('.py')]}{_ending()}"


def link(path: str, text: bytes, places: Places) -> bool:
    """Give the module at `path` what somebody made of its text; False where nobody did."""
    target = place_of(path)
    return any(put_if_there(file, target) for file in _files(text, places))


def known(text: bytes, places: Places) -> bytes:
    """What somebody made of this text, b"" where nobody did."""
    for file in _files(text, places):
        with suppress(FileNotFoundError):
            return read(file)
    return b""


def _files(text: bytes, places: Places) -> tuple[str, str]:
    name = name_of(text)
    return f"{places.shared}/{name}", f"{places.staged}/{name}"


def made(path: str, text: bytes, twin: str = "") -> bytes:
    """The bytecode of the module at `path`, b"" where it cannot be compiled: a template, a test of broken syntax.

    What Python made of its `twin`, a module with the same text elsewhere, is taken instead. The environment never
    changes, so its bytecode is never checked against the source (PEP 552, unchecked hashes): an import then costs one
    `stat` less.
    """
    of_twin = twin and unproven(twin, text)
    if of_twin and _is_whole(of_twin):
        return of_twin
    code = _compiled(path, text)
    return _header(text) + code if code else b""


def unproven(twin: str, text: bytes) -> bytes:
    """What Python made of `twin`, b"" where there is none, or it is not of this text and valid. May be cut off."""
    try:
        found, bytecode, stat = read(twin), read(cache_from_source(twin)), os.stat(twin)
    except OSError:
        return b""
    # As Python itself decides whether it is valid: its version, time and size of the source.
    times = (int(stat.st_mtime) & 0xFFFF_FFFF, stat.st_size & 0xFFFF_FFFF)
    valid = MAGIC_NUMBER + b"\0\0\0\0" + b"".join(number.to_bytes(4, "little") for number in times)
    return _header(text) + bytecode[_HEADER:] if found == text and bytecode[:_HEADER] == valid else b""


def twin_of(path: str, packages: str, own: str) -> str:
    """Where below `own` the module would be that is at `path` below `packages`; "" where there is no `own`."""
    return own and own + path[len(packages) :]


def give(path: str, text: bytes, places: Places, twin: str = "", compiled: bytes = b"") -> None:
    """Give the module at `path` bytecode: what somebody made of its text, else `compiled`, else what is `made` here.

    It gets none where it cannot be compiled. Raises OSError.
    """
    # Another process may have been faster, or another module have the same text.
    if not link(path, text, places) and (bytecode := compiled or made(path, text, twin)):
        keep(path, text, bytecode, places)


def keep(path: str, text: bytes, bytecode: bytes, places: Places) -> None:
    """Give the module at `path` this bytecode, and others with its text too. Each file appears when it is whole."""
    _, staged = _files(text, places)
    _write_whole(staged, bytecode)
    put(staged, place_of(path))


def put(file: str, target: str) -> None:
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


def put_if_there(file: str, target: str) -> bool:
    """The same; False where there is no `file`."""
    with suppress(FileNotFoundError):
        put(file, target)
        return True
    return False


def _compiled(path: str, text: bytes) -> bytes:
    try:
        return marshal.dumps(compile(text, path, "exec", dont_inherit=True))
    except Exception:  # noqa: BLE001  # as py_compile: foreign text can fail in any way
        return b""


def _header(text: bytes) -> bytes:
    return MAGIC_NUMBER + _UNCHECKED + source_hash(text)


def _is_whole(bytecode: bytes) -> bool:
    try:
        marshal.loads(bytecode[_HEADER:])  # noqa: S302  # what Python would load, and run
    except (EOFError, ValueError, TypeError):
        return False
    return True


def _write_whole(path: str, data: bytes) -> None:
    unproven = f"{path}.{os.getpid()}"
    try:
        # Read-only: whoever overwrote it in place would change it for all environments.
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
