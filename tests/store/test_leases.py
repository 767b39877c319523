"""Who uses an entry, and that nobody changes it: with real interpreters started from it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from threading import Thread

import psutil
import pytest

from ray_envcache.acquire import Store
from ray_envcache.errors import InUseError
from ray_envcache.gc.evict import evict
from ray_envcache.store import leases
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Holder
from ray_envcache.store.sizes import MeasuredRecord
from ray_envcache.system import files
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
    with pytest.raises(InUseError, match=r"in use by process|a process runs from it"):
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
    lease = leases.claim_ready(entry, store.layout, Holder("agent", cluster="session_x"))
    assert lease is not None
    with pytest.raises(InUseError, match=f"in use by agent {os.getpid()} .session_x."):
        evict(store.layout, entry)
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
    from ray_envcache.store.leases import Holder, claim_ready
    from ray_envcache.acquire import Store
    layout = Store.open().layout
    lease = claim_ready(layout.entry(sys.argv[1]), layout, Holder("agent"))
    print("up", flush=True)
    sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(program), entry.path.name]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children.append(child)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    assert [holder["pid"] for holder in leases.live_leases(store.layout, entry.key)] == [child.pid]
    child.kill()
    child.wait()
    assert leases.live_leases(store.layout, entry.key) == []
    evict(store.layout, entry)
    assert list(store.layout.leases_of(entry.key).iterdir()) == []


def test_unreleased_lease_warns(store: Store, entry: Entry) -> None:
    """A lease that is forgotten says so, and frees its entry."""
    with pytest.warns(ResourceWarning, match="unreleased lease"):
        assert leases.claim_ready(entry, store.layout, Holder("test")) is not None
    evict(store.layout, entry)


def test_lease_that_is_told_of_later(store: Store, entry: Entry) -> None:
    """A lease holds from the start, and whoever gives it back meanwhile, in whatever thread, leaves nothing behind."""
    for _ in range(100):
        lease = leases.claim_whole(entry)
        assert lease is not None
        with pytest.raises(InUseError):
            evict(store.layout, entry)
        telling = Thread(target=lease.announce, args=(store.layout, Holder("agent")))
        telling.start()
        lease.release()
        telling.join()
        assert not list(store.layout.leases_of(entry.key).glob("*"))
    with leases.claim_whole(entry) or pytest.fail("no lease") as lease:
        assert leases.live_leases(store.layout, entry.key) == []
        lease.announce(store.layout, Holder("agent"))
        assert [holder["pid"] for holder in leases.live_leases(store.layout, entry.key)] == [os.getpid()]
    lease.announce(store.layout, Holder("agent"))
    assert leases.live_leases(store.layout, entry.key) == []
    evict(store.layout, entry)


def test_lease_on_a_full_disk_holds_untold(store: Store, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for its file a lease still keeps the entry."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(leases, "_own_file", full)
    with leases.claim_ready(entry, store.layout, Holder("agent")) or pytest.fail("no lease"):
        assert leases.live_leases(store.layout, entry.key) == []
        with pytest.raises(InUseError):
            evict(store.layout, entry)


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
    record = MeasuredRecord.read(entry)
    assert record is not None
    assert record.size_bytes >= record.reclaimable_bytes > 0


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
