"""The files we add to a fresh venv, and the list of packages that uv installs into it."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from ray_envcache import inside
from ray_envcache.resolve.lockfile import ResolvedSet
from ray_envcache.store.layout import Entry

_PIP_GUARD = """\
#!/bin/sh
# Written by ray-envcache in place of pip's own script.
for word in "$@"; do
    case "$word" in
    install|uninstall)
        echo "error: this environment is shared by all Ray clusters of this host and cannot be changed" >&2
        echo "hint: add the package to pyproject.toml, run \\`uv lock\\`, and start the program again" >&2
        exit 1 ;;
    esac
done
exec "$(dirname -- "$0")/python" -m pip "$@"
"""


def add_hold(entry: Entry) -> None:
    """Make every interpreter of the venv hold the entry from its start to its end."""
    # A name of its own per entry: where one environment is stacked on another, each has its hold.
    name = f"_ray_envcache_hold_{entry.key[:12]}_{entry.number}"
    source = Path(inside.__file__).with_name("hold.py").read_text("utf-8")
    (entry.site_packages / f"{name}.py").write_text(source, encoding="utf-8")
    (entry.site_packages / f"{name}.pth").write_text(f"import {name}\n", encoding="utf-8")


def add_pip_guard(entry: Entry) -> None:
    """Put a script in place of pip that refuses to change the shared environment.

    Without a script of its own, `pip` in a worker would be the pip of another Python on PATH.
    """
    names = {"pip", "pip3", *(path.name for path in entry.bin.glob("pip3.*"))}
    for name in names:
        path = entry.bin / name
        # Not written through an existing name: it could be a link to a file of uv's cache.
        path.unlink(missing_ok=True)
        path.write_text(_PIP_GUARD, encoding="utf-8")
        path.chmod(0o755)


def pylock_text(resolved: ResolvedSet) -> str:
    """The resolved set as pylock.toml: exactly one artifact per package, so that uv installs what the key names."""
    packages = [package.artifact for package in resolved.packages]
    return tomli_w.dumps({"lock-version": "1.0", "created-by": "ray-envcache", "packages": packages})
