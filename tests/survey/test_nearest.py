"""What an environment is compared with, and how the differences read: facts of all kinds, without any build."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_envcache.build.plan import settings_facts
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.record import Facts, write_facts
from ray_envcache.survey.nearest import Difference, Nearest, nearest, why_new
from tests.gc.fabricated import change, make_entry, make_layout

PYTHON = {"version": "3.11.7", "executable": "/usr/bin/python3.11", "build": "gcc", "os_name": "posix"}


def wheel(name: str, version: str = "1.0", sha: str = "a") -> Facts:
    return {f"package {name}": version, f"artifact {name}": sha * 64}


def python(**changed: str) -> Facts:
    return {f"python {name}": value for name, value in {**PYTHON, **changed}.items()}


def joined(*found: Facts) -> Facts:
    return {fact: value for one in (python(), *found) for fact, value in one.items()}


def entry_of(layout: Layout, number: int, *found: Facts, project: str = "p") -> Entry:
    entry = make_entry(layout, number)
    write_facts(entry, joined(*found))
    change(entry, project=project)
    return entry


def compared(layout: Layout, *found: Facts, project: str = "p") -> Nearest:
    there = nearest([layout], project, joined(*found))
    assert there is not None
    return there


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return make_layout(tmp_path / "store")


def test_an_empty_store(layout: Layout) -> None:
    """There is nothing to compare with, nor in one whose only entry is being built."""
    make_entry(layout, 1, ready=False)
    assert why_new(layout, "p", joined()) == ""


RAY, AA = wheel("ray", "2.60.0"), wheel("aa")


@pytest.mark.parametrize(
    ("wanted", "line"),
    [
        ([RAY, AA], "another version of ray-envcache built the last"),
        ([RAY, AA, {"a later kind": "x"}], "another version of ray-envcache built the last"),
        ([wheel("ray", "2.61.0"), AA], "ray 2.60.0 -> 2.61.0"),
        ([wheel("ray", "2.60.0", sha="b"), AA], "artifact ray"),
        ([RAY, wheel("aa", sha="b")], "artifact aa"),
        ([RAY, AA, wheel("bb")], "bb none -> 1.0"),
        ([RAY], "aa 1.0 -> none"),
        ([RAY, *(wheel(f"a{n}", "2") for n in range(4))], "a0 none -> 2, a1 none -> 2, a2 none -> 2, and 2 more"),
        ([RAY, AA, python(version="3.12.1", build="x")], "python version 3.11.7 -> 3.12.1"),
        ([RAY, AA, python(executable="/opt/py")], "python executable /usr/bin/python3.11 -> /opt/py"),
        ([RAY, AA, {"option editable": "/p"}], "editable none -> /p"),
        ([RAY, AA, settings_facts('{"config-settings": {"token": "secret"}}')], "setting config-settings"),
        ([RAY, wheel("aa", "1.0 (inherited)", sha="b")], "aa 1.0 -> 1.0 (inherited)"),
    ],
)
def test_differences(layout: Layout, wanted: list[Facts], line: str) -> None:
    """Each kind, in words; what follows from another difference is none, and no value of a setting is shown."""
    entry_of(layout, 1, RAY, AA)
    found = compared(layout, *wanted)
    assert found.reason("p") == f"new: {line}"
    assert "secret" not in str(found)


def test_many_differences_are_counted(layout: Layout) -> None:
    """One line has room for three of them."""
    entry_of(layout, 1, *(wheel(f"p{n}") for n in range(9)))
    found = compared(layout, *(wheel(f"p{n}", "2.0") for n in range(5)), *(wheel(f"q{n}") for n in range(7)))
    assert found.reason("p") == "new: p0 1.0 -> 2.0, p1 1.0 -> 2.0, p2 1.0 -> 2.0, and 13 more"


def test_same_project_first_then_fewest_differences(layout: Layout) -> None:
    """A project's own environment wins over one of another project that is nearer."""
    entry_of(layout, 1, wheel("aa"), project="other")
    entry_of(layout, 2, wheel("aa", "2"), wheel("bb", "2"))
    nearer = entry_of(layout, 3, wheel("aa"), wheel("bb", "2"))
    assert compared(layout, wheel("aa"), wheel("bb")).key == nearer.key
    found = compared(layout, wheel("aa"), wheel("cc"), project="mine")
    assert found.reason("mine") == "new: the first of mine; compared with other: cc none -> 1.0"


def test_what_became_useless(layout: Layout) -> None:
    """An entry of the same key that is not handed out any more says why."""
    entry = entry_of(layout, 1, wheel("aa"))
    change(entry, base_python_file=(1, 2))
    found = nearest([layout], "p", joined(wheel("aa")))
    assert found is not None
    assert found.reason("p") == "new: of the earlier one its base Python was changed"


def test_layers(layout: Layout) -> None:
    """A layer is compared with layers, by its own packages and by those of what it lies on."""
    entry_of(layout, 1, wheel("aa"))
    layer = entry_of(layout, 2, wheel("aa"), {"content app": "sha256:1", "content lib": "sha256:1"})
    wanted = joined(wheel("aa"), {"content app": "sha256:1", "content lib": "sha256:2"})
    found = nearest([layout], "p", wanted)
    assert found is not None
    assert (found.key, found.differences) == (layer.key, (Difference("content", "lib", "sha256:1", "sha256:2"),))
    assert why_new(layout, "p", {**wanted, "package aa": "2"}) == "new: content lib, aa 1.0 -> 2"


@pytest.mark.parametrize("text", ["", "[[[", "[]", "{}", '{"package aa": 1}'])
def test_facts_that_are_damaged(layout: Layout, text: str) -> None:
    """An entry whose facts cannot be read, or that has none, is compared with nothing."""
    entry_of(layout, 1, wheel("aa")).facts.write_text(text)
    assert why_new(layout, "p", joined(wheel("aa"))) == ""
    entry_of(layout, 2, wheel("aa"))
    assert why_new(layout, "p", {}) == ""
