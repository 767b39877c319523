"""What a build of a local package sees: its files, and their digest.

uv builds in the folder itself, and many backends write there: what they leave is no content.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_envcache.checkout import git
from ray_envcache.checkout.project import read_toml
from ray_envcache.errors import LockfileError

MAX_FILES = 50_000
"""A folder with more files is no package: it has data in it, or an environment without a `pyvenv.cfg`."""

MAX_READ = 256_000_000
"""Of a package with more bytes only code is read: its other files count by size and time of change."""

_DEFINITION = ("pyproject.toml", "setup.cfg", "setup.py")
_NEVER = frozenset(
    {".git", ".hg", ".svn", "__pycache__", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".tox", ".nox",
     ".venv", "node_modules"}
)  # fmt: skip
_SIGNS = ("pyvenv.cfg", "CACHEDIR.TAG")  # of an environment, and of a cache, such as a store
_CODE = (".py", ".pyi", ".pyx", ".pxd", ".c", ".cc", ".cpp", ".cu", ".h", ".hpp", ".rs", ".toml", ".cfg")
_OUTPUT = re.compile(r"build/(bdist|lib|scripts|temp)[^/]*/.*|dist/[^/]*\.(whl|tar\.gz)|(.*/)?[^/]*\.egg-info(/.*)?")
"""What builds leave in the folder of a package, where git does not track it."""


@dataclass(frozen=True)
class Content:
    """The files of a local package that a build sees, relative to `folder` and sorted."""

    folder: Path
    files: tuple[str, ...]
    digest: str
    identities: dict[str, list[Any]]

    def edited_until(self, later: Content) -> list[str]:
        """The files of this content that are others, or gone, in `later`, which is the same package.

        Not those that only grew, and are no code: logs that a program keeps beside it.
        """
        changed = [name for name, identity in self.identities.items() if later.identities.get(name) != identity]
        return [name for name in changed if name.endswith(_CODE) or not self._has_grown(name)]

    def _has_grown(self, name: str) -> bool:
        was, path = self.identities[name], self.folder / name
        if was[0] == "link" or not path.is_file():
            return False
        if was[0] == "by time":
            return path.stat().st_size > int(was[2])
        with path.open("rb") as file:
            return bool(hashlib.sha256(file.read(was[2])).hexdigest() == was[1])


def scan(folder: Path) -> Content:
    """The content of the package in `folder`. Raises LockfileError where that is no package, or has too many files.

    It has the files that git tracks or does not ignore; without a repository, all but caches and environments. What
    `[tool.uv] cache-keys` names comes with it: files, variables and the commit.
    """
    return _content(folder, _seen(folder))


def scan_definition(folder: Path) -> Content:
    """What an editable installation of the package in `folder` depends on: its definition, and its `cache-keys`.

    Raises LockfileError as `scan` does.
    """
    return _content(folder, _DEFINITION)


def extensions(folders: Iterable[Path]) -> list[Path]:
    """The compiled modules in these folders: an editable installation builds them there, and is useless without."""
    suffixes = (".so", ".pyd")
    return [folder / name for folder in folders for name in _walk(folder) if name.endswith(suffixes)]


def _content(folder: Path, seen: Iterable[str]) -> Content:
    settings = _cache_keys(folder)
    # Neither sockets nor pipes: no build reads those, and reading one may wait without end.
    paths = {name: folder / name for name in (*seen, *_matching(folder, settings))}
    paths = {name: path for name, path in paths.items() if path.is_symlink() or path.is_file()}
    small = sum(path.stat().st_size for path in paths.values() if path.is_file()) <= MAX_READ
    identities = {name: _identity(path, read=small or name.endswith(_CODE)) for name, path in paths.items()}
    listing = sorted([_portable(name), *identity] for name, identity in identities.items())
    digest = hashlib.sha256(json.dumps([listing, _extras(folder, settings)]).encode()).hexdigest()
    return Content(folder, tuple(sorted(paths)), f"sha256:{digest}", identities)


def _seen(folder: Path) -> list[str]:
    seen: list[str] = []
    for name in _listed(folder):
        # A submodule, or another repository, is a folder of its own.
        if os.path.isdir(folder / name) and not os.path.islink(folder / name):
            seen.extend(f"{name}/{inner}" for inner in _seen(folder / name))
        elif os.path.lexists(folder / name):  # else deleted, and not yet for git
            seen.append(name)
        if len(seen) > MAX_FILES:
            raise LockfileError(
                f"The local package in `{folder}` has more than {MAX_FILES:,} files, the last one below "
                f"`{folder / name.partition('/')[0]}`",
                "name folders that are no part of it in .gitignore, or keep them elsewhere",
            )
    return seen


def _listed(folder: Path) -> Iterable[str]:
    repository = git.repository_of(folder)
    tracked = repository.files(folder) if repository else {}
    definitions = {name for name in ("pyproject.toml", "setup.py") if (folder / name).is_file()}
    # A repository that ignores the folder of the package says nothing of what is in it.
    if not tracked or (definitions and not definitions & tracked.keys()):
        tracked = dict.fromkeys(_walk(folder), False)
    return [name for name in tracked if tracked[name] or not _OUTPUT.fullmatch(name)]


def _walk(folder: Path) -> Iterator[str]:
    for directory, subdirectories, names in os.walk(folder):
        subdirectories[:] = [
            name
            for name in sorted(subdirectories)
            if name not in _NEVER and not any(os.path.exists(os.path.join(directory, name, sign)) for sign in _SIGNS)
        ]
        relative = os.path.relpath(directory, folder)
        links = [name for name in subdirectories if os.path.islink(os.path.join(directory, name))]
        for name in (*names, *links):
            if not name.endswith(".pyc"):
                yield name if relative == "." else f"{relative}/{name}"


def _identity(path: Path, *, read: bool) -> list[Any]:
    """What tells a file from another one in its place. Links count by where they point: nothing is followed twice."""
    if not path.is_file():
        return ["link", _portable(os.readlink(path))]
    found = path.stat()
    if not read:
        return ["by time", found.st_mtime_ns, found.st_size]
    text = path.read_bytes()
    return [bool(found.st_mode & 0o111), hashlib.sha256(text).hexdigest(), len(text)]


def _portable(name: str) -> str:
    # Digests are compared between nodes, whose locales may differ. A name need not be text in any of them.
    return os.fsencode(name).decode("utf-8", "surrogateescape")


def _cache_keys(folder: Path) -> list[dict[str, Any]]:
    pyproject = folder / "pyproject.toml"
    if not pyproject.exists():
        return []  # a package of setup.py alone
    tool = read_toml(pyproject, "repair it").get("tool", {})
    keys = tool.get("uv", {}).get("cache-keys", [])
    if not isinstance(keys, list):
        raise LockfileError(
            f"`cache-keys` in `{pyproject}` is not a list: `{keys}`", 'write `cache-keys = [{ file = "src/**/*.rs" }]`'
        )
    return [key if isinstance(key, dict) else {"file": str(key)} for key in keys]


def _matching(folder: Path, keys: list[dict[str, Any]]) -> set[str]:
    patterns = [str(key["file"]) for key in keys if "file" in key]
    return {name for pattern in patterns if not os.path.isabs(pattern) for name in _glob(folder, pattern)}


def _glob(folder: Path, pattern: str) -> list[str]:
    # Later Pythons would take `**.rs` for `*.rs`, and miss what lies deeper.
    if any("**" in part and part != "**" for part in pattern.split("/")):
        raise _no_pattern(folder, pattern)
    try:
        return [os.path.relpath(path, folder) for path in folder.glob(pattern) if path.is_file()]
    except (ValueError, IndexError) as error:
        raise _no_pattern(folder, pattern) from error


def _no_pattern(folder: Path, pattern: str) -> LockfileError:
    return LockfileError(
        f"`cache-keys` in `{folder / 'pyproject.toml'}` has a `file` that is no pattern for files: `{pattern}`",
        "write `src/**/*.rs` for the files in all folders below src, `src/*.rs` for those in src itself",
    )


def _extras(folder: Path, keys: list[dict[str, Any]]) -> list[Any]:
    variables = sorted(str(key["env"]) for key in keys if "env" in key)
    repository = git.repository_of(folder) if any(key.get("git") for key in keys) else None
    described = repository and repository.described(folder)
    return [[[name, os.environ.get(name)] for name in variables], described]


def require_folder(folder: Path) -> None:
    """Raise LockfileError where a path dependency is not on this node."""
    if not folder.is_dir():
        raise LockfileError(
            f"The local package in `{folder}` is not on this node",
            "path dependencies travel in the working_dir only if they lie inside it; "
            'or leave local packages to it: {"install_project": false}',
        )
