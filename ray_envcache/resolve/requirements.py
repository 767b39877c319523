"""requirements.txt as a lockfile: what its lines say, and whether they leave anything to choose.

uv reads the file and honours all of it; this module only looks at it, to know which files it is made of, and that
every entry means one version or one file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from ray_envcache.errors import LockfileError
from ray_envcache.system.secrets import without_credentials

if TYPE_CHECKING:
    from packaging.requirements import Requirement

_COMMENT = re.compile(r"(^|\s+)#.*$")
_INCLUDE = re.compile(r"(-r|--requirement|-c|--constraint)(?:\s*=\s*|\s+|(?<=-[rc]))(\S.*)")
_INCLUDES = re.compile(r"^\s*(-r|--requirement|-c|--constraint)", re.MULTILINE)
_HASH = re.compile(r"\s--hash(?:=|\s+)([a-z0-9]+:[0-9a-f]+)")
_FRAGMENT = re.compile(r"[#&](sha256|sha384|sha512|sha1|md5)=([0-9a-f]+)")
_VARIABLE = re.compile(r"\$\{([A-Z0-9_]+)\}")
_OPTIONS = re.compile(r"\s+--?[a-z].*$")
_ARCHIVE = re.compile(r"\.(whl|zip|gz|tgz|bz2|xz)$")  # what would pass for a name too
_COMMIT = re.compile(r"@[0-9a-f]{40}(#|$)")
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


@dataclass(frozen=True)
class Entry:
    """A line that names a package, by version or by URL, and the hashes it allows ("sha256:...")."""

    line: Line
    name: str
    requirement: Requirement
    hashes: frozenset[str]

    @property
    def is_exact(self) -> bool:
        """Whether the line means one version, one file, or one commit."""
        url = self.requirement.url
        if url is None:
            return any(one.operator in {"==", "==="} and "*" not in one.version for one in self.requirement.specifier)
        return bool(_COMMIT.search(url)) if url.startswith("git+") else bool(self.hashes) or url.startswith("file:")

    def means(self, version: str, markers: dict[str, str]) -> bool:
        """Whether the line asks for this version of its package on a machine with these markers."""
        marker = self.requirement.marker
        fits = self.requirement.url is not None or self.requirement.specifier.contains(version, prereleases=True)
        return fits and (marker is None or marker.evaluate(dict(markers)))


def files(path: Path) -> list[Path]:
    """The file and all that it includes, each once. Reads them, and nothing else. Raises LockfileError."""
    # The warm path: thousands of lines with hashes take their time.
    if not _INCLUDES.search(_read(path)):
        return [path]
    found: dict[Path, None] = {}
    for line in lines(path):
        found[line.file] = None
    return [path, *(file for file in found if file != path)]


def lines(path: Path) -> Iterator[Line]:
    """All logical lines of a file and of what it includes, but not the includes themselves. Raises LockfileError."""
    yield from _lines(path, {path}, is_constraint=False)


def entries(path: Path) -> list[Entry]:
    """The entries of a file and of what it includes; folders of local packages are not among them.

    Raises LockfileError where a line leaves something to choose, and no constraint makes up for it.
    """
    found = [entry for line in lines(path) if (entry := _entry(line))]
    exact = {entry.name for entry in found if entry.line.is_constraint and entry.is_exact}
    for entry in found:
        if not (entry.is_exact or entry.line.is_constraint or entry.name in exact):
            raise _unpinned(entry, path)
    return found


def _lines(path: Path, seen: set[Path], *, is_constraint: bool) -> Iterator[Line]:
    # A file without any entry counts too: it may get one.
    yield Line(path, 0, "", is_constraint)
    for number, text in _logical(_read(path)):
        include = _INCLUDE.fullmatch(text)
        if include is None:
            yield Line(path, number, text, is_constraint)
            continue
        included = _expanded(include[2].strip("\"' "))
        if "://" in included:
            raise LockfileError(
                f"`{path}` includes `{_shown(include[2])}` in line {number}, which may change at any time",
                "put that file beside it",
            )
        other = Path(os.path.normpath(path.parent / included))
        if other not in seen:
            seen.add(other)
            yield from _lines(other, seen, is_constraint=is_constraint or "c" in include[1][:3])


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LockfileError(
            f"Cannot read `{path}`: {error}", "see that all files it includes are there, inside the working_dir"
        ) from error


def _logical(text: str) -> Iterator[tuple[int, str]]:
    parts: list[str] = []
    first = 1
    for number, line in enumerate(text.splitlines(), 1):
        if not parts:
            first = number
        continued = line.endswith("\\") and not line.lstrip().startswith("#")
        parts.append(line[:-1] if continued else line)
        if not continued:
            yield from _joined(first, parts)
            parts = []
    yield from _joined(first, parts)


def _joined(number: int, parts: list[str]) -> Iterator[tuple[int, str]]:
    text = " ".join(
        part.strip() for part in (_COMMENT.sub("", part) if "#" in part else part for part in parts) if part.strip()
    )
    if text:
        yield number, text


def _entry(line: Line) -> Entry | None:
    text = _expanded(line.text)
    if not text or text.startswith("-"):
        return None
    listed = {*_HASH.findall(text)}
    plain = _OPTIONS.sub("", text)
    requirement = _requirement(plain, line)
    if requirement is None:
        return None
    if requirement.url:
        listed |= {f"{name}:{value}" for name, value in _FRAGMENT.findall(requirement.url)}
    return Entry(line, _canonical(requirement.name), requirement, frozenset(listed))


def _requirement(text: str, line: Line) -> Requirement | None:
    """The requirement of a line, None where it is the folder of a local package."""
    try:
        found = Requirement(text)
    except InvalidRequirement:
        return _nameless(text, line)
    if _ARCHIVE.search(found.name):
        return _nameless(text, line)
    is_folder = found.url is not None and found.url.startswith("file:") and os.path.isdir(path_of(found.url))
    return None if is_folder else found


def _nameless(text: str, line: Line) -> Requirement | None:
    """The requirement for a bare path or URL, whose wheel says what it is."""
    url, _, marker = text.partition(" ;")
    bare = re.sub(r"\[[^\]]*\]$", "", url.strip())
    if "://" not in bare:
        path = Path(os.path.normpath(line.file.parent / bare))
        if path.is_dir():
            return None
        bare = path.as_uri()
    try:
        name = parse_wheel_filename(os.path.basename(path_of(bare)))[0]
        return Requirement(f"{name} @ {bare}" + (f" ; {marker}" if marker else ""))
    except ValueError:  # also of what is neither URL nor marker; its text has the whole line
        raise LockfileError(
            f"What package is meant is not said: {line}", "write `name==version`, or `name @ url`"
        ) from None


def lock_command(path: Path) -> str:
    """What locks the packages of a file."""
    return f"uv pip compile --universal --generate-hashes {path.name} -o locked-{path.name}"


def path_of(url: str) -> str:
    """The path of a URL."""
    return unquote(urlsplit(url).path)


def _unpinned(entry: Entry, path: Path) -> LockfileError:
    if entry.requirement.url is None:
        hint = f"lock it: `{lock_command(path)}`, and name the file that this writes"
        return LockfileError(f"Not an exact version: {entry.line}", hint)
    if entry.requirement.url.startswith("git+"):
        return LockfileError(f"Not an exact commit: {entry.line}", "write all 40 digits of the commit after the `@`")
    return LockfileError(f"A URL without a hash: {entry.line}", "add `--hash=sha256:...`")


def restrict(packages: list[dict[str, Any]], found: list[Entry], markers: dict[str, str]) -> list[dict[str, Any]]:
    """The packages (tables of pylock.toml) with those artifacts alone whose hashes the lines allow.

    Raises LockfileError where none is left, or where a package is in no line.
    """
    return [_restricted(package, found, markers) for package in packages]


def _restricted(package: dict[str, Any], found: list[Entry], markers: dict[str, str]) -> dict[str, Any]:
    if "directory" in package:
        return package
    name, version = package["name"], package.get("version", "")
    meant = [entry for entry in found if entry.name == name and entry.means(version, markers)]
    if not meant:
        raise LockfileError(
            f"uv takes {name} {version}, which no line asks for",
            "see whether `[tool.uv]` or a UV_ variable overrides versions; leave that to the file",
        )
    allowed = frozenset[str]().union(*(entry.hashes for entry in meant))
    kept = {key: value for key, value in package.items() if key not in _ARTIFACTS or _allows(allowed, value)}
    if "wheels" in package:
        kept["wheels"] = [wheel for wheel in package["wheels"] if _allows(allowed, wheel)]
    if not any(kept.get(kind) for kind in ("vcs", "wheels", *_ARTIFACTS)):
        raise LockfileError(
            f"None of the files of {name} {version} has a hash that the file lists: {meant[0].line}",
            "somebody replaced them, or the list is of another index; if that is right, lock again",
        )
    return kept


_ARTIFACTS = ("sdist", "archive")


def _allows(allowed: frozenset[str], artifact: dict[str, Any]) -> bool:
    return not allowed or any(f"{name}:{value}" in allowed for name, value in artifact.get("hashes", {}).items())


def _expanded(text: str) -> str:
    return _VARIABLE.sub(lambda found: os.environ.get(found[1], found[0]), text)


def _canonical(name: str) -> str:
    return canonicalize_name(name)


def _shown(text: str) -> str:
    # Before it is cut: half a password is no login any more.
    return without_credentials(text)[:_SHOWN]
