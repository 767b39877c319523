"""The seal: what it takes from RECORDs, hostile ones too, and what it asks of the files themselves."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

from ray_envcache.store.layout import Entry, Layout
from ray_envcache.survey import verification
from ray_envcache.survey.verification import Listed

SITE = "lib/python3.12/site-packages"
RECORD = f"{SITE}/one-1.0.dist-info/RECORD"
DIGEST = "sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"  # of nothing
OTHER = "sha256=LPJNul-wow4m6DsqxbninhsWHlwfp0JecwQzYpOLmCQ"  # of "hello"


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """An entry with a package of one module, and nothing else."""
    entry = Layout(tmp_path).first_entry("0123456789abcdef" * 2)
    (entry.venv / SITE / "one-1.0.dist-info").mkdir(parents=True)
    (entry.venv / SITE / "one.py").touch(mode=0o644)
    write_record(entry, f"one.py,{DIGEST},0\none-1.0.dist-info/RECORD,,\n")
    return entry


def write_record(entry: Entry, text: str | bytes) -> None:
    (entry.venv / RECORD).write_bytes(text.encode() if isinstance(text, str) else text)


def sealed(entry: Entry) -> dict[str, Listed]:
    """What the seal lists, but for the RECORD."""
    verification.seal(entry)
    return {path: one for path, one in verification.listed_in(entry).items() if path != RECORD}


def test_what_a_record_notes(entry: Entry) -> None:
    """A digest of a RECORD counts, whatever the file is by now, and whether it is there at all."""
    write_record(entry, f'one.py,{OTHER}=,5\n"a,b.py",{DIGEST},0\n{"x" * 100}.py,,\n')
    assert sealed(entry) == {
        f"{SITE}/one.py": Listed(OTHER, 5, 0o100644, "one"),
        f"{SITE}/a,b.py": Listed(DIGEST, 0, 0, "one"),
        f"{SITE}/{'x' * 100}.py": Listed("", 0, 0, "one"),
    }


def test_what_is_asked_of_the_files(entry: Entry) -> None:
    """Scripts, some of which we replace, are hashed; so is a file of two packages, or with a note that is none."""
    (entry.venv / "bin").mkdir()
    for path in ("bin/tool", f"{SITE}/two.py", f"{SITE}/many.py", "pyvenv.cfg"):
        (entry.venv / path).write_text("hello")
    write_record(
        entry,
        f"one.py,{OTHER},5\none.py,{OTHER},5\nmany.py,{OTHER},many\n../../../bin/tool,{DIGEST},0\ntwo.py,md5=x,5\n",
    )
    found = sealed(entry)
    assert {path: (one.content, one.package) for path, one in found.items()} == {
        f"{SITE}/one.py": (DIGEST, "one"),
        f"{SITE}/two.py": (OTHER, "one"),
        f"{SITE}/many.py": (OTHER, "one"),
        "bin/tool": (OTHER, "one"),
        "pyvenv.cfg": (OTHER, ""),
    }


def test_links_and_bytecode(entry: Entry) -> None:
    """Links are listed with where they lead, bytecode, pipes and folders are not; names may be any bytes."""
    os.symlink(b"odd, \xff\n", entry.venv / "lib64")
    (entry.venv / SITE / "__pycache__").mkdir()
    (entry.venv / SITE / "__pycache__" / "one.cpython-312.pyc").touch()
    os.mkfifo(entry.venv / "pipe")
    (entry.venv / os.fsdecode(b'\xfe\r\n,"')).touch(mode=0o600)
    write_record(entry, f"one.py,{DIGEST},0\n__pycache__/one.cpython-312.pyc,,\n")
    mode = os.lstat(entry.venv / "lib64").st_mode
    assert sealed(entry) == {
        f"{SITE}/one.py": Listed(DIGEST, 0, 0o100644, "one"),
        "lib64": Listed("link=odd, \udcff\n", 7, mode, ""),
        '\udcfe\r\n,"': Listed(DIGEST, 0, 0o100600, ""),
    }


def test_written_once(entry: Entry) -> None:
    """A compiler that was killed and starts again takes nothing for right that came after the first one."""
    before = sealed(entry)
    (entry.venv / "later").touch()
    assert sealed(entry) == before


@pytest.mark.parametrize(
    "text",
    [
        f"/etc/passwd,{OTHER},0\n",
        f"../../../../../../etc/passwd,{OTHER},0\n",
        f"a/../../../../..,{OTHER},0\n",
        "no row at all\n",
        f"one.py,{OTHER}\n",
        b"\xff\xfe,,,,\n",
        '"never ended',
        f"{'x' * 200_000},{OTHER},0\n",
    ],
)
def test_hostile_record(entry: Entry, text: str | bytes) -> None:
    """Of a RECORD that is none the files are hashed; what it names elsewhere is nothing to us."""
    write_record(entry, text)
    assert sealed(entry)[f"{SITE}/one.py"].content == DIGEST
    assert not [path for path in sealed(entry) if "passwd" in path or "x" * 9 in path]


def test_record_behind_a_link(entry: Entry, tmp_path: Path) -> None:
    """A RECORD that is a link, or lies behind one, is not that of a package of this entry."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "RECORD").write_text(f"one.py,{OTHER},0\nmore.py,{OTHER},0\n")
    (entry.venv / SITE / "two-1.0.dist-info").symlink_to(tmp_path / "elsewhere")
    (entry.venv / SITE / "three-1.0.dist-info").mkdir()
    (entry.venv / SITE / "three-1.0.dist-info" / "RECORD").symlink_to(tmp_path / "elsewhere" / "RECORD")
    found = sealed(entry)
    assert found[f"{SITE}/one.py"].content == DIGEST
    assert f"{SITE}/more.py" not in found


def test_only_regular_files_are_read(entry: Entry, tmp_path: Path) -> None:
    """Neither a link is followed that took the place of a file meanwhile, nor a pipe waited for."""
    path = tmp_path / "file"
    path.touch()
    found = path.lstat()
    path.unlink()
    path.symlink_to(entry.venv / SITE / "one.py")
    with pytest.raises(OSError, match="symbolic links"):
        verification.content_of(path, found)
    path.unlink()
    os.mkfifo(path)
    assert verification.content_of(path, found) == DIGEST


@pytest.mark.parametrize("text", ["{}", "a,b,c\n", "one.py,x,many,0,\n", "one.py,x,0,9,\n", '"', "\0,\n"])
def test_damaged_seal(entry: Entry, text: str) -> None:
    """A seal that is none is an error."""
    entry.sealed.write_text(text)
    with pytest.raises((ValueError, csv.Error)):
        verification.listed_in(entry)


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("a/__pycache__/b.cpython-312.pyc", "a/b.py"),
        ("a/__pycache__/b.cpython-312.opt-1.pyc", "a/b.py"),
        ("a/__pycache__/b.c.cpython-312.pyc", "a/b.c.py"),
        ("a/__pycache__/b.pyc", ""),
        ("a/__pycache__/c/b.cpython-312.pyc", ""),
        ("a/b.cpython-312.pyc", ""),
        ("a/__pycache__/b.py", ""),
    ],
)
def test_places_of_bytecode(path: str, module: str) -> None:
    assert verification.module_of(path) == module
