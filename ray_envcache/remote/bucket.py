"""The bucket of the remote tier, and the manifests in it.

    v1/<key>/pylock.toml            the manifest of an environment, written last: all that it names is there
    v1/wheels/<sha256>/<name>.whl
    v1/bytecode/<sha256>.zip        of the modules of one wheel, for one Python

A manifest is a standard pylock.toml, so that uv installs a copy of the bucket without us. A signature is its last line,
a comment, by an ed25519 key as `ssh-keygen -t ed25519` makes it. It covers the key of the environment too, so that no
signed manifest passes for that of another environment.
"""

from __future__ import annotations

import base64
import importlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import tomli
import tomli_w

from ray_envcache.errors import RemoteError
from ray_envcache.system.texts import needs_extra, without_credentials

VARIABLE = "RAY_ENVCACHE_REMOTE"
TRUST = "RAY_ENVCACHE_REMOTE_TRUST"
SIGN = "RAY_ENVCACHE_REMOTE_SIGN"
PLACE = "v1/{}/pylock.toml"
_CLIENT = {"allow_http": True, "connect_timeout": "3s", "timeout": "10m"}
# Without progress. Writers have none: an upload gets no answer before its end.
_READER = {**_CLIENT, "read_timeout": "10s"}
# A manifest is small: a server that sends it byte by byte must not keep a node from building.
_ASKING = {**_READER, "timeout": "30s"}
_RETRIES = {"retry_config": {"max_retries": 1}}
_MARK = b"# ed25519: "
_KEYS = "cryptography.hazmat.primitives.serialization"
_TOO_LARGE = 1 << 40  # for an object
_TAG = re.compile(r"[\w-][\w.-]*")


class Bucket:
    """What is below a URL: s3://, gs://, az://, file://, or http(s)://, which is read only. Nothing is ever removed.

    The library obstore finds credentials by its own chain. Methods raise RemoteError where the object store does not
    answer, or refuses.
    """

    def __init__(self, url: str, *, writes: bool = False) -> None:
        self.url, open_url = without_credentials(url), library("obstore.store").from_url
        if not re.match(r"file:///|(?!file:)[a-z0-9]+://[^/]", url):
            raise RemoteError(f"Not a bucket: `{self.url}`", "write s3://bucket/prefix, or file:///folder")
        self._errors = (library("obstore.exceptions").BaseError, OSError, ValueError)
        clients = [{"client_options": one, **_RETRIES} for one in (_ASKING, _CLIENT if writes else _READER)]
        with self._explained():
            ways = [{"mkdir": writes}] * 2 if url.startswith("file:") else clients
            self._asked, self._store = (open_url(url, **way) for way in ways)

    def read(self, name: str) -> bytes | None:
        """A small object, None where there is none."""
        with self._explained(), suppress(FileNotFoundError):
            return bytes(self._asked.get(name).bytes())
        return None

    def part(self, name: str, start: int, end: int) -> memoryview:
        """A part of an object, all of it."""
        with self._explained():
            found = memoryview(self._store.get_range(name, start=start, end=end))
            if len(found) != end - start:
                raise ValueError(f"{name} ends early")
            return found

    def has(self, name: str) -> bool:
        """Whether there is such an object."""
        with self._explained(), suppress(FileNotFoundError):
            return bool(self._store.head(name))
        return False

    def write(self, name: str, content: Any) -> None:
        """Make an object of bytes or of an open file. Others see it whole or not at all."""
        with self._explained():
            self._store.put(name, content)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            # The library shows all of an answer, which may name the access key, and then its own insides.
            text = re.sub(r"<\?xml.*<Code>(\w+)</Code>.*|Debug source:.*", r"\1", str(error), flags=re.DOTALL)
            reason = " ".join(without_credentials(text).split())[:400]
            hint = f"see whether this host reaches ${VARIABLE}, and has credentials and a region for it"
            raise RemoteError(f"`{self.url}`: {type(error).__name__}: {reason}", hint) from None


