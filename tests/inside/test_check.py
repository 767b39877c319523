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

from ray_envcache.inside import check, pyc
from tests import support

MODULES = 200


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a ray of many modules."""
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
sys.argv = ["check.py", {json.dumps(request)!r}]
{before}
runpy.run_path({check.__file__!r}, run_name="__main__")
"""
    command = [sys.executable, "-I", "-B", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={}, timeout=60)
    assert done.stderr == ""
    return json.loads(done.stdout.rpartition("\n\n")[2]), sorted(site.rglob("*.pyc"))


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


def test_bytecode_of_this_python(site: Path) -> None:
    """What our own Python has compiled of the same text is taken, unless a full disk has cut it off."""
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
    os.utime(twins / "ray" / "m9.py", (2e9, 2e9))  # bytecode that Python itself would not believe
    answer, bytecode = run_check(site, twins=twins)
    assert answer[0] == "1.0"
    contents = [path.read_bytes() for path in bytecode]
    assert len(contents) == MODULES + 1
    assert all(marshal.loads(content[16:]) for content in contents), "whole"
    assert sum(b"TWIN" in content for content in contents) == MODULES - 4


def test_bytecode_of_earlier_environments(site: Path) -> None:
    """What the store has of the same text is linked and used; only the rest is compiled."""
    run_check(site)
    staged = next((site.parent / "staged").iterdir())
    (shared := site.parent / "shared").mkdir()
    known = staged.rename(shared / staged.name)
    for path in site.rglob("*.pyc"):
        path.unlink()
    (site / "ray" / "m7.py").write_text("VALUE = 7\n")
    text = (site / "ray" / "m9.py").read_bytes()
    (site / "ray" / "m9.py").write_bytes(text + b"raise SystemError('not read')\n")
    marked = known / pyc.name_of((site / "ray" / "m9.py").read_bytes())
    marked.hardlink_to(known / pyc.name_of(text))
    answer, bytecode = run_check(site)
    assert answer[0] == "1.0"
    assert len(bytecode) == MODULES + 1
    assert {path.name.split(".")[0] for path in bytecode if path.stat().st_nlink == 2} >= {"m1", "m7"}
    assert [path.name for path in staged.iterdir()] == [pyc.name_of(b"VALUE = 7\n")]


def test_disk_without_room(site: Path) -> None:
    """Where bytecode cannot be put down there is none, and the answer is the same."""
    answer, bytecode = run_check(site, "import os; os.replace = lambda *_: os.stat('/no/such/file')")
    assert answer[0] == "1.0"
    assert bytecode == []
    assert os.listdir(site.parent / "staged") != []
    assert list((site.parent / "staged").rglob("*.pyc*")) == []
