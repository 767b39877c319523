"""Lower stores: used in place, held against their owner's collector, and never changed in any way."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

import pytest

from ray_envcache.acquire import Store
from ray_envcache.build import bytecode
from ray_envcache.cluster.building import AgentBuild
from ray_envcache.errors import ReadOnlyError, StoreError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.collector import collect
from ray_envcache.gc.evict import evict
from ray_envcache.gc.policy import Limits
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import leases, record, roots
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder, Lease
from ray_envcache.store.record import ReadyRecord
from ray_envcache.system import files, flock
from ray_envcache.system.files import file_identity, is_unchanged
from tests import support
from tests.build.test_layers import make_package

pytestmark = pytest.mark.host

Acquire: TypeAlias = Callable[[Path], Lease]

NOTHING_DUE = Limits(unused_for=None, min_free_space=None)

# Nobody's user where that can be: the paths of tests are for their owner alone, hence the power to look into them.
OTHER_USER = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
OTHER_USER += [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient") if OTHER_USER]

# What a worker does, by a lease and without.
USE = """
import subprocess, sys
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder
from ray_envcache.field.spec import EnvSpec
from ray_envcache.acquire import Store

with Store.open().acquire(EnvSpec.parse(sys.argv[1]), installed_ray(), Holder("agent")) as lease:
    subprocess.run([lease.python, "-c", "import wanted, sys; print(sys.prefix)"], check=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheels, and two projects with the same packages; one has code of its own."""
    folder = tmp_path_factory.mktemp("image")
    support.make_fake_ray(folder / "wheels")
    support.make_wheel(folder / "wheels", "wanted")
    support.make_project(folder / "plain", folder / "wheels", ["ray", "wanted"])
    app = make_package(folder / "app", "app", dependencies=["ray", "wanted"])
    with (app / "pyproject.toml").open("a") as file:
        file.write(f'[tool.uv]\nno-index = true\nfind-links = ["{folder / "wheels"}"]\n')
    support.run_uv("lock", cwd=app)
    return folder


@pytest.fixture(scope="module")
def image(folder: Path) -> Layout:
    """The store of an image, made as a Dockerfile makes one; tests leave it as it is."""
    root = folder / "opt" / "envcache"
    done = cli("build", folder / "app", RAY_ENVCACHE_DIR=str(root))
    assert done.returncode == 0, done.stderr
    subprocess.run(["chmod", "-R", "a+rX", root], check=True)
    return Layout(root)


@pytest.fixture
def project(folder: Path) -> Path:
    return folder / "plain"


@pytest.fixture
def below(image: Layout, store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store of our own, empty, on top of that of the image; nothing may change in that during the test."""
    monkeypatch.setenv(roots.READONLY, str(image.root))
    return Store.open(store.layout.root)


@pytest.fixture(autouse=True)
def _nothing_changes(image: Layout) -> Iterator[None]:
    before = snapshot(image)
    yield
    assert snapshot(image) == before


def snapshot(layout: Layout) -> dict[str, tuple[int, ...]]:
    """All there is, with modes, owners, inodes and times. Not the links, and the times they change: uv's cache has some."""
    found = {str(path): path.lstat() for path in [layout.root, *layout.root.rglob("*")]}
    assert len(found) > 50
    return {path: (one.st_mode, one.st_uid, one.st_ino, one.st_size, one.st_mtime_ns) for path, one in found.items()}


def cli(*arguments: str | Path, before: list[str] | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [*(before or []), sys.executable, "-m", "ray_envcache", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)


def acquire(store: Store, project: Path, *, finish: bool = True) -> Lease:
    return store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test"), finish=finish)


def environment_of(layout: Layout) -> Entry:
    """The environment in the image; beside it there is a layer."""
    return next(one for one in Layout(layout.root, readonly=True).all_entries() if one.pylock.exists())


def layer_of(layout: Layout) -> Entry:
    return next(one for one in Layout(layout.root, readonly=True).all_entries() if not one.pylock.exists())


def own_entries(store: Store) -> list[Entry]:
    return list(store.layout.all_entries())


@contextmanager
def modes(*paths: Path, mode: int) -> Iterator[None]:
    """Other modes for a moment."""
    before = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(mode)
    try:
        yield
    finally:
        for path, was in before.items():
            path.chmod(was)


@pytest.fixture
def copy(image: Layout, tmp_path: Path) -> Layout:
    """A copy of the image's store, for tests that change it: no environment of it works at its place."""
    shutil.copytree(image.root, tmp_path / "copy", symlinks=True)
    return Layout(tmp_path / "copy", readonly=True)


def test_environments_are_used_in_place(below: Store, image: Layout, project: Path) -> None:
    """Found by what will be installed, without a build; afterwards our own memo leads there. Nothing is written there."""
    wanted = environment_of(image)
    for _ in range(2):
        with acquire(below, project) as lease:
            assert lease.entry == wanted
            program = "import sys, wanted; print(sys.prefix)"
            assert support.run_python(program, python=lease.python).strip() == str(wanted.venv)
    spec = EnvSpec.parse(project)
    with below.lookup(spec, installed_ray(), Holder("test")) or pytest.fail("not on the warm path") as lease:
        assert lease.entry == wanted
    assert own_entries(below) == []


def test_memo_of_a_lower_store(below: Store, image: Layout, folder: Path) -> None:
    """Who prepares an image has asked for exactly this: then the warm path finds it at once, layer included."""
    field = EnvSpec.parse({"path": str(folder / "app"), "install_project": False})
    with below.lookup(field, installed_ray(), Holder("test")) or pytest.fail("not on the warm path") as lease:
        assert lease.entry == environment_of(image)
    with acquire(below, folder / "app") as lease:
        assert lease.entry.path.parent == image.entries
        assert lease.entries[1:] == [environment_of(image)]
    assert own_entries(below) == []
    assert list(below.layout.memo.iterdir()) == []


def test_own_environments_come_first(
    store: Store, project: Path, image: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What we have ourselves is used; and what is only below is not, when the variable does not say so any more."""
    with acquire(store, project, finish=False) as lease:
        assert not lease.entry.readonly
    monkeypatch.setenv(roots.READONLY, str(image.root))
    both = Store.open(store.layout.root)
    with acquire(both, project, finish=False) as lease:
        assert not lease.entry.readonly
    # Nobody compiles there meanwhile.
    files.remove_tree(lease.entry.path)
    with acquire(both, project) as lease:
        assert lease.entry == environment_of(image)
    with acquire(store, project) as lease:
        assert not lease.entry.readonly


def test_agent(below: Store, image: Layout, project: Path) -> None:
    """An agent whose warm path finds nothing has its child look further, and gets its lease on the read-only entry."""
    spec = EnvSpec.parse(project)
    assert below.lookup(spec, installed_ray(), Holder("test")) is None
    build = AgentBuild(below, spec, installed_ray(), Holder("agent"), logging.getLogger("test"), dict(os.environ))
    with build.lease.result() as lease:
        assert lease.entry == environment_of(image)
        ((name, holder),) = leases.live_leases(below.layout, lease.entry.key)
        assert (holder.kind, name) == ("agent", str(lease.entry.path))
    assert own_entries(below) == []


def test_other_user(image: Layout, project: Path, tmp_path: Path) -> None:
    """Made by root and used by somebody else: by a lease, by an interpreter, and in the command line."""
    mine = tmp_path / "mine"
    mine.mkdir(mode=0o700)
    if OTHER_USER:
        os.chown(mine, 65534, 65534)
    environ = {
        **os.environ,
        "HOME": str(mine),
        "UV_CACHE_DIR": str(mine / "uv"),
        "RAY_ENVCACHE_DIR": str(mine / "store"),
        roots.READONLY: str(image.root),
    }
    for command in (["-c", textwrap.dedent(USE), project], ["-m", "ray_envcache", "list"]):
        done = subprocess.run(
            [*OTHER_USER, sys.executable, "-B", *command], env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert str(environment_of(image).venv) in done.stdout or "ready, read-only" in done.stdout
    assert list((mine / "store" / "v1" / "entries").iterdir()) == []
    assert all(one.stat().st_mode & 0o004 for one in image.root.rglob("*"))


MOUNTS = {
    # A shared disk, or a volume of a pod.
    "bind": 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0"',
    # A layer of an image, or an image volume.
    "overlay": 'mount -t overlay -o "lowerdir=$0:$MADE" overlay "$0"',
    # One file, copied to each host.
    "squashfs": 'mksquashfs "$0" "$MADE/store.squashfs" -quiet -no-progress && mount -o loop,ro "$MADE/store.squashfs" "$0"',
}


@pytest.mark.parametrize("kind", MOUNTS)
def test_read_only_file_system(kind: str, image: Layout, below: Store, project: Path, tmp_path: Path) -> None:
    """On a file system that is mounted read-only an entry is leased, held and run from as everywhere."""
    mount = f'{{ {MOUNTS[kind]}; }} || exit 77; ! touch "$0/new" && exec "$@"'
    command = [*support.container(), "sh", "-c", mount, str(image.root), sys.executable, "-c", textwrap.dedent(USE)]
    environ = {**os.environ, "MADE": str(tmp_path)}
    done = subprocess.run([*command, project], env=environ, capture_output=True, text=True, check=False)
    if done.returncode == 77 and kind != "bind":
        pytest.skip(f"this machine cannot mount it: {done.stderr}")
    assert done.stdout.strip() == str(environment_of(image).venv), done.stderr
    assert own_entries(below) == []


def test_mounted_noexec(image: Layout, below: Store) -> None:
    """As some container runtimes mount an image volume: no library loads from there, so it is refused, with the cause."""
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,noexec "$0" && exec "$@"'
    command = [*support.container(), "sh", "-c", mount, str(image.root), sys.executable, "-m", "ray_envcache", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert (
        f"`{image.root}` is mounted noexec: no program or library can be loaded from there\nhint: mount it"
        in done.stderr
    )


def test_file_system_without_flocks(
    below: Store, image: Layout, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mounted read-only nobody here can remove anything, so it is used all the same; else it is refused."""

    def no_flocks(path: Path, **_: object) -> int:
        raise OSError(95, "Operation not supported", path)

    wanted = environment_of(image)
    monkeypatch.setattr(flock, "try_flock", no_flocks)
    with pytest.raises(StoreError, match="not supported"):
        leases.claim(wanted, below.layout, Holder("test"))
    monkeypatch.setattr(os, "fstatvfs", lambda _: os.statvfs_result((0,) * 8 + (os.ST_RDONLY, 0)))
    lease = leases.hold(wanted)
    assert lease is not None
    lease.release()


@pytest.mark.parametrize("by", ["interpreter", "lease"])
def test_owner_cannot_remove_what_is_used(
    below: Store, image: Layout, project: Path, by: str, children: list[subprocess.Popen[str]]
) -> None:
    """The collector of the read-only store sees its users, and does not see them any more when they were killed."""
    wanted = environment_of(image)
    program = "import sys; print('up', flush=True); sys.stdin.read()"
    if by == "lease":
        program = USE.replace("subprocess.run", program + " #")
    python = wanted.python if by == "interpreter" else sys.executable
    command = [python, "-c", program, str(project)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    children.append(child)
    assert child.stdout is not None
    assert child.stdout.readline() == "up\n"
    owned = image.entry(wanted.path.name)
    assert owned is not None
    # What `evict` asks before it does anything; that itself would leave its traces in the image.
    assert not flock.is_free(owned.in_use)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert flock.is_free(owned.in_use)
    # The file of a dead lease is in our own store, and swept there.
    collect(below.layout, NOTHING_DUE)
    assert [path for path in below.layout.leases.rglob("*") if path.is_file()] == []
    assert own_entries(below) == []


def test_layer_on_top(
    below: Store, image: Layout, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Code that the image does not have is built into our own store, on the environment of the image."""
    shutil.copytree(folder / "app", tmp_path / "app")
    module = tmp_path / "app" / "src" / "app" / "__init__.py"
    module.write_text(module.read_text().replace("X = 1", "X = 2"))
    # Nobody finishes it in the background: that holds the environment of the image too, and the next tests see who does.
    for _ in range(2):
        with acquire(below, tmp_path / "app", finish=False) as lease:
            assert support.run_python("import app, wanted; print(app.X)", python=lease.python) == "2\n"
            assert own_entries(below) == [lease.entry]
            assert lease.entries[1:] == [environment_of(image)]
    bytecode.finish(below.layout, lease.entry, background=False)
    assert lease.entry.compiled.exists()
    rows = [line.split()[0] for line in cli("list").stdout.splitlines()[1:4]]
    assert sorted(rows[1:]) == sorted(one.key[:12] for one in [lease.entry, layer_of(image)])
    assert rows[0] == environment_of(image).key[:12]
    monkeypatch.delenv(roots.READONLY)
    # Whoever collects need not know of the image: as long as the environment is there, nobody takes the layer for broken.
    assert collect(below.layout, NOTHING_DUE).in_use == 0
    assert own_entries(below) == [lease.entry]
    (layer,) = json.loads(cli("list", "--json").stdout)["envs"]
    assert (layer["state"], layer["base"]) == ("ready", environment_of(image).key)
    with leases.claim(lease.entry, below.layout, Holder("test")) or pytest.fail("no lease") as again:
        assert again.entries == lease.entries


def test_commands(below: Store, image: Layout, project: Path, store: Store) -> None:
    """They show what is below, say whose it is, and leave it alone."""
    wanted = environment_of(image)
    table = cli("list").stdout
    assert table.count("ready, read-only") == 2
    assert "0 environments, 0 B, 0 B reclaimable; in read-only stores 2, " in table
    with acquire(below, project):
        data = json.loads(cli("list", "--json").stdout)
        assert data["readonly_roots"] == [str(image.root)]
        (one,) = [one for one in data["envs"] if one["key"] == wanted.key]
        assert (one["readonly"], one["in_use"], one["reclaimable_bytes"]) == (True, True, 0)
        assert [holder["pid"] for holder in one["holders"]] == [os.getpid()]
        assert "ready, 1 user" in cli("why", wanted.key).stdout
    assert "a read-only store is never collected from here" in cli("why", wanted.key).stdout
    for command in ("rm", "pin"):
        done = cli(command, wanted.key)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"`{image.root}` is read-only here\nhint: its owner can: RAY_ENVCACHE_DIR={image.root}" in done.stderr
    done = cli("purge", "--yes")
    assert (done.returncode, done.stdout.split(",")[0]) == (0, "Removed 0 environments")
    assert done.stderr == f"The read-only store at {image.root} stays as it is\n"
    # What we have of the same key goes, and nothing is refused.
    with acquire(store, project):
        pass
    support.wait_until(lambda: cli("rm", wanted.key).returncode == 0, "the compiler is gone")
    assert own_entries(below) == []


def test_missing_store(below: Store, image: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An image need not have one: nothing fails, and `list` says so. Our own is not below itself, however spelled."""
    (tmp_path / "link").symlink_to(below.layout.root)
    named = [tmp_path / "nowhere", "", tmp_path / "link", below.layout.root, image.root, image.root]
    monkeypatch.setenv(roots.READONLY, ":".join(map(str, named)))
    assert [layout.root for layout in Store.open(below.layout.root).readonly] == [image.root]
    assert cli("list").stderr == f"note: {roots.READONLY} names `{tmp_path}/nowhere`, where there is no store\n"


@pytest.mark.parametrize(("named", "reason"), [("envcache", "relative"), ("/opt/it's", "shebangs"), ("/a:~/b", "~/b")])
def test_impossible_paths(store: Store, named: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable and the path."""
    monkeypatch.setenv(roots.READONLY, named)
    with pytest.raises(StoreError, match=reason) as caught:
        Store.open(store.layout.root)
    assert roots.READONLY in str(caught.value)


@pytest.mark.parametrize("place", ["root", "top", "entries", "entry"])
@pytest.mark.parametrize("fault", ["group may write", "others may write", "foreign", "link"])
def test_not_trusted(
    store: Store, copy: Layout, project: Path, place: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may write to a store may run code as us: refused, with the directory and the remedy."""
    one = environment_of(copy)
    path = {"root": copy.root, "top": copy.top, "entries": copy.entries, "entry": one.path}[place]
    if fault == "foreign":
        pretend_foreign(path, monkeypatch)
    elif fault == "link":
        path.rename(path.with_name("elsewhere"))
        path.symlink_to("elsewhere")
    else:
        path.chmod(0o775 if fault == "group may write" else 0o757)
    monkeypatch.setenv(roots.READONLY, str(copy.root))
    if fault == "link":
        # The root may be a link; further down, what is no directory is nobody's entry.
        assert (roots.readonly_stores(store.layout, os.environ) == ()) == (place in {"top", "entries"})
        return
    with pytest.raises(StoreError, match=f"`{path}`") as caught:
        leases.hold(one) if place == "entry" else roots.readonly_stores(store.layout, os.environ)
    assert "environments run code" in caught.value.hint


def pretend_foreign(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Give a directory to somebody else; where only root may do that, be somebody else."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


def test_unreadable(copy: Layout, tmp_path: Path) -> None:
    """A store that root made, and nobody made readable, is an error that says how."""
    drop = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"] if os.geteuid() == 0 else []
    one = environment_of(copy)
    environ = {"RAY_ENVCACHE_DIR": str(tmp_path / "own"), roots.READONLY: str(copy.root)}
    for path in (copy.root, one.path, one.ready):
        with modes(path, mode=0):
            done = cli("list", before=drop, **environ)
        assert (done.returncode, done.stdout) == (3, "")
        assert f"chmod -R a+rX '{copy.root}'" in done.stderr


def test_moved_store(store: Store, copy: Layout, image: Layout, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Environments have their place in them: elsewhere they are not handed out; by another name of the same place, yes."""
    link = copy.root.with_name("link")
    link.symlink_to(image.root)
    for root, built in ((copy.root, 1), (link, 0)):
        monkeypatch.setenv(roots.READONLY, str(root))
        with acquire(Store.open(store.layout.root), project, finish=False) as lease:
            assert lease.entry.path.is_relative_to(store.layout.root if built else link)
        for one in own_entries(store):
            files.remove_tree(one.path)


def test_times_of_images() -> None:
    """The layers of an image keep whole seconds: a file is the same after that, and another one is not."""
    was = file_identity(__file__)
    assert was is not None
    size, changed = was
    second = changed // 10**9 * 10**9
    assert is_unchanged(__file__, was)
    assert not is_unchanged(__file__, (size, changed - 1))
    assert not is_unchanged(__file__, (size + 1, changed))
    assert not is_unchanged("/nowhere", was)
    assert is_unchanged(__file__, (size, second + 1)) == (changed == second)


def test_step_of_an_image(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When `build` returns nothing is left to do: all its processes are killed then, and the next kernel is another."""
    root = tmp_path / "opt"
    done = cli("build", folder / "app", before=support.container(), RAY_ENVCACHE_DIR=str(root))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Compiling bytecode") == 1
    monkeypatch.setattr(record, "boot_id", lambda: "another")
    records = [ReadyRecord.read(one) for one in Layout(root, readonly=True).all_entries()]
    assert len(list(filter(None, records))) == 2
    assert cli("build", folder / "app", RAY_ENVCACHE_DIR=str(root)).stderr == ""


def test_nothing_is_collected_there(image: Layout) -> None:
    """Not even by who may: an entry that was found below is not removed, whatever it is asked for."""
    with pytest.raises(ReadOnlyError):
        evict(image, environment_of(image))
