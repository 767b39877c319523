"""git, asked about the repository of a local package: never by way of the user's own settings, and without writing.

Each call names the repository, so that the answer depends neither on its owner nor on a git hook around the driver.
All users of a checkout get the same answer: what a user ignores for all repositories does not count.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ray_envcache.errors import LockfileError
from ray_envcache.system import children

# Of the others, a git hook sets those that name the hook's own repository and index.
_REACH = re.compile(
    r"GIT_(ALLOW_PROTOCOL|ASKPASS|CONFIG_(COUNT|GLOBAL|NOSYSTEM|SYSTEM|KEY_\d+|VALUE_\d+)|EXEC_PATH|HTTP_.+"
    r"|PROXY_COMMAND|SSH|SSH_COMMAND|SSH_VARIANT|SSL_.+|TERMINAL_PROMPT)"
)
_SETTINGS = ("core.excludesFile=/dev/null", "core.fsmonitor=false", "core.untrackedCache=false")


@dataclass(frozen=True)
class Repository:
    """A checkout: `top` is its folder, `directory` where git keeps the rest: `.git`, or what the file `.git` names."""

    top: Path
    directory: Path

    def files(self, folder: Path) -> dict[str, bool]:
        """What git tracks (True) or does not ignore (False) in `folder`, from there; repositories inside by their name.

        Raises LockfileError where there is no git, or git cannot read the repository.
        """
        listed = self._ask(folder, "ls-files", "-z", "-t", "--cached", "--others", "--exclude-standard", "--", ".")
        # A file in a conflict is listed once for each side.
        return {name[2:].rstrip("/"): name[0] != "?" for name in listed.split("\0") if name}

    def described(self, folder: Path) -> str:
        """The commit, and the tag that names it or the last one before it; "" before the first commit.

        Raises LockfileError as `files` does.
        """
        if not self._ask(folder, "rev-list", "--max-count=1", "--all"):
            return ""
        return self._ask(folder, "describe", "--tags", "--always", "--abbrev=40", "HEAD")

    def _ask(self, folder: Path, *arguments: str) -> str:
        named = {"GIT_DIR": os.fspath(self.directory), "GIT_WORK_TREE": os.fspath(self.top)}
        settings = [part for setting in _SETTINGS for part in ("-c", setting)]
        try:
            done = children.run(
                ["git", *settings, *arguments], environ=environ() | named, cwd=folder, decode=os.fsdecode
            )
        except FileNotFoundError as error:
            raise LockfileError(
                f"The local package in `{folder}` is in a git repository, and there is no git on this node",
                "install git, which knows the files that are no part of the package; or leave out `.git`",
            ) from error
        if done.returncode != 0:
            raise LockfileError(
                f"git cannot read the repository `{self.top}`: {done.stderr.strip()}",
                "see what `git status` says there; where it is a submodule or a worktree, git keeps the rest elsewhere",
            )
        return done.stdout


def repository_of(folder: Path) -> Repository | None:
    """The repository that `folder` is in, None where it is in none."""
    real = Path(os.path.realpath(folder))
    for place in (real, *real.parents):
        pointer = place / ".git"
        if (pointer / "HEAD").is_file():
            return Repository(place, pointer)
        if pointer.is_file():
            # Of a submodule, or of a linked worktree.
            name = pointer.read_text("utf-8", "surrogateescape").partition("gitdir:")[2].strip()
            return Repository(place, Path(os.path.normpath(place / name)))
    return None


def reaches(name: str) -> bool:
    """Whether this variable tells git how to reach other hosts, and not which repository it is in."""
    return _REACH.fullmatch(name) is not None


def environ() -> dict[str, str]:
    """Our variables without those by which a git hook, or another Python, would lead a child astray."""
    found = children.clean_environ()
    return {name: value for name, value in found.items() if not name.startswith("GIT_") or reaches(name)}
