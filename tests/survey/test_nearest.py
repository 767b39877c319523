"""What an environment is compared with, and how the differences read: facts of all kinds, without any build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from ray_envcache.store.layout import Entry, Layout
from ray_envcache.survey.nearest import Difference, Nearest, Wanted, nearest, why_new
from ray_envcache.survey.packages import of_tables
from tests.gc.fabricated import make_entry, make_layout
from tests.survey.test_filters import change

PYTHON = {"version": "3.11.7", "executable": "/usr/bin/python3.11", "build": "gcc", "markers": {"os_name": "posix"}}
INPUTS: dict[str, Any] = {"interpreter": PYTHON, "build_settings": "", "outside": []}
KEY = "f" * 32


def wheel(name: str, version: str = "1.0", sha: str = "a", url: str = "https://index/x") -> dict[str, Any]:
    file = {"name": f"{name}.whl", "url": url, "hashes": {"sha256": sha * 64}}
    return {"name": name, "version": version, "wheels": [file]}


def entry_of(layout: Layout, number: int, *tables: dict[str, Any], project: str = "p", **inputs: Any) -> Entry:
    entry = make_entry(layout, number)
    entry.pylock.write_text(tomli_w.dumps({"lock-version": "1.0", "packages": tables}))
    change(entry, project=project, inputs={**INPUTS, **inputs})
    return entry


def compared(layout: Layout, *tables: dict[str, Any], project: str = "p", **inputs: Any) -> Nearest:
    found = nearest([layout], Wanted(KEY, project, {**INPUTS, **inputs}, tables))
    assert found is not None
    return found


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return make_layout(tmp_path / "store")


def test_an_empty_store(layout: Layout) -> None:
    """There is nothing to compare with, nor in one whose only entry is being built."""
    make_entry(layout, 1, ready=False)
    assert why_new(layout, Wanted(KEY, "p", INPUTS)) == ""


@pytest.mark.parametrize(
    ("tables", "inputs", "line"),
    [
        ([wheel("ray", "2.60.0"), wheel("aa")], {}, "another version of ray-envcache built the one before"),
        ([wheel("ray", "2.61.0"), wheel("aa")], {}, "ray 2.60.0 -> 2.61.0"),
        ([wheel("ray", "2.60.0"), wheel("aa", sha="b")], {}, "another file of aa"),
        ([wheel("ray", "2.60.0"), wheel("aa", url="https://mirror/x"), wheel("bb")], {}, "+bb 1.0"),
        ([wheel("ray", "2.60.0")], {}, "-aa 1.0"),
        ([wheel("ray", "2.60.0"), *(wheel(f"a{n}", "2") for n in range(4))], {}, "+4 packages, -aa 1.0"),
        (None, {"interpreter": {**PYTHON, "version": "3.12.1", "build": "x"}}, "Python 3.11.7 -> 3.12.1"),
        (
            None,
            {"interpreter": {**PYTHON, "executable": "/opt/python"}},
            "Python's executable /usr/bin/python3.11 -> /opt/python",
        ),
        (None, {"outside": ["system site-packages"]}, "system site-packages off -> on"),
        (None, {"build_settings": '{"config-settings": {"token": "secret"}}'}, "uv's setting config-settings"),
        ([wheel("ray", "2.60.0")], {"outside": [["aa", "1.0", "/usr", "0"]]}, "aa 1.0 -> 1.0 (inherited)"),
    ],
)
def test_differences(layout: Layout, tables: list[dict[str, Any]] | None, inputs: dict[str, Any], line: str) -> None:
    """Each kind, in words; where a file lies is no difference, and no value of a setting is shown."""
    there = [wheel("ray", "2.60.0"), wheel("aa")]
    entry_of(layout, 1, *there)
    found = compared(layout, *(there if tables is None else tables), **inputs)
    assert found.reason("p") == f"new: {line}"
    assert "secret" not in str(found)


def test_many_differences_are_counted(layout: Layout) -> None:
    """One line has room for three changes, and none for a list of packages."""
    entry_of(layout, 1, *(wheel(f"p{n}") for n in range(9)))
    found = compared(layout, *(wheel(f"p{n}", "2.0") for n in range(5)), *(wheel(f"q{n}") for n in range(7)))
    words = "new: p0 1.0 -> 2.0, p1 1.0 -> 2.0, p2 1.0 -> 2.0, 2 more changes, +7 packages, -4 packages"
    assert found.reason("p") == words


def test_same_project_first_then_fewest_differences(layout: Layout) -> None:
    """A project's own environment wins over one of another project that is nearer."""
    entry_of(layout, 1, wheel("aa"), project="other")
    entry_of(layout, 2, wheel("aa", "2"), wheel("bb", "2"))
    nearer = entry_of(layout, 3, wheel("aa"), wheel("bb", "2"))
    assert compared(layout, wheel("aa"), wheel("bb")).key == nearer.key
    found = compared(layout, wheel("aa"), wheel("cc"), project="mine")
    assert found.reason("mine") == "new: the first of mine; 1 difference from other"


def test_what_became_useless(layout: Layout) -> None:
    """An entry of the same key that is not handed out any more says why."""
    entry = entry_of(layout, 1, wheel("aa"))
    change(entry, base_python_file=(1, 2))
    found = nearest([layout], Wanted(entry.key, "p", INPUTS, [wheel("aa")]))
    assert found is not None
    assert found.reason("p") == "new: of the earlier one its base Python was changed"


def test_layers(layout: Layout) -> None:
    """A layer is compared with layers, by its own packages and by those of what it lies on."""
    bases = [entry_of(layout, 1, wheel("aa")), entry_of(layout, 2, wheel("aa", "2"))]
    layer = make_entry(layout, 3)
    settings = {"build_settings": "{}"}
    change(layer, base=bases[0].name, inputs={**settings, "contents": {"app": "sha256:1", "lib": "sha256:1"}})
    wanted = Wanted(KEY, "p", {**settings, "contents": {"app": "sha256:1", "lib": "sha256:2"}}, base=bases[0])
    found = nearest([layout], wanted)
    assert found is not None
    assert (found.key, found.differences) == (layer.key, (Difference("content", "lib", "sha256:1", "sha256:2"),))
    assert why_new(layout, wanted._replace(base=bases[1])) == "new: the code of lib, aa 1.0 -> 2"


def test_packages_are_told_apart_as_keys_are() -> None:
    """By hash, commit and subdirectory; without any of them by all that is known, of which nothing is shown."""
    vcs = {"name": "a", "vcs": {"url": "https://host/a", "commit-id": "c1", "subdirectory": "x"}}
    other = {"name": "a", "vcs": {**vcs["vcs"], "subdirectory": "y"}}  # type: ignore[dict-item]
    loose = {"name": "a", "archive": {"url": "https://host/a.tgz?token=secret"}}
    assert of_tables([vcs]) == of_tables([{**vcs, "index": "https://index"}])
    assert of_tables([vcs]) != of_tables([other])
    assert "secret" not in str(of_tables([loose]))
    assert of_tables([loose]) != of_tables([{"name": "a", "archive": {"url": "https://host/b.tgz"}}])
