"""The check of a new environment, run by itself: what it answers, and what it leaves."""

from __future__ import annotations

import json
import marshal
import os
import py_compile
import shutil
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from ray_envcache.inside import check
from tests import support

MODULES = 200


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a ray of many modules, larger in all than a pipe holds."""
    package = tmp_path / "site" / "ray"
    package.mkdir(parents=True)
    for number in range(MODULES):
        (package / f"m{number}.py").write_text(f"VALUE = {number}\nTEXT = {'x' * 1000!r}\n")
    (package / "__init__.py").write_text(
        f"""\
import atexit, importlib
__version__ = "1.0"
atexit.register(print, "at the end")
assert sum(importlib.import_module(f"ray.m{{number}}").VALUE for number in range({MODULES})) == {sum(range(MODULES))}
"""
    )
    return package.parent


def run_check(site: Path, before: str = "", twins: Path | None = None) -> tuple[list[object], list[Path]]:
    """What the check answers, and the bytecode that is there afterwards."""
    staged = site.parent / "staged"
    request = {
        "import_ray": True,
        "site": f"{site}",
        "shared": f"{site.parent}/shared",
        "staged": f"{staged}",
        "twins": f"{twins or ''}",
    }
    program = f"""
import runpy, sys
sys.path.insert(0, {str(site)!r})
sys.argv = ["_check.py", {json.dumps(request)!r}]
{before}
runpy.run_path({check.__file__!r}, run_name="__main__")
"""
    command = [sys.executable, "-I", "-B", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={}, timeout=60)
    assert done.stderr == ""
    return json.loads(done.stdout), sorted(site.rglob("*.pyc"))


def test_answer(site: Path) -> None:
    """Versions, prefix and holds, and nothing else: what ray does at an interpreter's end is not waited for."""
    answer, bytecode = run_check(site)
    assert answer == [
        "1.0",
        support.run_python("import platform; print(platform.python_version())").strip(),
        sys.prefix,
        0,
    ]
    assert len(bytecode) == MODULES + 1


def test_twins(site: Path) -> None:
    """What the cluster's Python made of the same text is taken; what is cut off there is compiled, and the rest kept."""
    twins = site.parent / "twins"
    shutil.copytree(site, twins)
    for source in twins.rglob("m*.py"):
        text = source.read_text()
        source.write_text(text.replace("TEXT", "TWIN"))  # as long, and seen in its bytecode
        os.utime(source, (1e9, 1e9))
        py_compile.compile(str(source), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
        source.write_text(text)
        os.utime(source, (1e9, 1e9))
    for name in ("m0", "m7", f"m{MODULES - 1}"):
        cached = Path(cache_from_source(str(twins / "ray" / f"{name}.py")))
        cached.write_bytes(cached.read_bytes()[:-5])
    answer, bytecode = run_check(site, twins=twins)
    assert answer[0] == "1.0"
    assert len(bytecode) == MODULES + 1
    contents = [path.read_bytes() for path in bytecode]
    assert all(marshal.loads(content[16:]) for content in contents), "whole"
    assert sum(b"TWIN" in content for content in contents) == MODULES - 3


def test_helper_that_dies(site: Path) -> None:
    """Whatever kills the one who puts bytecode down, at once or in the middle: the answer is the same."""
    fork = "import os; fork = os.fork; os.fork = lambda: fork() or os.kill(os.getpid(), 9)"
    answer, bytecode = run_check(site, fork)
    assert answer[0] == "1.0"
    assert bytecode == []
    link = "import os; link, made = os.link, []; os.link = lambda *names: made.append(link(*names)) or made[9:] and os.kill(os.getpid(), 9)"
    answer, bytecode = run_check(site, link)
    assert answer[0] == "1.0"
    assert 0 < len(bytecode) < MODULES


def test_disk_without_room(site: Path) -> None:
    """Where bytecode cannot be put down there is none, and the answer is the same."""
    answer, bytecode = run_check(site, "import os; os.replace = lambda *_: os.stat('/no/such/file')")
    assert answer[0] == "1.0"
    assert bytecode == []
    assert os.listdir(site.parent / "staged") != []
    assert list((site.parent / "staged").rglob("*.pyc*")) == []
