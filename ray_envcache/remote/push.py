"""Publishing an environment: its wheels and their bytecode, named after what is in them, and last the manifest.

So two publishers of one environment are in each other's way in nothing: whichever manifest comes last, all that it
names is there. What a publisher that died has uploaded, the next one finds.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import IO

from ray_envcache.errors import RemoteError
from ray_envcache.remote import bucket, manifest, wheels
from ray_envcache.remote.bucket import Bucket
from ray_envcache.remote.manifest import Blob
from ray_envcache.store import journal
from ray_envcache.store.layout import Entry, Layout, layout_of
from ray_envcache.store.leases import Holder, claim
from ray_envcache.store.record import ReadyRecord
from ray_envcache.system import files, testpoints

VARIABLE = "RAY_ENVCACHE_REMOTE_PUSH"
_THREADS = 8  # of which most wait for answers
_logger = logging.getLogger(__name__)


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
        key, place = self.entry.key, manifest.PLACE.format(self.entry.key)
        python = str((files.read_json(self.entry.compiled) or {}).get("python"))
        with ThreadPoolExecutor(_THREADS) as pool:
            if not self._is_there(self.bucket.read(place) or b"", pool):
                made = [*pool.map(partial(self._package, python), wheels.packages_of(self.entry))]
                testpoints.reach("push-manifest")
                packs = [pack for _, pack in made if pack]
                self.bucket.write(place, manifest.written(key, python, [wheel for wheel, _ in made], packs))
        journal.note(self.layout, "push", key=key, uploads=self.uploads, bytes=self.size, present=self.present)

    def _is_there(self, content: bytes, pool: ThreadPoolExecutor) -> bool:
        """Whether all that a manifest names is there, and signed as here. Rules of the bucket may have changed that."""
        try:
            found = manifest.parsed(content, self.entry.key)
        except RemoteError:
            return False  # nothing, or damaged
        names = [blob.path for blob in found.wheels + found.packs]
        is_there = manifest.is_as_signed_here(content, self.entry.key) and all(pool.map(self.bucket.has, names))
        self.present = len(names) * is_there
        return is_there

    def _package(self, python: str, package: wheels.Package) -> tuple[Blob, Blob | None]:
        # Files without a name: of a process that is killed nothing is left.
        with ExitStack() as stack:
            file, more = (stack.enter_context(tempfile.TemporaryFile(dir=self.layout.root)) for _ in range(2))
            modules = wheels.write(package, self.entry, file)
            has_bytecode = wheels.write_bytecode(modules, layout_of(self.entry).bytecode / python, more)
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
