"""The errors of ray-envcache: few, typed, picklable, each with a cause and a next step.

Ray ships exceptions between processes and the runtime env agent receives ours from a child process as JSON, so
every error is rebuilt from its message and its hint alone.
"""

from __future__ import annotations

from typing import Any, ClassVar


class EnvCacheError(Exception):
    """Base of all errors of this package.

    `message` is one sentence, plus the last lines of a tool that failed; `hint` says what to do next.
    The command line exits with `exit_code`. The cause of a `passing` error may be gone a second later: the plugin
    tries again when Ray does, and repeats any other error for a while instead.
    """

    exit_code: ClassVar[int] = 1
    passing: ClassVar[bool] = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}" if self.hint else self.message

    def to_json(self) -> dict[str, str]:
        """The error as plain data, for another process."""
        return {"type": type(self).__name__, "message": self.message, "hint": self.hint}

    @staticmethod
    def from_json(data: dict[str, Any]) -> EnvCacheError:
        """Rebuild what `to_json` made; an unknown type becomes a plain `EnvCacheError`."""
        kinds = {kind.__name__: kind for kind in _subclasses(EnvCacheError)}
        return kinds.get(str(data.get("type")), EnvCacheError)(str(data.get("message")), str(data.get("hint", "")))


class FieldValueError(EnvCacheError, ValueError):
    """A value in `runtime_env` or on the command line is not valid."""

    exit_code = 2


class LockfileError(EnvCacheError):
    """The lockfile is missing, broken, outdated, unreadable for this uv, or lacks a requested group or extra."""


class ChangedError(LockfileError):
    """The files changed while they were read."""

    passing = True


class DigestError(LockfileError):
    """The files on this node are not the ones whose digest the field value pins."""


class InterpreterError(EnvCacheError):
    """No Python on this host fits the project or the cluster."""


class RayVersionError(EnvCacheError):
    """The ray of the lockfile, or what ray needs, does not fit the ray of the cluster."""


class InheritError(EnvCacheError):
    """A package to be used from the cluster's own Python is not there, or has another version."""


class BuildError(EnvCacheError):
    """uv failed to build the environment; the message ends with its last lines."""


class PassingError(BuildError):
    """The build failed for a reason that may be gone by now: an index did not answer, or the entry was removed."""

    passing = True


class DiskFullError(BuildError):
    """Not enough space for the environment; the message has the figures."""

    passing = True


class StoreError(EnvCacheError):
    """The store cannot be used: not writable, not ours, not private, or on a file system without flock."""

    exit_code = 3


class TempDirError(EnvCacheError):
    """A temp directory cannot be used for Ray: missing, not writable, full, remote, or out of short reach."""

    exit_code = 2


class CommandError(EnvCacheError):
    """There is no such command to run."""

    exit_code = 127


class ClusterError(EnvCacheError):
    """A cluster cannot be asked: it is not there, does not answer, or runs another Ray or Python."""


class BusyError(EnvCacheError):
    """An entry is kept by one process for so long that it must be stopped or hang; asking again may succeed."""

    passing = True


class ReadOnlyError(EnvCacheError):
    """The command would change a read-only store."""


class InUseError(EnvCacheError):
    """An entry cannot be removed because processes use it; `why` names them."""


class RemoteError(EnvCacheError):
    """The remote tier does not answer, refuses, or holds something that cannot be used."""


class UnknownKeyError(EnvCacheError, LookupError):
    """No entry of the store, or more than one, has this key."""


def _subclasses(kind: type[EnvCacheError]) -> list[type[EnvCacheError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _subclasses(child))]
