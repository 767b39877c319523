"""The collector: what goes, what stays, and what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.errors import FieldValueError, InUseError, UnknownKeyError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.collector import collect, make_room
from ray_envcache.gc.evict import evict
from ray_envcache.gc.policy import Limits
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import leases, pins
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Holder
from ray_envcache.store.record import read_record
from ray_envcache.survey.inventory import FRESH_SECONDS, record_sizes, status
from ray_envcache.system import disk, flock, processes
from ray_envcache.system.disk import DiskUse
from ray_envcache.system.texts import Space
from tests import support
from tests.cli.test_commands import run
from tests.gc.fabricated import add_file, make_entry, make_layout, publish
from tests.store.test_leases import start

pytestmark = pytest.mark.host

DAY = 86_400
AGE_ONLY = Limits(min_free_space=None)
NOW = Limits(unused_for=0, min_free_space=None)

Make = Callable[[str], Entry]


@pytest.fixture
def make(tmp_path: Path, wheels: Path, store: Store) -> Make:
    """Build the environment of a project with a package of its own of 200 kB; nobody holds it."""

    def make(name: str) -> Entry:
        support.make_wheel(wheels, name, modules={f"{name}.py": f"DATA = '{name * 200_000}'[:200_000]\n"})
        project = support.make_project(tmp_path / f"project-{name}", wheels, ["ray", name])
        return support.build_finished(store, project)

    return make


def age(entry: Entry, days: float) -> None:
    """Pretend that the entry was last used so long ago."""
    then = time.time() - days * DAY
    os.utime(entry.in_use, (then, then))


def test_old_ones_go_and_used_ones_stay(store: Store, make: Make, children: list[subprocess.Popen[str]]) -> None:
    """What nobody used for 14 days goes; what was used, is in use, or is pinned stays."""
    old, fresh, held, pinned = make("aa"), make("bb"), make("cc"), make("dd")
    start(held, "", children)
    pins.pin(store.layout, pinned)
    for entry in (old, held, pinned):
        age(entry, 15)
    report = collect(store.layout, AGE_ONLY)
    assert [one.name for one in report.removed] == [old.path.name]
    assert report.removed[0].reason == "unused for 15 days"
    assert (report.in_use, report.pinned, report.failed) == (1, 1, [])
    assert [entry.path.exists() for entry in (old, fresh, held, pinned)] == [False, True, True, True]


def test_dry_run_says_exactly_what_a_run_does(store: Store, make: Make) -> None:
    """`--dry-run` goes through the same code, changes nothing, and names the same environments and bytes."""
    for number, name in enumerate(("aa", "bb", "cc")):
        age(make(name), 20 - number)
    names = [path.name for path in store.layout.entries.iterdir()]
    would = collect(store.layout, AGE_ONLY, dry_run=True)
    assert [path.name for path in store.layout.entries.iterdir()] == names
    did = collect(store.layout, AGE_ONLY)
    assert [(one.name, one.reason, one.freed_bytes) for one in would.removed] == [
        (one.name, one.reason, one.freed_bytes) for one in did.removed
    ]
    assert [one.name[:2] != "" for one in did.removed] == [True] * 3


def test_user_that_ends_while_it_is_looked_for(store: Store, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is there any more to be named: not taken for one whom we cannot see."""
    lease = leases.hold(make("aa"))
    assert lease is not None
    look = processes.processes_using

    def late(root: Path, names: Collection[str]) -> dict[str, dict[int, str]]:
        lease.release()
        return look(root, names)

    monkeypatch.setattr(processes, "processes_using", late)
    found = status(store.layout, lease.entry)
    assert (lease.descriptors, found.users, found.in_use) == ([], (), False)


def occupied(*paths: Path) -> int:
    """What the paths occupy together, as du counts it: each file once."""
    done = subprocess.run(["du", "-sc", "-B1", *paths], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1].split()[0])


