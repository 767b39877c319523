"""Whether a worker could start in a new environment: run there, by its Python, as `-I -B check.py REQUEST`.

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


class _Bytecode:
    """Gives every module below `site` its bytecode when it is imported, and has it stay for whoever comes next."""

    def __init__(self, site: str, shared: str, staged: str, twins: str) -> None:
        self._site, self._twins = site, twins
        self._cut_off: set[str] = set()
        self._pyc = _sibling("pyc")
        self._places = self._pyc.Places(*(os.path.join(place, self._pyc.tag()) for place in (shared, staged)))
        self._helper, self._pipe = _start_helper(self._put_down)

    def install(self) -> None:
        """From now on the import system asks here."""
        get_data, get_code = SourceFileLoader.get_data, SourceFileLoader.get_code

        def provide(loader: Any, path: str) -> bytes:
            return self._find(path) or get_data(loader, path)

        def load(loader: Any, name: str) -> Any:
            try:
                return get_code(loader, name)
            except (EOFError, ValueError, TypeError):
                self._cut_off.add(loader.path)
                return get_code(loader, name)

        SourceFileLoader.get_data = provide  # type: ignore[method-assign,assignment]
        SourceFileLoader.get_code = load  # type: ignore[method-assign,assignment]

    def wait(self) -> None:
        """Wait until all is put down. Whatever became of the helper: modules are imported without that."""
        with suppress(BrokenPipeError):
            self._pipe.close()
        os.waitpid(self._helper, 0)

    def _find(self, path: str) -> bytes:
        """What is to be read from `path`; b"" where it is no bytecode of ours, or cannot be compiled."""
        if not (path.startswith(f"{self._site}/") and path.endswith(".pyc") and "/__pycache__/" in path):
            return b""
        source = source_from_cache(path)
        text = self._pyc.read(source)
        # Whether a twin's is whole is seen by who loads it, here and in the helper: twice here would take too long.
        found: bytes = self._pyc.known(text, self._places) or self._pyc.unproven(self._twin_of(source), text)
        compiled: bytes = b"" if found else self._pyc.made(source, text)
        if found or compiled:
            # Little, where it can: the pipe holds 64 kB, and who fills it waits.
            marshal.dump((source, compiled), self._pipe)
            self._pipe.flush()
        return found or compiled

    def _twin_of(self, source: str) -> str:
        twin: str = self._pyc.twin_of(source, self._site, self._twins)
        return "" if source in self._cut_off else twin

    def _put_down(self, source: str, compiled: bytes) -> None:
        # Without room for it the module is compiled again by whoever imports it.
        with suppress(OSError):
            text = self._pyc.read(source)
            os.makedirs(self._places.staged, exist_ok=True)
            os.makedirs(os.path.join(os.path.dirname(source), "__pycache__"), exist_ok=True)
            self._pyc.give(source, text, self._places, self._twin_of(source), compiled)


def _start_helper(put_down: Callable[[str, bytes], None]) -> tuple[int, IO[bytes]]:
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
    bytecode = _Bytecode(*(asked[name] for name in ("site", "shared", "staged", "twins")))
    bytecode.install()
    ray = importlib.import_module("ray").__version__ if asked["import_ray"] else version("ray")
    bytecode.wait()
    held = [name for name, module in sys.modules.items() if name.startswith("_ray_envcache_hold") and module.HELD]
    sys.stdout.write(f"{json.dumps([ray, platform.python_version(), sys.prefix, len(held)])}\n")
    sys.stdout.flush()
    # What ray does when an interpreter ends imports dozens of modules more, and nobody needs it here.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
