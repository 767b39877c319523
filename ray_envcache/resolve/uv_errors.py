"""What a failed uv says, told apart by cause: each has its type of error, a hint, and where uv is terse its words."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ray_envcache.errors import BuildError, DiskFullError, EnvCacheError, InterpreterError, LockfileError, PassingError
from ray_envcache.system import children, disk

_ERROR = re.compile(r"(?ms)^[ \N{MULTIPLICATION SIGN}x]*error.*")
_FULL = re.compile(r"(?:`(/[^`\n]*)`: )?(?:No space left on device|Disk quota exceeded)|os error (?:28|122)\b")


class _Cause(NamedTuple):
    """A reason for which uv fails, by its sign in what uv says; groups of the sign fill the hint.

    The error is of `kind`, by default that of the call, and has `words` before those of uv.
    """

    sign: str
    kind: type[EnvCacheError] | None
    words: str
    hint: str


# The first that fits counts: what this node lacks, what an index says, what is built, what the lockfile is.
# fmt: off
_CAUSES = tuple(_Cause(*one) for one in (
    (r"Failed to initialize cache at|`/.*`: (Permission denied|Read-only file system)", BuildError,
     "uv cannot write where it has to: ", "let this user write there, or choose another place: UV_CACHE_DIR, TMPDIR"),
    (r"when waiting for lock on", PassingError, "",
     "try again when the uv that keeps others out, such as `uv cache clean`, is done; or set UV_LOCK_TIMEOUT"),
    (r"variable `UV_\w+` with invalid value|invalid value '.*' for '--", BuildError,
     "uv cannot read a variable: ", "mend the variable UV_... of this node that says so"),
    (r"Failed to parse: `?(.*?)`?\n(.|\n)*TOML parse error", LockfileError,
     "uv cannot read a setting: ", "mend that setting in {0}"),
    (r"Required uv version `(.*?)` does not match", BuildError, "",
     'python -m pip install "uv{0}" with the Python of ray-envcache here, or relax it in uv.toml or `[tool.uv]`'),
    (r"No interpreter found for (?:.* )?(\S+) in ", InterpreterError, "",
     "`uv python install {0}`, or name one that is here (--python): `uv python list` shows them"),
    (r"Failed to inspect Python interpreter|which is incompatible with", InterpreterError, "",
     "name a Python that fits and starts: `uv python list` shows those that are here"),
    (r"401 Unauthorized|403 Forbidden|Missing credentials|lack of valid authentication", None,
     "an index wants credentials (401 Unauthorized or 403 Forbidden): ",
     "set them as uv takes them, on this node: UV_INDEX_<NAME>_USERNAME and _PASSWORD, netrc or keyring"),
    (r"invalid peer certificate", None, "",
     "tell uv which certificates to trust: SSL_CERT_FILE, or UV_SYSTEM_CERTS=1 for those of this node"),
    (r"(?i)network (connectivity is|was) disabled", None, "",
     "unset UV_OFFLINE, or `offline` in a uv.toml, until uv has fetched what is missing"),
    (r"404 Not Found|410 Gone", None, "",
     "set an index that has it (UV_DEFAULT_INDEX, uv.toml); where it was withdrawn, `uv lock --upgrade`"),
    (r"error sending request|client error \(Connect\)|dns error|Failed to fetch|timed out|Request failed", PassingError,
     "an index does not answer: ", "see that this node reaches the index; proxies and mirrors are set as for uv"),
    (r"Hash mismatch for `(.*?)=", None, "",
     "the index serves another file than was locked; if that is right, `uv lock --upgrade-package {0}`"),
    (r"Git executable not found|Git operation failed", None, "",
     "see that this node has git, reaches that repository, and finds the commit there"),
    (r"marked as `--no-build`|uilding .*is disabled|source is disabled", None, "",
     "lock versions that have a wheel for this platform, or leave out `no_build`, in `[tool.uv]` `no-build`"),
    (r"uild backend|ailed to (download and )?build|build-system\.requires", None, "",
     "`uv sync` in its folder shows the same; what the build needs (a compiler, headers) must be on this node"),
    (r"Expected `--hash`, found|Unexpected '-'", None, "",
     "leave out that option of pip; how packages are built says a uv.toml beside (`config-settings` and others)"),
    (r"Git sources cannot be editable", None, "", "write `name @ git+https://...@COMMIT` instead"),
    (r"Distribution not found at: file:", None,
     "a local package is not on this node: ", "path dependencies travel in the working_dir only if they lie inside it"),
    (r"unsupported schema version", None, "",
     "upgrade uv on this node (python -m pip install --upgrade uv), or lock with the uv version that is here"),
    (r"Failed to parse `(.*)`", None, "",
     "restore {0} from version control, or remove it and lock again: `uv lock` reads it too"),
    (r"are incompatible with the|cannot be used with", None, "",
     "leave out one of them, they do not go together; a default group with `no_groups` (--no-group)"),
    (r"does not have a member", None, "", "after adding or removing one, run `uv lock`"),
    (r"is not defined", None, "", "extras and groups are those of pyproject.toml; after adding one, run `uv lock`"),
))
# fmt: on


def expect_success(done: children.Completed, kind: type[EnvCacheError], what: str, hint: str) -> None:
    """Raise the error for a uv that failed at `what`: of the cause that it names, else of `kind`.

    The hint is that of the cause, else uv's own, else `hint`.
    """
    if done.returncode != 0:
        raise error_of(done, kind, what, hint)


def error_of(done: children.Completed, kind: type[EnvCacheError], what: str, hint: str) -> EnvCacheError:
    """The error that `expect_success` raises."""
    if done.killed:
        return killed(done)
    reason = _said(done.stderr) or f"uv ended with status {done.returncode}"
    if full := _FULL.search(done.stderr):
        # That says nothing about what was asked: uv keeps notes in its cache even where it only reads.
        room = f"; {disk.room_left(Path(full[1]))}" if full[1] else ""
        return DiskFullError(
            f"No space left for uv to work: {reason}{room}",
            "make room there (ray-envcache list shows what the store holds), or move what uv writes there: "
            "RAY_ENVCACHE_DIR, UV_CACHE_DIR, TMPDIR",
        )
    for cause in _CAUSES:
        if found := re.search(cause.sign, done.stderr):
            return (cause.kind or kind)(f"{what}: {cause.words}{reason}", cause.hint.format(*found.groups()))
    # What brought a package along is no cure.
    told = re.findall(r"(?m)^hint: (?!.* was included because )(.*)", done.stderr)
    return kind(f"{what}: {reason}", told[-1] if told else hint)


def killed(done: children.Completed, who: str = "uv") -> PassingError:
    """The error for a child that a signal ended: then what it said so far is not the reason."""
    hint = "try again; the kernel kills it where this node has too little memory (dmesg says so)"
    return PassingError(f"{who} was {done.killed} before it was done", hint)


def _said(stderr: str) -> str:
    """The reason that uv gives: from the first line that says `error`, without its own hints, at no great length."""
    found = _ERROR.search(stderr)
    reason = (found[0] if found else stderr).split("\nhint:")[0].strip().removeprefix("error: ")
    first, _, rest = reason.partition("\n")
    return "\n".join([first, *rest.splitlines()[-25:]])
