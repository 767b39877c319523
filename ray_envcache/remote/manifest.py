"""The manifest of a published environment: a standard pylock.toml, so that uv installs a copy of the bucket without us.

    v1/<key>/pylock.toml            written last: all that it names is there
    v1/wheels/<sha256>/<name>.whl
    v1/bytecode/<sha256>.zip        of the modules of one wheel, for one Python

A signature is its last line, a comment, by an ed25519 key as `ssh-keygen -t ed25519` makes it. It covers the key of the
environment too, so that no signed manifest passes for that of another environment.
"""

from __future__ import annotations

import base64
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import tomli
import tomli_w

from ray_envcache.errors import RemoteError
from ray_envcache.remote.bucket import library

TRUST = "RAY_ENVCACHE_REMOTE_TRUST"
SIGN = "RAY_ENVCACHE_REMOTE_SIGN"
PLACE = "v1/{}/pylock.toml"
_MARK = b"# ed25519: "
_KEYS = "cryptography.hazmat.primitives.serialization"
_TOO_LARGE = 1 << 40  # for an object
_TAG = re.compile(r"[\w-][\w.-]*")


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


def written(key: str, python: str, wheels: list[Blob], packs: list[Blob]) -> bytes:
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


def parsed(content: bytes, key: str) -> Manifest:
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