def test_least_recently_used_goes_first_when_space_is_needed(store: Store, make: Make) -> None:
    """The ceiling of the store is reached by removing the least recently used."""
    entries = [make("aa"), make("bb"), make("cc")]
    for number, entry in enumerate(entries):
        age(entry, 3 - number)
    size = occupied(store.layout.bytecode, *(entry.path for entry in entries))
    report = collect(store.layout, Limits(None, max_used_space=Space(size=size - 1), min_free_space=None))
    assert [one.name for one in report.removed] == [entries[0].path.name]


def test_shared_files_count_once_for_the_ceiling(tmp_path: Path) -> None:
    """Environments that share nearly all of their files take their space once, and go only when that is too much."""
    layout = make_layout(tmp_path / "store")
    entries = [make_entry(layout, number) for number in range(5)]
    shared = add_file(entries[0], 5_000_000)
    for number, entry in enumerate(entries):
        age(entry, 5 - number)
        if number:
            os.link(shared, entry.site_packages / "data")

    def removed(size: int) -> int:
        return len(collect(layout, Limits(None, max_used_space=Space(size=size), min_free_space=None)).removed)

    whole = occupied(*(entry.path for entry in entries))
    assert removed(whole) == 0
    assert removed(whole - 1) == 1
    assert removed(4_900_000) == 4, "only the last one frees what they share"


def test_space_is_asked_of_all_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two idle environments that keep each other's files free nothing alone, but go for the space that both free."""
    layout = make_layout(tmp_path / "store")
    entries = [make_entry(layout, number) for number in range(2)]
    os.link(add_file(entries[0], 5_000_000), entries[1].site_packages / "data")
    space = disk.free_space(layout.root)
    monkeypatch.setattr(disk, "free_space", lambda _: space)  # other processes write to this disk
    make_room(layout, space.free + 4_000_000)
    assert list(layout.all_entries()) == []


def test_nothing_goes_in_vain(tmp_path: Path) -> None:
    """Where something outside of the store keeps nearly all bytes, the disk stays full and the environments stay too."""
    layout = make_layout(tmp_path / "store")
    entries = [make_entry(layout, number) for number in range(3)]
    for entry in entries:
        os.link(add_file(entry, 5_000_000), tmp_path / entry.key)
    make_room(layout, 1 << 60)
    assert [entry.path.exists() for entry in entries] == [True] * 3


def test_room_for_a_build_heeds_the_floor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What RAY_ENVCACHE_RESERVED_SPACE keeps is kept from builds too."""
    layout = make_layout(tmp_path / "store")
    entries = [make_entry(layout, number) for number in range(3)]
    for number, entry in enumerate(entries):
        add_file(entry, 2_000_000)
        age(entry, 3 - number)
    monkeypatch.setenv("RAY_ENVCACHE_RESERVED_SPACE", "3MB")
    make_room(layout, 1 << 60)
    assert [entry.path.exists() for entry in entries] == [False, True, True]
    monkeypatch.setenv("RAY_ENVCACHE_RESERVED_SPACE", "some")
    with pytest.raises(FieldValueError, match="RAY_ENVCACHE_RESERVED_SPACE"):
        make_room(layout, 1 << 60)


def test_half_built_ones_go_whatever_the_limits(tmp_path: Path) -> None:
    """What a killed builder left is rubbish, also where no limit is set; what is built at this moment is none."""
    layout = make_layout(tmp_path / "store")
    half, growing, whole = (make_entry(layout, number, ready=number == 2) for number in range(3))
    builder = flock.try_flock(layout.builder_flock(growing.key), exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    assert builder is not None
    report = collect(layout, Limits(unused_for=None, min_free_space=None))
    os.close(builder)
    assert [one.name for one in report.removed] == [half.path.name]
    assert growing.path.exists()
    assert whole.path.exists()


def test_what_is_finished_while_it_is_looked_at_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder that ends between the look for the record and that for its flock leaves nothing broken."""
    layout = make_layout(tmp_path / "store")
    entry, real = make_entry(layout, 1, ready=False), flock.is_held
    builder = [flock.try_flock(layout.builder_flock(entry.key), exclusive=True, flags=os.O_RDWR | os.O_CREAT)]

    def end(path: Path) -> bool:
        if builder and (descriptor := builder.pop()):
            publish(entry)
            os.close(descriptor)
        return real(path)

    monkeypatch.setattr(flock, "is_held", end)
    assert collect(layout, AGE_ONLY).removed == []
    assert builder == []
    assert status(layout, entry).state == "ready"


