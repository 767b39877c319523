"""Any kind of lockfile in the one form of pylock.toml, as uv or the file itself has it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import tomli
from packaging.utils import canonicalize_name

from ray_envcache.checkout import requirement_files
from ray_envcache.checkout.project import Kind, Project, read_toml
from ray_envcache.errors import LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import uv, uv_errors
from ray_envcache.resolve.interpreter import Interpreter
from ray_envcache.resolve.uv import Scope
from ray_envcache.system import children

_LISTS = {
    "extra": "extras", "group": "groups", "no-extra": "no_extras", "no-group": "no_groups", "only-group": "only_groups"
}  # fmt: skip
_FLAGS = ("all_extras", "all_groups", "all_packages")


def export(spec: EnvSpec, project: Project, interpreter: Interpreter) -> dict[str, Any]:
    """The project's lockfile as the tables of a pylock.toml. Paths in it start from the project's folder.

    Installs nothing; for a requirements file alone uv asks the index. Raises LockfileError.
    """
    _refuse_selection(spec, project)
    if project.kind is Kind.PYLOCK:
        return read_toml(project.file, "write it again with the tool that made it")
    if project.kind is Kind.UV:
        return _from_uv(spec, project, interpreter)
    if project.kind is Kind.REQUIREMENTS:
        return _from_requirements(project, interpreter, no_build=spec.no_build)
    return _exported(project, interpreter, [f"--script={project.file.name}"])


def _from_uv(spec: EnvSpec, project: Project, interpreter: Interpreter) -> dict[str, Any]:
    data = _exported(project, interpreter, selection(spec, project))
    # uv has applied them and does not list them; packaging, from 26.4, selects only what is listed.
    data["extras"] = [canonicalize_name(name) for name in spec.extras]
    data["dependency-groups"] = [canonicalize_name(name) for name in spec.groups]
    return data


def selection(spec: EnvSpec, project: Project) -> list[str]:
    """The arguments of `uv export` and `uv sync` that select what `spec` means of a project with uv.lock."""
    package = spec.package or (project.name() if project.member != "." and not spec.all_packages else None)
    with_dev = spec.dev or spec.all_groups or "dev" in {*spec.groups, *spec.only_groups}
    return [
        *(f"--{option}={name}" for option, field in _LISTS.items() for name in getattr(spec, field)),
        *(f"--{field.replace('_', '-')}" for field in _FLAGS if getattr(spec, field)),
        *([f"--package={package}"] if package else []),
        *([] if spec.default_groups else ["--no-default-groups"]),
        # Beside it `--group=dev` would count for nothing.
        *([] if with_dev else ["--no-dev"]),
    ]


def _refuse_selection(spec: EnvSpec, project: Project) -> None:
    """Raise LockfileError for options that only a project with uv.lock has."""
    has = {Kind.UV: {*_LISTS.values(), *_FLAGS, "default_groups"}, Kind.PYLOCK: {"extras", "groups"}}
    asked = spec.to_field().keys() & has[Kind.UV] - has.get(project.kind, set())
    if asked:
        raise LockfileError(
            f"`{project.file}` has neither extras nor groups: `{', '.join(sorted(asked))}`",
            "leave them out; a pyproject.toml with uv.lock may have them",
        )


def _exported(project: Project, interpreter: Interpreter, selection: list[str]) -> dict[str, Any]:
    arguments = ["export", "--frozen", "--no-header", "--format=pylock.toml", f"--python={interpreter.executable}"]
    done = uv.run([*arguments, *selection], cwd=project.folder)
    what = f"Cannot resolve the project in `{project.folder}`"
    uv_errors.expect_success(done, LockfileError, what, "see what `uv export --frozen` says in that folder")
    return tomli.loads(done.stdout)


def _from_requirements(project: Project, interpreter: Interpreter, *, no_build: bool) -> dict[str, Any]:
    hashes = requirement_files.listed_hashes(project.file)
    done = _compiled(project, interpreter, "--no-deps", *(["--no-build"] if no_build else []))
    hint = "`uv pip compile --no-deps` of it shows the same"
    uv_errors.expect_success(done, LockfileError, f"Cannot resolve `{project.file}`", hint)
    data = tomli.loads(done.stdout)
    # uv writes down the Python at hand; the file asks for none.
    data.pop("requires-python", None)
    for package in data["packages"]:
        if hashes.get(package["name"]):
            _keep_listed(package, hashes[package["name"]], project.file)
    _require_complete(project, interpreter, {package["name"] for package in data["packages"]})
    return data


def _keep_listed(package: dict[str, Any], hashes: set[str], file: Path) -> None:
    """Leave a package (a table of pylock.toml) those of its files alone that have one of these hashes."""

    def is_other(artifact: dict[str, Any]) -> bool:
        return hashes.isdisjoint(artifact.get("hashes", {}).values())

    for kind in {"sdist", "archive"} & package.keys():
        if is_other(package[kind]):
            del package[kind]
    package["wheels"] = [wheel for wheel in package.get("wheels", []) if not is_other(wheel)]
    if not any(package.get(kind) for kind in ("wheels", "sdist", "archive", "vcs", "directory")):
        raise LockfileError(
            f"None of the files of {package['name']} {package['version']} has a hash that `{file}` lists for it",
            "the files on the index were replaced, or the list is of another index; if that is right, lock again",
        )


def _require_complete(project: Project, interpreter: Interpreter, listed: set[str]) -> None:
    """Raise LockfileError where the file leaves out what its packages need: workers would fail to import it."""
    done = _compiled(project, interpreter, "--no-build")
    if done.returncode != 0:
        # Versions that do not go together may be meant so, and what a source package needs only its build knows.
        return
    missing = {package["name"] for package in tomli.loads(done.stdout)["packages"]} - listed
    # What needs ray may leave it to the cluster.
    if missing and "ray" not in missing:
        raise LockfileError(
            f"`{project.file}` leaves out what its packages need: {', '.join(sorted(missing))}",
            f"lock it with all that is needed: `{requirement_files.lock_command(project.file)}`; what is left out on "
            "purpose, name in `override-dependencies` of a uv.toml beside it",
        )


def _compiled(project: Project, interpreter: Interpreter, *options: str) -> children.Completed:
    arguments = ["pip", "compile", "--no-header", "--format=pylock.toml", f"--python={interpreter.executable}"]
    return uv.run([*arguments, *options, project.file], cwd=project.folder)


def require_current(project: Project, executable: str) -> None:
    """Raise LockfileError where uv.lock no longer matches pyproject.toml, or a script's lock the script."""
    if project.kind not in {Kind.UV, Kind.SCRIPT}:
        return
    script = [f"--script={project.file.name}"] if project.kind is Kind.SCRIPT else []
    check = ["lock", "--check", *script, f"--python={executable}"]
    done = uv.run([*check, "--offline"], cwd=project.folder, scope=Scope.USER)
    if done.returncode == 0 or (done := _checked_again(done, check, project)).returncode == 0:
        return
    lock, source = project.lock_files()[-1].name, project.file.name if script else "pyproject.toml"
    what = f"{lock} in `{project.folder}` no longer matches {source}"
    hint = f"run `uv lock{f' --script {source}' if script else ''}` there"
    if re.search("needs to be updated|not found in the cache", done.stderr):
        # A package was added. uv, which was to ask no index, calls that a conflict: there is none.
        raise LockfileError(what, hint)
    if "error: No solution found" not in done.stderr:
        what = f"Cannot check {lock} in `{project.folder}`"
    uv_errors.expect_success(done, LockfileError, what, hint)


