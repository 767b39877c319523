"""Every kind of lockfile gives the packages that uv would take, and the same packages give the same environment."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_envcache.acquire import Store, digest_of_files
from ray_envcache.checkout.project import Project
from ray_envcache.errors import BuildError, InterpreterError, LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import interpreter, lockfile
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.resolve.lockfile import ResolvedSet
from ray_envcache.store.key import compute_key
from ray_envcache.store.leases import Holder
from tests import index, support
from tests.conftest import Acquire

pytestmark = pytest.mark.host

SCRIPT = """\
# /// script
# requires-python = ">=3.10"
# dependencies = {dependencies}
# [tool.uv]
# no-index = true
# find-links = ["{wheels}"]
# ///
print("hello")
"""


def resolve(path: Path, **options: Any) -> ResolvedSet:
    """What a field value selects for the running Python."""
    spec = EnvSpec.parse({"path": path, **options})
    python = interpreter.probe(interpreter.base_executable(None))
    return lockfile.resolve(spec, Project.locate(Path(spec.path), spec.package), python)


def key(path: Path, **options: Any) -> str:
    """The key of what a field value selects."""
    return compute_key(resolve(path, **options), interpreter.probe(interpreter.base_executable(None)))


def versions(path: Path, **options: Any) -> dict[str, str]:
    """Names and versions of what a field value selects."""
    return {package.name: package.version for package in resolve(path, **options).packages}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_pylock(path: Path, packages: list[Mapping[str, Any]], **head: Any) -> Path:
    """A pylock.toml as no tool of ours writes it."""
    import tomli_w

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        tomli_w.dumps(
            {"lock-version": "1.0", "created-by": "a test", **head, "packages": [dict(one) for one in packages]}
        )
    )
    return path


def locked_wheel(wheel: Path, name: str, **more: Any) -> dict[str, Any]:
    """A package of a pylock.toml whose wheel is that file."""
    artifact = {"url": wheel.as_uri(), "hashes": {"sha256": sha256(wheel)}}
    return {"name": name, "version": wheel.name.split("-")[1], "wheels": [artifact], **more}


def all_kinds(tmp_path: Path, wheels: Path) -> list[Path]:
    """One set of packages, locked in every way there is."""
    support.make_wheel(wheels, "wanted", "1.5")
    support.make_wheel(wheels, "for-windows")
    support.make_sdist(wheels, "from-source")
    needs = ["ray", "wanted", "from-source", "for-windows; sys_platform == 'win32'"]
    project = support.make_project(tmp_path / "project", wheels, needs)
    others = tmp_path / "others"
    others.mkdir()
    exported = support.run_uv(
        "export", "--frozen", "--format=requirements.txt", "--no-emit-project", cwd=project.parent
    )
    script = others / "job.py"
    script.write_text(SCRIPT.format(dependencies=json.dumps(needs), wheels=wheels))
    support.run_uv("lock", "--script", script, cwd=others)
    for name in ("pylock.toml", "pylock.study.toml"):
        support.run_uv(
            "export", "--frozen", "--format=pylock.toml", f"--output-file={others / name}", cwd=project.parent
        )
    (others / "anything.txt").write_text(f"--no-index\n--find-links {wheels}\n{exported}")
    return [project, project.parent, project.parent / "uv.lock", *sorted(others.iterdir())]


def test_same_set_of_any_kind_is_one_environment(tmp_path: Path, wheels: Path, store: Store, acquire: Acquire) -> None:
    """uv.lock, pylock.toml, pylock.NAME.toml, requirements and a script with the same packages share one entry."""
    kinds = all_kinds(tmp_path, wheels)
    assert [path.name for path in kinds[3:]] == [
        "anything.txt", "job.py", "job.py.lock", "pylock.study.toml", "pylock.toml"
    ]  # fmt: skip
    assert {acquire(path).entry for path in kinds} == {acquire(kinds[0]).entry}
    found = sorted(path.name for path in acquire(kinds[0]).entry.site_packages.glob("*.dist-info"))
    assert found == ["from_source-1.0.dist-info", f"ray-{support.RAY_VERSION}.dist-info", "wanted-1.5.dist-info"]


@pytest.mark.pypi
def test_real_packages_of_any_kind(tmp_path: Path) -> None:
    """Real packages, with wheels for many platforms, are the same set in uv.lock, pylock.toml and requirements."""
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text(
        '[project]\nname = "real"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = ["pandas", "fastapi"]\n'
    )
    support.run_uv("lock", cwd=project)
    for form, name in (("pylock.toml", "pylock.toml"), ("requirements.txt", "requirements.txt")):
        support.run_uv("export", "--frozen", f"--format={form}", f"--output-file={tmp_path / name}", cwd=project)
    assert "numpy" in versions(project)
    assert key(project) == key(tmp_path / "pylock.toml") == key(tmp_path / "requirements.txt")


@pytest.fixture(scope="module")
def two_wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for name in ("first-one", "second"):
        support.make_wheel(folder, name)
    return folder


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.text("abc# -=\\ä;@\t", max_size=12), st.booleans())
def test_order_and_comments_in_requirements_do_not_matter(
    two_wheels: Path,
    random: Any,
    comment: str,
    split: bool,  # noqa: FBT001
) -> None:
    """Requirements are a set: order, comments, blank lines, continuations and spelling make no difference to the key."""
    hashes = {name: sha256(two_wheels / f"{name}-1.0-py3-none-any.whl") for name in ("first_one", "second")}
    plain = [f"{name}==1.0 --hash=sha256:{digest}" for name, digest in hashes.items()]
    head = f"--no-index\n--find-links {two_wheels}\n"
    (two_wheels / "plain.txt").write_text(head + "\n".join(plain))
    lines = [
        plain[0].replace("first_one", "First.One"),
        plain[1].replace("==", " == "),
        f"# {comment.rstrip(chr(92))}",
        "",
    ]
    random.shuffle(lines)
    joint = " \\\n    --hash" if split else " --hash"
    (two_wheels / "other.txt").write_text(head + "\n".join(line.replace(" --hash", joint) for line in lines))
    assert key(two_wheels / "plain.txt") == key(two_wheels / "other.txt")


def test_markers_includes_and_constraints_of_requirements(tmp_path: Path, wheels: Path) -> None:
    """Markers choose, `-r` adds, `-c` may pin what a line leaves open; all these files are in the digest."""
    for name, version in (("a", "1.0"), ("b", "1.0"), ("b", "2.0"), ("c", "1.0"), ("c", "2.0")):
        support.make_wheel(wheels, name, version)
    folder = tmp_path / "locks"
    (folder / "deeper").mkdir(parents=True)
    (folder / "all.txt").write_text(f"--no-index\n-f {wheels}\n-r deeper/more.txt\na==1.0\n")
    (folder / "deeper" / "more.txt").write_text(
        "b==1.0 ; python_version >= '3'\nb==2.0 ; python_version < '3'\nc\n-c=pins.txt\n-r ../all.txt\n"
    )
    (folder / "deeper" / "pins.txt").write_text("c==1.0\nnever-asked-for==7\n")
    spec = EnvSpec.parse(folder / "all.txt")
    assert versions(folder / "all.txt") == {"a": "1.0", "b": "1.0", "c": "1.0"}
    before = digest_of_files(spec)
    (folder / "deeper" / "pins.txt").write_text("c==2.0\n")
    assert digest_of_files(spec) != before
    assert versions(folder / "all.txt")["c"] == "2.0"


def test_index_lines_of_requirements(tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """`--index-url` says where the packages are, as uv has it."""
    support.make_wheel(wheels, "wanted", "3.0")
    with index.serve(wheels) as served:
        (tmp_path / "requirements.txt").write_text(
            f"--index-url {served.url}\nray=={support.RAY_VERSION}\nwanted==3.0\n"
        )
        lease = acquire(tmp_path / "requirements.txt")
    assert support.run_python("import wanted; print(wanted.VERSION)", python=lease.python).strip() == "3.0"


def test_hashes_of_requirements_are_insisted_on(tmp_path: Path, wheels: Path) -> None:
    """Of several files of one version those listed are taken; where none is, nothing is."""
    plain = support.make_wheel(wheels, "wanted")
    tag = f"py{sys.version_info.major}{sys.version_info.minor}-none-any"
    better = support.make_wheel(wheels, "wanted", modules={"wanted.py": "BETTER = True\n"}, tag=tag)
    lock = tmp_path / "requirements.txt"
    for wheel in (plain, better):
        lock.write_text(f"--no-index\n-f {wheels}\nwanted==1.0 --hash=sha256:{sha256(wheel)}\n")
        assert [package.digest for package in resolve(lock).packages] == [f"sha256:{sha256(wheel)}"]
    lock.write_text(f"--no-index\n-f {wheels}\nwanted==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(LockfileError, match=r"None of the files of wanted 1.0 has a hash .*requirements.txt"):
        resolve(lock)


def make_workspace(tmp_path: Path, wheels: Path, root: str = "") -> Path:
    """A workspace of two members, one package each; returns its folder."""
    for name in ("a", "b", "tool", "checker"):
        support.make_wheel(wheels, name)
    folder = tmp_path / "workspace"
    for name in ("one", "two"):
        inner = folder / "packages" / name
        inner.mkdir(parents=True)
        need, group = ("a", "tool") if name == "one" else ("b", "checker")
        (inner / "pyproject.toml").write_text(
            f'[project]\nname = "{name}"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = ["{need}"]\n'
            f'[dependency-groups]\n{group}s = ["{group}"]\ndev = ["{group}"]\n[tool.uv]\ndefault-groups = ["{group}s"]\n'
        )
    (folder / "pyproject.toml").write_text(
        f"{root}[tool.uv]\nno-index = true\nfind-links = ['{wheels}']\n[tool.uv.workspace]\nmembers = ['packages/*']\n"
    )
    support.run_uv("lock", cwd=folder)
    return folder


def test_member_of_a_workspace(tmp_path: Path, wheels: Path) -> None:
    """A member is meant by its folder, by its pyproject.toml, or by `package`; uv.lock is that of the root."""
    folder = make_workspace(tmp_path, wheels)
    member = folder / "packages" / "one"
    for path, options in ((member, {}), (member / "pyproject.toml", {}), (folder, {"package": "One"})):
        assert versions(path, **options) == {"a": "1.0", "tool": "1.0"}
    assert versions(folder / "uv.lock", package="two") == {"b": "1.0", "checker": "1.0"}
    assert versions(folder).keys() >= {"a", "b"}


def test_root_of_a_workspace_that_is_a_project(tmp_path: Path, wheels: Path) -> None:
    """The root alone is meant by its own files."""
    head = '[project]\nname = "root"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = ["tool"]\n'
    folder = make_workspace(tmp_path, wheels, head)
    assert versions(folder) == versions(folder, package="root") == {"tool": "1.0"}


def test_digest_of_a_member(tmp_path: Path, wheels: Path) -> None:
    """A member's digest covers uv.lock, the root's and its own pyproject.toml, and not those of its neighbours."""
    folder = make_workspace(tmp_path, wheels)
    one, two = (EnvSpec.parse(folder / "packages" / name) for name in ("one", "two"))
    before = digest_of_files(one), digest_of_files(two)
    with (folder / "packages" / "two" / "pyproject.toml").open("a") as file:
        file.write("\n# a comment\n")
    assert digest_of_files(one) == before[0]
    assert digest_of_files(two) != before[1]
    by_name = EnvSpec.parse({"path": folder, "package": "two"})
    assert digest_of_files(by_name) == digest_of_files(two)
    with (folder / "pyproject.toml").open("a") as file:
        file.write("\n# a comment\n")
    assert digest_of_files(one) != before[0]


def test_development_group_only_when_named(tmp_path: Path, wheels: Path) -> None:
    """Default groups are those of `[tool.uv]`, the development group comes when it is named."""
    for name in ("of-dev", "of-default", "of-test"):
        support.make_wheel(wheels, name)
    extra = '[dependency-groups]\ndev = ["of-dev"]\nbase = ["of-default"]\ntest = ["of-test"]\n'
    project = support.make_project(tmp_path / "project", wheels, extra=extra, lock=False)
    project.write_text(project.read_text() + 'default-groups = ["dev", "base"]\n')
    support.run_uv("lock", cwd=project.parent)
    assert versions(project).keys() == {"of-default"}
    assert versions(project, groups=["dev"]).keys() == {"of-default", "of-dev"}
    assert versions(project, groups=["test"]).keys() == {"of-default", "of-test"}


def make_cpu_and_cuda(tmp_path: Path, wheels: Path) -> Path:
    """A project that takes its torch, of one version, from an index per extra, as people do with torch."""
    for build in ("cpu", "cu99"):
        support.make_wheel(tmp_path / build, "torch", f"2.0+{build}", modules={"torch.py": f"BUILD = {build!r}\n"})
    project = support.make_project(tmp_path / "project", wheels, ["ray"], lock=False)
    text = project.read_text().replace("no-index = true\n", "")
    extras = "".join(f'{build} = ["torch==2.0"]\n' for build in ("cpu", "cu99"))
    indexes = "".join(
        f'[[tool.uv.index]]\nname = "{build}"\nurl = "{tmp_path / build}"\nformat = "flat"\nexplicit = true\n'
        for build in ("cpu", "cu99")
    )
    sources = ", ".join(f'{{ index = "{build}", extra = "{build}" }}' for build in ("cpu", "cu99"))
    project.write_text(
        f"{text}conflicts = [[{{ extra = 'cpu' }}, {{ extra = 'cu99' }}]]\n[[tool.uv.index]]\nname = 'here'\n"
        f"url = '{wheels}'\nformat = 'flat'\ndefault = true\n{indexes}[tool.uv.sources]\ntorch = [{sources}]\n"
        f"[project.optional-dependencies]\n{extras}"
    )
    support.run_uv("lock", cwd=project.parent)
    return project


@pytest.mark.parametrize("build", ["cpu", "cu99"])
def test_index_per_extra_takes_what_uv_takes(tmp_path: Path, wheels: Path, store: Store, build: str) -> None:
    """CPU and CUDA builds of one version from explicit indexes: the extra decides, as with `uv sync`."""
    project = make_cpu_and_cuda(tmp_path, wheels)
    with store.acquire(EnvSpec.parse({"path": project, "extras": [build]}), installed_ray(), Holder("test")) as lease:
        ours = support.run_python("import torch; print(torch.BUILD)", python=lease.python)
    support.run_uv("sync", "--frozen", f"--extra={build}", cwd=project.parent)
    uvs = support.run_python("import torch; print(torch.BUILD)", python=project.parent / ".venv" / "bin" / "python")
    assert ours == uvs == f"{build}\n"


def test_conflicting_extras(tmp_path: Path, wheels: Path) -> None:
    """Extras that exclude each other are refused with uv's reason."""
    project = make_cpu_and_cuda(tmp_path, wheels)
    with pytest.raises(LockfileError, match="`cpu` and `cu99` are incompatible with the declared conflicts") as caught:
        resolve(project, extras=["cpu", "cu99"])
    assert "leave out one" in caught.value.hint


