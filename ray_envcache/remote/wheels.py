"""From an installed package back to a wheel, always the same bytes: whatever it was built or downloaded from.

Left out is what uv makes again: notes on where a package is from, and the scripts of its entry points.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import re
import stat
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import IO, NamedTuple

from packaging.utils import canonicalize_name
from packaging.version import Version

from ray_envcache.errors import RemoteError
from ray_envcache.store.layout import Entry
from ray_envcache.survey import verification
from ray_envcache.survey.verification import LINK, Listed, verify

_MADE_BY_UV = ("INSTALLER", "RECORD", "REQUESTED", "direct_url.json", "uv_build.json", "uv_cache.json")
_OURS = ("_ray_envcache_", "_virtualenv.")
# As uv writes it, where the path is short, and where it is long.
_SHEBANG = re.compile(rb"#!/bin/sh\n'''exec' .*\n' '''\n|#!.*\n")


class Package(NamedTuple):
    """An installed package; `files` are those of its wheel, by their paths below the venv."""

    name: str
    version: str
    file: str
    info: str
    files: dict[str, Listed]


def packages_of(entry: Entry) -> list[Package]:
    """The packages that an entry has for real: those of what it lies on, and inherited ones, are links.

    Raises RemoteError where wheels of them would not give other hosts the same.
    """
    found = verify(entry)
    if found.state != "sound":
        what = f"`{entry.path}` is {found.state}{found.reason and f': {found.reason}'}"
        raise RemoteError(what, f"ray-envcache verify --repair {entry.short}")
    files: dict[str, dict[str, Listed]] = defaultdict(dict)
    for path, listed in verification.listed_in(entry).items():
        if not listed.content.startswith(LINK):
            files[listed.package][path] = listed
    site = _site(entry)
    for path in files.pop("", {}):
        if path.startswith(site) and not path.startswith(_OURS, len(site)):
            hint = "see that the package that brings it lists it in its RECORD"
            raise RemoteError(f"`{entry.venv / path}` belongs to no package: no wheel would have it", hint)
    return [_package(entry, own) for _, own in sorted(files.items())]


def _package(entry: Entry, files: dict[str, Listed]) -> Package:
    # Below others are some that a package has for itself, as ray has.
    own = re.compile(rf"({re.escape(_site(entry))}[^/]+\.dist-info)/RECORD")
    info = next(match[1] for match in map(own.fullmatch, files) if match)
    found = PathDistribution(entry.venv / info)
    name, version = canonicalize_name(found.metadata["Name"]), str(Version(found.version))
    if re.search(r'"editable": *true', found.read_text("direct_url.json") or ""):
        hint = "publish what `ray-envcache build` makes of the project"
        raise RemoteError(f"{name} is imported from where it is developed, which other hosts do not have", hint)
    tags = re.findall(r"(?m)^Tag: *(\S+?)-(\S+?)-(\S+)", found.read_text("WHEEL") or "") or [("py3", "none", "any")]
    fits = "-".join(".".join(sorted(set(part))) for part in zip(*tags, strict=True))
    made = {f"bin/{one.name}" for one in found.entry_points if one.group in {"console_scripts", "gui_scripts"}}
    made |= {f"{info}/{note}" for note in _MADE_BY_UV}
    kept = {path: files[path] for path in sorted(files.keys() - made)}
    return Package(name, version, f"{name.replace('-', '_')}-{version}-{fits}.whl", Path(info).stem, kept)


def _site(entry: Entry) -> str:
    return f"{entry.site_packages.relative_to(entry.venv)}/"


def write(package: Package, entry: Entry, file: IO[bytes]) -> list[str]:
    """Write a package as a wheel to `file`; the sha256 of the text of each of its modules."""
    text, record, modules = io.StringIO(), f"{package.info}.dist-info/RECORD", []
    lines = csv.writer(text, lineterminator="\n")
    with _new_zip(file) as archive:
        for path, listed in package.files.items():
            name, script = _in_wheel(path, package, entry)
            _add(archive, name, [script] if script else verification.chunks_of(entry.venv / path), listed)
            content = verification.as_recorded(hashlib.sha256(script).hexdigest()) if script else listed.content
            lines.writerow((name, content, len(script) or listed.size))
            modules += [base64.urlsafe_b64decode(f"{content[7:]}=").hex()] if name.endswith(".py") else []
        lines.writerow((record, "", ""))
        _add(archive, record, [text.getvalue().encode()])
    return modules


def write_bytecode(modules: list[str], folder: Path, file: IO[bytes]) -> bool:
    """Write the bytecode that `folder` has of these modules to `file`; whether there is any."""
    with _new_zip(file) as archive:
        for path in sorted({folder / f"{module}.pyc" for module in modules}):
            with suppress(FileNotFoundError):
                _add(archive, path.name, [path.read_bytes()])
        return bool(archive.namelist())


def _in_wheel(path: str, package: Package, entry: Entry) -> tuple[str, bytes]:
    """The name of a file in the wheel; and of a script, where uv puts the place of the interpreter, its text there."""
    if path.startswith(site := _site(entry)):
        return path[len(site) :], b""
    start = _SHEBANG.match(text := (entry.venv / path).read_bytes()) if path.startswith("bin/") else None
    if start and os.fsencode(entry.bin) in start[0]:
        return f"{package.info}.data/scripts/{path[4:]}", b"#!python\n" + text[start.end() :]
    return f"{package.info}.data/data/{path}", b""


def _new_zip(file: IO[bytes]) -> zipfile.ZipFile:
    # 1: larger than the usual 6, but three times as fast.
    return zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1)


def _add(archive: zipfile.ZipFile, name: str, chunks: Iterable[bytes], about: Listed | None = None) -> None:
    """Add a file, always with the same time."""
    with archive.open(name, "w", force_zip64=about is not None and about.size >= zipfile.ZIP64_LIMIT) as out:
        for chunk in chunks:
            out.write(chunk)
    mode = 0o755 if about and about.mode & stat.S_IXUSR else 0o644
    archive.getinfo(name).external_attr = (stat.S_IFREG | mode) << 16
