"""requirements.txt as text: its logical lines, and the files it includes.

The agent reads it for the digest of each field value, so nothing here imports `packaging` (37 ms on a busy host).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ray_envcache.errors import LockfileError
from ray_envcache.system.texts import without_credentials

_COMMENT = re.compile(r"(^|\s+)#.*$")
_INCLUDE = re.compile(r"(-r|--requirement|-c|--constraint)(?:\s*=\s*|\s+|(?<=-[rc]))(\S.*)")
_INCLUDES = re.compile(r"^\s*(-r|--requirement|-c|--constraint)", re.MULTILINE)
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
_SHOWN = 120


@dataclass(frozen=True)
class Line:
    """A logical line: continuations joined, the comment removed. `number` is that of its first line in the file."""

    file: Path
    number: int
    text: str
    is_constraint: bool

    def __str__(self) -> str:
        return f"`{_shown(self.text)}` in line {self.number} of `{self.file}`"


def files(path: Path) -> list[Path]:
    """The file and all files that it includes, each once. Raises LockfileError."""
    # Most files include none, and finding the logical lines of 2,000 takes 7 ms.
    return [*_by_file(path)] if _INCLUDES.search(_read(path)) else [path]


def lines(path: Path) -> list[Line]:
    """All logical lines of a file and of those it includes, but for the includes themselves. Raises LockfileError."""
    return [line for found in _by_file(path).values() for line in found]


def expanded(text: str) -> str:
    """The text with `${NAME}` replaced by that variable, where it is set."""
    return _VARIABLE.sub(lambda found: os.environ.get(found[1], found[0]), text)


def _by_file(
    path: Path, found: dict[Path, list[Line]] | None = None, *, is_constraint: bool = False
) -> dict[Path, list[Line]]:
    found = {} if found is None else found
    own = found[path] = []
    for number, text in _logical(_read(path)):
        include = _INCLUDE.fullmatch(text)
        if include is None:
            own.append(Line(path, number, text, is_constraint))
            continue
        other = _included(path, number, include[2])
        if other not in found:
            _by_file(other, found, is_constraint=is_constraint or "c" in include[1][:3])
    return found


def _included(path: Path, number: int, name: str) -> Path:
    included = expanded(name.strip("\"' "))
    if "://" in included:
        raise LockfileError(
            f"`{path}` includes `{_shown(name)}` in line {number}, which may change at any time",
            "put that file beside it",
        )
    return Path(os.path.normpath(path.parent / included))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LockfileError(
            f"Cannot read `{path}`: {error}", "see that all files it includes are there, inside the working_dir"
        ) from error


def _logical(text: str) -> Iterator[tuple[int, str]]:
    first, parts = 1, list[str]()
    # The empty line at the end completes a continuation there.
    for number, line in enumerate([*text.splitlines(), ""], 1):
        first = first if parts else number
        continues = line.endswith("\\") and not line.lstrip().startswith("#")
        parts.append(_COMMENT.sub("", line[:-1] if continues else line).strip())
        if not continues:
            if joined := " ".join(filter(None, parts)):
                yield first, joined
            parts = []


def _shown(text: str) -> str:
    # Before it is cut: half a password is not recognized as one.
    return without_credentials(text)[:_SHOWN]