def test_selection_from_pylock(tmp_path: Path, wheels: Path) -> None:
    """A pylock.toml of any tool: extras, default groups and named groups, markers, paths from its own place."""
    names = ("always", "of-extra", "of-default", "of-group", "elsewhere")
    made = {name: support.make_wheel(tmp_path / "here", name) for name in names}
    relative = {"path": "../here/always-1.0-py3-none-any.whl", "hashes": {"sha256": sha256(made["always"])}}
    lock = make_pylock(
        tmp_path / "locks" / "pylock.toml",
        [
            {"name": "always", "version": "1.0", "wheels": [relative]},
            locked_wheel(made["of-extra"], "of-extra", marker="'fast' in extras"),
            locked_wheel(made["of-default"], "of-default", marker="'base' in dependency_groups"),
            locked_wheel(made["of-group"], "of-group", marker="'test' in dependency_groups"),
            locked_wheel(made["elsewhere"], "elsewhere", marker="sys_platform == 'win32'"),
        ],
        **{"extras": ["fast"], "dependency-groups": ["base", "test"], "default-groups": ["base"]},
    )
    assert versions(lock).keys() == {"always", "of-default"}
    assert versions(lock, extras=["fast"], groups=["test"]).keys() == {"always", "of-default", "of-extra", "of-group"}
    for options, says in (({"extras": ["nope"]}, "no extra `nope`"), ({"groups": ["nope"]}, "no group `nope`")):
        with pytest.raises(LockfileError, match=says):
            resolve(lock, **options)


