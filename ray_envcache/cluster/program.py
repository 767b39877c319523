"""Running an unmodified program from a cached environment: `ray-envcache run -- python main.py`.

Driver, raylet, agent and workers all run from the environment, so a bare `ray.init()` builds and copies nothing.
ray_envcache itself need not be installed there. The command is a child that stands in for this process: it has our
terminal, process group and descriptors, gets the signals that are sent to us, and we end as it ends.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ray_envcache import inside
from ray_envcache.acquire import Store
from ray_envcache.build.progress import Observer
from ray_envcache.checkout.project import Kind, Project
from ray_envcache.errors import CommandError, InterpreterError, LockfileError
from ray_envcache.field import registration
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import export, interpreter, uv, uv_errors
from ray_envcache.resolve.interpreter import LockedRay
from ray_envcache.store.leases import Holder, Lease
from ray_envcache.system import children

GUARDS = f"{inside.__path__[0]}/path"
"""A folder with what takes the place of commands that would change the environment."""

# The terminal sends its signals to the whole process group, and so to the command; other senders reach only us.
_FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT)
_FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
_IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


def find_project(start: Path) -> Path:
    """The project's folder as uv finds it: the first pyproject.toml from `start` upwards. Raises LockfileError."""
    for folder in (start, *start.parents):
        if (folder / "pyproject.toml").is_file():
            return folder
    raise LockfileError(
        f"No project: neither `{start}` nor a folder above it has a pyproject.toml",
        "run in the project's folder, or name it: --project DIR",
    )


def acquire(spec: EnvSpec, observer: Observer) -> Lease:
    """A lease on the environment of the project at `spec.path`, whose own packages are imported from their folders.

    The Python is the one that uv takes for the project. Raises the errors of `Store.acquire`.
    """
    Project.locate(Path(spec.path), spec.package)  # raises a better error than uv in a folder that does not exist
    folder = Path(spec.path if os.path.isdir(spec.path) else os.path.dirname(spec.path))
    python = spec.python if spec.python and os.path.isabs(spec.python) else _python_of(folder, spec.python, os.environ)
    wanted = EnvSpec.parse({**spec.to_field(), "python": python})
    store = Store.open()
    return store.acquire(wanted, LockedRay(), Holder("run"), observer, check_current=True, editable=True)


