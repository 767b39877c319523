"""What an entry should consist of: RECORDs, hostile ones too, and the seal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ray_envcache.store.layout import Entry, Layout
from ray_envcache.survey import listing
from ray_envcache.survey.listing import Listed

SITE = "lib/python3.12/site-packages"
DIGEST = "sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"  # of nothing


@pytest.fixture
def entry(tmp_path: Path) -> Entry:
    """An entry with a package of one module, and nothing else."""
    entry = Layout(tmp_path).first_entry("0123456789abcdef" * 2)
    (entry.venv / SITE / "one-1.0.dist-info").mkdir(parents=True)
    (entry.venv / SITE / "one.py").touch(mode=0o644)
    write_record(entry, f"one.py,{DIGEST},0\none-1.0.dist-info/RECORD,,\n")
    return entry


def write_record(entry: Entry, text: str | bytes) -> None:
    data = text.encode() if isinstance(text, str) else text
    (entry.venv / SITE / "one-1.0.dist-info" / "RECORD").write_bytes(data)


def recorded(entry: Entry) -> tuple[dict[str, list[Listed]], list[str]]:
    listed, differences = listing.expected_in(entry, listing.tree_of(entry))
    assert {one.kind for one in differences} <= {"record"}
    return listed, [one.detail for one in differences]


def test_rows(entry: Entry) -> None:
    """A row with a hash tells what a file should be; one without tells nothing."""
    assert recorded(entry) == ({f"{SITE}/one.py": [Listed(DIGEST, 0, "one")]}, [])
    write_record(entry, f'"a,b.py",{DIGEST}=,\n../../../bin/x,{DIGEST},3\n')
    listed, wrong = recorded(entry)
    assert listed == {f"{SITE}/a,b.py": [Listed(DIGEST, -1, "one")], "bin/x": [Listed(DIGEST, 3, "one")]}
    assert not wrong


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"/etc/passwd,{DIGEST},0\n", "names no file of the environment: '/etc/passwd"),
        (f"../../../../../../etc/passwd,{DIGEST},0\n", "names no file of the environment"),
        (f"a/../../../../..,{DIGEST},0\n", "names no file of the environment"),
        ("no row at all\n", "names no file of the environment"),
        (f"one.py,{DIGEST},many\n", "invalid literal"),
        (b"\xff\xfe,,\n", "codec can't decode"),
        ('"never ended', "names no file of the environment"),
        (f"{'x' * 200_000},{DIGEST},0\n", "field larger than field limit"),
        (f"one.py,{DIGEST},0\none.py,{DIGEST},1\n", f"has two different lines for {SITE}/one.py"),
    ],
)
def test_hostile_record(entry: Entry, text: str | bytes, reason: str) -> None:
    """A RECORD that is none is named, with the reason; what it names is nothing to us."""
    write_record(entry, text)
    _, (wrong,) = recorded(entry)
    assert reason in wrong


def test_gigantic_record(entry: Entry) -> None:
    """A RECORD that would fill the memory is not read."""
    os.truncate(entry.venv / SITE / "one-1.0.dist-info" / "RECORD", 10**12)
    _, (wrong,) = recorded(entry)
    assert "has 1000000000000 bytes" in wrong


def test_record_behind_a_link(entry: Entry, tmp_path: Path) -> None:
    """A RECORD that is a link, or lies behind one, is not that of a package of this entry."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "RECORD").write_text("../x\n")
    (entry.venv / SITE / "two-1.0.dist-info").symlink_to(tmp_path / "elsewhere")
    (entry.venv / SITE / "three-1.0.dist-info").mkdir()
    (entry.venv / SITE / "three-1.0.dist-info" / "RECORD").symlink_to(tmp_path / "elsewhere" / "RECORD")
    assert recorded(entry)[1] == []


def test_only_regular_files_are_read(entry: Entry, tmp_path: Path) -> None:
    """Neither a link is followed, nor a pipe waited for."""
    (tmp_path / "link").symlink_to(entry.venv / SITE / "one.py")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError, match=r"symbolic links|no regular file"):
            listing.digest_of(tmp_path / name)


def test_seal(entry: Entry) -> None:
    """The seal has what no RECORD has, links too, but no bytecode; of scripts it knows better. It is written once."""
    (entry.venv / "bin").mkdir()
    (entry.venv / "bin" / "tool").touch()
    os.symlink(b"odd, \xff", entry.venv / "lib64")
    (entry.venv / SITE / "__pycache__").mkdir()
    (entry.venv / SITE / "__pycache__" / "one.cpython-312.pyc").touch()
    write_record(entry, f"one.py,{DIGEST},0\n../../../bin/tool,sha256=other,7\n")
    listing.seal(entry)
    listed, wrong = recorded(entry)
    record = f"{SITE}/one-1.0.dist-info/RECORD"
    assert not wrong
    assert listed.keys() == {"bin/tool", f"{SITE}/one.py", record, "lib64"}
    assert listed["bin/tool"] == [Listed(DIGEST, 0)]
    assert listed["lib64"] == [Listed("link=odd, \udcff", -1)]
    (entry.venv / "later").touch()
    listing.seal(entry)
    assert recorded(entry)[0] == listed


def test_damaged_seal(entry: Entry) -> None:
    """A seal that is none is named."""
    entry.sealed.write_text("{}")
    _, (wrong,) = recorded(entry)
    assert wrong.startswith("the entry's own list is damaged")
