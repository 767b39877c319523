"""requirements.txt as a lockfile: uv reads it and honours all of it, once no line leaves a choice."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from ray_envcache.checkout import requirement_files, toml
from ray_envcache.checkout.project import Project
from ray_envcache.checkout.requirement_files import Line
from ray_envcache.errors import LockfileError
from ray_envcache.resolve import uv, uv_errors
from ray_envcache.resolve.interpreter import Interpreter
from ray_envcache.system import children

_HASH = re.compile(r"(?:\s--hash(?:=|\s+)|[#&])(sha256|sha384|sha512|sha1|md5)[:=]([0-9a-f]+)")
_OPTIONS = re.compile(r"\s+--?[a-z].*$")
_ARCHIVE = re.compile(r"\.(whl|zip|gz|tgz|bz2|xz)$")  # would pass for a name
_EDITABLE_REPOSITORY = re.compile(r"(-e|--editable)[\s=]*[a-z]+\+")
_COMMIT = re.compile(r"@[0-9a-f]{40}(#|$)")
_ARTIFACTS = ("sdist", "archive")


@dataclass(frozen=True)
class RequirementLine:
    """A line that names a package, by version or by URL, and the hashes it allows ("sha256:...")."""

    line: Line
    requirement: Requirement
    hashes: frozenset[str]

    @property
    def name(self) -> str:
        """The normalized name of the package."""
        return canonicalize_name(self.requirement.name)

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


def export(project: Project, interpreter: Interpreter, *, no_build: bool) -> dict[str, Any]:
    """The packages of the file as the tables of a pylock.toml. uv asks the index for them.

    Raises LockfileError where a line leaves a choice, where the index has none of the listed files, or where the file
    leaves out what its packages need.
    """
    found = read(project.file)
    done = _compile(project, interpreter, "--no-deps", *(["--no-build"] if no_build else []))
    hint = "`uv pip compile --no-deps` of it shows the same"
    uv_errors.expect_success(done, LockfileError, f"Cannot resolve `{project.file}`", hint)
    data = toml.parse(done.stdout)
    # uv writes down the Python at hand; the file asks for none.
    data.pop("requires-python", None)
    data["packages"] = [restrict(package, found, interpreter.markers) for package in data["packages"]]
    _require_complete(project, interpreter, {package["name"] for package in data["packages"]})
    return data


def read(path: Path) -> list[RequirementLine]:
    """The lines for packages in a file and in the files it includes.

    Raises LockfileError where a line leaves a choice, and no constraint makes up for it.
    """
    found = [one for line in requirement_files.lines(path) if (one := _parsed(line))]
    exact = {one.name for one in found if one.line.is_constraint and one.is_exact}
    for one in found:
        if not (one.is_exact or one.line.is_constraint or one.name in exact):
            raise _unpinned(one, path)
    return found


def restrict(package: dict[str, Any], found: list[RequirementLine], markers: dict[str, str]) -> dict[str, Any]:
    """The package (a table of pylock.toml) with those artifacts alone whose hashes the lines allow.

    Raises LockfileError where none is left, or where the package is in no line.
    """
    if "directory" in package:
        return package
    name, version = package["name"], package.get("version", "")
    meant = [one for one in found if one.name == name and one.means(version, markers)]
    if not meant:
        raise LockfileError(
            f"uv takes {name} {version}, which no line asks for",
            "see whether `[tool.uv]` overrides versions; leave that to the file",
        )
    allowed = frozenset[str]().union(*(one.hashes for one in meant))
    kept = {key: value for key, value in package.items() if key not in _ARTIFACTS or _allows(allowed, value)}
    if "wheels" in package:
        kept["wheels"] = [wheel for wheel in package["wheels"] if _allows(allowed, wheel)]
    if not any(kept.get(kind) for kind in ("vcs", "wheels", *_ARTIFACTS)):
        raise LockfileError(
            f"None of the files of {name} {version} has a hash that the file lists: {meant[0].line}",
            "the files on the index were replaced, or the list is of another index; if that is right, lock again",
        )
    return kept


def _allows(allowed: frozenset[str], artifact: dict[str, Any]) -> bool:
    return not allowed or any(f"{name}:{value}" in allowed for name, value in artifact.get("hashes", {}).items())


def _parsed(line: Line) -> RequirementLine | None:
    """The line, None where it is an option, or the path of a local package's folder."""
    text = requirement_files.expanded(line.text)
    if _EDITABLE_REPOSITORY.match(text):
        raise LockfileError(f"Editable, but no local package: {line}", "write `name @ git+https://...@COMMIT` instead")
    if text.startswith("-"):
        return None
    hashes = frozenset(f"{name}:{value}" for name, value in _HASH.findall(text))
    text = _OPTIONS.sub("", text)
    try:
        found = Requirement(text)
    except InvalidRequirement:
        found = None
    if found is None or _ARCHIVE.search(found.name):
        found = _nameless(text, line)
    elif (found.url or "").startswith("file:") and not os.path.exists(unquote(urlsplit(found.url or "").path)):
        raise LockfileError(
            f"A file of another machine: {line}",
            "write the version, `name==version`, as `pip list --format=freeze` does where the list was made",
        )
    return RequirementLine(line, found, hashes) if found else None


