"""requirements.txt as text: the files it includes, and its lines, of which none may leave a choice.

uv reads the file itself, and honours all of it. The agent comes by here for the digest of each field value, so nothing
imports `packaging` (37 ms on a busy host).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from ray_envcache.errors import LockfileError
from ray_envcache.system.texts import without_credentials

_COMMENT = re.compile(r"#(?<!\S#).*")
_INCLUDE = re.compile(r"""(?m)^[ \t]*(-r|--requirement|-c|--constraint)[ \t=]*["']?(.*?)["']?[ \t]*$""")
_LINE = re.compile(r"(?:.*\\\n)*.+")
_WHEEL = re.compile(r"(?:\S*/)?([^/\s]+?)-[^/\s]*\.whl(?!\S*/)")
_NAMED = re.compile(r"(\w[\w.-]*)\s*(?:\[[^]]*\]\s*)?(?:@\s*(?P<place>\S+)|(?P<version>[^/;@]*)(?:;.*)?)")
_EXACT = re.compile(r"===?\s*[^\s,;)*=]+(?=[\s,)]|$)")
_COMMIT = re.compile(r"@[0-9a-f]{40}(#|$)")
_HASH = re.compile(r"(?:\s--hash[\s=]+|[#&])(?:sha\d+|md5)[:=]([0-9a-f]+)")
_UNPINNED = "Not an exact version"
_INSTEAD = {
    _UNPINNED: "write `name==version`, or lock it: `{}`, and name the file that this writes",
    "Not an exact commit": "write all 40 digits of the commit after the `@`",
    "A URL without a hash": "add `--hash=sha256:...`, or write `name==version`",
    "A file of another machine": "write `name==version`, as `pip list --format=freeze` does where the list was made",
    "No package is named": "write `name==version`, or `name @ url`",
}


def files(path: Path) -> list[Path]:
    """The file and all files that it includes, each once. Raises LockfileError."""
    return [*dict.fromkeys(file for file, _, _ in _read_all(path))]


def listed_hashes(path: Path) -> dict[str, set[str]]:
    """The hashes that a file and those it includes list for each package, by normalized name; none mean any file.

    Raises LockfileError where a line leaves a choice, and no constraint makes up for it. Options are left to uv.
    """
    hashes, open_lines, fixed = dict[str, set[str]](), list[tuple[str, str, str]](), set[str]()
    for file, constrains, text in _read_all(path):
        for found in _LINE.finditer(text):
            line = " ".join(found[0].replace("\\\n", " ").split())
            if not line or line.startswith("-"):
                continue
            name, choice = _understood(os.path.expandvars(line), file.parent)
            hashes.setdefault(name, set()).update(_HASH.findall(line))
            if choice and not constrains:
                open_lines.append((name, choice, f"`{_shown(line)}` in line {_number(text, found)} of `{file}`"))
            elif constrains and not choice and ";" not in line:  # with a marker it may count elsewhere alone
                fixed.add(name)
    for name, choice, line in open_lines:
        if choice != _UNPINNED or name not in fixed:
            raise LockfileError(f"{choice}: {line}", _INSTEAD[choice].format(lock_command(path)))
    return hashes


def lock_command(path: Path) -> str:
    """What makes a file of exact versions of one that leaves choices."""
    return f"uv pip compile --universal --generate-hashes {path.name} -o locked-{path.name}"


def _read_all(path: Path) -> Iterator[tuple[Path, bool, str]]:
    """The file and all that it includes, each with whether it only constrains others, and its text without comments."""
    found = [(path, False)]
    for file, constrains in found:  # it grows
        text = _COMMENT.sub("", _read(file))
        yield file, constrains, text
        for include in _INCLUDE.finditer(text):
            name = os.path.expandvars(include[2])
            if "://" in name:
                shown = f"`{_shown(include[2])}` in line {_number(text, include)}"
                raise LockfileError(
                    f"`{file}` includes {shown}, which may change at any time", "put that file beside it"
                )
            other = Path(os.path.normpath(file.parent / name)), constrains or "c" in include[1][:3]
            if other not in found:
                found.append(other)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise LockfileError(
            f"Cannot read `{path}`: {error}", "see that all files it includes are there, inside the working_dir"
        ) from error


def _number(text: str, found: re.Match[str]) -> int:
    return text.count("\n", 0, found.start()) + 1


def _shown(text: str) -> str:
    # Before it is cut: half a password is not recognized as one.
    return without_credentials(text)[:120]


def _understood(text: str, folder: Path) -> tuple[str, str]:
    """The package that a line names, and the kind of choice that it leaves."""
    wheel = _WHEEL.match(text)  # its file says which package it is
    asked = re.split(r"\s--|\s;", f"{wheel[1]} @ {text}" if wheel else text)[0]
    found = _NAMED.fullmatch(asked)
    if found is None:
        return "", "" if os.path.isdir(folder / asked.partition("[")[0]) else "No package is named"
    name, place = re.sub(r"[-_.]+", "-", found[1]).lower(), found["place"]
    if place is None:
        choice = "" if _EXACT.search(found["version"]) else _UNPINNED
    elif place.startswith("git+"):
        choice = "" if _COMMIT.search(place) else "Not an exact commit"
    elif place.startswith("file:") or "://" not in place:
        path = unquote(re.split(r"[\[#]", place.removeprefix("file:"))[0])
        choice = "" if os.path.exists(folder / path) else "A file of another machine"
    else:
        choice = "" if _HASH.search(text) else "A URL without a hash"
    return name, choice