def test_pylock_for_others(tmp_path: Path) -> None:
    """A pylock.toml for another Python or platform is refused."""
    with pytest.raises(InterpreterError, match=r"requires Python <3\.10, the cluster runs"):
        resolve(make_pylock(tmp_path / "pylock.toml", [], **{"requires-python": "<3.10"}))
    with pytest.raises(LockfileError, match="does not satisfy any of the environments"):
        resolve(make_pylock(tmp_path / "pylock.toml", [], environments=["sys_platform == 'win32'"]))


def test_local_packages(tmp_path: Path, wheels: Path) -> None:
    """Members and path dependencies are told with name, absolute folder, and whether they are editable."""
    for name in ("beside", "inside"):
        folder = tmp_path / name if name == "beside" else tmp_path / "project" / name
        folder.mkdir(parents=True)
        (folder / "pyproject.toml").write_text(
            f'[project]\nname = "{name}"\nversion = "1"\nrequires-python = ">=3.10"\n'
        )
    project = support.make_project(tmp_path / "project", wheels, ["beside", "inside"], lock=False)
    with project.open("a") as file:
        file.write(
            '[tool.uv.sources]\nbeside = { path = "../beside", editable = true }\ninside = { path = "inside" }\n'
        )
    support.run_uv("lock", cwd=project.parent)
    support.run_uv("export", "--frozen", "--format=pylock.toml", "-o=pylock.toml", cwd=project.parent)
    (project.parent / "requirements.txt").write_text("--no-index\n-e ../beside\n./inside\n")
    expected = [("beside", tmp_path / "beside", True), ("inside", tmp_path / "project" / "inside", False)]
    for path in (project, project.parent / "pylock.toml", project.parent / "requirements.txt"):
        assert [(one.name, one.path, one.editable) for one in resolve(path).local] == expected