def test_layer_goes_after_its_environment(tmp_path: Path) -> None:
    """A layer whose environment was collected can never be used: the next collection takes it, however young it is."""
    layout = make_layout(tmp_path / "store")
    base, layer = (make_entry(layout, number) for number in range(2))
    layer.ready.write_text(json.dumps({**json.loads(layer.ready.read_text()), "base": base.name}))
    age(base, 15)
    assert [one.name for one in collect(layout, AGE_ONLY).removed] == [base.name]
    assert leases.claim(layer, layout, Holder("test")) is None
    (gone,) = collect(layout, Limits(unused_for=None, min_free_space=None)).removed
    assert (gone.name, gone.reason) == (layer.name, "it is broken and can never be used")


def test_use_that_is_seen_counts_as_use(tmp_path: Path) -> None:
    """What was in use when a collector last looked has been unused since then, not since its first user came."""
    layout = make_layout(tmp_path / "store")
    entry = make_entry(layout, 1)
    in_use = flock.try_flock(entry.in_use, exclusive=False)
    assert in_use is not None
    age(entry, 15)
    assert collect(layout, AGE_ONLY).in_use == 1
    os.close(in_use)  # by SIGKILL, without a word
    assert collect(layout, AGE_ONLY).removed == []
    age(entry, 15)
    assert len(collect(layout, AGE_ONLY).removed) == 1


def test_death_of_a_holder_counts_as_use(tmp_path: Path, children: list[subprocess.Popen[str]]) -> None:
    """Killed with all its workers after weeks in which no collector looked, a cluster's environment stays for weeks."""
    layout = make_layout(tmp_path / "store")
    entry = make_entry(layout, 1)
    code = """
from pathlib import Path
from ray_envcache.store import leases
from ray_envcache.store.layout import Layout
layout = Layout(Path(sys.argv[1]))
lease = leases.claim(next(layout.all_entries()), layout, leases.Holder("agent"))
"""
    agent = support.start_python(children, code, layout.root)
    age(entry, 15)
    agent.kill()
    agent.wait()
    assert collect(layout, AGE_ONLY, dry_run=True).removed == []
    assert collect(layout, AGE_ONLY).removed == []
    age(entry, 15)
    assert len(collect(layout, AGE_ONLY).removed) == 1


def test_freed_bytes_are_those_of_the_disk(store: Store, make: Make, tmp_path: Path) -> None:
    """What uv's cache has too frees nothing; once that cache is gone, all of it is freed. Measured, not summed."""
    entry = make("aa")
    linked = record_sizes(store.layout, entry)
    assert linked.reclaimable < linked.size
    # Another hard link somewhere else, as uv's cache has them, makes even less reclaimable.
    for path in entry.site_packages.rglob("*.py"):
        while path.stat().st_nlink < 2:
            os.link(path, tmp_path / f"link-{path.name}")
    gone = evict(store.layout, entry)
    assert gone.size >= linked.size - 4096
    assert gone.reclaimable < gone.size


def outdate(entry: Entry) -> None:
    """Pretend that the entry was measured so long ago that its record is not believed any more."""
    then = time.time() - FRESH_SECONDS - 1
    os.utime(entry.measured, (then, then))


