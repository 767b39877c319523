"""Several hosts on one machine: each has a store, a home and a cache of uv of its own, and no index unless told so."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.acquire import Store, digest_of_files
from ray_envcache.build import bytecode
from ray_envcache.field.spec import EnvSpec
from ray_envcache.remote.bucket import Bucket
from ray_envcache.remote.push import Push, push
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import journal
from ray_envcache.store.journal import Event
from ray_envcache.store.leases import Holder, Lease
from ray_envcache.survey.verification import verify


class Host:
    """One host; `environ` are its variables."""

    def __init__(self, folder: Path, remote: str = "") -> None:
        folder.mkdir(parents=True)
        self.root = folder / "store"
        self.environ = {
            "HOME": str(folder),
            "RAY_ENVCACHE_DIR": str(self.root),
            "UV_CACHE_DIR": str(folder / "uv"),
            "UV_DEFAULT_INDEX": "http://127.0.0.1:9/simple",
            **({"RAY_ENVCACHE_REMOTE": remote} if remote else {}),
        }

    @contextmanager
    def active(self) -> Iterator[Store]:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environ.items():
                patch.setenv(name, value)
            yield Store.open(self.root)

    @contextmanager
    def acquired(self, options: Any) -> Iterator[Lease]:
        """The environment as a node has it, which gets the digest of the files with the field value."""
        with self.active() as store:
            spec = EnvSpec.parse(options)
            spec = spec._replace(digest=digest_of_files(spec))
            with store.acquire(spec, installed_ray(), Holder("test"), finish=False) as lease:
                yield lease

    def state_of(self, lease: Lease) -> str:
        """What `verify` says of the environment once it is finished."""
        with self.active() as store:
            bytecode.finish(store.layout, lease.entry, background=False)
        return verify(lease.entry).state

    def push(self, options: Any, url: str) -> list[Push]:
        """Publish an environment, which is built here first."""
        with self.acquired(options) as lease, self.active() as store:
            for entry in lease.entries:
                bytecode.finish(store.layout, entry, background=False)
            return push(store.layout, lease.entries, Bucket(url, writes=True))

    def events(self, name: str) -> list[Event]:
        with self.active() as store:
            return [event for event in journal.read(store.layout).events if event.name == name]

    def start(
        self, children: list[subprocess.Popen[str]], *arguments: str | Path, **more: str
    ) -> subprocess.Popen[str]:
        """Start the command line on this host."""
        command = [sys.executable, "-m", "ray_envcache", *map(str, arguments)]
        environ = {**os.environ, **self.environ, **more}
        child = subprocess.Popen(
            command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        children.append(child)
        return child


_NOTES = ("INSTALLER", "REQUESTED", "direct_url.json", "uv_build.json", "uv_cache.json")


def tree(host: Host, venv: Path) -> dict[str, tuple[str, str]]:
    """{path: (mode, content or target)} as if every store lay in one place; without bytecode, and what uv notes."""
    found = {}
    for folder, folders, names in os.walk(venv):
        for path in (Path(folder, name) for name in (*folders, *names)):
            mode = path.lstat().st_mode
            if "__pycache__" in path.parts or path.name in {*_NOTES, ".lock"}:
                continue
            if stat.S_ISLNK(mode):
                content = os.readlink(path).replace(str(host.root), "<store>")
            elif path.name == "RECORD":
                # Of files that a wheel did not list there is no hash, and scripts have the place of their interpreter.
                lines = sorted(line.partition(",")[0] for line in path.read_text().splitlines())
                content = "\n".join(line for line in lines if not line.endswith(_NOTES))
            else:
                text = path.read_bytes() if path.is_file() else b""
                content = hashlib.sha256(text.replace(os.fsencode(host.root), b"<store>")).hexdigest()
            found[path.relative_to(venv).as_posix()] = (oct(mode), content)
    return found


def objects(bucket: Path) -> set[str]:
    return {path.relative_to(bucket).as_posix() for path in bucket.rglob("*") if path.is_file()}
