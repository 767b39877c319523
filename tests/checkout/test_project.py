"""Where a lockfile is found, and which files decide: as uv has it, without starting it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ray_envcache.checkout.project import Kind, Project
from ray_envcache.errors import LockfileError
from tests import support

MEMBER = '[project]\nname = "{name}"\nversion = "1"\nrequires-python = ">=3.10"\n'


def make(folder: Path, text: str = "", *, lock: bool = True) -> Path:
    """A folder with a pyproject.toml, and a uv.lock that nobody reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(text or MEMBER.format(name=folder.name))
    if lock:
        (folder / "uv.lock").touch()
    return folder


def names(project: Project) -> list[str]:
    return sorted(os.path.relpath(path, project.folder) for path in project.inputs())


@pytest.mark.parametrize("name", ["", "pyproject.toml", "uv.lock"])
def test_project(tmp_path: Path, name: str) -> None:
    """A project is meant by its folder, its pyproject.toml or its uv.lock."""
    folder = make(tmp_path / "project")
    assert Project.locate(folder / name) == Project(Kind.UV, folder, folder / "uv.lock")
    assert names(Project.locate(folder / name)) == ["pyproject.toml", "uv.lock"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere", "No such file"),
        ("file/pyproject.toml", "Not a directory"),
        ("loop/pyproject.toml", "Too many levels of symbolic links"),
        ("x" * 300, "File name too long"),
    ],
)
def test_nothing_there(tmp_path: Path, path: str, said: str) -> None:
    """What cannot be looked at is named, with the cause and what to do."""
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(LockfileError, match=said) as caught:
        Project.locate(tmp_path / path)
    assert str(tmp_path / path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("pylock.toml", Kind.PYLOCK),
        ("pylock.gpu-1.toml", Kind.PYLOCK),
        ("requirements.txt", Kind.REQUIREMENTS),
        ("anything.txt", Kind.REQUIREMENTS),
    ],
)
def test_single_files(tmp_path: Path, name: str, kind: Kind) -> None:
    """Other lockfiles are meant by their own names; the settings of uv beside them count too."""
    (tmp_path / name).touch()
    (tmp_path / "uv.toml").touch()
    found = Project.locate(tmp_path / name)
    assert (found.kind, found.folder, names(found)) == (kind, tmp_path, sorted([name, "uv.toml"]))
    assert found.name() == tmp_path.name


@pytest.mark.parametrize("name", ["job.py", "job.py.lock"])
def test_script(tmp_path: Path, name: str) -> None:
    """A script is meant by itself or by its lock."""
    (tmp_path / "job.py").write_text("# /// script\n# dependencies = []\n# ///\n")
    (tmp_path / "job.py.lock").touch()
    found = Project.locate(tmp_path / name)
    assert (found.kind, found.file.name, found.name()) == (Kind.SCRIPT, "job.py", "job.py")
    assert names(found) == ["job.py", "job.py.lock"]


WORKSPACE = "[tool.uv.workspace]\nmembers = {members}\nexclude = {exclude}\n"


def locked(folder: Path, *, members: list[str], exclude: list[str]) -> Path:
    """The root of a workspace, locked by uv."""
    make(folder, MEMBER.format(name="root") + WORKSPACE.format(members=members, exclude=exclude), lock=False)
    support.run_uv("lock", "-q", cwd=folder)
    return folder


@pytest.mark.parametrize(
    ("members", "exclude", "place"),
    [
        (["packages/*"], [], "packages/one"),
        (["./packages/x/../*"], [], "packages/one"),
        (["packages/**"], [], "packages/one"),
        (["pack*/o?e"], [], "packages/one"),
        (["packages/*"], [], "packages/deep/one"),
        (["packages/*"], ["packages/one"], "packages/one"),
        (["packages/*"], ["packages/o*"], "packages/one"),
        (["elsewhere/*"], [], "packages/one"),
        ([], [], "one"),
    ],
)
def test_root_of_a_member(tmp_path: Path, members: list[str], exclude: list[str], place: str) -> None:
    """The root of a workspace is where uv has it, with patterns and exclusions, whatever lock lies beside the member."""
    member = make(tmp_path / "root" / place)
    if "deep" in place:
        make(member.parent, lock=False)
    root = locked(tmp_path / "root", members=members, exclude=exclude)
    uvs = Path(support.run_uv("workspace", "dir", cwd=member).strip())
    found = Project.locate(member)
    assert found.folder == uvs
    assert found.member == (place if uvs == root else ".")
    assert names(found) == sorted({"uv.lock", "pyproject.toml", f"{found.member}/pyproject.toml".removeprefix("./")})