def test_reclaimable_is_an_hour_old_at_most(
    store: Store, tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `uv cache clean` the record of an entry holds for an hour, then the entry is measured again."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    support.make_wheel(wheels, "aa", modules={"aa.py": "x = '" + "a" * 500_000 + "'\n"})
    project = support.make_project(tmp_path / "project", wheels, ["ray", "aa"])
    entry = support.build_finished(store, project)

    def reclaimable() -> int:
        return status(store.layout, entry).reclaimable_bytes

    before = reclaimable()
    support.run_uv("cache", "clean", cwd=tmp_path)
    assert reclaimable() == before
    outdate(entry)
    assert reclaimable() >= before + 500_000
    kept = read_record(DiskUse, entry.measured)
    assert kept is not None
    assert kept.reclaimable == reclaimable()
    assert support.run_python("import aa", python=entry.python) == "", "nothing breaks"


def test_reclaimable_counts_what_other_entries_have_too(store: Store, wheels: Path, tmp_path: Path) -> None:
    """What an entry shares with another is freed by neither; once the other is gone it is freed by the one left."""
    for name in ("aa", "bb"):
        support.make_wheel(wheels, name, modules={f"{name}.py": f"DATA = '{name * 100_000}'\n"})

    def build(*packages: str) -> Entry:
        project = support.make_project(tmp_path / f"project-{packages[-1]}", wheels, ["ray", *packages])
        return support.build_finished(store, project)

    first = build("aa")
    alone = record_sizes(store.layout, first).reclaimable
    other = build("aa", "bb")
    assert record_sizes(store.layout, first).reclaimable <= alone - 200_000, "the bytecode of aa is shared"
    evict(store.layout, other)
    assert record_sizes(store.layout, first).reclaimable == alone


def test_clock_that_went_back_makes_a_record_old(store: Store, make: Make) -> None:
    """A record of the future is not believed: the entry is measured again."""
    entry = make("aa")
    ahead = time.time() + DAY
    os.utime(entry.measured, (ahead, ahead))
    status(store.layout, entry)
    assert entry.measured.stat().st_mtime < ahead


def test_never_follows_a_link_out_of_the_store(store: Store, make: Make, tmp_path: Path) -> None:
    """Symbolic links in an entry, in the trash, and in place of an entry are removed or left, never followed."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").write_text("do not touch")
    entry = make("aa")
    entry.site_packages.chmod(0o755)
    (entry.site_packages / "link").symlink_to(outside, target_is_directory=True)
    (store.layout.trash / "link").symlink_to(outside, target_is_directory=True)
    (store.layout.entries / ("f" * 32 + "-1")).symlink_to(outside, target_is_directory=True)
    collect(store.layout, NOW)
    assert (outside / "precious").read_text() == "do not touch"
    assert not entry.path.exists()


def test_leaves_alone_what_is_not_ours(store: Store, make: Make) -> None:
    """Foreign files and newer layout versions in the store's root stay."""
    newer, foreign = store.layout.root / "v2" / "entries" / "x", store.layout.entries / "notes.txt"
    newer.mkdir(parents=True)
    foreign.write_text("mine")
    make("aa")
    assert len(collect(store.layout, Limits(everything=True)).removed) == 1
    assert newer.is_dir()
    assert foreign.read_text() == "mine"


def test_rubbish_of_the_dead_is_swept(store: Store, make: Make) -> None:
    """Half entries, trash, temporary files and leases of the dead all go, at once."""
    entry = make("aa")
    half = store.layout.entries / ("a" * 32 + "-1")
    (half / "venv").mkdir(parents=True)
    (store.layout.trash / "half-deleted" / "deep").mkdir(parents=True)
    (store.layout.memo / ".tmp-0123").touch()
    store.layout.leases_of("b" * 32).mkdir()
    (store.layout.leases_of("b" * 32) / "dead").touch()
    evict(store.layout, entry)
    (memo,) = store.layout.memo.glob("*.json")
    report = collect(store.layout, AGE_ONLY)
    assert [one.name for one in report.removed] == [half.name]
    left = [path for path in store.layout.top.rglob("*") if path.is_file() and not path.name.startswith("journal.")]
    assert {path for path in left if path.parent != store.layout.flocks} == {store.layout.cachedir_tag, memo}


def test_temporary_file_of_a_living_writer_stays(store: Store) -> None:
    """A file that is being written is not rubbish."""
    import fcntl

    path = store.layout.memo / ".tmp-living"
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        collect(store.layout, AGE_ONLY)
        assert path.exists()
    collect(store.layout, AGE_ONLY)
    assert not path.exists()


def test_second_collector_has_nothing_to_do(store: Store, make: Make) -> None:
    """While one is at work another returns at once, and that is no failure."""
    make("aa")
    descriptor = flock.try_flock(store.layout.collector_flock, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    assert descriptor is not None
    done = run("gc", "--all")
    os.close(descriptor)
    assert (done.returncode, done.stdout) == (0, "Nothing done: another collector is at work\n")


def test_user_that_comes_between_choosing_and_removing_keeps_it(
    store: Store, make: Make, tmp_path: Path, children: list[subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frozen after the choice, the collector finds the newcomer and leaves the entry, by lease or by interpreter."""
    for newcomer in ("interpreter", "lease"):
        entry = make("aa" if newcomer == "lease" else "bb")
        points = tmp_path / newcomer
        points.mkdir()
        (points / "stop-evict-chosen").touch()
        command = [sys.executable, "-m", "ray_envcache", "gc", "--all"]
        collector = subprocess.Popen(
            command, env={**os.environ, "RAY_ENVCACHE_TEST_POINTS": str(points)}, stdout=subprocess.PIPE, text=True
        )
        children.append(collector)
        support.wait_until((points / "reached-evict-chosen").exists, "the collector chose")
        lease = leases.claim(entry, store.layout, Holder("agent")) if newcomer == "lease" else None
        child = start(entry, "", children) if newcomer == "interpreter" else None
        (points / "stop-evict-chosen").unlink()
        assert collector.wait() == 0
        assert entry.ready.exists(), newcomer
        if lease:
            lease.release()
        if child:
            child.kill()
            child.wait()


def test_entry_that_somebody_else_removes_first(
    store: Store, make: Make, tmp_path: Path, children: list[subprocess.Popen[str]]
) -> None:
    """A lost race is no failure of the collector, and a plain answer to who removes by hand."""
    entry = make("a")
    (tmp_path / "stop-evict-locked").touch()
    command = [sys.executable, "-m", "ray_envcache", "gc", "--all"]
    environ = {**os.environ, "RAY_ENVCACHE_TEST_POINTS": str(tmp_path)}
    collector = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children.append(collector)
    support.wait_until((tmp_path / "reached-evict-locked").exists, "the collector has the flocks")
    entry.path.rename(store.layout.trash / "taken")
    (tmp_path / "stop-evict-locked").unlink()
    out, err = collector.communicate()
    assert (collector.returncode, err) == (0, "")
    assert "0 failed" in out
    with pytest.raises(UnknownKeyError, match="gone already"):
        evict(store.layout, entry)


@pytest.mark.parametrize("point", ["evict-locked", "evict-renamed"])
def test_user_that_comes_while_it_is_removed_gets_a_new_one(
    store: Store, tmp_path: Path, wheels: Path, children: list[subprocess.Popen[str]], point: str
) -> None:
    """A user that comes in the middle of a removal waits until the collector goes on, and has another one built."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    entry = support.build_finished(store, project)
    points = tmp_path / "points"
    points.mkdir()
    (points / f"stop-{point}").touch()
    environ = {**os.environ, "RAY_ENVCACHE_TEST_POINTS": str(points)}
    collector = subprocess.Popen([sys.executable, "-m", "ray_envcache", "rm", entry.key], env=environ, text=True)
    children.append(collector)
    support.wait_until((points / f"reached-{point}").exists, "the collector is in the middle")
    if point == "evict-renamed":
        assert leases.claim(entry, store.layout, Holder("agent")) is None
    user = subprocess.Popen([sys.executable, "-m", "ray_envcache", "build", project], stdout=subprocess.PIPE, text=True)
    children.append(user)
    if point != "evict-renamed":
        time.sleep(0.3)  # lets the user meet the flock; the outcome is the same if it does not
    (points / f"stop-{point}").unlink()
    out, _ = user.communicate()
    assert collector.wait() == user.returncode == 0
    assert subprocess.run([out.strip(), "-c", "import ray"], check=False).returncode == 0


def test_process_without_a_hold_is_a_veto(store: Store, make: Make, children: list[subprocess.Popen[str]]) -> None:
    """A program that is no Python and holds no flock, but runs from the entry, keeps it."""
    entry = make("aa")
    entry.bin.chmod(0o755)
    program = entry.bin / "raylet"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", program)
    child = subprocess.Popen([program, "600"], text=True)
    children.append(child)
    support.wait_until(lambda: os.readlink(f"/proc/{child.pid}/exe") == str(program), "it runs")
    with pytest.raises(InUseError, match=rf"in use by process {child.pid} \(its executable\)"):
        evict(store.layout, entry)
    assert collect(store.layout, NOW, dry_run=True).removed == [], "nor would a collection take it"
    child.kill()
    child.wait()
    evict(store.layout, entry)


@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs unshare and root")
def test_user_in_another_container_is_seen(store: Store, make: Make, children: list[subprocess.Popen[str]]) -> None:
    """A process of another pid namespace keeps the entry, though it has no number here, and is told as used."""
    entry = make("aa")
    program = "print('up', flush=True); import sys; sys.stdin.read()"
    inside = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", entry.python, "-c", program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    children.append(inside)
    assert inside.stdout is not None
    assert inside.stdout.readline() == "up\n"
    # From a sibling namespace, as another container would ask.
    asked = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-m", "ray_envcache", "list", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    (one,) = json.loads(asked.stdout)["envs"]
    assert (one["in_use"], one["holders"]) == (True, [])
    with pytest.raises(InUseError):
        evict(store.layout, entry)


def test_make_room_takes_what_frees_something(store: Store, make: Make) -> None:
    """Asked for more than the disk has, all idle environments that free bytes go."""
    make("aa")
    make("bb")
    make_room(store.layout, 1 << 60)
    assert list(store.layout.all_entries()) == []


def test_gc_works_on_a_full_disk(tmp_path: Path, wheels: Path) -> None:
    """With no byte left the collector still removes, and the disk has room again."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    with support.small_disk(tmp_path / "disk") as small:
        store = Store.open(small / "store")
        entry = support.build_finished(store, project)
        with suppress(OSError), (small / "ballast").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        assert disk.free_space(small).free == 0
        with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test")):
            assert collect(store.layout, Limits(everything=True)).in_use == 1
        done = run("gc", "--all", RAY_ENVCACHE_DIR=str(store.layout.root))
        assert done.returncode == 0, done.stderr
        assert not entry.path.exists()
        assert done.stdout.splitlines()[-1].startswith("Removed 1 environment, freed ")


def test_summary_line(store: Store, make: Make) -> None:
    """One line says what happened, for cron's mail; `--json` has the same as data."""
    pins.pin(store.layout, make("bb"))
    age(make("aa"), 15)
    pattern = r"1 environment, freed \S+ \S?B; 0 in use, 1 pinned, 0 failed"
    would = run("gc", "--min-free-space", "0%", "--dry-run")
    done = run("gc", "--min-free-space", "0%")
    assert re.fullmatch(f"Would remove {pattern.replace('freed', 'free')}", would.stdout.splitlines()[-1])
    assert re.fullmatch(f"Removed {pattern}", done.stdout.splitlines()[-1])
    data = json.loads(run("gc", "--all", "--json").stdout)
    assert (data["schema_version"], data["removed"], data["pinned"]) == (1, [], 1)


def test_limits_come_from_flags_before_variables(store: Store, make: Make) -> None:
    """RAY_ENVCACHE_UNUSED_FOR changes the default, a flag overrides both; nonsense is a usage error that names it."""
    entry = make("aa")
    age(entry, 2)
    assert "Removed 0" in run("gc", "--unused-for", "3d", RAY_ENVCACHE_UNUSED_FOR="1d").stdout
    assert "Removed 1" in run("gc", RAY_ENVCACHE_UNUSED_FOR="1d").stdout
    wrong = run("gc", RAY_ENVCACHE_MAX_USED_SPACE="much")
    assert (wrong.returncode, "RAY_ENVCACHE_MAX_USED_SPACE" in wrong.stderr) == (2, True)
    assert run("gc", "--unused-for", "yesterday").returncode == 2


@pytest.mark.parametrize(
    "option", ["--max-used-space=50", "--unused-for= 14 ", "--min-free-space=0.5", "--reserved-space=007"]
)
def test_limits_need_a_unit(store: Store, make: Make, option: str) -> None:
    """50 bytes, or 14 seconds, are hardly what somebody means who leaves the unit out: nothing is removed."""
    entry = make("aa")
    done = run("gc", option)
    assert (done.returncode, "without a unit" in done.stderr, '"50GB"' in done.stderr) == (2, True, True)
    assert entry.ready.exists()
    for none in ("0", "0.0", "0%"):
        assert run("gc", "--reserved-space", none).returncode == 0


def test_rm_takes_the_layers_along(store: Store, make: Make) -> None:
    """A layer cannot be used without the environment below it; a pinned one keeps both."""
    base, layer, other = make("aa"), make("bb"), make("cc")
    record = json.loads(layer.ready.read_text())
    layer.ready.write_text(json.dumps({**record, "base": base.name}))
    pins.pin(store.layout, layer)
    assert run("rm", base.key).returncode == 1
    assert base.ready.exists()
    pins.unpin(store.layout, layer.key)
    done = run("rm", base.key, layer.key)
    assert (done.returncode, done.stderr.count("Removed")) == (0, 2)
    assert [one.name for one in store.layout.all_entries()] == [other.name]


def test_pin_survives_everything_but_unpin(store: Store, make: Make) -> None:
    """Neither gc nor rm nor purge removes what is pinned."""
    entry = make("aa")
    key = entry.key[:8]
    assert run("pin", key).returncode == 0
    assert "pinned" in run("list").stdout
    assert "Removed 0" in run("gc", "--all").stdout
    refused = run("rm", key)
    assert (refused.returncode, "it is pinned" in refused.stderr) == (1, True)
    assert run("purge", "--yes").returncode == 0
    assert entry.ready.exists()
    assert run("unpin", key).returncode == 0
    assert run("purge", "--yes").returncode == 0
    assert not entry.path.exists()


def test_pin_of_what_cannot_be_used(tmp_path: Path) -> None:
    """An environment that is being built, or is broken, is not pinned, and the error says so."""
    layout = make_layout(tmp_path / "store")
    with pytest.raises(UnknownKeyError, match="being built, broken, or just removed") as caught:
        pins.pin(layout, make_entry(layout, 1, ready=False))
    assert "ray-envcache build waits for it" in caught.value.hint
    assert pins.pinned_keys(layout) == set()


def test_purge_asks(store: Store, make: Make) -> None:
    """Without a terminal to ask on, purge insists on --yes."""
    entry = make("aa")
    done = run("purge")
    assert (done.returncode, "--yes" in done.stderr) == (2, True)
    assert entry.ready.exists()


def test_why_names_processes(store: Store, make: Make, children: list[subprocess.Popen[str]]) -> None:
    """`why` shows each user with pid, command and since when; then nothing."""
    entry = make("aa")
    child = start(entry, "", children)
    said = run("why", entry.key[:8]).stdout
    assert re.search(rf"{child.pid}\s+process\s", said)
    (user,) = status(store.layout, entry).users
    assert (user.pid, user.kind) == (child.pid, "process")
    child.kill()
    child.wait()
    assert "nothing keeps it" in run("why", entry.key[:8]).stdout


def test_limits_can_be_switched_off(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an option as by a variable, and the option has the last word."""
    age(make("one"), days=2)
    monkeypatch.setenv("RAY_ENVCACHE_UNUSED_FOR", "1d")
    assert "Removed 0 environments" in run("gc", "--unused-for", "off", "--min-free-space", "OFF").stdout
    assert "Removed 1 environment" in run("gc", "--min-free-space", "off").stdout
