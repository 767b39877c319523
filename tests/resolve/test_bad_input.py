"""Bad input is an error with a cause and a hint, and leaves the store as it was."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ray_envcache import errors
from ray_envcache.acquire import Store
from ray_envcache.build.plan import require_buildable
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import ClusterRay, installed_ray
from ray_envcache.store.leases import Holder
from ray_envcache.system import flock
from tests import index, support

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def _own_uv_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another test fetched must not hide that this one cannot."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))


@pytest.fixture(autouse=True)
def _store_stays_as_it_was(store: Store) -> Iterator[None]:
    yield
    if not os.access(store.layout.entries, os.R_OK):
        return
    assert (
        list(store.layout.entries.iterdir())
        == list(store.layout.trash.iterdir())
        == list(store.layout.memo.iterdir())
        == []
    )
    assert not any(flock.is_held(path) for path in store.layout.flocks.iterdir())


def refused(store: Store, value: Any, kind: type[errors.EnvCacheError], says: str) -> errors.EnvCacheError:
    """Acquire must fail with this error, which says this and has a hint."""
    with pytest.raises(kind, match=says) as caught:
        store.acquire(EnvSpec.parse(value), installed_ray(), Holder("test"))
    assert type(caught.value) is kind
    assert caught.value.hint
    return caught.value


def test_no_such_path(tmp_path: Path, store: Store) -> None:
    """A path that is not there is named."""
    refused(
        store, tmp_path / "nowhere" / "pyproject.toml", errors.LockfileError, "nowhere/pyproject.toml`: No such file"
    )


def test_folder_without_pyproject(tmp_path: Path, store: Store) -> None:
    """A folder that is no project is named."""
    refused(store, tmp_path, errors.LockfileError, "No pyproject.toml in")


def test_file_that_is_no_project_file(tmp_path: Path, store: Store) -> None:
    """Any other file is refused by its name."""
    (tmp_path / "main.py").touch()
    refused(store, tmp_path / "main.py", errors.LockfileError, "Not a script with a .*main.py")


def test_no_lockfile(tmp_path: Path, wheels: Path, store: Store) -> None:
    """Without uv.lock the hint says to run `uv lock`."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"], lock=False)
    assert "uv lock" in refused(store, project, errors.LockfileError, "No uv.lock beside").hint


def test_outdated_lockfile(tmp_path: Path, wheels: Path, store: Store) -> None:
    """A lockfile that no longer matches pyproject.toml is refused with both names."""
    support.make_wheel(wheels, "wanted")
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    project.write_text(project.read_text().replace('["ray"]'.replace('"', "'"), "['ray', 'wanted']"))
    assert (
        "uv lock" in refused(store, project, errors.LockfileError, "uv.lock .* no longer matches pyproject.toml").hint
    )


def test_lockfile_without_what_was_added(tmp_path: Path, wheels: Path, store: Store) -> None:
    """A package that this host has not met is no conflict: nothing is said of one."""
    support.make_wheel(wheels, "wanted")
    with index.serve(wheels) as served:
        project = lock_from_index(tmp_path, served)
        support.make_wheel(wheels, "unheard-of")
        project.write_text(project.read_text().replace("'wanted'", "'wanted', 'unheard-of'"))
        refused(store, project, errors.LockfileError, r"no longer matches pyproject.toml\nhint: run `uv lock` there$")


@pytest.mark.parametrize("name", ["environment.yml", "requirements.in", "Pipfile.lock", "pylock.a.b.toml"])
def test_unknown_kind_of_file(tmp_path: Path, store: Store, name: str) -> None:
    """A file that is no lockfile we know is named, with those we know."""
    (tmp_path / name).touch()
    assert "uv.lock, pylock.toml" in refused(store, tmp_path / name, errors.LockfileError, f"Not a kind .*{name}").hint


def test_folder_with_another_lockfile(tmp_path: Path, store: Store) -> None:
    """A folder without pyproject.toml does not choose among the lockfiles in it; the hint names one."""
    (tmp_path / "pylock.gpu.toml").touch()
    assert "pylock.gpu.toml" in refused(store, tmp_path, errors.LockfileError, "No pyproject.toml").hint


