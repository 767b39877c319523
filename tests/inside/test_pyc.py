"""Bytecode of one module: right for its text, never checked again, and none where there can be none."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from ray_envcache.inside import pyc


@pytest.fixture
def places(tmp_path: Path) -> pyc.Places:
    return pyc.Places(str(tmp_path / "shared"), str(tmp_path / "staged"))


def make(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def says(module: Path) -> str:
    """What Python takes a module for, and where its traceback points."""
    program = "import module; print(module.VALUE, module.__spec__.loader.get_code('module').co_filename)"
    command = [sys.executable, "-S", "-B", "-c", program]
    return subprocess.run(command, cwd=module.parent, env={}, capture_output=True, text=True, check=True).stdout


def test_two_modules_of_one_text(tmp_path: Path, places: pyc.Places) -> None:
    """They have one file, which Python takes for each at once, with tracebacks that name the module itself."""
    modules = [make(tmp_path / name / "module.py", "VALUE = 1\n") for name in "ab"]
    for module in modules:
        pyc.give(str(module), places)
    cached = [Path(cache_from_source(str(module))) for module in modules]
    assert cached[0].samefile(cached[1])
    assert [path.name for path in Path(places.staged).iterdir()] == [pyc.name_of(b"VALUE = 1\n")]
    for module in modules:
        assert says(module).split() == ["1", str(module)]


def test_bytecode_is_not_checked(tmp_path: Path, places: pyc.Places) -> None:
    """An import believes the bytecode without a look at the source: the environment never changes."""
    module = make(tmp_path / "a" / "module.py", "VALUE = 1\n")
    pyc.give(str(module), places)
    module.write_text("VALUE = 'changed'\n")
    assert says(module).startswith("1 ")


def test_text_that_does_not_compile(tmp_path: Path, places: pyc.Places) -> None:
    """A template, or a test of broken syntax, gets no bytecode, and no rubbish stays."""
    broken = make(tmp_path / "a" / "broken.py", "def (:\n")
    pyc.give(str(broken), places)
    assert not Path(cache_from_source(str(broken))).exists()
    assert not Path(places.staged).exists()


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user in a child")
def test_same_pid_again(tmp_path: Path) -> None:
    """What a killed compiler with our pid left behind is in nobody's way: in a container the same pid comes again."""
    (tmp_path / "staged").mkdir()
    tmp_path.chmod(0o755)
    program = """if True:
        import os, sys
        from ray_envcache.inside import pyc
        os.chown(sys.argv[1], 65534, 65534)
        os.chdir(sys.argv[1])
        os.setgid(65534); os.setuid(65534)
        left = os.open(f"whole.pyc.{os.getpid()}", os.O_WRONLY | os.O_CREAT, 0o444)
        os.close(left)
        pyc._write_whole("whole.pyc", b"whole")
        print(open("whole.pyc").read())
    """
    command = [sys.executable, "-c", program, str(tmp_path / "staged")]
    assert subprocess.check_output(command, text=True) == "whole\n"


def test_failure_is_told_by_its_number(tmp_path: Path, places: pyc.Places) -> None:
    """Run as a program it says on stdout which error of the system stopped it, for its caller to raise again."""
    make(tmp_path / "a" / "module.py", "VALUE = 1\n")
    (tmp_path / "staged").touch()
    asked = {
        "top": f"{tmp_path}/a",
        "shared": places.shared,
        "staged": places.staged,
        "workers": 1,
        "background": False,
    }
    command = [sys.executable, "-I", "-S", pyc.__file__, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, str(errno.ENOTDIR))
    assert "Not a directory" in done.stderr
