"""Who uses an entry, and that nobody changes it: with real interpreters started from it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest

from ray_envcache.acquire import Store
from ray_envcache.errors import BusyError, InUseError
from ray_envcache.gc.evict import evict
from ray_envcache.store import leases
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Holder
from ray_envcache.store.record import read_record
from ray_envcache.survey.inventory import status
from ray_envcache.system import files, flock
from ray_envcache.system.disk import DiskUse
from tests import support

pytestmark = pytest.mark.host


@pytest.fixture
def entry(tmp_path: Path, wheels: Path, store: Store) -> Entry:
    """A finished environment that nobody holds."""
    support.make_wheel(
        wheels,
        "wanted",
        modules={"wanted/__init__.py": "", "wanted/deep/__init__.py": "VALUE = 1\n", "wanted/bad.py": "def (:\n"},
    )
    return support.build_finished(store, support.make_project(tmp_path / "project", wheels, ["ray", "wanted"]))


def start(entry: Entry, code: str, children: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """An interpreter of the entry that runs `code` and then waits for its stdin to close; returns when it is there."""
    return support.start_python(children, code, python=entry.python)


def test_interpreter_of_the_venv_holds_its_entry(
    store: Store, entry: Entry, children: list[subprocess.Popen[str]]
) -> None:
    """While any interpreter runs from it, nobody can remove an entry; a SIGKILL gives it free."""
    child = start(entry, "", children)
    with pytest.raises(InUseError, match=r"in use by process|it is in use"):
        evict(store.layout, entry)
    assert entry.ready.exists()
    child.send_signal(signal.SIGKILL)
    child.wait()
    evict(store.layout, entry)
    assert not entry.path.exists()
    assert list(store.layout.trash.iterdir()) == []


def test_forked_child_keeps_the_hold(store: Store, entry: Entry, children: list[subprocess.Popen[str]]) -> None:
    """A fork that outlives the interpreter still holds the entry."""
    child = start(entry, "import os, time\nif os.fork() == 0: time.sleep(600)", children)
    (forked,) = psutil.Process(child.pid).children()
    child.kill()
    child.wait()
    try:
        with pytest.raises(InUseError):
            evict(store.layout, entry)
    finally:
        forked.kill()


def test_lease_holds_until_released(store: Store, entry: Entry) -> None:
    """A lease keeps its entry, names its holder, and frees it at once on release; twice is once."""
    lease = leases.claim(entry, store.layout, Holder("agent", cluster="session_x"))
    assert lease is not None
    ((name, holder),) = leases.live_leases(store.layout, entry.key)
    assert (name, holder.kind, holder.pid, holder.cluster) == (entry.name, "agent", os.getpid(), "session_x")
    with pytest.raises(InUseError, match="it is in use") as caught:
        evict(store.layout, entry)
    assert f"ray-envcache why {entry.short}" in caught.value.hint
    lease.release()
    lease.release()
    assert leases.live_leases(store.layout, entry.key) == []
    evict(store.layout, entry)


def test_lease_of_a_killed_process_counts_no_more(
    store: Store, entry: Entry, children: list[subprocess.Popen[str]]
) -> None:
    """Nobody needs to clean up after a holder that was SIGKILLed, and its file is swept."""
    program = """
    import sys
    from ray_envcache.store.leases import Holder, claim
    from ray_envcache.acquire import Store
    layout = Store.open().layout
    lease = claim(layout.entry(sys.argv[1]), layout, Holder("agent"))
    print("up", flush=True)
    sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), entry.path.name]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children.append(child)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    assert [holder.pid for _, holder in leases.live_leases(store.layout, entry.key)] == [child.pid]
    child.kill()
    child.wait()
    assert leases.live_leases(store.layout, entry.key) == []
    evict(store.layout, entry)
    assert list(store.layout.leases_of(entry.key).iterdir()) == []


def test_unreleased_lease_warns(store: Store, entry: Entry) -> None:
    """A lease that is forgotten says so, and frees its entry."""
    with pytest.warns(ResourceWarning, match="unreleased lease"):
        assert leases.claim(entry, store.layout, Holder("test")) is not None
    evict(store.layout, entry)


@contextmanager
def kept_alone(entry: Entry) -> Iterator[None]:
    """Keep the entry to ourselves, as a lister does while it looks and a collector while it removes."""
    descriptor = flock.try_flock(entry.in_use, exclusive=True)
    assert descriptor is not None
    try:
        yield
    finally:
        os.close(descriptor)


def test_claim_waits_for_a_stopped_lister(store: Store, entry: Entry) -> None:
    """A claim waits while a lister or collector keeps the entry, however long that was stopped, and then succeeds."""
    claims: list[leases.Lease | None] = []
    claiming = Thread(target=lambda: claims.append(leases.claim(entry, store.layout, Holder("agent"))))
    with kept_alone(entry):
        claiming.start()
        claiming.join(1)
        assert claiming.is_alive()
    claiming.join()
    with claims[0] or pytest.fail("taken for gone"):
        assert entry.ready.exists()


def test_nothing_is_built_a_second_time_beside_a_stopped_lister(
    tmp_path: Path, store: Store, entry: Entry, children: list[subprocess.Popen[str]]
) -> None:
    """While a process keeps an environment for a second, those who want it wait; they do not build another one."""
    program = """
    from ray_envcache.acquire import Store
    from ray_envcache.field.spec import EnvSpec
    from ray_envcache.resolve.interpreter import installed_ray
    from ray_envcache.store.leases import Holder
    with Store.open().acquire(EnvSpec.parse(sys.argv[1]), installed_ray(), Holder("test"), finish=False) as lease:
        print(lease.entry.path.name, flush=True)
    """
    with kept_alone(entry):
        command = [
            sys.executable,
            "-c",
            "import sys" + textwrap.dedent(program),
            str(tmp_path / "project/pyproject.toml"),
        ]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        children.append(child)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(2)
    assert child.stdout is not None
    assert child.stdout.read().strip() == entry.path.name
    assert store.layout.entries_of(entry.key) == [entry]