def test_script_without_lock(tmp_path: Path, store: Store) -> None:
    """A script that was never locked is told how."""
    script = tmp_path / "job.py"
    script.write_text("# /// script\n# dependencies = []\n# ///\n")
    error = refused(store, script, errors.LockfileError, r"No `job.py.lock` beside .*job.py")
    assert "uv lock --script job.py" in error.hint


def test_outdated_lock_of_a_script(tmp_path: Path, wheels: Path, store: Store) -> None:
    """A script whose block was edited since is told to lock again."""
    script = tmp_path / "job.py"
    text = (
        f'# /// script\n# dependencies = ["ray"]\n# [tool.uv]\n# no-index = true\n# find-links = ["{wheels}"]\n# ///\n'
    )
    script.write_text(text)
    support.run_uv("lock", "--script", script, cwd=tmp_path)
    script.write_text(text.replace("ray", "ray<99"))
    error = refused(store, script, errors.LockfileError, "job.py.lock .* no longer matches job.py")
    assert "uv lock --script job.py" in error.hint


UNPINNED = {
    "wanted": "Not an exact version: `wanted`",
    "wanted>=1.0  # why not": "Not an exact version: `wanted>=1.0`",
    "wanted==1.*": "Not an exact version",
    "wanted[extra] ; python_version > '3'": "Not an exact version",
    "wanted @ https://example.org/wanted-1.0-py3-none-any.whl": "A URL without a hash",
    "git+https://example.org/wanted": "No package is named",
    "wanted @ git+https://example.org/wanted@v1.0": "Not an exact commit",
    "-r https://example.org/requirements.txt": "may change at any time",
    "-r nowhere.txt": "Cannot read .*nowhere.txt",
}


@pytest.mark.parametrize("line", UNPINNED)
def test_unpinned_requirement(tmp_path: Path, wheels: Path, store: Store, line: str) -> None:
    """A requirement that leaves something to choose is named with its line."""
    lock = tmp_path / "requirements.txt"
    lock.write_text(f"ray=={support.RAY_VERSION}\n\n{line}\n")
    says = refused(store, lock, errors.LockfileError, UNPINNED[line]).message
    assert "nowhere" in line or "line 3" in says


def test_unpinned_requirement_says_how_to_lock(tmp_path: Path, store: Store) -> None:
    """The hint is a command that locks the very file."""
    (tmp_path / "requirements.txt").write_text("wanted\n")
    error = refused(store, tmp_path / "requirements.txt", errors.LockfileError, "Not an exact version")
    assert "uv pip compile --universal --generate-hashes requirements.txt" in error.hint


def test_pylock_of_a_later_version(tmp_path: Path, store: Store) -> None:
    """A pylock.toml of a version to come says so."""
    (tmp_path / "pylock.toml").write_text('lock-version = "2.0"\ncreated-by = "the future"\npackages = []\n')
    error = refused(
        store, tmp_path / "pylock.toml", errors.LockfileError, "not a lockfile that we know: .* 2.0 is not supported"
    )
    assert "upgrade packaging" in error.hint


def test_broken_pylock(tmp_path: Path, store: Store) -> None:
    """A pylock.toml that is no TOML, or no lockfile, is named with what is wrong."""
    (tmp_path / "pylock.toml").write_text("[packages\n")
    refused(store, tmp_path / "pylock.toml", errors.LockfileError, r"Cannot read .*pylock.toml.*line 1")
    (tmp_path / "pylock.toml").write_text('lock-version = "1.0"\n')
    refused(store, tmp_path / "pylock.toml", errors.LockfileError, "created-by")


