"""A layer's venv as a forest of links: it has all that the environment below has, as if uv had installed both in one.

Whole folders are linked where nothing of the layer lies in them; where something does, what is in them.
"""

from __future__ import annotations

import os
from pathlib import Path

from ray_envcache.store.layout import Entry

_OF_EACH_VENV = frozenset({".gitignore", ".lock", "CACHEDIR.TAG", "bin", "lib64", "pyvenv.cfg"})
_METADATA = (".dist-info", ".egg-info")


def link(base: Entry, entry: Entry) -> None:
    """Link what the venv of `base` has into that of `entry`, where that has nothing of the same name."""
    for path in base.venv.iterdir():
        if path.name not in _OF_EACH_VENV:
            _link(path, entry.venv / path.name)
    for script in base.bin.iterdir():
        # The interpreter of the layer is its own, and so is what `venv_files` puts in place of pip.
        if not script.name.startswith(("python", "activate", "pip")):
            _add_script(script, entry, base)


def _link(source: Path, target: Path) -> None:
    """Link `source` at `target`; where both are folders, what is in it."""
    # uv takes no metadata for that of an installed package that is behind a link.
    is_own = source.name.endswith(_METADATA) and not source.is_symlink() and source.is_dir()
    if is_own or (target.is_dir() and not target.is_symlink() and source.is_dir()):
        target.mkdir(exist_ok=True)
        for path in source.iterdir():
            if path.name != "__pycache__":
                _link(path, target / path.name)
    elif not os.path.lexists(target):
        target.symlink_to(source)


def _add_script(script: Path, entry: Entry, base: Entry) -> None:
    """Give `entry` a console script of `base`, run by its own interpreter, so that it sees the layer too."""
    path, was = entry.bin / script.name, os.fsencode(base.bin)
    if script.is_dir() or os.path.lexists(path):
        _link(script, path)
        return
    # The first lines name the interpreter, one way or, where its path is long, another.
    text = script.read_bytes()
    if text.startswith(b"#!") and was in text[:1000]:
        path.write_bytes(text[:1000].replace(was, os.fsencode(entry.bin)) + text[1000:])
        path.chmod(0o755)
    else:
        path.symlink_to(script)
