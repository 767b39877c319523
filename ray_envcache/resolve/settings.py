"""What files tell uv: which of its settings reach our calls, and from which files.

uv itself takes each setting from the project's file, else from the user's, else from the system's. Here a setting that
decides what is installed counts from the project alone, whose files are in every digest; so all users and nodes get
the same environment for the same files. Settings that say how indexes are reached count from all three.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tomli_w

from ray_envcache.checkout.project import read_toml, table_in

PLACE = "/dev/fd"
"""The folder of the uv.toml that our calls are given, by its descriptor: relative paths in it start there."""

REACH = frozenset(
    {
        "allow-insecure-host", "cache-dir", "concurrent-builds", "concurrent-downloads", "concurrent-installs",
        "extra-index-url", "find-links", "http-proxy", "https-proxy", "index", "index-strategy", "index-url",
        "keyring-provider", "link-mode", "native-tls", "no-index", "no-proxy", "offline", "python-preference",
        "system-certs",
    }
)  # fmt: skip
"""How and where uv gets things. Of these `python-preference` matters to `uv python find` alone: all other calls name
their interpreter."""

RESOLVE = frozenset(
    {
        "constraint-dependencies", "dependency-metadata", "exclude-dependencies", "fork-strategy",
        "override-dependencies", "prerelease", "prerelease-package", "resolution", "torch-backend",
    }
)  # fmt: skip
"""Which versions uv resolves: the result is the resolved set, which is in the key."""

BUILD = frozenset(
    {
        "build-constraint-dependencies", "config-settings", "config-settings-package", "exclude-newer",
        "exclude-newer-package", "extra-build-dependencies", "extra-build-variables", "no-binary", "no-binary-package",
        "no-build", "no-build-isolation", "no-build-isolation-package", "no-build-package", "no-sources",
        "no-sources-package", "preview", "preview-features", "require-build-hashes",
    }
)  # fmt: skip
"""What a build from source gives: in the key of what is built here."""


def of_project(folder: Path) -> dict[str, Any]:
    """The settings in the files of `folder`: those in uv.toml, else those in pyproject.toml. Raises LockfileError."""
    return _at(folder) or {}


def for_uv(folder: Path, from_node: frozenset[str]) -> tuple[str, list[Path]]:
    """The text of the one uv.toml for a call of uv in `folder`, and the files that it is made of.

    `from_node` are the settings that count from user and system.
    """
    place = next((place for place in (folder, *folder.parents) if _at(place) is not None), folder)
    # A folder above is not in the digest of the project.
    decides = RESOLVE | BUILD if place == folder else RESOLVE
    of_node = _node_files() if from_node else []
    found = _taken(of_project(place), place, REACH | decides | {"required-version"})
    for path in of_node:
        found = _combined(found, _taken(read_toml(path, "repair it"), path.parent, from_node))
    if found.get("link-mode") == "symlink":
        # Links into uv's cache would break every environment when that cache is cleaned.
        del found["link-mode"]
    return tomli_w.dumps(found), [_file_in(place), *of_node]


def _file_in(folder: Path) -> Path:
    return folder / ("uv.toml" if os.path.isfile(folder / "uv.toml") else "pyproject.toml")


def _at(folder: Path) -> dict[str, Any] | None:
    """The settings in the files of `folder`, None where it has none: then uv looks in the folder above."""
    path = _file_in(folder)
    if path.name == "uv.toml":
        return read_toml(path, "repair it")
    if not os.path.isfile(path):
        return None
    tool = table_in(read_toml(path, "repair it"), "tool")
    return table_in(tool, "uv") if "uv" in tool else None


def _node_files() -> list[Path]:
    """The user's uv.toml and the system's, where uv looks for them; or the one that $UV_CONFIG_FILE names instead."""
    if given := os.environ.get("UV_CONFIG_FILE"):
        return [Path(given)]
    user = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    system = (os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg").split(":")
    return [path for folder in (user, *system, "/etc") if (path := Path(folder, "uv", "uv.toml")).is_file()]


def _taken(found: dict[str, Any], folder: Path, names: frozenset[str]) -> dict[str, Any]:
    """The settings with these names of a file in `folder`, where their relative paths start."""
    return {name: _from_place(name, value, folder) for name, value in found.items() if name in names}


def _from_place(name: str, value: Any, folder: Path) -> Any:
    """The value with relative paths from PLACE. They must stay relative: as such they are in uv.lock."""
    if name == "index" and isinstance(value, list):
        return [{**one, "url": _from_place("index-url", one["url"], folder)} for one in value]
    if isinstance(value, list):
        return [_from_place(name, one, folder) for one in value]
    is_path = name in {"cache-dir", "extra-index-url", "find-links", "index-url"} and isinstance(value, str)
    if not is_path or "://" in value or os.path.isabs(value):
        return value
    return os.path.relpath(os.path.abspath(folder / value), PLACE)


def _combined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Both, as uv combines files: lists one after the other, else the first file counts."""
    lists = {name: [*first[name], *second[name]] for name in first.keys() & second if isinstance(first[name], list)}
    return {**second, **first, **lists}
