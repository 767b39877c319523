"""uv dies in the middle of a build, and uv's cache is cleaned from under everybody."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import uv

from ray_envcache.acquire import Store
from ray_envcache.errors import BuildError
from ray_envcache.system import flock
from tests import support
from tests.conftest import Acquire

pytestmark = [pytest.mark.host, pytest.mark.attack]

NAMES = ("red", "green", "blue")


def stuck_project(folder: Path, wheels: Path, note: Path) -> Path:
    """A project with a source package whose first build notes who builds it, and never ends."""
    noted = f"note = pathlib.Path({str(note)!r}); first = not note.exists(); os = __import__('os')"
    code = f"{noted}; first and (note.write_text(str(os.getpid())), time.sleep(600))"
    support.make_sdist(wheels, "stuck", code=code)
    return support.make_project(folder, wheels, ["ray", "stuck"])


def is_gone(pid: int) -> bool:
    """Whether the process ended, reaped or not."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextmanager
def killing(note: Path, victim: str) -> Iterator[None]:
    """Kill uv, or the build backend that it started, as soon as the backend runs."""

    def kill() -> None:
        support.wait_until(lambda: note.exists() and note.read_text() != "", "the build of the source package began")
        backend = psutil.Process(int(note.read_text()))
        (backend if victim == "backend" else backend.parents()[0]).send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    yield
    killer.join()


@pytest.mark.parametrize(
    ("victim", "says"),
    [("uv", r"uv was killed by signal 9 \(Killed\)"), ("backend", "(?s)could not build the environment.*stuck")],
)
def test_uv_killed_in_a_build(
    victim: str, says: str, tmp_path: Path, wheels: Path, store: Store, acquire: Acquire
) -> None:
    """Whoever of a build is killed (by the kernel, say), it is an error at once, nothing of it lives on, and the next one succeeds."""
    note = tmp_path / "note"
    project = stuck_project(tmp_path / "project", wheels, note)
    with killing(note, victim), pytest.raises(BuildError, match=says) as caught:
        acquire(project)
    assert caught.value.hint
    support.wait_until(lambda: is_gone(int(note.read_text())), "the build backend is gone")
    assert list(store.layout.entries.iterdir()) == list(store.layout.trash.iterdir()) == []
    assert not any(flock.is_held(path) for path in store.layout.flocks.iterdir())
    assert support.run_python("import ray, stuck", python=acquire(project).python) == ""


@pytest.mark.parametrize("command", ["export", "lock", "venv"])
def test_uv_killed_at_other_work(
    command: str, tmp_path: Path, wheels: Path, acquire: Acquire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A uv that is killed while it reads or checks the lockfile does not mean that there is something wrong with it."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    wrapper = tmp_path / "uv"
    wrapper.write_text(f'#!/bin/sh\n[ "$1" = {command} ] && kill -KILL $$\nexec {uv.find_uv_bin()} "$@"\n')
    wrapper.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setattr("ray_envcache.resolve.uv.find", lambda: str(wrapper))
        with pytest.raises(BuildError, match="uv was killed by signal 9") as caught:
            acquire(project)
    assert "try again" in caught.value.hint
    assert acquire(project).python.exists()


USER = """
import subprocess, sys
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.gc.collector import collect
from ray_envcache.store.leases import Holder
from ray_envcache.gc.policy import Limits
from ray_envcache.field.spec import EnvSpec
from ray_envcache.acquire import Store

store, project, modules = Store.open(), sys.argv[1], sys.argv[3]
for _ in range(int(sys.argv[2])):
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
        subprocess.run([lease.python, "-c", f"import ray, {modules}"], check=True)
    collect(store.layout, Limits(everything=True))
"""


def clean_for_ever(uv_command: str, stop: threading.Event, counts: dict[str, int]) -> None:
    """Run a command on uv's cache again and again; it must not fail either."""
    while not stop.is_set():
        support.run_uv("cache", uv_command, "--quiet", cwd=Path("/"))
        counts[uv_command] += 1


def clean_under(store: Store, tmp_path: Path, wheels: Path, children: list[subprocess.Popen[str]], rounds: int) -> None:
    """Build, use and collect in several processes, so often each, while two others clean the cache they all use."""
    projects = {}
    for name in NAMES:
        support.make_wheel(wheels, name, modules={f"{name}/part{n}.py": f"X = {n}\n" for n in range(100)})
        projects[name] = support.make_project(tmp_path / f"project-{name}", wheels, ["ray", name])
    support.make_sdist(wheels, "built-here")
    projects["built_here"] = support.make_project(tmp_path / "project-sdist", wheels, ["ray", "built-here"])
    for name, project in projects.items():
        modules = ", ".join(f"{name}.part{n}" for n in range(100)) if name in NAMES else name
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", USER, str(project), str(rounds), modules], stderr=subprocess.PIPE, text=True
            )
        )
    stop, counts = threading.Event(), {"clean": 0, "prune": 0}
    cleaners = [threading.Thread(target=clean_for_ever, args=(command, stop, counts)) for command in counts]
    for cleaner in cleaners:
        cleaner.start()
    said = [child.communicate()[1] for child in children]
    stop.set()
    for cleaner in cleaners:
        cleaner.join()
    print(counts)
    assert said == [""] * len(said)
    assert min(counts.values()) > 0


@pytest.fixture
def own_uv_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of uv on the file system of the store, so that packages are links into it."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    return tmp_path / "uv-cache"


def test_cleaned_cache_of_uv_harms_nobody(
    own_uv_cache: Path, store: Store, tmp_path: Path, wheels: Path, children: list[subprocess.Popen[str]]
) -> None:
    """`uv cache clean` and `uv cache prune`, again and again, fail no build and break no environment.

    uv's own lock sees to that: cleaning waits for whoever uses the cache, and they for it.
    """
    clean_under(store, tmp_path, wheels, children, rounds=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_cleaned_cache_of_uv_harms_nobody_for_long(
    own_uv_cache: Path, store: Store, tmp_path: Path, wheels: Path, children: list[subprocess.Popen[str]]
) -> None:
    """The same, forty times."""
    clean_under(store, tmp_path, wheels, children, rounds=40)


@pytest.mark.parametrize("how", [["cache", "clean"], ["cache", "clean", "--force"], None], ids=["clean", "force", "rm"])
def test_environment_needs_no_cache(
    how: list[str] | None,
    own_uv_cache: Path,
    tmp_path: Path,
    wheels: Path,
    acquire: Acquire,
    children: list[subprocess.Popen[str]],
) -> None:
    """Whoever runs in an environment imports on when the cache is gone, and so does who comes later."""
    support.make_wheel(wheels, "deep", modules={"deep/__init__.py": "", "deep/late.py": "X = 1\n"})
    lease = acquire(support.make_project(tmp_path / "project", wheels, ["ray", "deep"]))
    program = "import deep; print('up', flush=True); import sys; sys.stdin.read(); import deep.late"
    running = subprocess.Popen([lease.python, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children.append(running)
    assert running.stdout is not None
    assert running.stdout.readline() == "up\n"
    if how:
        support.run_uv(*how, cwd=tmp_path)
    else:
        shutil.rmtree(own_uv_cache)
    running.communicate()
    assert running.returncode == 0
    assert support.run_python("import ray, deep.late", python=lease.python) == ""
