"""Finding and calling uv."""

from __future__ import annotations

import errno
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from enum import Enum
from pathlib import Path
from types import MappingProxyType

import uv

from ray_envcache.checkout import git
from ray_envcache.errors import BuildError
from ray_envcache.resolve import settings
from ray_envcache.system import children, texts

# How indexes are reached. A job may say so too, in the `env_vars` of its runtime_env.
_REACH = re.compile(
    r"UV_(DEFAULT_INDEX|EXTRA_INDEX_URL|FIND_LINKS|INDEX|INDEX_.+|INSECURE_HOST|KEYRING_PROVIDER|NATIVE_TLS"
    r"|SYSTEM_CERTS|CONCURRENT_.+|HTTP_.+|REQUEST_TIMEOUT|REQUIRE_METADATA_RANGE_REQUESTS"
    r"|API_KEY|AUTH_TOKEN|CREDENTIALS_DIR|(AZURE|GCS|S3)_ENDPOINT_URL|GITHUB_FAST_PATH_URL|GITHUB_TOKEN"
    r"|NO_GITHUB_FAST_PATH|NO_HF_TOKEN)|NETRC|SSL_CERT_(FILE|DIR)|(HTTPS?|ALL|NO)_PROXY"
)
# Where uv keeps things on this node, and what it refuses to install at all.
_NODE = re.compile(
    r"UV_(CACHE_DIR|LINK_MODE|LOCK_TIMEOUT|OFFLINE|PYTHON_CACHE_DIR|PYTHON_INSTALL_DIR|PYTHON_SEARCH_PATH"
    r"|MALWARE_CHECK|MALWARE_CHECK_URL|STACK_SIZE)"
)
_RESOLVE = re.compile(r"UV_(EXCLUDE_NEWER|FORK_STRATEGY|PRERELEASE|RESOLUTION)")
_GIVEN: ContextVar[Mapping[str, str]] = ContextVar("given", default=MappingProxyType({}))


class Scope(Enum):
    """The settings of user and system that count in a call of uv, beside those of the project."""

    PROJECT = frozenset[str]()
    REACH = settings.REACH
    USER = settings.REACH | settings.RESOLVE | settings.BUILD


def run(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    cwd: Path,
    cache: Path | None = None,
    on_line: children.OnLine | None = None,
    pass_fds: Sequence[int] = (),
    scope: Scope = Scope.REACH,
    more: Mapping[str, str] = MappingProxyType({}),
) -> children.Completed:
    """Run uv in `cwd` to its end, with the settings of the files there, and its cache at `cache`.

    What else counts, of files and of variables, says `scope`; `more` are variables beside ours. `on_line` gets each
    line of stderr as it comes.
    Credentials never leave this function. Raises LockfileError where a file with settings is broken.
    """
    environ = _environ(scope) | dict(more)
    if cache is not None:
        environ["UV_CACHE_DIR"] = os.fspath(cache)
    text, sources = settings.for_uv(cwd, scope.value)
    with file_of(text) as file:
        config = f"{settings.PLACE}/{file}"
        done = children.run(
            [find(), *arguments, f"--config-file={config}"],
            environ=environ,
            cwd=cwd,
            on_line=None if on_line is None else lambda line: on_line(without_credentials(line)),
            pass_fds=[*pass_fds, file],
        )
    return replace(done, stderr=without_credentials(done.stderr).replace(config, " or ".join(map(str, sources))))


@contextmanager
def file_of(text: str) -> Iterator[int]:
    """A file with this text, by its descriptor: it needs no room on a disk, and a SIGKILL leaves nothing."""
    memory = sys.platform == "linux"
    with os.fdopen(os.memfd_create("uv.toml"), "w+b") if memory else tempfile.TemporaryFile() as file:
        file.write(text.encode())
        file.seek(0)
        yield file.fileno()


def find() -> str:
    """The path of the uv binary: that of the uv package beside us. Raises BuildError."""
    try:
        return os.fspath(uv.find_uv_bin())
    except FileNotFoundError as error:
        raise BuildError("There is no uv on this node", "python -m pip install uv") from error


def cache_directory(near: Path) -> Path | None:
    """The user's uv cache where uv can link from it into the folder `near`, else None."""
    done = run(["cache", "dir"], cwd=Path("/"))  # not there: what lies above the store says nothing of its user's uv
    cache = Path(done.stdout.strip())
    if done.returncode != 0 or not cache.is_absolute():
        return None
    existing = next(parent for parent in [cache, *cache.parents] if parent.exists())
    return cache if _links(existing, near) and os.access(existing, os.W_OK) else None


def _links(source: Path, target: Path) -> bool:
    """Whether files in the folder `source` can have links in `target`: same file system, by the same mount.

    No kernel links a folder, but it says EXDEV only where it would not link a file either: this leaves nothing.
    """
    try:
        os.link(source, target / ".link")
    except OSError as error:
        return error.errno != errno.EXDEV and source.stat().st_dev == target.stat().st_dev
    return True


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
    return {name: value for name, value in env_vars.items() if _REACH.fullmatch(name.upper()) or git.reaches(name)}


def without_credentials(text: str) -> str:
    """The text with what is secret in every URL, and every password that uv was given, blotted out."""
    return texts.without_credentials(text, _GIVEN.get())


def _environ(scope: Scope) -> dict[str, str]:
    environ = {name: value for name, value in git.environ().items() if _passes(name, scope)}
    # Links into uv's cache would break every environment when that cache is cleaned.
    if environ.get("UV_LINK_MODE") == "symlink":
        del environ["UV_LINK_MODE"]
    if scope is not Scope.PROJECT:
        environ.update(_GIVEN.get())
    environ.update(UV_PYTHON_DOWNLOADS="never", UV_NO_PROGRESS="1", NO_COLOR="1")
    # An index that does not answer is an error within seconds, not within 10 s a try.
    environ.setdefault("UV_HTTP_RETRIES", "1")
    environ.setdefault("UV_HTTP_CONNECT_TIMEOUT", "3")
    return environ


def _passes(name: str, scope: Scope) -> bool:
    """Whether a variable reaches our calls: of those of uv none that decides what is installed."""
    if not name.startswith("UV_") or _NODE.fullmatch(name):
        return True
    reaches, resolves = _REACH.fullmatch(name) is not None, _RESOLVE.fullmatch(name) is not None
    return (reaches and scope is not Scope.PROJECT) or (resolves and scope is Scope.USER)
