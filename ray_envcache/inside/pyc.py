"""Bytecode for the modules of an environment: linked where the store has it, else compiled and kept for others.

Run by the environment's own Python, whose bytecode it has to be: as the compiler, `-I -S pyc.py REQUEST`, and as a part
of the check. The package is not there, so this imports the standard library only.
"""

from __future__ import annotations

import errno
import hashlib
import json
import marshal
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import MAGIC_NUMBER, cache_from_source, source_hash

_UNKNOWN = 255  # the exit code of a helper that stopped for another reason than an OSError
_UNCHECKED = (1).to_bytes(4, "little")  # flags of PEP 552: hash-based, never checked
_DIGEST = hashlib.sha256().digest_size
# No more links to this file; not this file system; no links there, or not to files like this one.
_NO_LINK = frozenset({errno.EMLINK, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP})


@dataclass(frozen=True)
class Places:
    """Where bytecode comes from and goes to: `shared` by all entries, and `staged` until it is on the disk."""

    shared: str  # strings: joined thousands of times
    staged: str

    @classmethod
    def of_this_python(cls, shared: str, staged: str) -> Places:
        """The folders of the running Python in both."""
        return cls(f"{shared}/{tag()}", f"{staged}/{tag()}")


@cache
def tag() -> str:
    """Tells apart what compiles differently: implementation, version, build, and options of the interpreter."""
    # Optimized or not, with columns for tracebacks or without: a sample shows it.
    sample = compile("assert a.b", "", "exec", dont_inherit=True)
    made = [sample.co_code, sample.co_linetable, sys.flags.optimize]
    identity = [sys.implementation.name, sys.version, MAGIC_NUMBER, *made, "with proof"]
    return f"{sys.implementation.cache_tag}-{hashlib.sha256(repr(identity).encode()).hexdigest()[:16]}"


def name_of(text: bytes) -> str:
    """The file name of the bytecode of a module with this text."""
    return f"{hashlib.sha256(text).hexdigest()}.pyc"


def with_proof(bytecode: bytes, text: bytes) -> bytes:
    """The bytecode of a module with this text, and what proves it: the digests of the text, and of all before.

    An import reads the code to its end and no further.
    """
    noted = bytecode + hashlib.sha256(text).digest()
    return noted + hashlib.sha256(noted).digest()


def proven_source(bytecode: bytes) -> str:
    """The hexadecimal digest of the text that this bytecode was made of; "" where it is damaged, or has no proof."""
    noted, digest = bytecode[:-_DIGEST], bytecode[-_DIGEST:]
    return noted[-_DIGEST:].hex() if hashlib.sha256(noted).digest() == digest else ""


def give(path: str, places: Places, twin: str = "") -> None:
    """Give the module at `path` bytecode: linked, where some module with its text has it, else made and staged.

    What this Python has compiled of a `twin`, a module with the same text elsewhere, is not compiled again. The module
    gets none where it cannot be compiled. Raises OSError.
    """
    os.makedirs(os.path.dirname(cache_from_source(path)), exist_ok=True)
    if not _link(path, places):
        text = _read(path)
        if code := (twin and _code_of(twin, text)) or _compiled(path, text):
            _keep(path, text, code, places)


def _link(path: str, places: Places) -> bool:
    """Link the bytecode that was made of the text of the module at `path`; False where there is none."""
    name, target = name_of(_read(path)), cache_from_source(path)
    for folder in (places.shared, places.staged):
        with suppress(FileNotFoundError):
            _put(f"{folder}/{name}", target)
            return True
    return False


def _code_of(twin: str, text: bytes) -> bytes:
    """The code that Python keeps of `twin`, b"" where it has none, or not of this text and valid (PEP 3147, 552)."""
    try:
        found, bytecode, valid = _read(twin), _read(cache_from_source(twin)), MAGIC_NUMBER + stamp_of(twin)
        code = bytecode[len(valid) :] if found == text and bytecode.startswith(valid) else b""
        if code:
            marshal.loads(code)  # noqa: S302  # ours; a full disk may have cut it off (gh-126606 of CPython)
    except (OSError, EOFError, ValueError, TypeError):
        return b""
    return code


def stamp_of(module: str) -> bytes:
    """What Python itself notes behind the magic number of a module's bytecode: no flags, its time and size (PEP 552).

    Raises OSError.
    """
    found = os.stat(module)
    numbers = (0, int(found.st_mtime) & 0xFFFF_FFFF, found.st_size & 0xFFFF_FFFF)
    return b"".join(number.to_bytes(4, "little") for number in numbers)


def _compiled(path: str, text: bytes) -> bytes:
    try:
        return marshal.dumps(compile(text, path, "exec", dont_inherit=True))
    except Exception:  # noqa: BLE001  # as py_compile: foreign text can fail in any way
        return b""


