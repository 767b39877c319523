"""From a project to a lease: with real uv, small wheels, no index."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ray_envcache.acquire import Store, digest_of_files
from ray_envcache.errors import DigestError, LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import ClusterRay, installed_ray
from ray_envcache.store.leases import Holder
from ray_envcache.system import flock
from tests import index, support
from tests.conftest import Acquire

pytestmark = pytest.mark.host

ACQUIRE = """
import sys
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder
from ray_envcache.field.spec import EnvSpec
from ray_envcache.acquire import Store

class Talk:
    def say(self, text): print(text, flush=True)
    def line(self, text): pass

with Store.open().acquire(EnvSpec.parse(sys.argv[1]), installed_ray(), Holder("test"), Talk()) as lease:
    print(lease.entry.path.name, flush=True)
    sys.stdin.read()
"""


def start_acquirer(project: Path, children: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """A process that acquires, prints the entry's name as its last line and keeps the lease until its stdin closes."""
    child = subprocess.Popen(
        [sys.executable, "-c", ACQUIRE, str(project)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    children.append(child)
    return child


def read_until(child: subprocess.Popen[str], start: str) -> str:
    """The next line of the child's stdout that starts so."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(start):
            return line
    raise AssertionError(f"the child ended before it said {start!r}")


def test_second_acquire_reuses_what_the_first_built(
    tmp_path: Path, wheels: Path, store: Store, acquire: Acquire
) -> None:
    """The same project gives the same entry, built once."""
    log = tmp_path / "witness.log"
    support.make_witness(wheels, log)
    project = support.make_project(tmp_path / "project", wheels, ["ray", "envcache-witness"])
    assert acquire(project).entry == acquire(project).entry
    assert support.count_builds(log) == 1


def test_environment_has_the_locked_packages_and_no_others(tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """What the lockfile selects can be imported; the development group and the project itself are not there."""
    support.make_wheel(wheels, "wanted", "2.5")
    support.make_wheel(wheels, "unwanted")
    project = support.make_project(
        tmp_path / "project", wheels, ["ray", "wanted"], extra='[dependency-groups]\ndev = ["unwanted"]\n'
    )
    lease = acquire(project)
    program = (
        "import wanted, importlib.util as u; print(wanted.VERSION, u.find_spec('unwanted'), u.find_spec('project'))"
    )
    assert support.run_python(program, python=lease.python).split() == ["2.5", "None", "None"]


def test_extras_and_groups_select(tmp_path: Path, wheels: Path, store: Store) -> None:
    """A named extra or group adds its packages, and makes another environment."""
    for name in ("base", "of-extra", "of-group"):
        support.make_wheel(wheels, name)
    extra = '[project.optional-dependencies]\nplus = ["of-extra"]\n[dependency-groups]\ntest = ["of-group"]\n'
    project = support.make_project(tmp_path / "project", wheels, ["ray", "base"], extra=extra)
    found = {}
    for options in ({}, {"extras": ["plus"]}, {"groups": ["test"]}, {"extras": ["plus"], "groups": ["test"]}):
        spec = EnvSpec.parse({"path": project, **options})
        with store.acquire(spec, installed_ray(), Holder("test")) as lease:
            found[lease.entry.key] = {path.name for path in lease.entry.site_packages.glob("*of_*.py")}
    assert list(found.values()) == [set(), {"of_extra.py"}, {"of_group.py"}, {"of_extra.py", "of_group.py"}]


def test_same_packages_from_another_project_are_the_same_environment(
    tmp_path: Path, wheels: Path, acquire: Acquire
) -> None:
    """Name, place, comments, development group and artifacts for other platforms do not matter."""
    support.make_wheel(wheels, "wanted")
    one = support.make_project(tmp_path / "one", wheels, ["ray", "wanted"])
    support.make_wheel(wheels, "for-windows")
    support.make_wheel(wheels, "tool")
    two = support.make_project(
        tmp_path / "two",
        wheels,
        ["ray", "wanted", "for-windows; sys_platform == 'win32'"],
        extra='[dependency-groups]\ndev = ["tool"]\n# a comment\n',
    )
    assert acquire(one).entry == acquire(two).entry


def test_changed_hash_is_another_environment(tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """The same version with other content does not pass for the first."""
    support.make_wheel(wheels, "wanted", modules={"wanted.py": "X = 1\n"})
    project = support.make_project(tmp_path / "project", wheels, ["ray", "wanted"])
    first = acquire(project)
    support.make_wheel(wheels, "wanted", modules={"wanted.py": "X = 2\n"})
    (project.parent / "uv.lock").unlink()
    support.run_uv("lock", cwd=project.parent)
    second = acquire(project)
    assert first.entry.key != second.entry.key
    assert support.run_python("import wanted; print(wanted.X)", python=second.python).strip() == "2"


def test_ray_is_added_with_the_versions_the_cluster_has(
    tmp_path: Path, wheels: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lockfile without ray gets exactly the cluster's ray and what it needs."""
    project = support.make_project(tmp_path / "project", wheels)
    support.set_index_of_node(tmp_path / "config", wheels, monkeypatch)
    installed = {line.split("==")[0]: line.split("==")[1] for line in support.run_python(LIST_INSTALLED).split()}
    for name, version in installed.items():
        if name != "ray":
            support.make_wheel(wheels, name, version)
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
        pins = support.run_python(LIST_INSTALLED, python=lease.python).split()
    added = {name: version for name, _, version in (pin.partition("==") for pin in pins) if name in installed}
    assert added["ray"] == support.RAY_VERSION
    assert "click" in added
    assert all(installed[name] == version for name, version in added.items())


LIST_INSTALLED = """
import re
from importlib.metadata import distributions
for found in distributions(): print(f"{re.sub('[-_.]+', '-', found.name).lower()}=={found.version}")
"""


def test_eight_processes_at_once_build_once(
    tmp_path: Path, wheels: Path, store: Store, children: list[subprocess.Popen[str]]
) -> None:
    """N processes that ask for one key at the same moment cause one build, and all get the same entry."""
    log = tmp_path / "witness.log"
    support.make_witness(wheels, log)
    project = support.make_project(tmp_path / "project", wheels, ["ray", "envcache-witness"])
    for _ in range(8):
        start_acquirer(project, children)
    names = {child.communicate()[0].splitlines()[-1] for child in children}
    assert (len(names), support.count_builds(log)) == (1, 1)
    assert [child.returncode for child in children] == [0] * 8


def test_orphaned_uv_is_waited_for_then_its_remains_are_swept(
    tmp_path: Path, wheels: Path, store: Store, children: list[subprocess.Popen[str]]
) -> None:
    """After SIGKILL of a builder nobody builds beside the uv it left, and then its half environment goes."""
    started, released = tmp_path / "started", tmp_path / "released"
    code = f"pathlib.Path({str(started)!r}).touch(); [time.sleep(0.02) for _ in iter(pathlib.Path({str(released)!r}).exists, True)]"
    support.make_sdist(wheels, "slow", code=code)
    project = support.make_project(tmp_path / "project", wheels, ["ray", "slow"])
    first = start_acquirer(project, children)
    support.wait_until(started.exists, "the build of the source package began")
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = start_acquirer(project, children)
    assert str(first.pid) in read_until(second, "Waiting for the environment"), "says for whom it waits"
    assert len(list(store.layout.all_entries())) == 1, "does not build beside the orphan"
    released.touch()
    name = second.communicate()[0].splitlines()[-1]
    assert [entry.path.name for entry in store.layout.all_entries()] == [name]
    assert list(store.layout.trash.iterdir()) == []


def test_interrupted_build_leaves_nothing(
    tmp_path: Path, wheels: Path, store: Store, children: list[subprocess.Popen[str]]
) -> None:
    """Ctrl-C in the middle of a build kills uv and what it started, frees the flock and removes the half."""
    started = tmp_path / "started"
    code = f"pathlib.Path({str(started)!r}).write_text(str(__import__('os').getpid())); time.sleep(600)"
    support.make_sdist(wheels, "slow", code=code)
    project = support.make_project(tmp_path / "project", wheels, ["ray", "slow"])
    builder = start_acquirer(project, children)
    support.wait_until(lambda: started.exists() and started.read_text() != "", "the build of the source package began")
    builder.send_signal(signal.SIGINT)
    builder.wait()
    support.wait_until(lambda: support.is_gone(int(started.read_text())), "the build backend is gone")
    assert list(store.layout.entries.iterdir()) == list(store.layout.trash.iterdir()) == []
    assert not any(flock.is_held(path) for path in store.layout.flocks.iterdir())


def test_lookup_starts_no_process_and_imports_little(
    tmp_path: Path, wheels: Path, store: Store, acquire: Acquire
) -> None:
    """The warm path runs in every agent: no child process, no resolver, no command-line library."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    name = acquire(project).entry.path.name
    program = """
    import sys
    from ray_envcache.resolve.interpreter import installed_ray
    from ray_envcache.field.spec import EnvSpec
    from ray_envcache.acquire import Store
    from ray_envcache.store.leases import Holder
    events = []
    sys.addaudithook(lambda event, _: events.append(event) if event in {"subprocess.Popen", "os.fork", "os.posix_spawn"} else None)
    with Store.open().lookup(EnvSpec.parse(sys.argv[1]), installed_ray(), Holder("test")) as lease:
        heavy = [name for name in ("packaging.pylock", "click", "rich", "uv", "ray") if name in sys.modules]
        heavy += [name for name in sys.modules if name.startswith(("ray_envcache.build", "ray_envcache.gc", "ray_envcache.doctor"))]
        print(lease.entry.path.name, events, heavy)
    """
    assert support.run_python(program, str(project)).strip() == f"{name} [] []"


def test_edited_lockfile_never_gives_the_old_environment(
    tmp_path: Path, wheels: Path, store: Store, acquire: Acquire
) -> None:
    """After `uv lock` the next acquire gives the new set; a pinned digest of the old files is an error."""
    support.make_wheel(wheels, "wanted", "1.0")
    project = support.make_project(tmp_path / "project", wheels, ["ray", "wanted"])
    old = EnvSpec.parse({"path": project, "digest": digest_of_files(EnvSpec.parse(project))})
    first = acquire(project)
    support.make_wheel(wheels, "wanted", "2.0")
    support.run_uv("lock", "--upgrade", cwd=project.parent)
    assert acquire(project).entry.key != first.entry.key
    with pytest.raises(DigestError, match="digest"):
        store.acquire(old, installed_ray(), Holder("test"))


def test_pinned_environment_is_found_without_its_files(
    tmp_path: Path, wheels: Path, store: Store, acquire: Acquire
) -> None:
    """Where an ignored uv.lock did not travel, the pinned digest suffices if this host knows the environment.

    Not where the lockfile leaves open which file a package is: then the checkout has to be here.
    """
    with index.serve(wheels) as served:
        project = support.make_project(tmp_path / "project", wheels, ["ray"], lock=False)
        in_index = f'index = [{{ url = "{served.url}", default = true }}]'
        project.write_text(project.read_text().replace("no-index = true", in_index).replace("find-links", "#"))
        support.run_uv("lock", cwd=project.parent)
        entry = acquire(project).entry
    by_file = support.make_project(tmp_path / "by-file", wheels, ["ray"])
    acquire(by_file)
    spec, open_spec = (
        EnvSpec.parse({"path": one, "digest": digest_of_files(EnvSpec.parse(one))}) for one in (project, by_file)
    )
    shutil.rmtree(project.parent)
    shutil.rmtree(by_file.parent)
    with store.acquire(spec, installed_ray(), Holder("test")) as lease:
        assert lease.entry == entry
    with pytest.raises(LockfileError, match="No such file"):
        store.acquire(open_spec, installed_ray(), Holder("test"))
    with pytest.raises(LockfileError, match="No such file"):
        store.acquire(EnvSpec.parse({"path": project}), installed_ray(), Holder("test"))


def test_another_ray_is_another_environment(tmp_path: Path, wheels: Path, store: Store) -> None:
    """Clusters of two Ray versions on one host never share an environment, nor a memo of one."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
        assert store.lookup(EnvSpec.parse(project), ClusterRay("1.0"), Holder("test")) is None
        assert lease.descriptors


@pytest.mark.parametrize("damage", ["truncate", "remove", "foreign key", "no interpreter"])
def test_damaged_entry_is_rebuilt_beside(tmp_path: Path, wheels: Path, store: Store, damage: str) -> None:
    """An entry without a whole ready record, or without its interpreter, is never handed out, and never rebuilt in place."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
        first = lease.entry
    text = first.ready.read_text()
    if damage == "truncate":
        first.ready.write_text(text[: len(text) // 2])
    elif damage == "remove":
        first.ready.unlink()
    elif damage == "foreign key":
        first.ready.write_text(json.dumps({**json.loads(text), "key": "0" * 32}))
    else:
        first.bin.chmod(0o755)
        first.python.unlink()
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
        assert lease.python.exists()
        assert damage == "remove" or lease.entry.number == 2


@pytest.mark.parametrize("name", ["with space", "with-ümläut", "with%percent#hash", "with(parens)&;"])
def test_unusual_store_paths_work(tmp_path: Path, wheels: Path, name: str) -> None:
    """Spaces, umlauts and shell characters in the store's path are no trouble, console scripts included."""
    support.make_wheel(
        wheels, "tool", modules={"tool.py": "def main(): print('tool runs')\n"}, scripts={"tool": "tool:main"}
    )
    project = support.make_project(tmp_path / "project", wheels, ["ray", "tool"])
    store = Store.open(tmp_path / name)
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
        done = subprocess.run([lease.entry.bin / "tool"], capture_output=True, text=True, check=True)
    assert done.stdout == "tool runs\n"


def test_project_folder_may_have_any_name(tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """Quotes, dollars and newlines in the project's own path never meet a shell."""
    folder = tmp_path / "a 'quoted\" $HOME folder"
    support.make_project(tmp_path / "plain", wheels, ["ray"])
    shutil.copytree(tmp_path / "plain", folder)
    assert acquire(folder).python.exists()
    assert os.environ["RAY_ENVCACHE_DIR"] in str(acquire(folder).python)
