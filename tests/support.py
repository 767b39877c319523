"""What tests are made of: small wheels, small projects, child processes that are always reaped."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import os
import shlex
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import uv
from filelock import FileLock

from ray_envcache.acquire import Store
from ray_envcache.build import bytecode
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Holder

RAY_VERSION = installed_ray().version
NO_PID = 5_000_000 + os.getpid()
"""For names of sessions: no process has it, nor do other runs of these tests, which may go on at the same time."""


def make_wheel(
    folder: Path,
    name: str,
    version: str = "1.0",
    *,
    modules: Mapping[str, str] | None = None,
    requires: Iterable[str] = (),
    tag: str = "py3-none-any",
    scripts: Mapping[str, str] | None = None,
) -> Path:
    """A wheel with these modules ({file name: text}; by default one empty module), entry points and requirements."""
    module = name.replace("-", "_")
    files = dict(modules if modules is not None else {f"{module}.py": f"VERSION = {version!r}\n"})
    info = f"{module}-{version}.dist-info"
    needs = "".join(f"Requires-Dist: {need}\n" for need in requires)
    files[f"{info}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    files[f"{info}/WHEEL"] = f"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: {tag}\n"
    if scripts:
        lines = "".join(f"{script} = {target}\n" for script, target in scripts.items())
        files[f"{info}/entry_points.txt"] = f"[console_scripts]\n{lines}"
    files[f"{info}/RECORD"] = (
        "".join(f"{path},{_record_hash(text)}\n" for path, text in files.items()) + f"{info}/RECORD,,\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{module}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            # A fixed date: the same content always gives the same wheel, and the same hash.
            archive.writestr(zipfile.ZipInfo(path, (2020, 1, 1, 0, 0, 0)), text)
    return wheel


def unpack(wheel: Path, folder: Path) -> None:
    """Install a wheel of Python modules into a folder, for its `sys.path`."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def _record_hash(text: str) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
    return f"sha256={digest},{len(text.encode())}"


def make_fake_ray(folder: Path, version: str = RAY_VERSION) -> Path:
    """A wheel that looks like ray to whoever only imports it, and needs nothing."""
    return make_wheel(folder, "ray", version, modules={"ray/__init__.py": f"__version__ = {version!r}\n"})


