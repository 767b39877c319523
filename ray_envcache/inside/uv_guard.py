"""The guard: what `uv` does in a program below `ray-envcache run`, whose environment is shared and never changes.

The script `path/uv` runs it with the environment's Python. It passes calls on to the next uv on PATH, which finds the
environment by UV_PROJECT_ENVIRONMENT and leaves it alone by UV_NO_SYNC. Where uv would change it all the same, or
where a program asks for packages that it does not have, the guard fails and says what to do.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

_OURS = ("UV_PROJECT_ENVIRONMENT", "UV_NO_SYNC")
_SELECTING = re.compile(
    r"--((all|no|only)-)?(extra|extras|group|groups|dev|packages)|--dev|--package|--no-default-groups|--python|-p"
)
_FIRST = ("--help", "-h", "--dry-run", "--check", "--script", "--target", "-t", "--prefix")
_WHAT = "this program runs from an environment that all Ray clusters of this host share, and that never changes"
Options = list[list[str]]


def main(words: Sequence[str]) -> NoReturn:
    """Do what `uv` with these words means here, and end as uv ends."""
    about, venv = json.loads(os.environ["RAY_ENVCACHE_RUN_ABOUT"]), os.environ["RAY_ENVCACHE_RUN"]
    uv = _next_uv() or about["uv"]
    common, rest = _options(words, uv)
    name, after = rest[:1], rest[1:]
    if name == ["pip"]:
        name, after = rest[:2], rest[2:]
    options, command = _options(after, uv, *name)
    if not any(option[0] in _FIRST for option in options):
        project = _project(common + options)
        other = os.environ.get("VIRTUAL_ENV") != venv and any(option[0] == "--active" for option in options)
        if project not in about["folders"] or other:
            _forget(about, *_OURS)
        elif name in (["run"], ["sync"]):
            _fit(uv, name[0], common, options, about, at_home=project == about["home"])
        elif name == ["venv"] and not command:
            _fail(f"{_WHAT}: `uv venv` would replace it", "leave it out, or name another folder: uv venv DIR", 2)
        elif name in (["add"], ["remove"]):
            _say(f"note: {_WHAT}: uv changes pyproject.toml and uv.lock only; start the program again for more")
        if name in (["pip", "install"], ["pip", "uninstall"], ["pip", "sync"]):
            _require_no_change(uv, venv, words, options)
    os.execv(uv, [uv, *words])  # noqa: S606  # it takes our place


def _next_uv() -> str | None:
    """The uv on PATH behind this guard."""
    found = [os.path.join(folder, "uv") for folder in os.environ.get("PATH", "").split(os.pathsep) if folder]
    guard = os.path.realpath(os.path.join(os.path.dirname(__file__), "path", "uv"))
    return next((uv for uv in found if os.access(uv, os.X_OK) and os.path.realpath(uv) != guard), None)


def _options(words: Sequence[str], uv: str, *command: str) -> tuple[Options, list[str]]:
    """The options at the start of `words`, each with its value, and the words behind them."""
    valued: set[str] = set()
    if words[:1] and words[0].startswith("-"):
        # Which options have a value says the uv that is here.
        done = subprocess.run([uv, *command, "--help"], stdout=subprocess.PIPE, text=True, check=False)
        for short, long in re.findall(r"(?m)^ +(-\w, )?(--[\w-]+) <", done.stdout):
            valued |= {short[:2], long}
    found: Options = []
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] not in {"-", "--"}:
        name, is_one, value = rest[0].partition("=")
        size = 2 if name in valued and not is_one else 1
        found.append([name, *([value] if is_one else rest[1:size])])
        rest = rest[size:]
    return found, rest


def _project(options: Options) -> str | None:
    """The folder of the project that uv finds with these options, None where there is none."""
    named = {"--directory": os.environ.get("UV_WORKING_DIR", ""), "--project": os.environ.get("UV_PROJECT", "")}
    named.update({option[0]: option[-1] for option in options if option[0] in named})
    folder = os.path.realpath(os.path.join(named["--directory"], named["--project"]) or ".")
    while not os.path.isfile(os.path.join(folder, "pyproject.toml")):
        above = os.path.dirname(folder)
        if above == folder:
            return None
        folder = above
    return folder


def _forget(about: dict[str, Any], *names: str) -> None:
    """Give uv the variables as they were before `ray-envcache run`."""
    for name in names:
        os.environ.pop(name, None)
        if name in about["before"]:
            os.environ[name] = about["before"][name]


def _fit(uv: str, name: str, common: Options, options: Options, about: dict[str, Any], *, at_home: bool) -> None:
    """Let `uv run` and `uv sync` of our project go on where the environment has what they ask for, else fail."""
    given = {option[0] for option in options}
    asked = [word for option in options if _SELECTING.fullmatch(option[0]) for word in option]
    if name == "run" and "--isolated" in given:
        _forget(about, "UV_NO_SYNC")  # uv makes another environment for it
        return
    if name == "run" and ("--no-sync" in given or "--no-project" in given or (at_home and not asked)):
        return
    places = {"--project", "--directory"}
    kept = [one for one in options if name == "sync" or one[0] in places or _SELECTING.fullmatch(one[0])]
    flags = [word for option in kept if option[0] != "--inexact" for word in option]
    check = [*(word for option in common for word in option), "sync", "--check", "--inexact", *flags]
    done = subprocess.run([uv, *check], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0 and name == "run":
        return
    _say(done.stderr.rstrip())
    if done.returncode == 0:
        sys.exit(0)
    if "is outdated" not in done.stderr:
        sys.exit(done.returncode)
    lacks = f"with what it needs: `ray-envcache run {shlex.join(asked)} -- ...`" if asked else "again, after `uv lock`"
    _fail(f"{_WHAT}: it is not what `uv {name}` asks for here", f"start the program {lacks}", done.returncode)


def _require_no_change(uv: str, venv: str, words: Sequence[str], options: Options) -> None:
    """End here if `uv pip` aims at our environment: well where nothing would change, else with an error."""
    wanted = [option[-1] for option in options if option[0] in {"--python", "-p"}] or [os.environ.get("UV_PYTHON", "")]
    system = ["--system"] if ["--system"] in options else []
    find = [uv, "python", "find", "--no-project", *system, *filter(None, wanted[-1:])]
    found = subprocess.run(find, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False).stdout
    if os.path.realpath(os.path.dirname(os.path.dirname(found))) != os.path.realpath(venv):
        return
    done = subprocess.run([uv, *words, "--dry-run"], stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode == 0 and "Would make no changes" in done.stderr:
        sys.exit(0)
    _fail(
        f"{_WHAT}: `uv {shlex.join(words)}` would change it",
        "add the package to pyproject.toml (uv add), and start the program again with `ray-envcache run`; "
        "for one command, `uv run --with NAME` has more packages",
        2,
    )


def _fail(message: str, hint: str, status: int) -> NoReturn:
    _say(f"error: {message}\nhint: {hint}")
    sys.exit(status)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
