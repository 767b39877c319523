"""Findings: what a check of a host or a node found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ray_envcache.errors import EnvCacheError

OK, WARN, ERROR = "ok", "warn", "error"


@dataclass(frozen=True)
class Finding:
    """One result: the `name` of the check, OK, WARN or ERROR, the result in words, and what to do if it is not OK."""

    name: str
    state: str
    text: str
    hint: str = ""


def finding_of(name: str, check: Callable[[], Finding]) -> Finding:
    """Run a check and return its finding; an error that it raises becomes a finding too."""
    try:
        return check()
    except EnvCacheError as error:
        return Finding(name, ERROR, error.message, error.hint)
    except (OSError, NotImplementedError) as error:
        return Finding(
            name,
            ERROR,
            str(error) or type(error).__name__,
            "the operating system refused; mend the permissions or the path",
        )
