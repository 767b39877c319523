"""What a build would be: from a project to its plan. Asks uv and the interpreter; changes nothing."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_envcache.build.environment import EnvironmentPlan
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import export, inherit, interpreter, lockfile
from ray_envcache.resolve.additions import additions, located
from ray_envcache.resolve.project import Project
from ray_envcache.store.key import compute_key

# Imported in functions, where uv is at work already: what they import themselves takes as long as uv does.
if TYPE_CHECKING:
    from ray_envcache.build.environment import EnvironmentPlan
    from ray_envcache.resolve.cluster_ray import AnyRay
    from ray_envcache.resolve.inherit import Inherited
    from ray_envcache.resolve.interpreter import Interpreter
    from ray_envcache.resolve.lockfile import ResolvedSet


def plan_of(spec: EnvSpec, project: Project, executable: str, ray: AnyRay, *, check_current: bool) -> EnvironmentPlan:
    """The plan of the environment that `spec` means, for the base interpreter at `executable`.

    With `check_current` the lockfile has to match the project. Raises LockfileError, InterpreterError, RayVersionError.
    """
    python, resolved = _resolve(spec, project, executable, ray, check_current=check_current)
    added = additions(ray, resolved, python)
    version = resolved.version_of("ray") or added["ray"]
    resolved, added, inherited = inherit.split(resolved, added, spec)
    resolved = resolved.with_packages(located(added, python))
    return EnvironmentPlan(
        key=compute_key(resolved, python, _outside(spec, inherited)),
        resolved=resolved,
        added=added,
        interpreter=python,
        folder=project.folder,
        project=project.name(),
        ray=version,
        inherited=tuple(inherited),
        system_site_packages=spec.system_site_packages,
    )


def require_buildable(spec: EnvSpec, ray: AnyRay) -> ResolvedSet:
    """Raise what `Store.acquire` would raise for bad input, without a store and without building anything."""
    executable = interpreter.base_executable(spec.python)
    project = Project.locate(Path(spec.path), spec.package)
    python, resolved = _resolve(spec, project, executable, ray, check_current=True)
    additions(ray, resolved, python)
    return resolved


def _resolve(
    spec: EnvSpec, project: Project, executable: str, ray: AnyRay, *, check_current: bool
) -> tuple[Interpreter, ResolvedSet]:
    with export.require_current(project, executable) if check_current else nullcontext():
        python = interpreter.probe(executable)
        ray.require_fit(python)
        return python, lockfile.resolve(spec, project, python)


def _outside(spec: EnvSpec, inherited: list[Inherited]) -> list[Any]:
    """What an environment uses from outside of the store; nothing, mostly."""
    visible = ["system site-packages"] if spec.system_site_packages else []
    return [*visible, *(one.identity() for one in inherited)]
