"""Bytecode of one module: taken from a twin that Python itself would believe, else compiled."""

from __future__ import annotations

import os
import py_compile
import subprocess
import sys
from collections.abc import Callable
from importlib.util import cache_from_source
from pathlib import Path

import pytest

from ray_envcache.build import bytecode
from ray_envcache.inside import pyc

TEXT = b"VALUE = 'compiled here'\n"
OTHER = b"VALUE = 'of the twin..'\n"
assert len(OTHER) == len(TEXT)


@pytest.fixture
def twin(tmp_path: Path) -> Path:
    """A module whose bytecode says that it comes from there, which no compiler would make of its text."""
    path = tmp_path / "twin" / "module.py"
    path.parent.mkdir()
    path.write_bytes(OTHER)
    os.utime(path, (1e9, 1e9))
    py_compile.compile(str(path), doraise=True, invalidation_mode=py_compile.PycInvalidationMode.TIMESTAMP)
    path.write_bytes(TEXT)
    os.utime(path, (1e9, 1e9))
    return path


def value(tmp_path: Path, twin: str) -> str:
    """What a module with TEXT says, once it has bytecode."""
    module = tmp_path / "site" / "module.py"
    for folder in (module.parent / "__pycache__", tmp_path / "staged"):
        folder.mkdir(parents=True, exist_ok=True)
    module.write_bytes(TEXT)
    places = pyc.Places(str(tmp_path / "shared"), str(tmp_path / "staged"))
    pyc.keep(str(module), TEXT, pyc.made(str(module), TEXT, twin), places)
    program = "import module; print(module.VALUE); print(module.__spec__.loader.get_code('module').co_filename)"
    command = [sys.executable, "-S", "-c", program]
    said = subprocess.run(command, cwd=module.parent, env={}, capture_output=True, text=True, check=True).stdout
    found, path = said.splitlines()
    assert os.path.samefile(module.parent / path, module), "tracebacks name the module, not the twin"
    return found


def test_twin_is_taken(tmp_path: Path, twin: Path) -> None:
    """Where Python would believe the bytecode of a module with the same text, so do we."""
    assert value(tmp_path, str(twin)) == "of the twin.."
    (staged,) = (tmp_path / "staged").iterdir()
    assert staged.name == pyc.name_of(TEXT)


def bytecode_of(twin: Path) -> Path:
    return Path(cache_from_source(str(twin)))


def other_text(twin: Path) -> None:
    twin.write_bytes(OTHER)
    os.utime(twin, (1e9, 1e9))


def cut_off(twin: Path) -> None:
    path = bytecode_of(twin)
    path.write_bytes(path.read_bytes()[:-5])


def touched(twin: Path) -> None:
    os.utime(twin, (2e9, 2e9))


def other_python(twin: Path) -> None:
    path = bytecode_of(twin)
    path.write_bytes(b"\0\0\r\n" + path.read_bytes()[4:])


def checked_hash(twin: Path) -> None:
    path = bytecode_of(twin)
    path.write_bytes(path.read_bytes()[:4] + b"\3" + path.read_bytes()[5:])


def no_code(twin: Path) -> None:
    path = bytecode_of(twin)
    path.write_bytes(path.read_bytes()[:16])


def no_bytecode(twin: Path) -> None:
    bytecode_of(twin).unlink()


def gone(twin: Path) -> None:
    twin.unlink()


@pytest.mark.parametrize(
    "spoil", [other_text, cut_off, touched, other_python, checked_hash, no_code, no_bytecode, gone]
)
def test_doubtful_twin_is_not(tmp_path: Path, twin: Path, spoil: Callable[[Path], None]) -> None:
    """Of another text, another Python, another moment, damaged or gone: then it is compiled."""
    spoil(twin)
    assert value(tmp_path, str(twin)) == "compiled here"


def test_without_a_twin(tmp_path: Path) -> None:
    """Compiled from its text; what cannot be compiled has no bytecode, and no rubbish stays."""
    assert value(tmp_path, "") == "compiled here"
    broken, staged = tmp_path / "site" / "broken.py", tmp_path / "staged"
    broken.write_bytes(b"def (:\n")
    bytecode.compile_tree(broken.parent, pyc.Places(str(tmp_path / "shared"), str(staged)), workers=1)
    assert pyc.made(str(broken), b"def (:\n") == b""
    assert not Path(cache_from_source(str(broken))).exists()
    assert [path.name for path in staged.iterdir()] == [pyc.name_of(TEXT)]