@pytest.mark.parametrize("option", ["extras", "groups"])
def test_options_that_requirements_do_not_have(tmp_path: Path, store: Store, option: str) -> None:
    """Requirements have neither extras nor groups nor members."""
    (tmp_path / "requirements.txt").touch()
    value: dict[str, Any] = {"path": tmp_path / "requirements.txt"}
    refused(store, {**value, option: ["gpu"]}, errors.LockfileError, f"neither extras nor groups: `{option}`")
    refused(store, {**value, "package": "one"}, errors.LockfileError, "no workspace with a member `one`")


def test_member_that_does_not_exist(tmp_path: Path, wheels: Path, store: Store) -> None:
    """A member that the workspace does not have is named, with those it has; a path dependency is none."""
    folders = {name: tmp_path / "project" / name for name in ("there", "beside")}
    for name, folder in folders.items():
        folder.mkdir(parents=True)
        (folder / "pyproject.toml").write_text(
            f'[project]\nname = "{name}"\nversion = "1"\nrequires-python = ">=3.10"\n'
        )
    project = support.make_project(tmp_path / "project", wheels, ["ray", "beside"], lock=False)
    with project.open("a") as file:
        file.write('[tool.uv.workspace]\nmembers = ["there"]\n[tool.uv.sources]\nbeside = { path = "beside" }\n')
    support.run_uv("lock", cwd=project.parent)
    error = refused(store, {"path": project, "package": "nope"}, errors.LockfileError, "has no member `nope`")
    assert "project, there" in error.hint
    refused(store, {"path": project, "package": "beside"}, errors.LockfileError, "has no member `beside`")
    shutil.rmtree(folders["there"])
    error = refused(store, {"path": project, "package": "there"}, errors.LockfileError, "not have a member there")
    assert "run `uv lock`" in error.hint


def test_path_dependency_that_is_not_here(tmp_path: Path, wheels: Path, store: Store) -> None:
    """A path dependency whose folder does not exist is named, with how it travels."""
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "pyproject.toml").write_text(
        '[project]\nname = "beside"\nversion = "1"\nrequires-python = ">=3.10"\n'
    )
    project = support.make_project(tmp_path / "project", wheels, ["ray", "beside"], lock=False)
    with project.open("a") as file:
        file.write('[tool.uv.sources]\nbeside = { path = "../beside" }\n')
    support.run_uv("lock", cwd=project.parent)
    (tmp_path / "beside").rename(tmp_path / "moved")
    error = refused(store, project, errors.LockfileError, r"(?s)local package is not on this node: .*/beside")
    assert "working_dir" in error.hint


@pytest.mark.parametrize("file", ["pyproject.toml", "uv.lock"])
def test_broken_toml(tmp_path: Path, wheels: Path, store: Store, file: str) -> None:
    """Broken TOML is quoted with the line uv complains about."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    (project.parent / file).write_text('[project\nname = "x"\n')
    refused(store, project, errors.LockfileError, rf"(?s){file}.*line 1")


@pytest.mark.parametrize("text", [f"a = {'[' * 10**6}", f"a{'.a' * 10**6} = 1", f"a = {'{a=' * 10**6}"])
def test_nested_without_end(tmp_path: Path, wheels: Path, store: Store, text: str) -> None:
    """A file that is nested to exhaust its readers is refused like any other that is broken."""
    support.make_fake_ray(wheels)
    lock = tmp_path / "pylock.toml"
    lock.write_text(text)
    refused(store, lock, errors.LockfileError, "Cannot read .*pylock.toml")


def test_lockfile_of_a_newer_uv(tmp_path: Path, wheels: Path, store: Store) -> None:
    """A lockfile that this uv is too old to read says so."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    lock = project.parent / "uv.lock"
    lock.write_text(lock.read_text().replace("version = 1\n", "version = 99\n", 1))
    assert "upgrade uv" in refused(store, project, errors.LockfileError, "unsupported schema version").hint