def make_project(
    folder: Path,
    wheels: Path,
    dependencies: Sequence[str] = (),
    *,
    extra: str = "",
    requires_python: str = ">=3.10",
    lock: bool = True,
) -> Path:
    """A project whose packages come from the folder `wheels` alone; returns its pyproject.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    pyproject = folder / "pyproject.toml"
    pyproject.write_text(
        textwrap.dedent(f"""\
        [project]
        name = "{folder.name.replace(" ", "-")}"
        version = "0.1"
        requires-python = "{requires_python}"
        dependencies = {list(dependencies)!r}
        """)
        + extra
        + textwrap.dedent(f"""
        [tool.uv]
        package = false
        no-index = true
        find-links = ["{wheels}"]
        """),
    )
    if lock:
        run_uv("lock", cwd=folder)
    return pyproject


def make_project_with_own_package(folder: Path, wheels: Path, dependencies: Sequence[str]) -> Path:
    """A project as `make_project` makes, which develops the package `own` in a folder of its own."""
    project = make_project(folder, wheels, [*dependencies, "own"], lock=False)
    (folder / "own" / "src" / "own").mkdir(parents=True)
    (folder / "own" / "src" / "own" / "__init__.py").write_text("Y = 1\n")
    (folder / "own" / "backend.py").write_text(SRC_BACKEND.format(name="own") + "\nbuild_editable = build_wheel\n")
    (folder / "own" / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "own"\nversion = "1.0"\n'
    )
    project.write_text(project.read_text() + '\n[tool.uv.sources]\nown = { path = "own" }\n')
    run_uv("lock", cwd=folder)
    return project


def set_index_of_node(folder: Path, wheels: Path, patch: pytest.MonkeyPatch) -> None:
    """Let this node get packages from the folder `wheels` alone, by a uv.toml of the user in `folder`."""
    (folder / "uv").mkdir(parents=True, exist_ok=True)
    (folder / "uv" / "uv.toml").write_text(f'no-index = true\nfind-links = ["{wheels}"]\n')
    patch.setenv("XDG_CONFIG_HOME", str(folder))


def build_finished(store: Store, project: Path) -> Entry:
    """Build an environment with all its bytecode, which nobody holds when this returns.

    Finished here: a process in the background could come late, and be seen with its flock's file open.
    """
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test"), finish=False) as lease:
        entry = lease.entry
    bytecode.finish(store.layout, entry, background=False)
    assert entry.measured.exists()
    return entry


def run(*command: str | os.PathLike[str], code: int = 0, **options: Any) -> str:
    """Run a command to its end and return its stdout; with another exit code the test fails and shows what it said."""
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, check=False, **options
    )
    assert done.returncode == code, describe(command, done.returncode, done.stdout, done.stderr)
    return done.stdout


def describe(command: Any, code: int, *outputs: str | bytes | None) -> str:
    """A command, its exit code and what it said, for the report of a failed test."""
    words = [command] if isinstance(command, (str, bytes, os.PathLike)) else command
    line = shlex.join(os.fsdecode(word) for word in words)
    said = [text.decode(errors="replace") if isinstance(text, bytes) else text for text in outputs if text]
    return "\n".join([f"exit code {code}: {line[:1000]}", *(text[-10_000:] for text in said)])


def run_uv(*arguments: str | os.PathLike[str], cwd: Path, **more: str) -> str:
    """Run uv with our own Python, and with `more` in its environment; returns its stdout."""
    environ = {**os.environ, "UV_PYTHON": sys.executable, "UV_PYTHON_DOWNLOADS": "never", **more}
    return run(uv.find_uv_bin(), *arguments, cwd=cwd, env=environ)


def variables_of_ray_start(shell: str, command: str, programs: Path, before: Mapping[str, str]) -> dict[str, str]:
    """The variables of `ray start`, as a real shell starts it by `command` where the caller had `before`.

    The `ray` in the folder `programs` says them and starts nothing.
    """
    texts = {
        "ray": "#!/bin/sh\necho $1 && exec env -0\n",
        "ray-envcache": f'#!/bin/sh\nexec "{sys.executable}" -m ray_envcache "$@"\n',
    }
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environ = {"PATH": f"{programs}:{os.environ['PATH']}", **before}
    done = subprocess.run([shell, "-c", command], env=environ, capture_output=True, text=True, check=True)
    verb, _, dump = done.stdout.partition("\n")
    assert verb == "start"
    return dict(pair.split("=", 1) for pair in dump.split("\0") if pair)


def run_python(
    code: str, *arguments: str, environ: Mapping[str, str] | None = None, python: Path | str = sys.executable
) -> str:
    """Run a Python program, with `environ` besides our own environment; returns its stdout."""
    command = [python, "-c", textwrap.dedent(code), *arguments]
    return run(*command, env={**os.environ, **(environ or {})}, timeout=240)


def reap(children: Iterable[subprocess.Popen[str]]) -> None:
    """Kill these processes. What they said on stderr, and no test has read, is shown where the test fails."""
    for child in children:
        child.kill()
        child.wait()
        if child.stderr is not None and not child.stderr.closed:
            # Not to its end: a process that it started may have the other end open.
            os.set_blocking(child.stderr.fileno(), False)
            with suppress(BlockingIOError):
                if unread := os.read(child.stderr.fileno(), 1 << 16):
                    print(describe(child.args, child.returncode, unread))
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def start_python(
    children: list[subprocess.Popen[str]],
    code: str,
    *arguments: str | Path,
    python: str | Path = sys.executable,
    **options: Any,
) -> subprocess.Popen[str]:
    """A child that has run `code` when this returns, and stays until its stdin closes."""
    program = f"import sys\n{code}\nprint('up', flush=True)\nsys.stdin.read()"
    command: list[str | Path] = [python, "-c", program, *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    children.append(child)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    return child


def command_of(process: psutil.Process) -> list[str]:
    """The command line; an empty one where the process is gone, or only left to be reaped."""
    with suppress(psutil.Error):
        command: list[str] = process.cmdline()
        return command
    return []


def is_gone(process: psutil.Process | int) -> bool:
    """Whether a process ended. That of a container which has to reap orphans, its first, may never do so."""
    try:
        found = psutil.Process(process) if isinstance(process, int) else process
        return not found.is_running() or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 120) -> None:
    """Wait for a condition. The deadline guards against a hang; no test measures time with it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still not so after {seconds} s: {what}"
        time.sleep(0.02)


_BACKEND = """\
import pathlib, sys, time, zipfile

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    {code}
    name = "{module}-{version}-py3-none-any.whl"
    info = "{module}-{version}.dist-info"
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / name, "w") as wheel:
        wheel.writestr("{module}.py", f"SETTINGS = {{config_settings!r}}\\n")
        wheel.writestr(info + "/METADATA", "Metadata-Version: 2.2\\nName: {name}\\nVersion: {version}\\n")
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nGenerator: tests\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "/RECORD", "")
    return name
"""


SRC_BACKEND = """\
import pathlib, zipfile

def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    info = "{name}-1.0.dist-info"
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / "{name}-1.0-py3-none-any.whl", "w") as wheel:
        for path in sorted(pathlib.Path("src").rglob("*.py")):
            wheel.write(path, path.relative_to("src"))
        wheel.writestr(info + "/METADATA", "Metadata-Version: 2.2\\nName: {name}\\nVersion: 1.0\\n")
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nGenerator: tests\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "/entry_points.txt", "[console_scripts]\\n{name}-script = {name}:main\\n")
        wheel.writestr(info + "/RECORD", "")
    return "{name}-1.0-py3-none-any.whl"
"""


EDITABLE_BACKEND = """
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    info = "{name}-1.0.dist-info"
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / "{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("{name}.pth", str(pathlib.Path("src").resolve()))
        wheel.writestr(info + "/METADATA", "Metadata-Version: 2.2\\nName: {name}\\nVersion: 1.0\\n")
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nGenerator: tests\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "/RECORD", "")
    return "{name}-1.0-py3-none-any.whl"
"""
"""What SRC_BACKEND needs beside to install its package editable."""

