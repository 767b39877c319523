"""`list` for scripts and big stores, as a process: filters, order, limit, keys only, and uv's cache."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.acquire import Store
from ray_envcache.store.layout import Entry
from ray_envcache.survey.inventory import record_sizes
from tests.cli.test_commands import run
from tests.gc.fabricated import add_file, change, make_entry

pytestmark = pytest.mark.host


@pytest.fixture
def entries(store: Store) -> list[Entry]:
    """Three environments, each larger than the one before, and of a project of its own."""
    found = [make_entry(store.layout, number) for number in (1, 2, 3)]
    for number, entry in enumerate(found):
        add_file(entry, 1_000_000 * (number + 1))
        change(entry, project=f"p{number}")
        os.utime(entry.in_use, (1_700_000_000 - number,) * 2)
    return found


def said(*arguments: str | Path) -> list[str]:
    done = run("list", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def listed(*arguments: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads("\n".join(said("--json", *arguments)))
    return data


def test_quiet_prints_keys_for_other_commands(store: Store, entries: list[Entry]) -> None:
    """In the order of the list, each once, whole; `rm` takes them."""
    again = make_entry(store.layout, 1)
    keys = said("-q")
    assert sorted(keys) == sorted(entry.key for entry in entries)
    assert said("-q", "--filter", "project:p1", "--filter", "size>1MB") == [entries[1].key]
    assert said("-q", "--filter", "project:p1", "--filter", "size>1GB") == []
    done = run("rm", *said("-q", "--filter", "size>2MB"))
    assert done.returncode == 0
    assert [entry.path.exists() for entry in [*entries, again]] == [True, True, False, True] or again.path.exists()


def test_sort_and_limit(store: Store, entries: list[Entry]) -> None:
    """The first of the order that was asked for, in table and JSON; the totals are those of what is shown."""
    assert [int(key, 16) for key in said("-q", "--sort", "size")] == [3, 2, 1]
    assert [int(key, 16) for key in said("-q")] == [3, 2, 1]
    assert [int(key, 16) for key in said("-q", "--sort", "used", "--limit", "2")] == [1, 2]
    assert [one["key"] for one in listed("--sort", "size", "--limit", "1")["envs"]] == [entries[2].key]
    *_, row, totals = said("--filter", "size<2MB")
    assert "p0" in row
    assert totals.startswith("1 of 3 shown: 1 environment, 1.0 MB, ")
    assert said()[-1].startswith("3 environments, 6.1 MB (shared files counted in each)")
    assert said("--limit", "0")[-1].startswith("0 of 3 shown: 0 environments, 0 B")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--filter", "mass>1GB"], ["Unknown filter: `mass>1GB`", "unused>7d", "has:torch==2.8.0"]),
        (["--filter", "size>1XB"], ["Not a size: `1XB`", "50GB"]),
        (["--sort", "name"], ["'name' is not one of", "'size', 'used', 'created'"]),
        (["--limit", "-1"], ["-1"]),
        (["-q", "--json"], ["leave out one"]),
    ],
)
def test_usage(store: Store, arguments: list[str], words: list[str]) -> None:
    """What cannot be meant is an error of usage that names it, and what is possible."""
    done = run("list", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    message = " ".join(done.stderr.split())
    assert all(word in message for word in words), message


def unpacked(cache: Path, name: str, size: int) -> Path:
    """A file of a package that uv unpacked."""
    file = cache / "archive-v0" / name / f"{name}.so"
    file.parent.mkdir(parents=True)
    file.write_bytes(os.urandom(size))
    return file


def test_the_stores_cache_of_uv(store: Store, entries: list[Entry]) -> None:
    """It has a line of its own, as it is now; what environments have of it is told."""
    assert listed()["uv_caches"] == []
    shared = unpacked(store.layout.uv_cache, "torch", 5_000_000)
    os.link(shared, entries[0].site_packages / "torch.so")
    unpacked(store.layout.uv_cache, "numpy", 1_000_000)
    expected = f"uv's cache of the store at {store.layout.uv_cache}: 6.0 MB, 5.0 MB of it in environments too"
    assert said()[-1] == expected
    unpacked(store.layout.uv_cache, "pandas", 9_000_000)
    (one,) = listed()["uv_caches"]
    assert (one["path"], one["own"]) == (str(store.layout.uv_cache), True)
    assert 15_000_000 < one["size_bytes"] < 15_100_000
    assert 5_000_000 <= one["shared_bytes"] < 5_010_000
    run("gc", "--all")
    assert listed()["uv_caches"][0]["size_bytes"] < 100_000


def test_the_users_cache_of_uv(
    store: Store, entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where it is asked for; what a venv elsewhere links to is not counted as ours."""
    cache = tmp_path / "cache of uv"
    monkeypatch.setenv("UV_CACHE_DIR", os.fspath(cache))
    ours, theirs = unpacked(cache, "torch", 5_000_000), unpacked(cache, "numpy", 2_000_000)
    os.link(ours, entries[0].site_packages / "torch.so")
    os.link(ours, entries[1].site_packages / "torch.so")
    os.link(theirs, tmp_path / "numpy.so")
    record_sizes(store.layout, entries[0])
    assert listed()["uv_caches"] == []
    assert said("--uv-cache")[-1] == (f"uv's cache of yours at {cache}: 7.0 MB, 5.0 MB of it in environments too")
