"""What a path means: which kind of lockfile, where it lies, and which files decide what is installed.

The agent reads this for each field value: nothing here starts a process, and no TOML is parsed on its way.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import tomli

from ray_envcache.checkout import requirement_files
from ray_envcache.errors import DigestError, LockfileError

_SCRIPT_BLOCK = re.compile(rb"(?m)^# /// script$\s(?P<content>(^#(| .*)$\s)+)^# ///$")  # from PEP 723
# A package that is developed here, in uv.lock. It begins with what is rare: `(?m)^` takes ten times longer.
_LOCAL = re.compile(r'\nname = "(.*)"\n(?:version = .*\n)?source = { (?:editable|virtual|directory) = "(.*)" }\n')
_PYLOCK = re.compile(r"pylock(\.[^.]+)?\.toml")
KNOWN = "pyproject.toml, its folder, uv.lock, pylock.toml, pylock.NAME.toml, a requirements file (*.txt) or a script"


class Kind(Enum):
    """The kinds of lockfiles."""

    UV = "uv.lock"
    PYLOCK = "pylock.toml"
    REQUIREMENTS = "requirements.txt"
    SCRIPT = "script.py.lock"


class Project(NamedTuple):
    """A lockfile and what belongs to it.

    `folder` is where uv runs and relative paths start: of a workspace its root. `file` is the lockfile itself, of a
    script the script. `member` is the folder of the member that is meant, from `folder`; "." is the root.
    """

    kind: Kind
    folder: Path
    file: Path
    member: str = "."

    @classmethod
    def locate(cls, path: Path, package: str | None = None) -> Project:
        """Find what `path` and the member `package` of its workspace mean. Raises LockfileError."""
        is_folder = _is_folder(path)
        if is_folder or path.name in {"pyproject.toml", "uv.lock"}:
            return _uv_project(path if is_folder else path.parent, package)
        found = _single_file(path)
        if package is not None:
            raise LockfileError(
                f"`{path}` has no workspace with a member `{package}`", "leave out `package`, or name a pyproject.toml"
            )
        return found

    def digest(self) -> str:
        """The digest of the content that decides, "sha256:...": what a field value pins."""
        digests = {os.path.relpath(path, self.folder): self._sha256(path) for path in self.inputs()}
        return f"sha256:{hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()}"

    def checked_digest(self, pinned: str | None) -> str:
        """The digest. Raises DigestError where a field value pins other content than the files have."""
        digest = self.digest()
        if pinned not in {None, digest}:
            raise DigestError(
                f"The files in `{self.folder}` have the digest {digest[:19]}…, the field value pins {pinned:.19}…",
                "bring this node's files up to date, or make the field value anew with ray_envcache.runtime_env()",
            )
        return digest

    def inputs(self) -> list[Path]:
        """The files that decide what is installed."""
        # Of other kinds too: uv takes settings from there, and some decide what a build from source gives.
        names = ["pyproject.toml", "uv.toml", *([f"{self.member}/pyproject.toml"] if self.member != "." else [])]
        return [*self.lock_files(), *(path for name in names if (path := self.folder / name).is_file())]

    def lock_files(self) -> list[Path]:
        """The files that say which versions and hashes."""
        if self.kind is Kind.REQUIREMENTS:
            return requirement_files.files(self.file)
        return [self.file, _lock_of(self.file)] if self.kind is Kind.SCRIPT else [self.file]

    def name(self) -> str:
        """What people call it: the name in pyproject.toml, or that of the script, else that of the folder."""
        if self.kind is Kind.SCRIPT:
            return self.file.name
        name = table_in(self.table(), "project").get("name") if self.kind is Kind.UV else None
        return name if isinstance(name, str) and name.isprintable() else self.folder.name

    def members(self) -> list[Path]:
        """The folders of its workspace, the root among them."""
        return [self.folder / folder for folder in {".", *_members(self.file).values()}]

    def table(self) -> dict[str, Any]:
        """The content of the member's pyproject.toml. Raises LockfileError."""
        return read_toml(self.folder / self.member / "pyproject.toml", "see what `uv lock` says of it")

    def _sha256(self, path: Path) -> str:
        content = path.read_bytes()
        if self.kind is Kind.SCRIPT and path == self.file:
            # The rest of a script decides nothing, and changes all the time.
            content = _script_block(self.file, content)
        return hashlib.sha256(content).hexdigest()