GROUPS = """
[project.optional-dependencies]
gpu = ["cuda"]
[dependency-groups]
dev = ["devtool"]
test = ["checker"]
cu12 = ["split==1.0"]
cu13 = ["split==2.0"]
"""
"""An extra, and groups of which two conflict; `make_grouped_project` has them."""


def make_grouped_project(folder: Path, wheels: Path) -> Path:
    """A project with GROUPS, of which one that conflicts with another is a default; returns its pyproject.toml."""
    for name, version in (("cuda", "1.0"), ("devtool", "1.0"), ("checker", "1.0"), ("split", "1.0"), ("split", "2.0")):
        make_wheel(wheels, name, version)
    pyproject = make_project(folder, wheels, ["ray"], extra=GROUPS, lock=False)
    conflict = 'default-groups = ["dev", "cu12"]\nconflicts = [[{group = "cu12"}, {group = "cu13"}]]\n'
    pyproject.write_text(pyproject.read_text() + conflict)
    run_uv("lock", cwd=folder)
    return pyproject


def make_sdist(
    folder: Path, name: str, version: str = "1.0", *, code: str = "pass", requires: Sequence[str] = ()
) -> Path:
    """A source package whose build backend, which needs `requires`, runs `code` (one line) before it makes the wheel.

    The package has a module that says what the build was given: `SETTINGS`.
    """
    module = name.replace("-", "_")
    files = {
        "PKG-INFO": f"Metadata-Version: 2.2\nName: {name}\nVersion: {version}\n",
        "pyproject.toml": (
            f'[build-system]\nrequires = {list(requires)!r}\nbuild-backend = "backend"\nbackend-path = ["."]\n'
            f'[project]\nname = "{name}"\nversion = "{version}"\n'
        ),
        "backend.py": _BACKEND.format(module=module, name=name, version=version, code=code),
    }
    folder.mkdir(parents=True, exist_ok=True)
    sdist = folder / f"{module}-{version}.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        for path, text in files.items():
            member = tarfile.TarInfo(f"{module}-{version}/{path}")
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return sdist


def make_witness(folder: Path, log: Path) -> Path:
    """A wheel that notes every start of an interpreter that has it: a line with its prefix and whether it is isolated.

    The builder checks a new environment with one isolated interpreter, and nobody else starts isolated ones: so many
    isolated lines, so many builds. Nothing of the package under test takes part in the counting.
    """
    note = f"import os, sys\nwith open({str(log)!r}, 'a') as log:\n    log.write(f'{{sys.prefix}} {{sys.flags.isolated}}\\n')\n"
    modules = {"envcache_witness.py": note, "envcache_witness.pth": "import envcache_witness\n"}
    return make_wheel(folder, "envcache-witness", modules=modules)


def count_builds(log: Path) -> int:
    """How many environments with the witness were built."""
    return sum(line.endswith(" 1") for line in log.read_text().splitlines()) if log.exists() else 0


def files_with(needles: Sequence[bytes], *tops: Path) -> list[Path]:
    """The files below these folders whose name or content has one of the needles.

    What others remove while we read is not kept by anyone: it is passed over. At least one file must be there.
    """
    found, seen = [], 0
    for folder, _, names in itertools.chain.from_iterable(map(os.walk, tops)):
        for path in (Path(folder, name) for name in names):
            with suppress(FileNotFoundError):
                text = os.fsencode(path.name) + (path.read_bytes() if stat.S_ISREG(path.lstat().st_mode) else b"")
                seen += 1
                if any(needle in text for needle in needles):
                    found.append(path)
    assert seen
    return found


@contextmanager
def short_folder() -> Iterator[Path]:
    """A temporary folder with a short path."""
    with tempfile.TemporaryDirectory(prefix="re", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that all of this run share: of the processes of pytest-xdist the first one makes it, the others wait."""
    run = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    folder, done = run / name, run / f"{name}.done"
    with FileLock(run / f"{name}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of one that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@contextmanager
def small_disk(place: Path, size: str = "20m") -> Iterator[Path]:
    """Mount an empty file system of this size and 2000 inodes, or skip where that is impossible."""
    place.mkdir(exist_ok=True)
    if shutil.which("mount") is None:
        pytest.skip("needs `mount`")
    options = f"size={size},nr_inodes=2000,mode=0700"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def kill_tree(pid: int) -> None:
    """SIGKILL a process and everything it started: of a driver, its whole local cluster.

    By descent, since Ray's agents overwrite their command lines.
    """
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()


def container() -> list[str]:
    """What to put in front of a command that is to run like a container's: first in a pid namespace, with its own /proc.

    It ends with the process that this starts. Skips where that is not allowed.
    """
    powers = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    command = ["unshare", *powers, "--pid", "--fork", "--kill-child", "--mount-proc"]
    done = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"needs `unshare` to work here: {done.stderr}")
    return command


def first_of_container(pid: int) -> psutil.Process:
    """The first process inside; it takes all others with it."""
    (first,) = psutil.Process(pid).children()
    return first
