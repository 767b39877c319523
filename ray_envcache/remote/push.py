"""Publishing an environment: its wheels and their bytecode, named after what is in them, and last the manifest.

So two publishers of one environment are in each other's way in nothing: whichever manifest comes last, all that it
names is there. What a publisher that died has uploaded, the next one finds. For an installed package is made into a
wheel of always the same bytes, whatever it was built or downloaded from. Left out is what uv makes again: notes on
where a package is from, and the scripts of its entry points.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import logging
import os
import re
import stat
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PathDistribution
from pathlib import Path
from typing import IO, NamedTuple

from packaging.utils import canonicalize_name
from packaging.version import Version

from ray_envcache.errors import RemoteError
from ray_envcache.remote import bucket
from ray_envcache.remote.bucket import PLACE, Blob, Bucket
from ray_envcache.store import journal
from ray_envcache.store.layout import Entry, Layout, layout_of
from ray_envcache.store.leases import Holder, claim
from ray_envcache.store.record import ReadyRecord
from ray_envcache.survey import verification
from ray_envcache.survey.verification import LINK, Listed, verify
from ray_envcache.system import files, testpoints

VARIABLE = "RAY_ENVCACHE_REMOTE_PUSH"
_THREADS = 8  # of which most wait for answers
_logger = logging.getLogger(__name__)
_MADE_BY_UV = ("INSTALLER", "RECORD", "REQUESTED", "direct_url.json", "uv_build.json", "uv_cache.json")
_OURS = ("_ray_envcache_", "_virtualenv.")
# As uv writes it, where the path is short, and where it is long.
_SHEBANG = re.compile(rb"#!/bin/sh\n'''exec' .*\n' '''\n|#!.*\n")


@dataclass
class Push:
    """The publication of an entry, which its caller keeps: objects and bytes uploaded, and objects `present` before."""

    layout: Layout
    bucket: Bucket
    entry: Entry
    uploads: int = 0
    size: int = 0
    present: int = 0

    def run(self) -> None:
        """Publish it. Raises RemoteError and OSError."""
        key, place = self.entry.key, PLACE.format(self.entry.key)
        python = str((files.read_json(self.entry.compiled) or {}).get("python"))
        with ThreadPoolExecutor(_THREADS) as pool:
            if not self._is_there(self.bucket.read(place) or b"", pool):
                made = [*pool.map(partial(self._package, python), packages_of(self.entry))]
                testpoints.reach("push-manifest")
                packs = [pack for _, pack in made if pack]
                self.bucket.write(place, bucket.manifest_of(key, python, [wheel for wheel, _ in made], packs))
        journal.note(self.layout, "push", key=key, uploads=self.uploads, bytes=self.size, present=self.present)

    def _is_there(self, content: bytes, pool: ThreadPoolExecutor) -> bool:
        """Whether all that a manifest names is there, and signed as here. Rules of the bucket may have changed that."""
        try:
            found = bucket.parse(content, self.entry.key)
        except RemoteError:
            return False  # nothing, or damaged
        names = [blob.path for blob in found.wheels + found.packs]
        is_there = bucket.is_as_signed_here(content, self.entry.key) and all(pool.map(self.bucket.has, names))
        self.present = len(names) * is_there
        return is_there

    def _package(self, python: str, package: Package) -> tuple[Blob, Blob | None]:
        # Files without a name: of a process that is killed nothing is left.
        with ExitStack() as stack:
            file, more = (stack.enter_context(tempfile.TemporaryFile(dir=self.layout.root)) for _ in range(2))
            modules = write_wheel(package, self.entry, file)
            has_bytecode = write_bytecode(modules, layout_of(self.entry).bytecode / python, more)
            wheel = self._upload(file, f"v1/wheels/{{}}/{package.file}", package.name, package.version)
            testpoints.reach("push-wheel")
            return wheel, self._upload(more, "v1/bytecode/{}.zip") if has_bytecode else None

    def _upload(self, file: IO[bytes], name: str, *package: str) -> Blob:
        digest = hashlib.sha256()
        file.seek(0)
        while data := file.read(1 << 20):
            digest.update(data)
        blob = Blob(name.format(digest.hexdigest()), digest.hexdigest(), file.tell(), *package)
        file.seek(0)
        if self.bucket.has(blob.path):
            self.present += 1
        else:
            self.bucket.write(blob.path, file)
            self.uploads, self.size = self.uploads + 1, self.size + blob.size
        return blob


def push(layout: Layout, entries: Iterable[Entry], target: Bucket) -> list[Push]:
    """Publish the entries of a lease: a layer after what it lies on. Raises RemoteError and OSError."""
    pushes = [Push(layout, target, entry) for entry in reversed([*entries])]
    for one in pushes:
        one.run()
    return pushes


def push_built(layout: Layout, entry: Entry) -> None:
    """Publish an entry that was built here, where $RAY_ENVCACHE_REMOTE_PUSH=1. A failure is noted, and no more."""
    url = os.environ.get(bucket.VARIABLE) if os.environ.get(VARIABLE) == "1" else None
    lease = claim(entry, layout, Holder("push", command="publishes it")) if url else None
    if url and lease:
        with lease:
            records = [(one, ReadyRecord.read_any(one)) for one in lease.entries]
            built = [one for one, record in records if record and not record.fetched]
            try:
                push(layout, built, Bucket(url, writes=True))
            except (RemoteError, OSError) as error:
                _logger.warning("%s was not published: %s", entry.name, error)
                journal.note(layout, "push", result="failed", key=entry.key, error=str(error).partition("\n")[0])


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


def write_wheel(package: Package, entry: Entry, file: IO[bytes]) -> list[str]:
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
