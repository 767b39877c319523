"""What a check of a host or a node found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ray_envcache.errors import EnvCacheError

OK, WARN, ERROR = "ok", "warn", "error"


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is (OK, WARN, ERROR), in words, and what to do where it is not well."""

    name: str
    state: str
    text: str
    hint: str = ""


def look(name: str, check: Callable[[], Finding]) -> Finding:
    """What a check found; what it raised is an error that was found."""
    try:
        return check()
    except EnvCacheError as error:
        return Finding(name, ERROR, error.message, error.hint)
    except (OSError, NotImplementedError) as error:
        return Finding(name, ERROR, str(error) or type(error).__name__, "see what the system says of that path")
