"""Manifests that no publisher of ours has written: whatever they say, a host builds, and says so once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import support
from tests.remote.hosts import Host

pytestmark = pytest.mark.host


def _replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text, text
        return text.replace(old, new)

    return change


def _sizes(new: str) -> Callable[[str], str]:
    return lambda text: re.sub(r"size = \d+", f"size = {new}", text)


def _again(text: str) -> str:
    first = text.index("[[packages]]")
    second = text.index("[[packages]]", first + 1)
    return text[:second] + text[first:second] + text[second:]


HOSTILE: dict[str, Callable[[str], str]] = {
    "nested": lambda text: "a = " + "[" * 100_000 + "\n" + text,
    "nested-tables": lambda text: "a = " + "{a=" * 50_000 + "\n" + text,
    "name-list": _replaced('name = "one"\nversion', "name = [1]\nversion"),
    "name-table": _replaced('name = "one"\nversion', "name = {a = 1}\nversion"),
    "version-list": _replaced('version = "1.0"', "version = [1]"),
    "size-huge": _sizes("1000000000000000"),
    "size-2**70": _sizes(str(2**70)),
    "size-negative": _sizes("-5"),
    "size-float": _sizes("1.5"),
    "size-nan": _sizes("nan"),
    "size-text": _sizes('"5"'),
    "size-0": _sizes("0"),
    "up": _replaced('path = "../wheels', 'path = "../../../../../wheels'),
    "absolute": _replaced('path = "../wheels', 'path = "/wheels'),
    "path-other-quotes": lambda text: text.replace('path = "../', "path = '../").replace('.whl"', ".whl'"),
    "https": _replaced('path = "../wheels', 'url = "https://127.0.0.1:9/wheels'),
    "no-packages": lambda text: text.replace("[[packages]]", "[[others]]"),
    "again": _again,
    "packs-text": lambda text: text.replace("packs = [", 'packs = "x"\nother = ['),
    "other-wheel-tag": _replaced("py3-none-any", "cp39-cp39-win32"),
    "bad-wheel-name": _replaced("one-1.0-py3-none-any.whl", "one.whl"),
    "wheel-of-another": _replaced("one-1.0-py3-none-any.whl", "two-1.0-py3-none-any.whl"),
    "lock-version": _replaced('lock-version = "1.0"', 'lock-version = "9.0"'),
    "lock-version-text": _replaced('lock-version = "1.0"', 'lock-version = "x"'),
    "requires": lambda text: 'requires-python = ">=4"\n' + text,
    "environments": lambda text: "environments = [\"sys_platform == 'win32'\"]\n" + text,
    "sha": _replaced('sha256 = "', 'sha256 = "zz'),
    "pack-up": lambda text: text.replace('{ sha256 = "', '{ sha256 = "../../../'),
    "html": lambda text: "<html>" + text,
    "binary": lambda text: "\udcff" + text,
    "marker": _replaced('version = "1.0"', 'version = "1.0"\nmarker = "python_version < \'3\'"'),
    "empty": lambda text: text[:0],
    "surrogate-name": _replaced('name = "one"\nversion', 'name = "one\\u0000"\nversion'),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile(how: str, tmp_path: Path, wheels: Path) -> None:
    """A list that says anything else is not used, or only for the packages in it that are wanted."""
    support.make_wheel(wheels, "one")
    project = support.make_project(tmp_path / "app", wheels, ["ray", "one"])
    bucket = tmp_path / "bucket"
    Host(tmp_path / "first").push(project, f"file://{bucket}")
    (manifest,) = bucket.glob("v1/*/pylock.toml")
    manifest.write_bytes(HOSTILE[how](manifest.read_text()).encode(errors="surrogateescape"))
    second = Host(tmp_path / "second", f"file://{bucket}")
    with second.acquired(project) as lease:
        (event,) = second.events("fetch")
        assert lease.how == ("built" if event.text("result") == "failed" else "fetched")
        support.run_python("import ray, one", python=lease.python)
        assert second.state_of(lease) == "sound"
