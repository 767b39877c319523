from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uv
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from ray_envcache.acquire import Store
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder, Lease
from tests import support

# No test is timed: on a busy machine anything takes long once.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def _be_the_first() -> None:
    """As the first process of a container we are the parent of all orphans: only reap them, and test in a child."""
    child = os.fork()
    if child == 0:
        return
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(abs(os.waitstatus_to_exitcode(status)))


if os.getpid() == 1:
    _be_the_first()


_LONG = ("cluster", "attack", "host", "pypi", "slow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is `fast`, begin with what takes longest, and leave out the long runs unless `-m` names them."""
    items.sort(key=_rank)  # with `-n` the many small tests fill up the end
    for item in items:
        if _rank(item) == len(_LONG):
            item.add_marker("fast")
    if "slow" in config.getoption("markexpr"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]


def _rank(item: pytest.Item) -> int:
    return next((number for number, name in enumerate(_LONG) if item.get_closest_marker(name)), len(_LONG))


class _TogetherByFile(LoadScopeScheduling):  # type: ignore[misc]  # pytest-xdist has no annotations
    """With `-n`, the tests of a file run one after the other: they share what they need, and the names of processes."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        # One cluster with all that Ray has is enough.
        return os.path.dirname(file) if "/doors/" in file else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    return _TogetherByFile(config, log)


@pytest.fixture(autouse=True, scope="session")
def _interruptible() -> None:
    """Where we were started in the background of a shell, which ignores Ctrl-C for us, child processes must not inherit
    that: tests interrupt them.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def _a_machine_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """An empty home, no settings of this machine's user, a disk that is never too full, and a store that cannot be made.

    A test that forgets to choose a store must fail, not fill the user's. What says how to reach package indexes stays,
    and so does uv's cache: a test run is no reason to download Ray again.
    """
    umask = os.umask(0o022)
    with pytest.MonkeyPatch.context() as patch:
        cache = support.run(uv.find_uv_bin(), "--color=never", "cache", "dir").strip()
        for name in filter(_is_of_the_user, list(os.environ)):
            patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        patch.setenv("UV_CACHE_DIR", cache)
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        # On a machine with little room the collector would remove what other tests have just made.
        patch.setenv("RAY_ENVCACHE_MIN_FREE_SPACE", "off")
        trap = tmp_path_factory.mktemp("trap") / "file"
        trap.write_text("you forgot to choose a store")
        patch.setenv("RAY_ENVCACHE_DIR", str(trap / "you-forgot-to-choose-a-store"))
        yield
    os.umask(umask)


_SETTINGS = ("CLICOLOR", "CONDA", "GIT_", "LC_", "PYTHON", "RAY_", "UV_", "VIRTUAL_ENV", "XDG_")
"""Prefixes of variables that change what programs do. Some come from `uv run`, or from importing this package."""
_REACH = (
    "GIT_SSL_", "UV_DEFAULT_INDEX", "UV_EXTRA_INDEX", "UV_FIND_LINKS", "UV_HTTP_", "UV_INDEX", "UV_INSECURE_HOST",
    "UV_NATIVE_TLS", "UV_SYSTEM_CERTS",
)  # fmt: skip


def _is_of_the_user(name: str) -> bool:
    if name.startswith(_REACH) and name != "UV_INDEX_STRATEGY":
        return False
    return name.startswith(_SETTINGS) or name in {"COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR", "TZ", "UV"}


@pytest.fixture(autouse=True)
def _failed_commands_are_shown(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The report of a failed test has the output of each command that failed in it, whatever the test asserts of that."""
    communicate = subprocess.Popen.communicate

    def recorded(child: subprocess.Popen[Any], *arguments: Any, **options: Any) -> tuple[Any, Any]:
        out, err = communicate(child, *arguments, **options)
        if child.returncode and (out or err):
            request.node.add_report_section("call", "command", support.describe(child.args, child.returncode, out, err))
        return out, err

    monkeypatch.setattr(subprocess.Popen, "communicate", recorded)


@pytest.fixture
def wheels(tmp_path: Path) -> Path:
    """A folder of wheels with a ray that only says its version."""
    folder = tmp_path / "wheels"
    support.make_fake_ray(folder)
    return folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which is also the default one of child processes."""
    root = tmp_path / "store"
    monkeypatch.setenv("RAY_ENVCACHE_DIR", str(root))
    return Store.open(root)


Acquire = Callable[[Path], Lease]


@pytest.fixture
def acquire(store: Store) -> Iterator[Acquire]:
    """Acquire the environment of a project from the store; released at the end of the test.

    Nobody compiles its bytecode in the background: a test that removes something would meet that process or not.
    """
    taken: list[Lease] = []

    def acquire(path: Path) -> Lease:
        lease = store.acquire(EnvSpec.parse(path), installed_ray(), Holder("test"), finish=False)
        taken.append(lease)
        return lease

    yield acquire
    for lease in taken:
        lease.release()


@pytest.fixture
def children() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a test starts; whatever happens they are gone after it."""
    started: list[subprocess.Popen[str]] = []
    yield started
    support.reap(started)
