"""The store for programs: `ray_envcache.Store`, by the examples of its page and beyond."""

from __future__ import annotations

import os
import re
import textwrap
from pathlib import Path

import pytest

import ray_envcache
from ray_envcache.acquire import Store
from ray_envcache.errors import FieldValueError
from tests import support
from tests.gc.fabricated import add_file, make_entry, make_layout

PAGE = (Path(__file__).parents[1] / "ray_envcache" / "README.md").read_text("utf-8")
SECTION = PAGE.partition("\n# From Python\n")[2].partition("\n# ")[0]


@pytest.mark.host
def test_the_examples_of_the_page(store: Store, tmp_path: Path, wheels: Path) -> None:
    """Each example runs as it stands, one after the other, in a process of its own."""
    support.make_wheel(wheels, "numpy", "2.4.1", modules={"numpy.py": "__version__ = '2.4.1'\n"})
    project = support.make_project(tmp_path / "project", wheels, ["ray", "numpy"])
    blocks = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    program = textwrap.dedent("".join(blocks))
    assert "training/pyproject.toml" in program
    said = support.run_python(program.replace("training/pyproject.toml", os.fspath(project)))
    assert "2.4.1" in said.splitlines()
    assert f"ready project {store.layout.root}" in said
    assert "0 would go" in said
    assert re.search(r"(sound|skipped) 0 differences", said)  # the background is not always done by then
    (entry,) = store.layout.all_entries()
    support.wait_until(entry.compiled.exists, "finished")
    (found,) = ray_envcache.Store.open(store.layout.root).verify()
    assert isinstance(found, ray_envcache.Verified)
    assert found.state == "sound"


def test_environments_and_collect(tmp_path: Path) -> None:
    """Typed results; limits as people write them."""
    layout = make_layout(tmp_path / "store")
    entry = make_entry(layout, 1)
    add_file(entry, 1_000_000)
    store = ray_envcache.Store.open(layout.root)
    assert store.root == layout.root
    (one,) = store.environments()
    assert isinstance(one, ray_envcache.Environment)
    assert (one.key, one.state, one.in_use) == (entry.key, "ready", False)
    assert store.collect(unused_for="1d", min_free_space=None).removed == []
    would = store.collect(unused_for=0, min_free_space="off", dry_run=True)
    assert isinstance(would, ray_envcache.Collected)
    assert ([one.key for one in would.removed], entry.path.exists()) == ([entry.key], True)
    assert store.collect(everything=True).freed_bytes >= 1_000_000
    assert not entry.path.exists()


def test_a_store_at_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one below the working directory that there is when it is opened, and all works as with an absolute."""
    monkeypatch.chdir(tmp_path)
    store = ray_envcache.Store.open("store")
    assert store.root == tmp_path / "store"
    make_entry(make_layout(store.root), 1)
    monkeypatch.chdir("/")
    assert len(store.environments()) == 1
    assert len(store.collect(everything=True).removed) == 1
    assert store.environments() == []


def test_bad_input(tmp_path: Path) -> None:
    """Unknown limits and options are errors that name them."""
    store = ray_envcache.Store.open(tmp_path / "store")
    with pytest.raises(FieldValueError, match=r"(?s)`max_space`.*max_used_space"):
        store.collect(max_space="1GB")
    with pytest.raises(FieldValueError, match="Not a size: `1XB`"):
        store.collect(max_used_space="1XB")
    with pytest.raises(ray_envcache.EnvCacheError, match="`'extra'`"):
        store.acquire("pyproject.toml", extra=["gpu"])