def library(name: str) -> Any:
    """A module of a library of the extra `remote`. Raises RemoteError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RemoteError(f"Buckets need the library {name.partition('.')[0]}", needs_extra("remote")) from error


class Blob(NamedTuple):
    """An object that is named after its content: a wheel, of a package with this name and version, or bytecode."""

    path: str
    sha256: str
    size: int
    name: str = ""
    version: str = ""


class Manifest(NamedTuple):
    """What is published of one environment; `text` is for uv. `python` tells whose bytecode it is, see `pyc.tag`."""

    python: str
    wheels: list[Blob]
    packs: list[Blob]
    text: str


def manifest_of(key: str, python: str, wheels: list[Blob], packs: list[Blob]) -> bytes:
    """The manifest of `key`, signed where $RAY_ENVCACHE_REMOTE_SIGN says so. Raises RemoteError."""
    return signed(_text(key, python, wheels, packs).encode(), key)


def _text(key: str, python: str, wheels: list[Blob], packs: list[Blob]) -> str:
    packages = []
    for one in wheels:
        place = {"name": os.path.basename(one.path), "path": f"../{one.path.removeprefix('v1/')}", "size": one.size}
        table = {**place, "hashes": {"sha256": one.sha256}}
        packages.append({"name": one.name, "version": one.version, "wheels": [table]})
    own = {"key": key, "python": python, "packs": [{"sha256": one.sha256, "size": one.size} for one in packs]}
    data = {"lock-version": "1.0", "created-by": "ray-envcache", "packages": packages, "tool": {"ray-envcache": own}}
    return tomli_w.dumps(data)


def parse(content: bytes, key: str) -> Manifest:
    """The manifest of `key`. Raises RemoteError where it is damaged, or of another environment."""
    try:
        data = tomli.loads(content.decode())
        own, wheels = data["tool"]["ray-envcache"], [_wheel(package) for package in data["packages"]]
        packs = [Blob(f"v1/bytecode/{one['sha256']}.zip", one["sha256"], +one["size"]) for one in own["packs"]]
        is_true = all(type(one.size) is int and 0 <= one.size < _TOO_LARGE for one in wheels + packs)
        if is_true and own["key"] == key and _TAG.fullmatch(own["python"]):
            # Written anew: uv would heed markers too, and other places of a package.
            return Manifest(own["python"], wheels, packs, _text(key, own["python"], wheels, packs))
        reason = "is that of another environment, or has impossible sizes"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = f"is damaged: {error!r}"[:200]
    raise RemoteError(f"The manifest `{PLACE.format(key)}` {reason}", "publish it again: ray-envcache push")


def _wheel(package: dict[str, Any]) -> Blob:
    table = package["wheels"][0]
    path = f"v1/{table['path'].removeprefix('../')}"
    return Blob(path, table["hashes"]["sha256"], +table["size"], str(package["name"]), package["version"])


def signed(body: bytes, key: str) -> bytes:
    """The text of a manifest, with a signature where $RAY_ENVCACHE_REMOTE_SIGN is the path of a private key."""
    path = os.environ.get(SIGN)
    if not path:
        return body
    try:
        private = library(_KEYS).load_ssh_private_key(Path(path).read_bytes(), None)
        return body + _MARK + base64.b64encode(private.sign(_message(body, key))) + b"\n"
    except (OSError, ValueError, TypeError) as error:
        raise RemoteError(f"{SIGN} has no usable key: {error}", "make one: ssh-keygen -t ed25519 -N ''") from error


def is_as_signed_here(content: bytes, key: str) -> bool:
    """Whether a manifest has the signature that we would give it; where we give none, any will do."""
    return content.startswith(signed(content.partition(_MARK)[0], key))


def require_signature(content: bytes, key: str) -> None:
    """Raise RemoteError where $RAY_ENVCACHE_REMOTE_TRUST, a public key or its path, has not signed this manifest."""
    trusted = os.environ.get(TRUST)
    if trusted:
        load, (body, _, signature) = library(_KEYS).load_ssh_public_key, content.rpartition(_MARK)
        try:
            public = load(trusted.encode() if trusted.startswith("ssh-") else Path(trusted).read_bytes())
            # Strictly: else lines after the signature would be taken for signed.
            public.verify(base64.b64decode(signature.removesuffix(b"\n"), validate=True), _message(body, key))
        except Exception as error:  # of the library too: in each case the key did not sign this
            what = f"The manifest of {key} is not signed by the key of {TRUST}: {type(error).__name__} {error}"
            raise RemoteError(what, f"publish it again with {SIGN}") from error


def _message(body: bytes, key: str) -> bytes:
    return f"ray-envcache {key}\n".encode() + body