def _is_folder(path: Path) -> bool:
    """Whether `path` is a folder. Raises LockfileError where it is not there, or this user may not look."""
    try:
        return stat.S_ISDIR(os.stat(path).st_mode)
    except OSError as error:
        raise LockfileError(
            f"Cannot look at `{path}`: {error.strerror}",
            "name what can be read here; a relative path starts in the working_dir, if there is one, else in the "
            "current directory",
        ) from error


def _uv_project(given: Path, package: str | None) -> Project:
    if not (given / "pyproject.toml").is_file():
        others = sorted(path.name for path in (*given.glob("pylock*.toml"), *given.glob("requirements*.txt")))
        hint = (
            f"name the lockfile itself, such as {others[0]}" if others else "run `uv init` there, or name another path"
        )
        raise LockfileError(f"No pyproject.toml in `{given}`", hint)
    real = Path(os.path.realpath(given))
    above = next((lock for parent in real.parents if (lock := parent / "uv.lock").is_file()), None)
    own = os.path.relpath(real, above.parent) if above else "."
    named = _members(above) if above else {}
    folders = {*named.values()} - {"."}
    # A member of a workspace may have an old lockfile of its own, which uv does not heed either. In the folder of
    # another member it is on its own, also for uv.
    is_alone = own not in folders or not folders.isdisjoint(map(str, Path(own).parents))
    lock = given / "uv.lock" if above is None or is_alone else above
    if not lock.is_file():
        unnamed = f", and `{above}` does not name it as a member" if above and own not in folders else ""
        raise LockfileError(
            f"No uv.lock beside `{given / 'pyproject.toml'}`{unnamed}",
            "run `uv lock` there; in a working_dir, see that .gitignore does not keep it out",
        )
    if package is None:
        return Project(Kind.UV, lock.parent, lock, own if lock == above else ".")
    members = named if lock == above else _members(lock)
    if package not in members:
        raise LockfileError(
            f"The workspace in `{lock.parent}` has no member `{package}`",
            f"its members: {', '.join(sorted(members))}; after adding one, run `uv lock`",
        )
    return Project(Kind.UV, lock.parent, lock, members[package])


def _members(lock: Path) -> dict[str, str]:
    """The members of a workspace by its uv.lock, {name: folder from there}; of a project of its own that project."""
    # As uv writes it: to read the whole file as TOML takes 20 ms at 300 packages, and agents come by here.
    try:
        text = lock.read_text("utf-8", "replace")
    except OSError:
        return {}  # one above the project that is not for this user to read
    manifest = re.search(r"(?s)\n\[manifest\]\n(?:.*?\n)?members = \[\n(.*?)\n\]", text)
    names = re.findall('"(.*)"', manifest[1]) if manifest else []
    return {name: folder for name, folder in _LOCAL.findall(text) if name in names or folder == "."}


def _single_file(path: Path) -> Project:
    script = path.with_suffix("") if path.name.endswith(".py.lock") else path
    if _PYLOCK.fullmatch(path.name):
        return Project(Kind.PYLOCK, path.parent, path)
    if path.suffix == ".txt":
        return Project(Kind.REQUIREMENTS, path.parent, path)
    if script.suffix != ".py":
        raise LockfileError(f"Not a kind of lockfile: `{path}`", f"name {KNOWN}")
    _script_block(script, script.read_bytes() if script.is_file() else b"")
    if not _lock_of(script).is_file():
        raise LockfileError(f"No `{_lock_of(script).name}` beside `{script}`", f"run `uv lock --script {script.name}`")
    return Project(Kind.SCRIPT, path.parent, script)


def _lock_of(script: Path) -> Path:
    return script.with_name(f"{script.name}.lock")


def _script_block(path: Path, content: bytes) -> bytes:
    """What a script says of the packages it needs (PEP 723). Raises LockfileError where it says nothing."""
    found = _SCRIPT_BLOCK.search(content.replace(b"\r\n", b"\n"))
    if found is None:
        raise LockfileError(
            f"Not a script with a `# /// script` block: `{path}`",
            f"`uv add --script {path.name} ray` writes one, `uv lock --script {path.name}` locks it; "
            "or name the project's pyproject.toml",
        )
    return found["content"]


def read_toml(path: Path, hint: str) -> dict[str, Any]:
    """The content of the file. Raises LockfileError with `hint` where it cannot be read."""
    try:
        return tomli.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LockfileError(f"Cannot read `{path}`: {error}", hint) from error


def table_in(table: dict[str, Any], *keys: str) -> dict[str, Any]:
    """The table within tables, {} where there is none."""
    for key in keys:
        found = table.get(key)
        table = found if isinstance(found, dict) else {}
    return table
