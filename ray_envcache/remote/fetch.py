"""Fetching an environment: uv installs its published wheels, and their bytecode is there before it is handed out.

uv gets the wheels from a proxy on loopback, at addresses that are the same on all hosts and for all keys. It unpacks
while it downloads, compares hashes itself, and keeps what it has unpacked: it never asks twice for a wheel.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from urllib.parse import unquote

from ray_envcache.errors import BuildError, DiskFullError, RemoteError
from ray_envcache.inside import pyc
from ray_envcache.remote import bucket
from ray_envcache.remote.bucket import PLACE, Blob, Bucket, Manifest
from ray_envcache.store.layout import Entry
from ray_envcache.system import testpoints

PART = 8_000_000
_PARTS = 3  # of one wheel at once: with the downloads at once this bounds memory to 400 MB
_DOWNLOADS = 16
_MOST_UNPACKED = 100  # bytecode becomes three times as large; a hostile pack could a thousand times, and fill memory
_CONSTANT = "http://envcache.invalid/"


def find(key: str, versions: Mapping[str, str]) -> tuple[Bucket, Manifest] | None:
    """The bucket and its manifest of `key`, None where it has none. Its packages have to be those of `Plan.versions`.

    One request. Raises RemoteError where there is no answer, or not one to be used.
    """
    url = os.environ.get(bucket.VARIABLE)
    remote = Bucket(url) if url else None
    content = remote.read(PLACE.format(key)) if remote else None
    if remote is None or content is None:
        return None
    bucket.require_signature(content, key)
    found = bucket.parse(content, key)
    has = {wheel.name: wheel.version for wheel in found.wheels}
    if versions and has != {name: version or has.get(name) for name, version in versions.items()}:
        raise RemoteError(f"The manifest of {key} has other packages than the lockfile", "ray-envcache push")
    return remote, found


@contextmanager
def offered(remote: Bucket, manifest: Manifest, entry: Entry) -> Iterator[tuple[Path, Mapping[str, str]]]:
    """A list from which uv can install the wheels while the context lasts, and the variables that this takes.

    Meanwhile the bytecode goes where the compiler of `entry` looks. Raises RemoteError, and OSError where the disk is
    full.
    """
    lines, errors, stop = entry.path / "pylock.fetched.toml", list[RemoteError](), Event()
    lines.write_text(manifest.text.replace('path = "../', f'url = "{_CONSTANT}'), encoding="utf-8")
    with ThreadPoolExecutor(1) as pool:
        packs = pool.submit(_fetch_packs, remote, manifest, entry, stop)
        try:
            with ThreadingHTTPServer(("127.0.0.1", 0), _handler(remote, manifest, errors)) as server:
                Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
                testpoints.reach("fetch-serving")
                proxy = dict.fromkeys(("HTTP_PROXY", "http_proxy"), f"http://127.0.0.1:{server.server_port}")
                # Longer than the bucket waits for progress: uv sees of a part nothing before its end.
                limits = {"UV_HTTP_TIMEOUT": "600", "UV_CONCURRENT_DOWNLOADS": str(_DOWNLOADS)}
                try:
                    yield lines, {**proxy, "NO_PROXY": "", "no_proxy": "", **limits}
                except DiskFullError:
                    raise
                except BuildError as error:
                    raise (errors or [RemoteError(error.message, error.hint)])[0] from error
                finally:
                    server.shutdown()
                    lines.unlink()
        except BaseException:
            stop.set()  # what it writes to is removed now
            raise
    testpoints.reach("fetch-installed")
    packs.result()


def _handler(remote: Bucket, manifest: Manifest, errors: list[RemoteError]) -> type[BaseHTTPRequestHandler]:
    """The answers to uv. Other users of the host, who do not know the hashes, get none."""
    blobs = {_CONSTANT + wheel.path.removeprefix("v1/"): wheel for wheel in manifest.wheels}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            blob = blobs.get(unquote(self.path), Blob("", "", 0))
            self.send_response(HTTPStatus.OK if blob.path else HTTPStatus.NOT_FOUND)
            self.send_header("Content-Length", str(blob.size))
            self.send_header("Cache-Control", "public, max-age=31536000, immutable")
            self.end_headers()
            # Not a list: a size that is not true may be any number.
            ranges = ((blob.path, at, min(at + PART, blob.size)) for at in range(0, blob.size, PART))
            try:
                for content in _parts(remote, ranges, _PARTS):
                    self.wfile.write(content)
            except (RemoteError, ConnectionError) as error:
                self.close_connection = True  # uv is gone, or sees an answer that is cut off
                errors.extend([error] if isinstance(error, RemoteError) else [])

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler


def _parts(remote: Bucket, ranges: Iterable[tuple[str, int, int]], at_once: int) -> Iterator[memoryview]:
    """Parts of objects in this order, of which so many are on their way at once."""
    # By threads: at the end of a process, what asyncio has left of obstore aborts Python (3.11, obstore 0.12).
    with ThreadPoolExecutor(at_once) as pool:
        coming = deque[Future[memoryview]]()
        for one in ranges:
            coming.append(pool.submit(remote.part, *one))
            if len(coming) == at_once:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()


def _fetch_packs(remote: Bucket, manifest: Manifest, entry: Entry, stop: Event) -> None:
    folder = entry.staged_bytecode / manifest.python
    ranges = [(pack.path, 0, pack.size) for pack in manifest.packs]
    folder.mkdir(parents=True)
    for pack, content in zip(manifest.packs, _parts(remote, ranges, _DOWNLOADS), strict=True):
        if stop.is_set():
            return
        try:
            _unpack(pack, content, folder)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            what = f"A pack of bytecode is damaged: {error!r}"
            raise RemoteError(what, "publish it again: ray-envcache push") from error


def _unpack(pack: Blob, content: memoryview, folder: Path) -> None:
    if hashlib.sha256(content).hexdigest() != pack.sha256:
        raise RemoteError(f"There is something else at {pack.path}", "remove that object, and publish it again")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sum(item.file_size for item in archive.infolist()) > _MOST_UNPACKED * pack.size:
            raise RemoteError(f"{pack.path} unpacks to what no bytecode does", "publish it again: ray-envcache push")
        for name in archive.namelist():
            bytecode, path = archive.read(name), folder / name
            # Several packages may have the same module, mostly an empty one.
            if name == f"{pyc.proven_source(bytecode)}.pyc" and not path.exists():
                with open(path, "xb", opener=lambda path, flags: os.open(path, flags, 0o444)) as file:
                    file.write(bytecode)
