"""The errors of ray-envcache: few, typed, picklable, each with a cause and a next step.

Ray ships exceptions between processes and the runtime env agent receives ours from a child process as JSON, so
every error is rebuilt from its message and its hint alone.
"""

from __future__ import annotations

from typing import Any, ClassVar


class EnvCacheError(Exception):
    """Base of all errors of this package.

    `message` is one sentence (plus quoted output, if a tool said something); `hint` says what to do next.
    `exit_code` is what the command line exits with.
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
    """What the user wrote in `runtime_env` (or on the command line) is not a valid field value."""

    exit_code = 2


class LockfileError(EnvCacheError):
    """The lockfile is missing, broken, outdated, unreadable for this uv, or does not have what was asked for."""


class ChangedError(LockfileError):
    """Somebody wrote the files while they were looked at."""


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


class ReadOnlyError(EnvCacheError):
    """What was asked for would change a lower store, where nothing is ever changed."""


class InUseError(EnvCacheError):
    """An entry cannot be removed because somebody uses it; the message names who."""


class UnknownKeyError(EnvCacheError, LookupError):
    """No entry of the store, or more than one, has this key."""


def _subclasses(kind: type[EnvCacheError]) -> list[type[EnvCacheError]]:
    return [kind, *(deeper for child in kind.__subclasses__() for deeper in _subclasses(child))]
