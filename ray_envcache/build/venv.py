"""What is put into a venv: by uv, whose calls are made here; links to what lies elsewhere; and files of our own.

A layer has links to all that the environment below has; an environment to what it inherits of the cluster's Python:
as if uv had installed it there. Folders are linked whole where nothing else lies in them; where something does, what
is in them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import tomli_w

from ray_envcache import inside
from ray_envcache.errors import BuildError
from ray_envcache.resolve import uv, uv_errors
from ray_envcache.resolve.from_cluster import Inherited
from ray_envcache.resolve.lockfile import ResolvedSet
from ray_envcache.store.layout import Entry

_OF_EACH_VENV = frozenset({".gitignore", ".lock", "CACHEDIR.TAG", "bin", "lib64", "pyvenv.cfg"})
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


@dataclass(frozen=True)
class UvCalls:
    """Calls of uv in `folder`, whose settings it reads. Each keeps the builder's flock and is logged in the entry."""

    entry: Entry
    folder: Path
    project: str
    cache: Path
    flock: int
    on_line: Callable[[str], None]
    environ: Mapping[str, str] = field(default_factory=dict)
    scope: uv.Scope = uv.Scope.REACH

    def __call__(self, *arguments: str | os.PathLike[str]) -> None:
        """Run uv to its end. Raises BuildError or its kin where it fails."""
        with self.entry.build_log.open("a", encoding="utf-8") as log:

            def listen(line: str) -> None:
                # A log that cannot be written must not hide why: uv itself will say that the disk is full.
                with suppress(OSError):
                    log.write(f"{line}\n")
                self.on_line(line)

            # `uv sync` installs there; `uv pip` is told by an option.
            more, kept = {**self.environ, "UV_PROJECT_ENVIRONMENT": os.fspath(self.entry.venv)}, [self.flock]
            done = uv.run(
                arguments, cwd=self.folder, cache=self.cache, on_line=listen, pass_fds=kept, scope=self.scope, more=more
            )
        what = f"uv could not build the environment of `{self.project}`"
        uv_errors.expect_success(done, BuildError, what, f"uv itself, run in {self.folder}, shows the same")


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


def link(base: Entry, entry: Entry) -> None:
    """Link what the venv of `base` has into that of `entry`, where that has nothing of the same name."""
    for path in base.venv.iterdir():
        if path.name not in _OF_EACH_VENV:
            _link(path, entry.venv / path.name, _is_no_metadata)
    for script in base.bin.iterdir():
        # The interpreter of the layer is its own, and so is what stands in place of pip.
        if not script.name.startswith(("python", "activate", "pip")):
            _add_script(script, entry, base)


def link_inherited(packages: Iterable[Inherited], site_packages: Path) -> None:
    """Link the files of these packages of the cluster's Python into a venv's; scripts are not among them."""
    found = list(packages)
    for folder in {one.folder for one in found}:
        files = {folder / name for one in found if one.folder == folder for name in one.files}
        parents = {parent for file in files for parent in file.parents}
        _link(folder, site_packages, partial(_belongs_to, files), files | parents)


def _link(source: Path, target: Path, is_whole: Callable[[Path], bool], only: Collection[Path] | None = None) -> None:
    """Link `source` at `target`; of a folder that is there already, or that is not linked whole, what is in it."""
    is_folder = target.is_dir() and not target.is_symlink()
    if os.path.lexists(target) and not is_folder:
        return
    if source.is_dir() and (is_folder or not is_whole(source)):
        target.mkdir(exist_ok=True)
        for path in source.iterdir():
            if path.name != "__pycache__" and (only is None or path in only):
                _link(path, target / path.name, is_whole, only)
    elif not is_folder:
        target.symlink_to(source)


def _is_no_metadata(folder: Path) -> bool:
    """Whether a folder is no metadata, unless behind a link: uv takes none there for that of an installed package."""
    return not folder.name.endswith((".dist-info", ".egg-info")) or folder.is_symlink()


def _belongs_to(files: Collection[Path], folder: Path) -> bool:
    """Whether all that lies in `folder`, bytecode apart, is in `files`."""
    return all(
        Path(directory, name) in files
        for directory, _, names in os.walk(folder)
        if os.path.basename(directory) != "__pycache__"
        for name in names
    )


def _add_script(script: Path, entry: Entry, base: Entry) -> None:
    """Give `entry` a console script of `base`, run by its own interpreter, so that it sees the layer too."""
    path, was = entry.bin / script.name, os.fsencode(base.bin)
    if script.is_dir() or os.path.lexists(path):
        _link(script, path, _is_no_metadata)
        return
    # The first lines name the interpreter, one way or, where its path is long, another.
    text = script.read_bytes()
    if text.startswith(b"#!") and was in text[:1000]:
        path.write_bytes(text[:1000].replace(was, os.fsencode(entry.bin)) + text[1000:])
        path.chmod(0o755)
    else:
        path.symlink_to(script)