def environ_for(lease: Lease, spec: EnvSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """The variables of the command: the environment is active, and Ray loads neither our plugin nor our hook.

    `uv` is a guard there, and uses this environment too where it is called for the project of `spec`.
    """
    environment = dict(registration.without_us(environ))
    for name in ("PYTHONHOME", "__PYVENV_LAUNCHER__"):
        environment.pop(name, None)
    # Ray's own hook for `uv run` would give each worker a `uv run` of its own, should one be among our parents.
    environment[registration.UV_RUN] = "0"
    environment["VIRTUAL_ENV"] = os.fspath(lease.entry.venv)
    environment["PATH"] = f"{GUARDS}:{lease.entry.bin}:{environ.get('PATH', os.defpath)}"
    return {**environment, **_variables_of_uv(lease, spec, environ)}


def _variables_of_uv(lease: Lease, spec: EnvSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """What makes uv use this environment, and what the guard needs to know (inside/uv_guard.py)."""
    ours = {"UV_PROJECT_ENVIRONMENT": os.fspath(lease.entry.venv), "UV_NO_SYNC": "1"}
    project = Project.locate(Path(spec.path), spec.package)
    is_uv = project.kind is Kind.UV
    above = json.loads(environ.get("RAY_ENVCACHE_RUN_ABOUT", "{}"))
    about = {
        "uv": uv.find(),
        "home": os.path.realpath(project.folder / project.member),
        "folders": [os.path.realpath(folder) for folder in project.members()] if is_uv else [],
        "before": above.get("before") or {name: environ[name] for name in ours if name in environ},
    }
    told = {"RAY_ENVCACHE_RUN": os.fspath(lease.entry.venv), "RAY_ENVCACHE_RUN_ABOUT": json.dumps(about)}
    return {**told, **ours} if is_uv else told


def command_of(words: Sequence[str]) -> list[str]:
    """The command that `uv run` makes of these words: Python for a file with Python code."""
    return ["python", *words] if words[0].endswith(".py") and os.path.isfile(words[0]) else [*words]


def find_command(name: str, lease: Lease, spec: EnvSpec, environ: Mapping[str, str]) -> tuple[str, str]:
    """The path of the program `name` on the PATH of `environ`, and what to say of it, if anything.

    It is said where it comes from outside although the lockfile has a package of this name. Raises CommandError.
    """
    program = shutil.which(name, path=environ["PATH"])
    is_inside = program and program.startswith((f"{lease.entry.bin}/", f"{GUARDS}/"))
    option = "" if is_inside else export.option_for(spec, name)
    if program is None:
        brings = f"`ray-envcache run {option}` brings it" if option else ""
        raise CommandError(f"No such command: `{name}`", brings or "it is looked for in the environment, then on PATH")
    says = f"`{name}` is {program}, outside of the environment; `{option}` brings the one that is locked"
    return program, says if option else ""


def run(program: str, command: Sequence[str], environ: Mapping[str, str], held: Iterable[int]) -> int:
    """Run a command to its end and return its exit status, negative for the signal that killed it.

    The command inherits the descriptors in `held`: if this process is killed, it goes on and still holds the
    environment. Raises CommandError where it cannot be started.
    """
    with _signals_blocked() as before, ExitStack() as inherited:
        for descriptor in held:
            # A copy above 2: where we were started with a closed stdin, the descriptor itself may be 0.
            copy = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 3)
            inherited.callback(os.close, copy)
        try:
            pid = os.posix_spawn(program, list(command), dict(environ), setsigmask=before, setsigdef=_IGNORED_BY_PYTHON)
        except OSError as error:
            raise CommandError(
                f"Cannot run `{program}`: {error.strerror}", "is it a program for this machine?"
            ) from error
        return _wait(pid)


def end_like(status: int) -> int:
    """The exit code for `status`. If a signal killed the command, end by that signal instead of returning."""
    if status >= 0:
        return status
    # A shell reports a program that a signal killed differently from one that returned 128 plus its number.
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    return 128 - status  # the signal has no effect, like SIGCONT


@contextmanager
def _signals_blocked() -> Iterator[set[signal.Signals]]:
    """Block the signals before the command starts: one that comes now waits until `_wait` can pass it on."""
    # Without a handler the kernel discards SIGCHLD, and where our parent ignored it also how the command ended.
    ignored = signal.signal(signal.SIGCHLD, lambda *_: None)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*_FORWARDED, signal.SIGCHLD})
    try:
        yield {signal.Signals(number) for number in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGCHLD, ignored)


def _wait(pid: int) -> int:
    """Pass signals on to the command until it has ended, and return its status."""
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        number, by_terminal = _next_signal()
        if number in _FORWARDED and not (by_terminal and number in _FROM_TERMINAL):
            os.kill(pid, number)


def _next_signal() -> tuple[int, bool]:
    """The next signal, and whether the kernel sent it: then it is from the terminal and reached the command too."""
    wanted = {*_FORWARDED, signal.SIGCHLD}
    if sys.platform == "darwin":
        return signal.sigwait(wanted), True
    found = signal.sigwaitinfo(wanted)
    return found.si_signo, found.si_code > 0


def _python_of(folder: Path, version: str | None, environ: Mapping[str, str]) -> str:
    """The base of the interpreter that `uv run` takes for the project, by all that the user tells uv of Pythons."""
    # `uv python find` obeys neither UV_PYTHON nor UV_PROJECT_ENVIRONMENT, and prefers the environment that is active.
    request = version or environ.get("UV_PYTHON")
    own = next((top for top in (folder, *folder.parents) if (top / "uv.lock").is_file()), folder)
    own = own / environ.get("UV_PROJECT_ENVIRONMENT", ".venv")
    others = {name: value for name, value in environ.items() if name not in {"VIRTUAL_ENV", "CONDA_PREFIX"}}
    more = {"VIRTUAL_ENV": os.fspath(own)} if (own / "bin/python").exists() else {}
    done = children.run(
        [uv.find(), "python", "find", *([] if more else ["--system"]), *([request] if request else [])],
        environ={**others, **more, "UV_PYTHON_DOWNLOADS": "never", "NO_COLOR": "1"},
        cwd=folder,
    )
    what = f"No Python for the project in `{folder}`"
    uv_errors.expect_success(done, InterpreterError, what, "name one that is here: --python")
    return interpreter.base_of(done.stdout.strip())
