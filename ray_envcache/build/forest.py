"""Forests of links: a venv has what lies elsewhere as if uv had installed it there.

A layer has all that the environment below has; an environment has what it inherits of the cluster's Python. Folders
are linked whole where nothing else lies in them; where something does, what is in them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path

from ray_envcache.resolve.from_cluster import Inherited
from ray_envcache.store.layout import Entry

_OF_EACH_VENV = frozenset({".gitignore", ".lock", "CACHEDIR.TAG", "bin", "lib64", "pyvenv.cfg"})


def link(base: Entry, entry: Entry) -> None:
    """Link what the venv of `base` has into that of `entry`, where that has nothing of the same name."""
    for path in base.venv.iterdir():
        if path.name not in _OF_EACH_VENV:
            _link(path, entry.venv / path.name, _is_no_metadata)
    for script in base.bin.iterdir():
        # The interpreter of the layer is its own, and so is what `venv_files` puts in place of pip.
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