def test_python_that_does_not_fit(tmp_path: Path, wheels: Path, store: Store) -> None:
    """requires-python that excludes the cluster's Python names both versions."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    for file in (project, project.parent / "uv.lock"):
        file.write_text(file.read_text().replace(">=3.10", ">=3.99"))
    refused(store, project, errors.InterpreterError, r"requires Python >=3.99, the cluster runs 3\.\d+")


def test_other_python_asked_for(tmp_path: Path, wheels: Path, store: Store) -> None:
    """The option `python` insists; a cluster of another version is refused with both."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    refused(
        store, {"path": project, "python": "3.2"}, errors.InterpreterError, r"asks for Python 3.2, the cluster runs 3\."
    )
    refused(store, {"path": project, "python": "/nowhere/python"}, errors.InterpreterError, "No executable at")


def test_ray_of_another_version(tmp_path: Path, wheels: Path, store: Store) -> None:
    """A lockfile that pins another ray names both versions and what to run."""
    support.make_fake_ray(wheels, "2.9.0")
    project = support.make_project(tmp_path / "project", wheels, ["ray==2.9.0"])
    error = refused(
        store, project, errors.RayVersionError, f"pins ray 2.9.0, the cluster runs ray {support.RAY_VERSION}"
    )
    assert f'uv add "ray=={support.RAY_VERSION}"' in error.hint


def test_needs_of_ray_in_conflict(tmp_path: Path, wheels: Path, store: Store) -> None:
    """A lockfile without ray whose packages are too old for the cluster's ray says which."""
    support.make_wheel(wheels, "click", "1.0")
    project = support.make_project(tmp_path / "project", wheels, ["click"])
    refused(store, project, errors.RayVersionError, "ray needs `click>=.*`, the lockfile has click 1.0")


@pytest.mark.parametrize(("option", "name"), [("extras", "Extra `nope`"), ("groups", "Group `nope`")])
def test_unknown_extra_or_group(tmp_path: Path, wheels: Path, store: Store, option: str, name: str) -> None:
    """An extra or group that pyproject.toml does not define is named."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    refused(store, {"path": project, option: ["nope"]}, errors.LockfileError, name)


def test_wrong_digest(tmp_path: Path, wheels: Path, store: Store) -> None:
    """A pinned digest that the files do not have is refused."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    refused(store, {"path": project, "digest": "sha256:" + "0" * 64}, errors.DigestError, "the field value pins")


def test_source_package_that_fails_to_build(tmp_path: Path, wheels: Path, store: Store) -> None:
    """The last lines of a failed build are in the error."""
    support.make_sdist(wheels, "broken", code="raise SystemExit('the compiler is on holiday')")
    project = support.make_project(tmp_path / "project", wheels, ["ray", "broken"])
    refused(store, project, errors.BuildError, "(?s)could not build.*broken.*the compiler is on holiday")


def test_package_that_breaks_ray(tmp_path: Path, wheels: Path, store: Store) -> None:
    """An environment in which ray cannot be imported is never handed out: its workers would respawn for ever."""
    support.make_wheel(
        wheels, "ray", support.RAY_VERSION, modules={"ray/__init__.py": "raise ImportError('no libfoo.so')\n"}
    )
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    refused(store, project, errors.BuildError, "(?s)`import ray` fails.*no libfoo.so")


def test_ray_that_lies_about_its_version(tmp_path: Path, wheels: Path, store: Store) -> None:
    """What counts is the ray that is imported, not what its metadata says."""
    support.make_wheel(wheels, "ray", support.RAY_VERSION, modules={"ray/__init__.py": "__version__ = '0.1'\n"})
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    refused(store, project, errors.BuildError, r'has ray, Python, prefix and holds `\["0.1"')


def lock_from_index(tmp_path: Path, served: index.Index) -> Path:
    """A project locked against an index on loopback."""
    project = support.make_project(tmp_path / "project", tmp_path / "no-wheels", ["ray", "wanted"], lock=False)
    project.write_text(project.read_text().split("[tool.uv]")[0])
    with project.open("a") as file:
        file.write(
            f'[tool.uv]\npackage = false\n[[tool.uv.index]]\nname = "here"\nurl = "{served.url}"\ndefault = true\n'
        )
    support.run_uv("lock", cwd=project.parent)
    return project


