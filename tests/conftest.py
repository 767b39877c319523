from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

from ray_envcache.acquire import Store
from ray_envcache.field import registration
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.cluster_ray import installed_ray
from ray_envcache.store.leases import Holder, Lease
from tests import support

# No test is timed: on a busy machine anything takes long once.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


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
def _bytecode_is_written() -> Iterator[None]:
    """Where a machine forbids it, each of the thousands of child processes would compile all that it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _trap_the_default_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A test that forgets to choose a store must fail, not fill the user's: this root cannot be made."""
    trap = tmp_path_factory.mktemp("trap") / "file"
    trap.write_text("you forgot to choose a store")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENVCACHE_DIR", str(trap / "you-forgot-to-choose-a-store"))
        # Importing the package registered it here; tests that want that say so.
        for name in (registration.HOOK, registration.PLUGINS, registration.UV_RUN):
            patch.delenv(name, raising=False)
        # Whoever runs us with this one means our own environment: a `uv sync` of a test would replace it.
        patch.delenv("UV_PROJECT_ENVIRONMENT", raising=False)
        yield


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
    for child in started:
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                stream.close()
