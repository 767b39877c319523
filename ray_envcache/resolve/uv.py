"""Finding and calling uv, and reading what it says when it fails."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MappingProxyType

import uv

from ray_envcache.errors import BuildError, DiskFullError, EnvCacheError
from ray_envcache.system import children, disk, secrets
from ray_envcache.system.children import clean_environ

_REACH = re.compile(
    r"UV_(INDEX|DEFAULT_INDEX|EXTRA_INDEX_URL|FIND_LINKS|KEYRING_PROVIDER|INSECURE_HOST|NATIVE_TLS|SYSTEM_CERTS"
    r"|INDEX_.*|HTTP_.*|CONCURRENT_.*)|NETRC|SSL_CERT_(FILE|DIR)|(HTTPS?|ALL|NO)_PROXY|GIT_.*"
)
_GIVEN: ContextVar[Mapping[str, str]] = ContextVar("given", default=MappingProxyType({}))
_FULL_PLACE = re.compile(r"`(/[^`\n]*)`: (?:No space left on device|Disk quota exceeded)")
# Settings of a surrounding `uv run` or of the user's shell that would change what we ask for.
_FOREIGN = frozenset(
    {
        "UV_ACTIVE", "UV_COMPILE_BYTECODE", "UV_DEV", "UV_FROZEN", "UV_ISOLATED", "UV_LOCKED", "UV_MANAGED_PYTHON",
        "UV_NO_CACHE", "UV_NO_DEV", "UV_NO_EDITABLE", "UV_NO_MANAGED_PYTHON", "UV_NO_SYNC", "UV_OUTPUT_FORMAT",
        "UV_PROJECT", "UV_PROJECT_ENVIRONMENT", "UV_PYTHON", "UV_PYTHON_PREFERENCE", "UV_QUIET", "UV_SYSTEM_PYTHON",
        "UV_VENV_CLEAR", "UV_VENV_RELOCATABLE", "UV_VENV_SEED", "UV_VERBOSE", "UV_WORKING_DIR",
    }
)  # fmt: skip


def run(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path,
    cache: Path | None = None,
    on_line: children.OnLine | None = None,
    pass_fds: Sequence[int] = (),
) -> children.Completed:
    """Run uv to its end, as `running` does. `on_line` as for `Finish`."""
    with running(arguments, cwd=cwd, cache=cache, pass_fds=pass_fds) as finish:
        return finish(on_line)


@contextmanager
def running(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path,
    cache: Path | None = None,
    pass_fds: Sequence[int] = (),
) -> Iterator[children.Finish]:
    """Run uv in `cwd` (whose settings it reads) with its cache at `cache`; credentials never leave what it gives."""
    environ = _environ()
    if cache is not None:
        environ["UV_CACHE_DIR"] = os.fspath(cache)
    with children.running([find(), *arguments], environ=environ, cwd=cwd, pass_fds=pass_fds) as finish:

        def without_secrets(on_line: children.OnLine | None = None) -> children.Completed:
            done = finish(None if on_line is None else lambda line: on_line(without_credentials(line)))
            return children.Completed(done.returncode, done.stdout, without_credentials(done.stderr))

        yield without_secrets


def find() -> str:
    """The path of the uv binary: that of the uv package beside us, else the one on PATH."""
    try:
        return os.fspath(uv.find_uv_bin())
    except FileNotFoundError as error:
        raise BuildError("There is no uv on this node", "python -m pip install uv") from error


def version() -> str:
    """The version of the uv package beside us, "" where uv is only on PATH."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("uv")
    except PackageNotFoundError:
        return ""


def cache_directory(near: Path) -> Path | None:
    """The user's uv cache where uv can link from it into `near`, else None: links do not cross file systems."""
    done = run(["cache", "dir"], cwd=near)
    cache = Path(done.stdout.strip())
    if done.returncode != 0 or not cache.is_absolute():
        return None
    existing = next(parent for parent in [cache, *cache.parents] if parent.exists())
    return cache if existing.stat().st_dev == near.stat().st_dev and os.access(existing, os.W_OK) else None