def _checked_again(done: children.Completed, check: list[str], project: Project) -> children.Completed:
    """What uv says of a lockfile that it refused, where that may be due to something else than the lockfile."""
    if "build" in done.stderr:
        # A local package with dynamic metadata is built to know what it needs, and its build may need an index.
        done = uv.run(check, cwd=project.folder, scope=Scope.USER)
    if done.returncode == 0:
        return done
    # The user may have locked with other settings than this node has: a mirror, or `exclude-newer`.
    alone = uv.run([*check, "--offline"], cwd=project.folder, scope=Scope.PROJECT)
    return alone if alone.returncode == 0 or "needs to be updated" in alone.stderr else done


def option_for(spec: EnvSpec, name: str) -> str:
    """The option that brings the package `name` to the project, "" where no other extra or group of its own has it."""
    project, name = Project.locate(Path(spec.path), spec.package), canonicalize_name(name)
    if project.kind is not Kind.UV or f'name = "{name}"' not in project.file.read_text("utf-8"):
        return ""
    own = canonicalize_name(spec.package or project.name())
    packages = read_toml(project.file, "run `uv lock`").get("package", [])
    table: dict[str, Any] = next((package for package in packages if package["name"] == own), {})
    chosen = {*spec.extras, *spec.groups, *(["dev"] if spec.dev else [])}
    for option, lists in (("--group", "dev-dependencies"), ("--extra", "optional-dependencies")):
        for title, needs in table.get(lists, {}).items():
            if title not in chosen and any(need["name"] == name for need in needs):
                return f"{option} {title}"
    return ""
