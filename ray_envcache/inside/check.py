"""Whether a worker could start in a new environment: run there, by its Python, as `-I -B check.py REQUEST`.

The package is not there, so this imports the standard library only. REQUEST and the answer are JSON.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import sys
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from importlib.util import source_from_cache
from typing import Any


def _share_bytecode(site: str, shared: str, staged: str, twins: str) -> None:
    """From now on a module below `site` has bytecode before it is imported: linked from the store, or made and kept.

    `twins` is where the cluster's own Python, if it is this one, has its packages: mostly it has compiled ray.
    """
    # What `import ray` needs is read at every start of a worker. With this a build takes 0.8 s instead of 1.15 where
    # the store has the bytecode, and the first workers import ray in 0.37 s instead of 0.75. Twins make
    # the first build of a store 1.0 s instead of 1.3 (30 packages with ray, uv's cache warm).
    sys.path.insert(0, os.path.dirname(__file__))
    pyc: Any = importlib.import_module("pyc")
    del sys.path[0]
    places = pyc.Places.of_this_python(shared, staged)
    get_data = SourceFileLoader.get_data

    def provide(loader: Any, path: str) -> bytes:
        if path.startswith(f"{site}/") and path.endswith(".pyc"):
            # Without room for it Python compiles the module, and keeps nothing.
            with suppress(OSError):
                source = source_from_cache(path)
                pyc.give(source, places, twins and twins + source[len(site) :])
        return get_data(loader, path)

    SourceFileLoader.get_data = provide  # type: ignore[method-assign,assignment]


def main(request: str) -> None:
    """Answer with the versions of ray and Python, the prefix, and the number of holds."""
    gc.disable()  # a tenth of the import would go into looking for garbage
    asked = json.loads(request)
    _share_bytecode(*(asked[name] for name in ("site", "shared", "staged", "twins")))
    ray = importlib.import_module("ray").__version__ if asked["import_ray"] else version("ray")
    held = [name for name, module in sys.modules.items() if name.startswith("_ray_envcache_hold") and module.HELD]
    # After a blank line, since packages print too, and not always to the end of a line.
    sys.stdout.write(f"\n\n{json.dumps([ray, platform.python_version(), sys.prefix, len(held)])}")
    sys.stdout.flush()
    # At the end of an interpreter ray imports dozens of modules more, which the check does not need.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
