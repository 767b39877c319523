"""File operations that others may see: atomic writes, and removal by way of the trash."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_TEMPORARY = ".tmp-"
FULL_DISK = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Error numbers that mean: no space, or no quota, left."""


def write_json(path: Path, data: dict[str, Any], *, durable: bool = True) -> None:
    """Write `data` as `write_whole` does, in place of what is there."""
    text = f"{json.dumps(data, indent=1, sort_keys=True)}\n"
    write_whole(path, text.encode(), mode=0o644, replace=True, durable=durable)


def write_whole(path: Path, data: bytes, *, mode: int, replace: bool, durable: bool = False) -> None:
    """Write a file that readers see whole or not at all, whichever process dies when.

    Unless it may `replace` one, raises FileExistsError. With `durable` the same holds across a power failure. Raises
    OSError; then no temporary file stays behind. Killed in between, one does; its flock is free, by which the next
    sweep knows it for rubbish.
    """
    temporary = path.with_name(f"{_TEMPORARY}{secrets.token_hex(8)}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            if durable:
                os.fsync(file.fileno())
            # Under the flock, so that no sweep takes it before it has its name.
            if replace:
                temporary.replace(path)
            else:
                os.link(temporary, path)
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise
            # A sweep came between opening and flock.
            write_whole(path, data, mode=mode, replace=replace, durable=durable)
        finally:
            temporary.unlink(missing_ok=True)
    if durable:
        with _opened(path.parent) as folder:
            os.fsync(folder)


def is_temporary(path: Path) -> bool:
    """Whether `path` is a file of `write_whole` that does not have its final name yet."""
    return path.name.startswith(_TEMPORARY)


def read_json(path: str | Path) -> dict[str, Any] | None:
    """The JSON object in `path`, or None where there is none: no file, truncated, or something else."""
    try:
        data = json.loads(Path(path).read_bytes().decode())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    except OSError as error:
        error.filename = os.fspath(path)  # Python does not name it where reading fails after opening
        raise
    return data if isinstance(data, dict) else None


def names_in(directory: str | Path) -> list[str]:
    """The names in a directory, in no order; none where there is no such directory."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def sync_file_system(path: Path) -> None:
    """Make all durable that is on the file system of the directory `path`. Raises OSError where some of it was lost.

    By syncfs(2) where there is one: sync(2) waits for everything that is mounted, also for a server that is gone.
    """
    with _opened(path) as descriptor:
        failed = _syncfs(descriptor)
    if failed == errno.ENOSYS:
        os.sync()
    elif failed:
        raise OSError(failed, os.strerror(failed), os.fspath(path))


@contextmanager
def _opened(directory: str | Path, flags: int = 0, parent: int | None = None) -> Iterator[int]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | flags, dir_fd=parent)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _syncfs(descriptor: int) -> int:
    """The error number of syncfs(2), 0 for none; ENOSYS where Python does not get there."""
    try:
        import ctypes  # some builds of Python have none

        syncfs = ctypes.CDLL(None, use_errno=True).syncfs
    except (ImportError, OSError, AttributeError):
        return errno.ENOSYS
    return ctypes.get_errno() if syncfs(descriptor) else 0


def discard(path: Path, trash: Path) -> None:
    """Remove a tree that is handed out no more: one rename takes it out of sight, then it is deleted.

    Killed in between, the rest lies in `trash`, where the next sweep finds it. No tree at `path` is no error.
    """
    try:
        path = to_trash(path, trash)
    except FileNotFoundError:
        if os.path.lexists(path):
            raise  # it is the trash that is missing
        return
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        # Not even room for a name in the trash. An entry without a ready record is never handed out: delete in place.
    remove_tree(path)


def to_trash(path: Path, trash: Path) -> Path:
    """Rename `path` into `trash` under a new unique name, and return that."""
    moved = trash / f"{path.name}.{secrets.token_hex(4)}"
    path.rename(moved)
    return moved


def remove_tree(top: Path) -> None:
    """Delete a tree of ours, frozen directories included; links are removed, never followed.

    Two processes may delete one tree at the same time: what is gone already is no error, and neither gives up.
    """
    if failure := _remove_item(None, os.fspath(top), is_directory=top.is_dir() and not top.is_symlink()):
        failure.filename = os.fspath(top)  # inside, names are relative
        raise failure


def empty_directory(descriptor: int, *, but: str = "") -> None:
    """Delete all that is in an open directory, where others may write at the same time, except the name `but`.

    It works by descriptors alone, so that a link put in meanwhile leads nowhere else. It goes on after an error, and
    raises the first one at the end. That a name is gone already is no error.
    """
    with suppress(PermissionError):
        os.fchmod(descriptor, stat.S_IRWXU)  # frozen directories too
    with os.scandir(descriptor) as found:
        items = {item.name: item.is_dir(follow_symlinks=False) for item in found if item.name != but}
    failures = [_remove_item(descriptor, name, is_directory=each) for name, each in items.items()]
    if failure := next(filter(None, failures), None):
        raise failure


def _remove_item(parent: int | None, name: str, *, is_directory: bool) -> OSError | None:
    try:
        if is_directory:
            _remove_directory(parent, name)
        else:
            os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        return error
    return None


def _remove_directory(parent: int | None, name: str) -> None:
    with _opened(name, os.O_NOFOLLOW, parent) as descriptor:
        empty_directory(descriptor)
    os.rmdir(name, dir_fd=parent)


def freeze(top: Path) -> None:
    """Take the right to write from every directory of a tree.

    Only directories: the files may be hard links into the cache of uv, and a file's mode belongs to all its links.
    A frozen directory stops programs that install, upgrade or remove: all of them create or unlink names.
    """
    for directory, _, _ in os.walk(top):
        with suppress(FileNotFoundError):
            mode = stat.S_IMODE(os.lstat(directory).st_mode)
            os.chmod(directory, mode & ~0o222)


def file_identity(path: str | Path) -> tuple[int, int] | None:
    """Size and mtime (ns) of the file that `path` leads to, or None where it leads nowhere."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def is_unchanged(path: str | Path, was: Sequence[int]) -> bool:
    """Whether the file that `path` leads to has this `file_identity`, give or take what images do to times.

    The layers of an image keep whole seconds only, once it was pushed and pulled.
    """
    now = file_identity(path)
    return now is not None and now[0] == was[0] and now[1] in {was[1], was[1] // 10**9 * 10**9}
