"""ray-envcache: each locked Python environment is built once per host and shared by all Ray clusters.

Importing this package registers the field: `ray.init(runtime_env={"envcache": "pyproject.toml"})`. It imports neither
ray nor anything heavy.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ray_envcache.errors import EnvCacheError, StoreError
from ray_envcache.field import registration
from ray_envcache.field.spec import EnvSpec
from ray_envcache.version import __version__ as __version__  # re-exported

if TYPE_CHECKING:
    from ray_envcache.api import Collected, Environment, Lease, Prefetched, Store, Verified, prefetch
    from ray_envcache.sessions.short_path import short_tmpdir

__all__ = [
    "Collected", "EnvCacheError", "EnvSpec", "Environment", "Lease", "Prefetched", "Store", "Verified",
    "prefetch", "runtime_env", "short_tmpdir",
]  # fmt: skip


def runtime_env(path: str | os.PathLike[str], **options: Any) -> dict[str, Any]:
    """A runtime_env for `@ray.remote`, `.options`, jobs, anything: absolute path, and the digest of the files pinned.

    The options are those of the field. With a guard: on a node without the plugin, where Ray would ignore the field,
    the task fails and says so.

    Checks what can be checked here (about 0.2 s, once per state of the files), builds nothing. Raises EnvCacheError
    where the project's files are missing, broken, outdated or do not fit this Python and ray.
    """
    from ray_envcache.field.guard import guarded  # imported when it is needed, not with ray
    from ray_envcache.hook import pinned_field

    # A string stays one, and is refused: its letters are no names.
    listed = {name: [*given] if isinstance(given, set | Iterator) else given for name, given in options.items()}
    value = {**listed, "path": os.path.abspath(os.path.expanduser(path)) if path else path}
    return guarded({"envcache": pinned_field(value)})


def __getattr__(name: str) -> Any:
    """Import what is rarely needed when it is asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = "ray_envcache.sessions.short_path" if name == "short_tmpdir" else "ray_envcache.api"
    return getattr(import_module(home), name)


if sys.platform == "win32":
    raise StoreError("ray-envcache does not run on Windows: it needs flock", "use WSL 2 or a Linux container")
registration.register(os.environ)
registration.extend()