@pytest.mark.parametrize("setting", ["workspace = true", "workspace = true, editable = false"])
@pytest.mark.parametrize("kind", ["[tool.uv]\npackage = true\n", ""])
def test_kinds_of_members(tmp_path: Path, setting: str, kind: str) -> None:
    """A member is found however the lockfile has it, and by its name; a path dependency beside it is none."""
    for name in ("one", "beside"):
        make(tmp_path / name, MEMBER.format(name=name) + kind)
    root = make(
        tmp_path,
        f"{MEMBER.format(name='root')}dependencies = ['one', 'beside']\n[tool.uv.sources]\none = {{ {setting} }}\n"
        f"beside = {{ path = 'beside' }}\n{WORKSPACE.format(members=['one'], exclude=[])}",
        lock=False,
    )
    support.run_uv("lock", "-q", cwd=root)
    assert (
        Project.locate(root / "one") == Project.locate(root, "one") == Project(Kind.UV, root, root / "uv.lock", "one")
    )
    assert sorted(Project.locate(root).members()) == [root, root / "one"]
    assert Project.locate(root / "beside").folder == root / "beside"
    with pytest.raises(LockfileError, match="has no member `beside`") as caught:
        Project.locate(root, "beside")
    assert "its members: one, root;" in caught.value.hint


def test_member_below_a_member(tmp_path: Path) -> None:
    """A member in the folder of another one is on its own where it is named by its folder, as for uv."""
    make(tmp_path / "root" / "one", lock=False)
    inner = make(tmp_path / "root" / "one" / "inner")
    root = locked(tmp_path / "root", members=["one", "one/inner"], exclude=[])
    assert Path(support.run_uv("workspace", "dir", cwd=inner).strip()) == inner == Project.locate(inner).folder
    assert Project.locate(root, "inner").member == "one/inner"


def test_root_that_is_no_project(tmp_path: Path) -> None:
    """The root of a workspace need not be a project."""
    make(tmp_path / "one", lock=False)
    make(tmp_path, WORKSPACE.format(members=["*"], exclude=[]), lock=False)
    support.run_uv("lock", "-q", cwd=tmp_path)
    assert Project.locate(tmp_path / "one").folder == Project.locate(tmp_path).folder == tmp_path


def test_project_between(tmp_path: Path) -> None:
    """A project inside of a project that is no workspace is on its own, whatever lies above."""
    inner = make(tmp_path / "root" / "middle" / "inner")
    make(tmp_path / "root" / "middle")
    locked(tmp_path / "root", members=["**"], exclude=[])
    assert Path(support.run_uv("workspace", "dir", cwd=inner).strip()) == inner == Project.locate(inner).folder


def test_workspace_in_a_workspace(tmp_path: Path) -> None:
    """A root is its own root."""
    inner = locked(tmp_path / "root" / "inner", members=[], exclude=[])
    locked(tmp_path / "root", members=["*"], exclude=["inner"])
    assert Project.locate(inner).folder == inner


def test_member_through_a_link(tmp_path: Path) -> None:
    """Where a folder really lies decides, as for uv, which runs there."""
    make(tmp_path / "root" / "one", lock=False)
    root = locked(tmp_path / "root", members=["*"], exclude=[])
    (tmp_path / "link").symlink_to(root / "one")
    assert Project.locate(tmp_path / "link").folder == root


def test_member_that_is_not_locked(tmp_path: Path) -> None:
    """A member that was just added to a workspace is in no lockfile: the error says in which, and `uv lock` mends it."""
    root = locked(tmp_path / "root", members=["*"], exclude=[])
    member = make(root / "one", lock=False)
    with pytest.raises(LockfileError) as caught:
        Project.locate(member)
    assert f"No uv.lock beside `{member}/pyproject.toml`, and `{root}/uv.lock` does not name" in caught.value.message
    assert caught.value.hint.startswith("run `uv lock` there")
    support.run_uv("lock", "-q", cwd=member)
    assert Project.locate(member).folder == root


def test_workspace_without_a_lock(tmp_path: Path) -> None:
    """Of a workspace that was never locked each member says so."""
    make(tmp_path / "root", WORKSPACE.format(members=["*"], exclude=[]), lock=False)
    member = make(tmp_path / "root" / "one", lock=False)
    with pytest.raises(LockfileError, match=r"No uv.lock beside .*/root/one/pyproject.toml`"):
        Project.locate(member)


@pytest.mark.parametrize("module", ["checkout.project", "resolve.interpreter"])
def test_agents_do_not_import_packaging(module: str) -> None:
    """What the plugin imports of these modules costs no `packaging` in each agent: it is needed for a build alone."""
    program = f"import sys, ray_envcache.{module}; print([m for m in sys.modules if m.startswith('packaging.')])"
    assert support.run_python(program).strip() == "[]"


def test_plain_project_is_found_without_a_parser(tmp_path: Path) -> None:
    """Nothing is parsed: the warm path comes through here."""
    folder = make(tmp_path / "project", "this is [no TOML")
    assert Project.locate(folder).folder == folder