def said(stderr: str) -> str:
    """What uv gave as its reason: from the first line that says `error`, without its own hints."""
    lines = stderr.strip().splitlines()
    start = next(
        (number for number, line in enumerate(lines) if line.lstrip(" \N{MULTIPLICATION SIGN}x").startswith("error")), 0
    )
    reason = "\n".join(lines[start:])
    return reason.split("\nhint:")[0].strip().removeprefix("error: ")


@contextmanager
def variables(env_vars: Mapping[str, str]) -> Iterator[None]:
    """Let uv have what `env_vars` of a runtime_env say of indexes, proxies and credentials, while the context lasts."""
    token = _GIVEN.set(relevant(env_vars))
    try:
        yield
    finally:
        _GIVEN.reset(token)


def relevant(env_vars: Mapping[str, str]) -> dict[str, str]:
    """Those of the variables that tell uv how to reach indexes; nothing that changes what is built, or where."""
    return {name: value for name, value in env_vars.items() if _REACH.fullmatch(name.upper())}


def without_credentials(text: str) -> str:
    """The text with what is secret in every URL, and every password that uv was given, blotted out."""
    return secrets.without_credentials(text, _GIVEN.get())


def is_unreachable(stderr: str) -> bool:
    """Whether uv failed for want of an answer from an index."""
    signs = (
        "error sending request",
        "client error (Connect)",
        "dns error",
        "Failed to fetch",
        "timed out",
        "Request failed",
    )
    return any(sign in stderr for sign in signs)


def is_unauthorized(stderr: str) -> bool:
    """Whether an index asked for credentials that uv does not have."""
    return any(sign in stderr for sign in ("401 Unauthorized", "403 Forbidden", "Missing credentials"))


def is_disk_full(stderr: str) -> bool:
    """Whether the disk, or the user's quota, had no room."""
    return any(
        sign in stderr for sign in ("No space left on device", "Disk quota exceeded", "os error 28", "os error 122")
    )


def full_place(stderr: str) -> Path | None:
    """The path at which uv found no room, where it names one."""
    found = _FULL_PLACE.search(stderr)
    return Path(found[1]) if found else None


def require_not_killed(done: children.Completed, who: str = "uv") -> None:
    """Raise BuildError where a signal ended the child: then what it said so far is not the reason."""
    if done.killed:
        raise BuildError(
            f"{who} was {done.killed} before it was done",
            "try again; if nobody killed it, the kernel did because this node has too little memory (dmesg says so)",
        )


def expect_success(done: children.Completed, kind: type[EnvCacheError], what: str, hint: str) -> None:
    """Turn a failure of uv into an error of ours that quotes its reason."""
    require_not_killed(done)
    if done.returncode == 0:
        return
    if is_disk_full(done.stderr):
        # That says nothing about what was asked: uv keeps notes in its cache even where it only reads.
        place = full_place(done.stderr) or Path(tempfile.gettempdir())
        raise DiskFullError(
            f"No space left for uv to work: {said(done.stderr)}; {disk.room_left(place)}",
            "make room there, or move what uv writes there: UV_CACHE_DIR, TMPDIR",
        )
    raise kind(f"{what}: {said(done.stderr) or f'uv ended with status {done.returncode}'}", hint)


def _environ() -> dict[str, str]:
    environ = {name: value for name, value in clean_environ().items() if name not in _FOREIGN}
    # Links into uv's cache would break every environment when that cache is cleaned.
    if environ.get("UV_LINK_MODE") == "symlink":
        del environ["UV_LINK_MODE"]
    environ.update(_GIVEN.get())
    environ.update(UV_PYTHON_DOWNLOADS="never", UV_NO_PROGRESS="1", NO_COLOR="1")
    # An index that does not answer is an error within seconds, not within 10 s a try.
    environ.setdefault("UV_HTTP_RETRIES", "1")
    environ.setdefault("UV_HTTP_CONNECT_TIMEOUT", "3")
    return environ
