"""The identity of an environment."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray_envcache.resolve.interpreter import Interpreter
    from ray_envcache.resolve.lockfile import ResolvedPackage, ResolvedSet

SCHEMA = 2
"""Increased when equal inputs give other bytes on disk."""

LAYER_SCHEMA = 3
"""Raised when the same inputs of a layer would give other bytes on disk."""

KEY_LENGTH = 32
"""Hex digits of a key: 128 bits, short enough for shebangs and for people."""


def compute_key(resolved: ResolvedSet, interpreter: Interpreter, outside: Sequence[Any] = ()) -> str:
    """The key of the environment with these packages, for this interpreter.

    Everything that changes what is installed changes the key, and nothing else does: not comments, not the order of a
    file, not artifacts for other platforms, not the project's name or place. `outside` is what it uses from elsewhere.
    """
    packages = [[package.name, package.version, package.kind, content_of(package)] for package in resolved.packages]
    identity = {
        "schema": SCHEMA,
        "packages": sorted(packages),
        "interpreter": interpreter.identity(),
        "build_settings": resolved.build_settings if resolved.is_built_here else "",
        "outside": list(outside),
    }
    return digest_of(identity)[:KEY_LENGTH]


def layer_key(base: str, content: str, build_settings: str) -> str:
    """The key of the layer with this content, built with these settings, on the environment with the key `base`.

    The settings stand in the root of the workspace, which is often no package of the layer.
    """
    identity = {"schema": LAYER_SCHEMA, "layer on": base, "content": content, "build_settings": build_settings}
    return digest_of(identity)[:KEY_LENGTH]


def digest_of(data: Any) -> str:
    """sha256 over canonical JSON: unambiguous, unlike hashes over joined strings."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def content_of(package: ResolvedPackage) -> list[str]:
    """What tells the artifact of a package from another one: its digest, else all that is known of its origin."""
    if not package.digest:
        return [json.dumps(package.artifact, sort_keys=True, default=str)]
    # One commit, or one archive, may hold several projects.
    return [package.digest, package.artifact.get(package.kind, {}).get("subdirectory", "")]
