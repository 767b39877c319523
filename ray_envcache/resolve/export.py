"""Any kind of lockfile in the one form of pylock.toml, as uv or the file itself has it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

from packaging.utils import canonicalize_name

from ray_envcache.checkout import requirements, toml
from ray_envcache.checkout.project import Kind, Project
from ray_envcache.errors import LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import uv
from ray_envcache.resolve.interpreter import Interpreter
from ray_envcache.resolve.uv import Scope
from ray_envcache.system import children


def export(spec: EnvSpec, project: Project, interpreter: Interpreter) -> dict[str, Any]:
    """The project's lockfile as the tables of a pylock.toml. Paths in it start from the project's folder.

    Installs nothing; for a requirements file alone uv asks the index. Raises LockfileError.
    """
    _refuse_options(spec, project)
    return _READERS[project.kind](spec, project, interpreter)


@contextmanager
def require_current(project: Project, executable: str) -> Iterator[None]:
    """Raise LockfileError where uv.lock no longer matches pyproject.toml, or a script's lock the script.

    At the end of the context: uv looks while others ask the interpreter and read the lockfile, and what they find wrong
    says more.
    """
    if project.kind not in {Kind.UV, Kind.SCRIPT}:
        yield
        return
    script = [f"--script={project.file.name}"] if project.kind is Kind.SCRIPT else []
    check = ["lock", "--check", *script, f"--python={executable}"]
    with uv.running([*check, "--offline"], cwd=project.folder, scope=Scope.USER) as finish:
        yield
        done = finish()
    if done.returncode != 0:
        done = _checked_again(done, check, project)
    lock, source = project.lock_files()[-1].name, project.file.name if script else "pyproject.toml"
    what = f"{lock} in `{project.folder}` no longer matches {source}"
    hint = f"run `uv lock{' --script ' if script else ''}{source if script else ''}`"
    if done.returncode != 0 and "not found in the cache" in done.stderr:
        # A package was added. uv, which was to ask no index, calls that a conflict: there is none.
        raise LockfileError(what, hint)
    uv.expect_success(done, LockfileError, what, hint)


def _checked_again(done: children.Completed, check: list[str], project: Project) -> children.Completed:
    """What uv says of a lockfile that it refused, where that may be due to something else than the lockfile."""
    if "build" in done.stderr:
        # A local package with dynamic metadata is built to know what it needs, and its build may need an index.
        done = uv.run(check, cwd=project.folder, scope=Scope.USER)
    if done.returncode == 0:
        return done
    # The user may have locked with other settings than this node has: a mirror, or `exclude-newer`.
    alone = uv.run([*check, "--offline"], cwd=project.folder, scope=Scope.PROJECT)
    if alone.returncode == 0:
        return alone
    _require_local_folders(project)
    return done


def local_sources(lock: Path) -> list[str]:
    """The folders of all local packages that this lockfile of uv, if it is there, knows: from its own place."""
    data = toml.read(lock, "run `uv lock`") if lock.is_file() else {}
    sources = [package.get("source", {}) for package in data.get("package", [])]
    kinds = ("editable", "virtual", "directory")
    return sorted({source[kind] for source in sources for kind in kinds if kind in source})


def _require_local_folders(project: Project) -> None:
    for name in local_sources(project.lock_files()[-1]):
        if not (project.folder / name).is_dir():
            raise LockfileError(
                f"The local package in `{project.folder / name}` is not on this node",
                "path dependencies travel in the working_dir only if they lie inside it",
            )


def _refuse_options(spec: EnvSpec, project: Project) -> None:
    if project.kind in {Kind.REQUIREMENTS, Kind.SCRIPT} and (spec.extras or spec.groups):
        raise LockfileError(
            f"`{project.file}` has neither extras nor groups: `{', '.join((*spec.extras, *spec.groups))}`",
            "leave them out; a pyproject.toml with uv.lock may have them",
        )


def _from_uv(spec: EnvSpec, project: Project, interpreter: Interpreter) -> dict[str, Any]:
    package = spec.package or (project.name() if project.member != "." else None)
    selection = [
        *(f"--extra={name}" for name in spec.extras),
        *(f"--group={name}" for name in spec.groups),
        *([f"--package={package}"] if package else []),
        # Beside it `--group=dev` would count for nothing.
        *(["--no-dev"] if "dev" not in spec.groups else []),
    ]
    data = _exported(project, interpreter, selection)
    # uv has applied them and does not list them; packaging, from 26.4, selects only what is listed.
    return {**data, "extras": _normalized(spec.extras), "dependency-groups": _normalized(spec.groups)}


def _normalized(names: Iterable[str]) -> list[str]:
    return [canonicalize_name(name) for name in names]


def _from_script(_spec: EnvSpec, project: Project, interpreter: Interpreter) -> dict[str, Any]:
    return _exported(project, interpreter, [f"--script={project.file.name}"])


def _exported(project: Project, interpreter: Interpreter, selection: list[str]) -> dict[str, Any]:
    arguments = ["export", "--frozen", "--no-header", "--format=pylock.toml", f"--python={interpreter.executable}"]
    done = uv.run([*arguments, *selection], cwd=project.folder)
    uv.expect_success(done, LockfileError, f"Cannot read the lockfile in `{project.folder}`", _hint(done.stderr))
    data, tags = toml.parse(done.stdout), frozenset(interpreter.tags)
    # Of ten wheels nine are for others: to have packaging read those too takes as long as uv took.
    return {**data, "packages": [without_foreign(tags, package) for package in data.get("packages", [])]}


def without_foreign(tags: frozenset[str], package: dict[str, Any]) -> dict[str, Any]:
    """The package without the wheels for other interpreters; with all where none fits, so that the error tells."""
    fitting = [wheel for wheel in package.get("wheels", []) if _may_fit(tags, wheel)]
    return {**package, "wheels": fitting} if fitting else package


def _may_fit(tags: frozenset[str], wheel: dict[str, Any]) -> bool:
    file = str(wheel.get("name") or wheel.get("url") or wheel.get("path")).lower()
    compressed = (part.split(".") for part in file.removesuffix(".whl").split("-")[-3:])  # PEP 425
    return not file.endswith(".whl") or any("-".join(tag) in tags for tag in product(*compressed))


def _hint(stderr: str) -> str:
    if "unsupported schema version" in stderr:
        return "upgrade uv on this node (python -m pip install --upgrade uv), or lock with the uv version that is here"
    if "are incompatible with the" in stderr:
        return "leave out one of them: `[tool.uv] conflicts` in pyproject.toml says that they do not go together"
    if "does not have a member" in stderr:
        return "name a member of the workspace, or leave out `package`"
    if "is not defined" in stderr:
        return "the extras and groups are those of pyproject.toml; after adding one, run `uv lock`"
    return "run `uv lock` in that folder and read what it says"


def _from_pylock(_spec: EnvSpec, project: Project, _interpreter: Interpreter) -> dict[str, Any]:
    return toml.read(project.file, "write it again with the tool that made it")


def _from_requirements(spec: EnvSpec, project: Project, interpreter: Interpreter) -> dict[str, Any]:
    found = requirements.read(project.file)
    done = _compile(project, interpreter, "--no-deps", *(["--no-build"] if spec.no_build else []))
    uv.expect_success(done, LockfileError, f"Cannot resolve `{project.file}`", _hint_of_compile(done.stderr))
    data = toml.parse(done.stdout)
    # uv writes down the Python at hand; the file asks for none.
    data.pop("requires-python", None)
    data["packages"] = requirements.restrict(data["packages"], found, interpreter.markers)
    _require_complete(project, interpreter, {package["name"] for package in data["packages"]})
    return data


def _require_complete(project: Project, interpreter: Interpreter, listed: set[str]) -> None:
    """Raise LockfileError where the file leaves out what its packages need: workers would fail to import it."""
    done = _compile(project, interpreter, "--no-build")
    if done.returncode != 0:
        # Versions that do not go together may be meant so, and what a source package needs only its build knows.
        return
    missing = {package["name"] for package in toml.parse(done.stdout)["packages"]} - listed
    # What needs ray may leave it to the cluster.
    if missing and "ray" not in missing:
        raise LockfileError(
            f"`{project.file}` leaves out what its packages need: {', '.join(sorted(missing))}",
            f"lock it with all that is needed: `{requirements.lock_command(project.file)}`; what is left out on "
            "purpose, name in `override-dependencies` of a uv.toml beside it",
        )


def _compile(project: Project, interpreter: Interpreter, *options: str) -> children.Completed:
    arguments = ["pip", "compile", "--no-header", "--format=pylock.toml", f"--python={interpreter.executable}"]
    return uv.run([*arguments, *options, project.file], cwd=project.folder)


def _hint_of_compile(stderr: str) -> str:
    if "is disabled" in stderr:
        return "lock versions that have a wheel for this platform, or leave out `no_build`"
    return "`uv pip compile --no-deps` of it shows the same"


_READERS: dict[Kind, Callable[[EnvSpec, Project, Interpreter], dict[str, Any]]] = {
    Kind.UV: _from_uv,
    Kind.SCRIPT: _from_script,
    Kind.PYLOCK: _from_pylock,
    Kind.REQUIREMENTS: _from_requirements,
}
