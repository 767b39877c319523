"""Whether a worker could start in a new environment: run there, by its Python, as `-I -B _check.py REQUEST`.

The package is not there, so this imports the standard library only. REQUEST and the answer are JSON. Most of the time
would go into compiling what `import ray` needs. So what is known is linked or taken over, and what the check compiles
stays, for the workers that come next.
"""

from __future__ import annotations

import gc
import importlib
import json
import marshal
import os
import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from importlib.util import module_from_spec, source_from_cache, spec_from_file_location
from typing import IO, Any


def _sibling(name: str) -> Any:
    spec = spec_from_file_location(name, os.path.join(os.path.dirname(__file__), f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _provide_bytecode(site: str, shared: str, staged: str, twins: str) -> Callable[[], None]:
    """Have every module below `site` get its bytecode when it is imported.

    It stays, for whoever comes next, once what is returned was called.
    """
    pyc, original = _sibling("_pyc"), SourceFileLoader.get_data
    places = pyc.Places(os.path.join(shared, pyc.tag()), os.path.join(staged, pyc.tag()))

    def put_down(source: str, text: bytes, bytecode: bytes) -> None:
        # Without room for it the module is compiled again by whoever imports it.
        with suppress(OSError):
            os.makedirs(places.staged, exist_ok=True)
            os.makedirs(os.path.join(os.path.dirname(source), "__pycache__"), exist_ok=True)
            if not pyc.link(source, text, places):
                pyc.keep(source, text, bytecode, places)

    helper, pipe = _start_helper(put_down)

    def get_data(self: Any, path: str) -> bytes:
        if path.startswith(f"{site}/") and path.endswith(".pyc") and "/__pycache__/" in path:
            source = source_from_cache(path)
            text = pyc.read(source)
            bytecode: bytes = pyc.known(text, places) or pyc.made(source, text, twins and twins + source[len(site) :])
            if bytecode:
                marshal.dump((source, text, bytecode), pipe)
                pipe.flush()
                return bytecode
        return original(self, path)

    def wait() -> None:
        # Whatever became of the helper, modules are imported without what it should have put down.
        with suppress(BrokenPipeError):
            pipe.close()
        os.waitpid(helper, 0)

    SourceFileLoader.get_data = get_data  # type: ignore[method-assign]
    return wait


def _start_helper(put_down: Callable[[str, bytes, bytes], None]) -> tuple[int, IO[bytes]]:
    """Start a process that does so with all that is written to its pipe.

    Making files takes half as long as the import, and threads would wait for each other's interpreter lock.
    """
    reading, writing = os.pipe()
    helper = os.fork()
    if helper == 0:
        try:
            os.close(writing)
            with suppress(EOFError), open(reading, "rb") as pipe:
                while True:
                    put_down(*marshal.load(pipe))  # noqa: S302  # we wrote it
        finally:
            os._exit(0)
    os.close(reading)
    return helper, open(writing, "wb")  # closed by who waits


def main(request: str) -> None:
    """Answer with the versions of ray and Python, the prefix, and the number of holds."""
    gc.disable()  # a tenth of the import would go into looking for garbage
    asked = json.loads(request)
    wait = _provide_bytecode(*(asked[name] for name in ("site", "shared", "staged", "twins")))
    ray = importlib.import_module("ray").__version__ if asked["import_ray"] else version("ray")
    wait()
    held = [name for name, module in sys.modules.items() if name.startswith("_ray_envcache_hold") and module.HELD]
    sys.stdout.write(f"{json.dumps([ray, platform.python_version(), sys.prefix, len(held)])}\n")
    sys.stdout.flush()
    # What ray does when an interpreter ends imports dozens of modules more, and nobody needs it here.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
