"""`explain`: would it be a new environment, and why. With real builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.acquire import Store
from ray_envcache.doctor.explain import Part, explain
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder
from ray_envcache.store.record import read_facts
from ray_envcache.survey.nearest import Difference, Nearest
from tests import support
from tests.build.test_layers import edit, make_package
from tests.conftest import Acquire

pytestmark = pytest.mark.host


def explained(store: Store, project: Path, **options: Any) -> list[Part]:
    spec = EnvSpec.parse({"path": os.fspath(project), **options})
    return explain(spec, installed_ray(), (store.layout, *store.readonly))


def new(found: list[Part]) -> Part | None:
    """What would be built first; None where all is there."""
    return next((one for one in found if one.path is None), None)


def near(found: list[Part]) -> Nearest:
    part = new(found)
    assert part is not None
    assert part.nearest is not None
    return part.nearest


def reason(found: list[Part]) -> str:
    return near(found).reason(found[0].project)


def differences(found: list[Part]) -> list[Difference]:
    return list(near(found).differences)


def lock_again(project: Path, *packages: str) -> None:
    text = project.read_text()
    line = next(line for line in text.splitlines() if line.startswith("dependencies"))
    project.write_text(text.replace(line, f"dependencies = {['ray', *packages]!r}"))
    support.run_uv("lock", cwd=project.parent)


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    for version in ("1.0", "2.0"):
        support.make_wheel(wheels, "aa", version)
    for name in ("bb", "cc", "dd"):
        support.make_wheel(wheels, name)
    return support.make_project(tmp_path / "study", wheels, ["ray", "aa==1.0", "bb"])


def test_nothing_there_then_there(store: Store, acquire: Acquire, project: Path) -> None:
    """In an empty store there is nothing to compare with; what a build made is found by its key, and nothing is built."""
    (found,) = explained(store, project)
    assert (found.project, found.path, found.nearest) == ("study", None, None)
    assert list(store.layout.all_entries()) == []
    entry = acquire(project).entry
    (found,) = explained(store, project)
    assert (found.key, found.path, found.reason) == (entry.key, os.fspath(entry.path), None)


def test_packages(store: Store, acquire: Acquire, project: Path) -> None:
    """A version, an addition and a removal; the key is the one that the build then has."""
    acquire(project)
    lock_again(project, "aa==2.0", "cc", "dd")
    found = explained(store, project)
    assert differences(found) == [
        Difference("package", "aa", "1.0", "2.0"),
        Difference("package", "bb", "1.0", None),
        Difference("package", "cc", None, "1.0"),
        Difference("package", "dd", None, "1.0"),
    ]
    assert reason(found) == "new: aa 1.0 -> 2.0, bb 1.0 -> none, cc none -> 1.0, and 1 more"
    assert acquire(project).entry.key == found[0].key


def test_another_file_of_the_same_version(store: Store, acquire: Acquire, project: Path, wheels: Path) -> None:
    """A wheel that was made anew has another hash, and nothing else."""
    acquire(project)
    support.make_wheel(wheels, "bb", modules={"bb.py": "NEW = 1\n"})
    support.run_uv("lock", "--upgrade-package", "bb", cwd=project.parent)
    found = explained(store, project)
    (one,) = differences(found)
    assert (one.kind, one.name) == ("artifact", "bb")
    assert one.was != one.now
    assert reason(found) == "new: artifact bb"


def test_inherited_packages(store: Store, acquire: Acquire, project: Path) -> None:
    """What is inherited instead of installed is named."""
    acquire(project)
    found = explained(store, project, inherit=["ray"])
    named = {(one.kind, one.name): (one.was, one.now) for one in differences(found)}
    assert named["ray", "ray"] == (support.RAY_VERSION, f"{support.RAY_VERSION} (inherited)")


def test_the_nearest_is_of_the_same_project(store: Store, acquire: Acquire, project: Path, wheels: Path) -> None:
    """Of another project an environment counts only where this one has none, and the reason says so."""
    acquire(project)
    other = support.make_project(project.parent.parent / "other", wheels, ["ray", "aa==2.0", "bb", "cc"])
    found = explained(store, other)
    assert reason(found) == "new: the first of other; compared with study: aa 1.0 -> 2.0, cc none -> 1.0"
    acquire(other)
    lock_again(project, "aa==2.0", "bb", "cc", "dd")
    assert reason(explained(store, project)) == "new: aa 1.0 -> 2.0, cc none -> 1.0, dd none -> 1.0"


def test_records_of_earlier_versions(store: Store, acquire: Acquire, project: Path) -> None:
    """They stay valid, and are compared with nothing: they have no facts."""
    acquire(project).entry.facts.unlink()
    assert new(explained(store, project)) is None
    lock_again(project, "aa==2.0", "bb")
    assert explained(store, project)[0].nearest is None


def test_why_an_entry_is_not_used_any_more(store: Store, acquire: Acquire, project: Path) -> None:
    """An environment of the same key that is not handed out: the reason is what happened to it."""
    entry = acquire(project).entry
    data = json.loads(entry.ready.read_text())
    data["base_python_file"] = [1, 2]
    entry.ready.write_text(json.dumps(data))
    assert reason(explained(store, project)) == "new: of the earlier one its base Python was changed"


def test_layers(store: Store, acquire: Acquire, tmp_path: Path, wheels: Path) -> None:
    """Of a new layer the local packages are named whose content changed; one on a new environment is new as that is."""
    make_package(tmp_path / "lib", "lib")
    app = make_package(tmp_path / "app", "app", dependencies=["ray", "lib"])
    with (app / "backend.py").open("a") as file:
        file.write("build_editable = build_wheel\n")
    with (app / "pyproject.toml").open("a") as file:
        file.write(f'[tool.uv]\nno-index = true\nfind-links = ["{wheels}"]\n[tool.uv.sources]\n')
        file.write('lib = { path = "../lib" }\n')
    support.run_uv("lock", cwd=app)
    below, layer = explained(store, app)
    assert (below.path, layer.path, layer.nearest) == (None, None, None)
    lease = acquire(app)
    keys = [layer.key, below.key]
    assert [one.key for one in lease.entries] == keys
    assert read_facts(lease.entry).items() > read_facts(lease.entries[1]).items()
    assert [one.path for one in explained(store, app)] == [os.fspath(one.path) for one in reversed(lease.entries)]
    edit(tmp_path / "lib", "X = 2")
    found = explained(store, app)
    assert new(found) == found[1]
    assert [(one.kind, one.name) for one in differences(found)] == [("content", "lib")]
    assert reason(found) == "new: content lib"
    assert [one.key for one in acquire(app).entries] == [found[1].key, keys[1]]
    with store.acquire(EnvSpec.parse(app), installed_ray(), Holder("test"), finish=False, editable=True) as edited:
        was, now = read_facts(acquire(app).entry), read_facts(edited.entry)
    # The lockfile has `lib` as a copy, whose code is what it was; of `app` only the definition counts.
    changed = {fact for fact in {*was, *now} if was.get(fact) != now.get(fact)}
    assert changed <= {"option editable", "content app"}
    assert now["option editable"] == os.fspath(app)


def test_the_reason_is_in_the_progress_of_a_build(acquire: Acquire, project: Path) -> None:
    """`build` says in one line why it builds; nothing in a store that has nothing to compare with."""
    command = [sys.executable, "-m", "ray_envcache", "build", os.fspath(project)]

    def told() -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr

    assert "new:" not in told()
    lock_again(project, "aa==2.0", "bb", "cc")
    assert "\n  new: aa 1.0 -> 2.0, cc none -> 1.0\n" in told()


def test_command(store: Store, project: Path) -> None:
    """What `explain` prints; the exit code is 0 whether or not it would be new, and the JSON has a version."""

    def run(*arguments: str | Path, code: int = 0) -> str:
        command = [sys.executable, "-m", "ray_envcache", *map(str, arguments)]
        return support.run(*command, code=code)

    assert run("explain", project) == "study would be new: the store has nothing to compare it with\n"
    key = support.build_finished(store, project).key
    assert run("explain", project) == f"study is there: {key[:12]}\n"
    data = json.loads(run("explain", "--json", project))
    assert (data["schema_version"], data["new"], [one["key"] for one in data["parts"]]) == (1, False, [key])
    lock_again(project, "aa==2.0", "bb")
    assert run("explain", project).splitlines() == [
        "study would be new: aa 1.0 -> 2.0",
        f"Compared with {key[:12]} of study:",
        "KIND     NAME  THERE  WANTED",
        "package  aa    1.0    2.0",
    ]
    (part,) = json.loads(run("explain", "--json", project))["parts"]
    assert part["nearest"]["differences"] == [{"kind": "package", "name": "aa", "was": "1.0", "now": "2.0"}]
    assert len(list(store.layout.all_entries())) == 1
    run("explain", project.parent / "missing", code=1)
