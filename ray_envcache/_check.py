"""Whether a worker could start in a new environment: run there, by its Python, as `-I -B _check.py REQUEST`.

The package is not there, so this imports the standard library only. REQUEST and the answer are JSON. Most of the time
would go into compiling what `import ray` needs. So what is known is linked or taken over, and what the check compiles
stays, for the workers that come next.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from types import CodeType
from typing import Any


def _sibling(name: str) -> Any:
    spec = spec_from_file_location(name, os.path.join(os.path.dirname(__file__), f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _provide_bytecode(site: str, shared: str, staged: str, twins: str) -> None:
    """Have every module below `site` get its bytecode when it is imported."""
    pyc, original = _sibling("_pyc"), SourceFileLoader.get_code
    places = pyc.Places(os.path.join(shared, pyc.tag()), os.path.join(staged, pyc.tag()))
    os.makedirs(places.staged, exist_ok=True)

    def get_code(self: Any, name: str) -> CodeType | None:
        path = str(self.get_filename(name))
        if path.startswith(f"{site}/"):
            # Without room for it, or broken, the module is compiled as ever, and not written.
            with suppress(OSError):
                os.makedirs(os.path.join(os.path.dirname(path), "__pycache__"), exist_ok=True)
                text = pyc.read(path)
                if not pyc.link(path, text, places):
                    pyc.make(path, text, places, twins and twins + path[len(site) :])
        return original(self, name)

    SourceFileLoader.get_code = get_code  # type: ignore[assignment, method-assign]


def main(request: str) -> None:
    """Answer with the versions of ray and Python, the prefix, and the number of holds."""
    asked = json.loads(request)
    _provide_bytecode(*(asked[name] for name in ("site", "shared", "staged", "twins")))
    ray = importlib.import_module("ray").__version__ if asked["import_ray"] else version("ray")
    held = [name for name, module in sys.modules.items() if name.startswith("_ray_envcache_hold") and module.HELD]
    sys.stdout.write(f"{json.dumps([ray, platform.python_version(), sys.prefix, len(held)])}\n")


if __name__ == "__main__":
    main(sys.argv[1])