def test_interpreter_waits_for_its_hold(store: Store, entry: Entry, children: list[subprocess.Popen[str]]) -> None:
    """An interpreter that starts while a process keeps the entry for a second runs with its hold all the same."""
    module = f"_ray_envcache_hold_{entry.key[:12]}_{entry.number}"
    with kept_alone(entry):
        command: list[str | Path] = [
            entry.python,
            "-c",
            f"import sys; print(sys.modules[{module!r}].HELD is not None, flush=True); input()",
        ]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        children.append(child)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
    assert child.stdout is not None
    assert child.stdout.readline() == "True\n"
    with pytest.raises(InUseError):
        evict(store.layout, entry)


def test_interpreter_of_a_removed_entry_does_not_wait(entry: Entry, tmp_path: Path) -> None:
    """An interpreter whose entry is renamed away while it waits for its hold gives up at once: the entry is gone."""
    begun = time.monotonic()
    with kept_alone(entry):
        child = subprocess.Popen([entry.python, "-c", "pass"], stderr=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(1)
        entry.path.rename(tmp_path / "moved")
        child.communicate()
    assert time.monotonic() - begun < 50  # seconds; the hold itself would wait for sixty


def test_claim_that_waits_too_long_says_so(store: Store, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim that cannot be had is an error which names the file; never is the entry taken for gone."""
    monkeypatch.setattr(leases, "CLAIM_SECONDS", 0.1)
    with kept_alone(entry), pytest.raises(BusyError, match=rf"{entry.in_use}.*\n.*hint|{entry.in_use}"):
        leases.claim(entry, store.layout, Holder("agent"))


def test_lease_on_a_full_disk_holds_untold(store: Store, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for its file a lease still keeps the entry."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(leases, "_own_file", full)
    with leases.claim(entry, store.layout, Holder("agent")) or pytest.fail("no lease"):
        assert leases.live_leases(store.layout, entry.key) == []
        with pytest.raises(InUseError):
            evict(store.layout, entry)


def test_two_sweeps_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep leaves the file that a holder made anew, because another sweep had taken its first one."""
    real, path = flock.try_flock, tmp_path / "lease"
    path.touch()

    def late(*args: Any, **options: Any) -> int | None:
        held = real(*args, **options)
        path.unlink()
        path.touch()
        return held

    monkeypatch.setattr(flock, "try_flock", late)
    leases.remove_free(path)
    assert path.exists()


def test_lease_of_which_a_full_disk_wrote_nothing(store: Store, entry: Entry) -> None:
    """An empty file of a lease counts as one: the collector does not take its holder for dead."""
    with leases.claim(entry, store.layout, Holder("agent")) or pytest.fail("no lease"):
        (path,) = store.layout.leases_of(entry.key).iterdir()
        os.truncate(path, 0)
        ((name, holder),) = leases.live_leases(store.layout, entry.key)
        assert (name, holder.kind) == ("", "")
        found = status(store.layout, entry)
        assert (found.users, found.in_use) == ((), True)


def test_hold_never_breaks_an_interpreter(store: Store, entry: Entry) -> None:
    """Without its `in-use` file, as on a copy of the environment, Python starts as ever."""
    copy = store.layout.root / "copy"
    shutil.copytree(entry.path, copy, symlinks=True)
    (copy / "in-use").unlink()
    done = subprocess.run(
        [copy / "venv/bin/python", "-c", "import wanted.deep"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    files.remove_tree(copy)


def test_bytecode_is_complete_and_imported(entry: Entry) -> None:
    """Every module that compiles has bytecode, valid without a look at the source; the record has true sizes."""
    sources = [path for path in entry.site_packages.rglob("*.py") if path.name != "bad.py"]
    assert sources
    program = "import importlib.util as u, sys\nfor p in sys.argv[1:]: print(u.cache_from_source(p))"
    for cached in support.run_python(program, *map(str, sources), python=entry.python).split():
        # Flags of PEP 552: hash-based, unchecked.
        assert Path(cached).read_bytes()[4:8] == b"\x01\x00\x00\x00"
    use = read_record(DiskUse, entry.measured)
    assert use is not None
    assert use.size >= use.reclaimable > 0


def run_as_mere_owner(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as the store's owner without root's power to write anywhere."""
    drop = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"] if os.geteuid() == 0 else []
    return subprocess.run([*drop, *map(str, command)], capture_output=True, text=True, check=False)


@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root needs setpriv to be a mere owner"
)
def test_nobody_writes_into_an_environment(entry: Entry) -> None:
    """Directories are frozen: no name can be created or removed, at the top, in a package, in its bytecode, in bin."""
    for folder in (
        entry.site_packages,
        entry.site_packages / "wanted/deep",
        entry.site_packages / "wanted/__pycache__",
        entry.bin,
        entry.venv,
    ):
        done = run_as_mere_owner("touch", folder / "new")
        assert "Permission denied" in done.stderr, folder
    assert "Permission denied" in run_as_mere_owner("rm", entry.site_packages / "wanted/__init__.py").stderr


def test_pip_install_is_refused_with_a_reason(entry: Entry) -> None:
    """`pip install` in a worker says what to do instead."""
    done = subprocess.run([entry.bin / "pip", "install", "six"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "shared by all Ray clusters" in done.stderr
    assert "uv lock" in done.stderr