def _nameless(text: str, line: Line) -> Requirement | None:
    """The requirement for a bare path or URL of a wheel, whose file name has the package's."""
    url, _, marker = text.partition(" ;")
    bare = re.sub(r"\[[^\]]*\]$", "", url.strip())
    if "://" not in bare:
        path = Path(os.path.normpath(line.file.parent / bare))
        if path.is_dir():
            return None
        bare = path.as_uri()
    try:
        name = parse_wheel_filename(os.path.basename(unquote(urlsplit(bare).path)))[0]
        return Requirement(f"{name} @ {bare}" + (f" ; {marker}" if marker else ""))
    except ValueError:  # the text is neither a URL nor a marker: the message has the whole line
        raise LockfileError(f"No package is named: {line}", "write `name==version`, or `name @ url`") from None


def _unpinned(one: RequirementLine, path: Path) -> LockfileError:
    if one.requirement.url is None:
        hint = f"lock it: `{_lock_command(path)}`, and name the file that this writes"
        return LockfileError(f"Not an exact version: {one.line}", hint)
    if one.requirement.url.startswith("git+"):
        return LockfileError(f"Not an exact commit: {one.line}", "write all 40 digits of the commit after the `@`")
    return LockfileError(f"A URL without a hash: {one.line}", "add `--hash=sha256:...`")


def _lock_command(path: Path) -> str:
    return f"uv pip compile --universal --generate-hashes {path.name} -o locked-{path.name}"


def _require_complete(project: Project, interpreter: Interpreter, listed: set[str]) -> None:
    """Raise LockfileError where the file leaves out what its packages need: workers would fail to import it."""
    done = _compile(project, interpreter, "--no-build")
    if done.returncode != 0:
        # Versions that do not go together may be meant so, and what a source package needs only its build knows.
        return
    missing = {package["name"] for package in toml.parse(done.stdout)["packages"]} - listed
    # What needs ray may leave it to the cluster.
    if missing and "ray" not in missing:
        raise LockfileError(
            f"`{project.file}` leaves out what its packages need: {', '.join(sorted(missing))}",
            f"lock it with all that is needed: `{_lock_command(project.file)}`; what is left out on purpose, name in "
            "`override-dependencies` of a uv.toml beside it",
        )


def _compile(project: Project, interpreter: Interpreter, *options: str) -> children.Completed:
    arguments = ["pip", "compile", "--no-header", "--format=pylock.toml", f"--python={interpreter.executable}"]
    return uv.run([*arguments, *options, project.file], cwd=project.folder)