def make_repository(tmp_path: Path, wheels: Path) -> tuple[str, str]:
    """A git repository with a package: its URL, and its commit."""
    # By no Python: those before 3.11.4 have no filter for what they unpack, later ones warn without one.
    support.run("tar", "xf", support.make_sdist(wheels, "from-git"), "-C", tmp_path)
    folder = tmp_path / "from_git-1.0"
    who = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.org"]
    for arguments in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "The package"]):
        subprocess.run(["git", *arguments], cwd=folder, check=True)
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return folder.as_uri(), done.stdout.strip()


def test_git_dependency_at_its_commit(tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """A git dependency is installed at the locked commit, from uv.lock or requirements, and is one environment."""
    url, commit = make_repository(tmp_path, wheels)
    project = support.make_project(tmp_path / "project", wheels, ["ray", f"from-git @ git+{url}"])
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(f"--no-index\n-f {wheels}\nray=={support.RAY_VERSION}\nfrom-git @ git+{url}@{commit}\n")
    lease = acquire(project)
    assert lease.entry == acquire(requirements).entry
    said = (lease.entry.site_packages / "from_git-1.0.dist-info" / "direct_url.json").read_text()
    assert json.loads(said)["vcs_info"]["commit_id"] == commit
    requirements.write_text(f"from-git @ git+{url}@main\n")
    with pytest.raises(LockfileError, match="Not an exact commit"):
        resolve(requirements)


def test_local_archives_by_hash(tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """A local wheel and a local source package, by path or URL, are known by their content."""
    wheel = support.make_wheel(tmp_path / "files", "a-wheel")
    sdist = support.make_sdist(tmp_path / "files", "a-source")
    needs = ["ray", f"a-wheel @ {wheel.as_uri()}", f"a-source @ {sdist.as_uri()}"]
    project = support.make_project(tmp_path / "project", wheels, needs)
    requirements = tmp_path / "requirements.txt"
    requirements.write_text(
        f"--no-index\n-f {wheels}\nray=={support.RAY_VERSION}\n{wheel} --hash=sha256:{sha256(wheel)}\n"
        f"a-source @ {sdist.as_uri()}#sha256={sha256(sdist)}\n"
    )
    lease = acquire(project)
    assert lease.entry == acquire(requirements).entry
    assert {path.name for path in lease.entry.site_packages.glob("a_*.py")} == {"a_wheel.py", "a_source.py"}
    built = {package.name for package in resolve(project).packages if package.is_built_here}
    assert built == {"a-source"}


@pytest.mark.parametrize("kind", ["wheel", "sdist", "archive"])
def test_hashes_of_a_pylock_are_enforced(
    tmp_path: Path, wheels: Path, acquire: Acquire, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file other than the locked one is never installed, however it is named: uv checks the hashes we give it."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    make = support.make_sdist if kind == "sdist" else support.make_wheel
    path = make(tmp_path / "files", "wanted")
    artifact = {"url": path.as_uri(), "hashes": {"sha256": "0" * 64}}
    table: dict[str, Any] = {"wheels": [artifact]} if kind == "wheel" else {kind: artifact}
    ray = locked_wheel(support.make_fake_ray(wheels), "ray")
    lock = make_pylock(tmp_path / "pylock.toml", [ray, {"name": "wanted", "version": "1.0", **table}])
    with pytest.raises(BuildError, match=r"(?s)Hash mismatch.*Expected.*0000.*Computed"):
        acquire(lock)


def test_no_build_names_what_is_no_wheel(tmp_path: Path, wheels: Path, store: Store) -> None:
    """`no_build` refuses what would be built from source, even where an environment with it is there."""
    support.make_sdist(wheels, "from-source")
    plain = support.make_project(tmp_path / "plain", wheels, ["ray"])
    built = support.make_project(tmp_path / "built", wheels, ["ray", "from-source"])
    (tmp_path / "requirements.txt").write_text(f"--no-index\n-f {wheels}\nfrom-source==1.0\n")
    for path in (plain, built):
        store.acquire(EnvSpec.parse(path), installed_ray(), Holder("test")).release()
    spec = EnvSpec.parse({"path": plain, "no_build": True})
    with store.acquire(spec, installed_ray(), Holder("test")) as lease:
        assert lease.entry.number == 1, "it does not change a byte, so it is not in the key"
    for path in (built, tmp_path / "requirements.txt"):
        with pytest.raises(LockfileError, match="from-source") as caught:
            store.acquire(EnvSpec.parse({"path": path, "no_build": True}), installed_ray(), Holder("test"))
        assert "no_build" in caught.value.hint


def test_script_is_pinned_by_what_it_needs(tmp_path: Path, wheels: Path) -> None:
    """The digest of a script covers its block and its lock; what else it does may change all the time."""
    script = tmp_path / "job.py"
    script.write_text(SCRIPT.format(dependencies='["ray"]', wheels=wheels))
    support.run_uv("lock", "--script", script, cwd=tmp_path)
    before = digest_of_files(EnvSpec.parse(script))
    script.write_text(f"import os\n{script.read_text()}print('more')\n")
    assert digest_of_files(EnvSpec.parse(script)) == before
    script.write_text(script.read_text().replace(">=3.10", ">=3.9"))
    assert digest_of_files(EnvSpec.parse(script)) != before


def test_requirements_that_leave_something_out(tmp_path: Path, wheels: Path) -> None:
    """A file without the dependencies of its packages is refused; ray may be left to the cluster, others by an override."""
    support.make_wheel(wheels, "needs-more", requires=["more"])
    support.make_wheel(wheels, "needs-ray", requires=["ray"])
    support.make_wheel(wheels, "more")
    lock = tmp_path / "requirements.txt"
    lock.write_text(f"--no-index\n-f {wheels}\nneeds-more==1.0\n")
    with pytest.raises(LockfileError, match="leaves out what its packages need: more"):
        resolve(lock)
    (tmp_path / "uv.toml").write_text("override-dependencies = ['more ; python_version < \"0\"']\n")
    assert versions(lock).keys() == {"needs-more"}
    lock.write_text(f"--no-index\n-f {wheels}\nneeds-ray==1.0\n")
    assert versions(lock).keys() == {"needs-ray"}


def test_settings_of_builds_are_honoured(tmp_path: Path, wheels: Path, acquire: Acquire) -> None:
    """Builds without isolation see what is locked; extra build dependencies and config settings count, for the key too."""
    support.make_wheel(wheels, "helper", modules={"helper.py": "X = 1\n"})
    support.make_sdist(wheels, "native", code="import helper", requires=["helper"])
    support.make_sdist(wheels, "forgetful", code="import helper")
    extra = '[tool.uv.extra-build-dependencies]\nforgetful = ["helper"]\n[tool.uv.config-settings]\nflavour = "{}"\n'
    project = support.make_project(tmp_path / "project", wheels, ["ray", "native", "forgetful", "helper"], lock=False)
    text = f'{project.read_text()}no-build-isolation-package = ["native"]\n'
    keys = set()
    for flavour in ("sweet", "sour"):
        project.write_text(text + extra.format(flavour))
        support.run_uv("lock", cwd=project.parent)
        lease = acquire(project)
        keys.add(lease.entry.key)
        assert flavour in support.run_python("import native; print(native.SETTINGS)", python=lease.python)
    assert len(keys) == 2