def _keep(path: str, text: bytes, code: bytes, places: Places) -> None:
    os.makedirs(places.staged, exist_ok=True)
    staged = f"{places.staged}/{name_of(text)}"
    # The environment never changes, so its bytecode is never checked against the source (PEP 552, unchecked hashes):
    # an import then costs one `stat` less.
    _write_whole(staged, with_proof(MAGIC_NUMBER + _UNCHECKED + source_hash(text) + code, text))
    _put(staged, cache_from_source(path))


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
            os.unlink(target)  # an import that comes in between compiles for itself
            _put(file, target)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        _write_whole(target, _read(file))


def _write_whole(path: str, data: bytes) -> None:
    # A name that no killed process can have left behind: in containers the same pid comes again.
    unproven = f"{path}.{os.urandom(8).hex()}"
    try:
        # Read-only: a write in place would change it for all environments.
        descriptor = os.open(unproven, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        with open(descriptor, "wb") as file:
            file.write(data)
        os.replace(unproven, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(unproven)
        raise


def compile_tree(top: str, places: Places, workers: int) -> None:
    """Give all modules below `top` bytecode of this Python, with so many processes.

    More than one are forks: they share our flocks, so that the entry stays held until the last of them is done. Our
    caller ends them, as our process group. Raises OSError where not all could be written.
    """
    directories = [*_with_modules(top)]
    if workers == 1:
        _do_share(directories, places)
        return
    helpers = [_fork(directories[number::workers], places) for number in range(workers)]
    for _, status in [os.waitpid(helper, 0) for helper in helpers]:
        _require_done(status, top)


def _fork(directories: list[str], places: Places) -> int:
    """Start a process that does its share; its exit code is the number of the error that stopped it."""
    child = os.fork()
    if child == 0:
        code = _UNKNOWN
        try:
            _do_share(directories, places)
            code = 0
        except OSError as error:
            code = error.errno or _UNKNOWN
        except Exception:  # noqa: BLE001  # a defect of ours: only its text on stderr tells
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(code)
    return child


def _require_done(status: int, top: str) -> None:
    code = os.waitstatus_to_exitcode(status)
    if 0 < code < _UNKNOWN:
        raise OSError(code, os.strerror(code), top)
    if code:
        raise ChildProcessError(f"a process that compiles `{top}` ended with {code}")


def _do_share(directories: list[str], places: Places) -> None:
    """Link everywhere first what the store has: that takes a thirtieth of the time of compiling."""
    missing = {directory: _link_directory(directory, places) for directory in directories}
    for directory, modules in missing.items():
        if modules:
            with _thawed(directory):
                for path in modules:
                    give(path, places)


def _link_directory(directory: str, places: Places) -> list[str]:
    """Link the bytecode of a directory's modules; returns those for which the store has none."""
    with _thawed(directory), os.scandir(directory) as found:
        modules = [item.path for item in found if item.name.endswith(".py") and item.is_file()]
        return [path for path in modules if not _link(path, places)]


@contextmanager
def _thawed(directory: str) -> Iterator[None]:
    """Open a frozen directory and its `__pycache__` for writing, no longer than that takes."""
    cache = os.path.join(directory, "__pycache__")
    mode = os.stat(directory).st_mode
    os.chmod(directory, mode | 0o200)
    try:
        os.makedirs(cache, exist_ok=True)
        os.chmod(cache, mode | 0o200)
        yield
    finally:
        with suppress(FileNotFoundError):
            os.chmod(cache, mode & ~0o222)
        os.chmod(directory, mode & ~0o222)


def _with_modules(top: str) -> Iterator[str]:
    for directory, subdirectories, names in os.walk(top):
        if "__pycache__" in subdirectories:
            subdirectories.remove("__pycache__")
        if any(name.endswith(".py") for name in names):
            yield directory


def lower_priority() -> None:
    """Run only when the processor has nothing else to do."""
    os.nice(19)
    with suppress(OSError), open("/proc/self/autogroup", "w", encoding="ascii") as group:
        # Linux shares the processor between sessions first, and we lead one: our niceness counts only within it.
        group.write("19")
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main(request: str) -> int:
    """Compile as the request says, and print the tag. A failure is told by its number on stdout, and 1 is returned."""
    asked = json.loads(request)
    if asked["background"]:
        lower_priority()
    warnings.simplefilter("ignore")  # the packages are not ours to mend
    try:
        compile_tree(asked["top"], Places.of_this_python(asked["shared"], asked["staged"]), asked["workers"])
    except OSError as error:
        sys.stdout.write(str(error.errno or ""))
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(tag())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