def test_hash_that_does_not_match(tmp_path: Path, wheels: Path, store: Store) -> None:
    """An index that serves another file than was locked is refused with both hashes."""
    support.make_wheel(wheels, "wanted")
    with index.serve(wheels) as served:
        project = lock_from_index(tmp_path, served)
        support.make_wheel(wheels, "wanted", modules={"wanted.py": "evil = True\n"})
        refused(store, project, errors.BuildError, "(?s)Hash mismatch.*Expected.*Computed")


def test_index_that_wants_a_password(tmp_path: Path, wheels: Path, store: Store) -> None:
    """An index that wants credentials which are not there says so, and how uv takes them."""
    support.make_wheel(wheels, "wanted")
    with index.serve(wheels) as served:
        project = lock_from_index(tmp_path, served)
        served.locked = True
        assert "UV_INDEX_<NAME>_USERNAME" in refused(store, project, errors.BuildError, "401 Unauthorized").hint


def test_index_out_of_reach(tmp_path: Path, wheels: Path, store: Store) -> None:
    """An index that does not answer is named."""
    support.make_wheel(wheels, "wanted")
    with index.serve(wheels) as served:
        project = lock_from_index(tmp_path, served)
    assert "reaches the index" in refused(store, project, errors.PassingError, "127.0.0.1").hint


def test_bad_input_needs_no_store(tmp_path: Path, wheels: Path) -> None:
    """`ray_envcache.runtime_env` finds the same faults without a store and without building."""
    support.make_fake_ray(wheels, "2.9.0")
    project = support.make_project(tmp_path / "project", wheels, ["ray==2.9.0"])
    with pytest.raises(errors.RayVersionError):
        require_buildable(EnvSpec.parse(project), installed_ray())
    require_buildable(EnvSpec.parse(project), ClusterRay("2.9.0"))


def test_root_with_characters_nobody_can_carry(tmp_path: Path) -> None:
    """A store path that would break PATH, shebangs or shells is refused before anything is made."""
    for name in ("colon:here", "dollar$HOME", "new\nline", 'quote"d', "quote'd", "tick`ls`", "back\\slash"):
        with pytest.raises(errors.StoreError, match="which PATH or shebangs cannot carry"):
            Store.open(tmp_path / name)
        assert not (tmp_path / name).exists()


def test_root_that_cannot_be_made() -> None:
    """A store below a file cannot be made; the error names it."""
    with pytest.raises(errors.StoreError, match=r"Cannot use the store at .*store"):
        Store.open(Path(__file__) / "store")


def test_root_that_others_may_write(tmp_path: Path) -> None:
    """A world-writable store is refused: environments run code."""
    root = tmp_path / "shared"
    root.mkdir()
    root.chmod(0o777)
    with pytest.raises(errors.StoreError, match="Others may write to the store"):
        Store.open(root)


def test_root_of_somebody_else(tmp_path: Path) -> None:
    """Another user's store is refused."""
    if os.geteuid() != 0:
        pytest.skip("only root can give a folder away")
    root = tmp_path / "theirs"
    Store.open(root)
    os.chown(root, 12345, 12345)
    with pytest.raises(errors.StoreError, match="belongs to user 12345"):
        Store.open(root)


def test_full_disk(tmp_path: Path, wheels: Path) -> None:
    """A disk without room gives an error with figures, and nothing stays behind on it."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    import random

    big = random.Random(0).randbytes(6_000_000).hex()
    support.make_wheel(wheels, "big", modules={"big.py": f"DATA = '{big}'\n"})
    project = support.make_project(tmp_path / "project", wheels, ["ray", "big"])
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=0700", "tmpfs", disk], check=True)
    try:
        small = Store.open(disk / "store")
        error = refused(small, project, errors.DiskFullError, r"No space left .* MB are free")
        assert "RAY_ENVCACHE_DIR" in error.hint
        assert list(small.layout.entries.iterdir()) == list(small.layout.trash.iterdir()) == []
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
