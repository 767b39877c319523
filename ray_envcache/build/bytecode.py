"""Finishing an entry in the background: bytecode, true sizes, and everything on the disk for good.

An environment is handed out as soon as it is linked and checked, because compiling takes thirty times longer than
linking. This process, the compiler, follows: `python -m ray_envcache.build.bytecode ROOT ENTRY`. It holds the entry
with a lease like every other user, runs at the lowest priority, and may be killed at any moment: the next user of the
entry starts it again, and it goes on where it was. Bytecode of earlier environments is linked, see `shared_bytecode`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ray_envcache.inside import pyc
from ray_envcache.inside.pyc import Places
from ray_envcache.store import shared_bytecode
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder, claim_ready
from ray_envcache.store.sizes import record_sizes
from ray_envcache.system import files, flock, testpoints
from ray_envcache.system.units import utc_now

_PROCESSORS = os.cpu_count() or 1
_UNKNOWN = 255  # the exit code of a helper that stopped for another reason than an OSError


def finish(layout: Layout, entry: Entry) -> bool:
    """Compile, sync and measure `entry`; False where it is gone, done, or another compiler is at it. Raises OSError."""
    try:
        descriptor = flock.try_flock(layout.finishing_flock(entry), exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if descriptor is None:
        return False
    try:
        return _finish_claimed(layout, entry, workers=max(1, _PROCESSORS - 1))
    finally:
        os.close(descriptor)


def finish_now(layout: Layout, entry: Entry) -> None:
    """Finish `entry` for a user who waits: on all processors, and after a compiler that is at it. Raises OSError."""
    with flock.exclusive_flock(layout.finishing_flock(entry), lambda: None):
        _finish_claimed(layout, entry, workers=_PROCESSORS)


def _finish_claimed(layout: Layout, entry: Entry, workers: int) -> bool:
    testpoints.reach("finishing-claimed")
    lease = claim_ready(entry, layout, Holder("bytecode", command="compiles bytecode"))
    if lease is None:
        return False
    with lease:
        testpoints.reach("finishing-leased")
        if entry.compiled.exists():
            return False
        _finish(layout, entry, workers)
        return True


def compile_tree(top: Path, places: Places, workers: int) -> None:
    """Give all modules below `top` bytecode of this Python, with so many processes.

    More than one are forks: they share our flocks, so that the entry stays held until the last of them is done. Raises
    OSError where not all could be written.
    """
    directories = list(_with_modules(top))
    if workers == 1:
        _do_share(directories, places)
        return
    helpers = [_fork(directories[number::workers], places) for number in range(workers)]
    try:
        while helpers:
            _, status = os.waitpid(helpers[0], 0)
            helpers.pop(0)
            _require_done(status, top)
    except BaseException:
        # One of them found no room, or we were interrupted.
        for helper in helpers:
            os.kill(helper, signal.SIGKILL)  # not waited for yet, so the number is its own
            os.waitpid(helper, 0)
        raise


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


def _require_done(status: int, top: Path) -> None:
    code = os.waitstatus_to_exitcode(status)
    if 0 < code < _UNKNOWN:
        raise OSError(code, os.strerror(code), os.fspath(top))
    if code:
        raise ChildProcessError(f"a process that compiles `{top}` ended with {code}")


def _do_share(directories: list[str], places: Places) -> None:
    """Link everywhere first what the store has: that takes a thirtieth of the time of compiling."""
    missing = {directory: _link_directory(directory, places) for directory in directories}
    for directory, modules in missing.items():
        if modules:
            with _thawed(directory):
                for path in modules:
                    pyc.give(path, places)


def _link_directory(directory: str, places: Places) -> list[str]:
    """Link the bytecode of a directory's modules; returns those for which the store has none."""
    with _thawed(directory), os.scandir(directory) as found:
        modules = [item.path for item in found if item.name.endswith(".py") and item.is_file()]
        return [path for path in modules if not pyc.link(path, places)]


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


def _finish(layout: Layout, entry: Entry, workers: int) -> None:
    began = time.monotonic()
    shared = shared_bytecode.folder_of_this_python(layout)
    places = Places(os.fspath(shared), os.fspath(entry.staged_bytecode / shared.name))
    os.makedirs(places.staged, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages are not ours to mend
        compile_tree(entry.site_packages, places, workers)
    # From here on the entry survives a crash of the machine, not only of processes; and what it shares.
    files.sync_file_system(entry.path)
    shared_bytecode.publish(places.staged, shared)
    files.remove_tree(entry.staged_bytecode)
    files.write_json(entry.compiled, {"compiled_at": utc_now(), "seconds": round(time.monotonic() - began, 3)})
    record_sizes(layout, entry)


def _with_modules(top: Path) -> Iterator[str]:
    for directory, subdirectories, names in os.walk(top):
        if "__pycache__" in subdirectories:
            subdirectories.remove("__pycache__")
        if any(name.endswith(".py") for name in names):
            yield directory


def _lower_priority() -> None:
    """Run only when the processor has nothing else to do."""
    os.nice(19)
    with suppress(OSError):
        # Linux shares the processor between sessions first, and we lead one: our niceness counts only within it.
        Path("/proc/self/autogroup").write_text("19", encoding="ascii")
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def main(arguments: list[str]) -> int:
    root, name = arguments
    layout = Layout(Path(root))
    entry = layout.entry(name)
    if entry is None:
        return 2
    _lower_priority()
    finish(layout, entry)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
