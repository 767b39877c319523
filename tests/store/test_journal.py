"""The journal: whole lines, bounded files, counters that never go back, and never in the way."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envcache.store import journal
from ray_envcache.store.layout import Layout
from ray_envcache.system import files, testpoints
from tests import support
from tests.gc.fabricated import make_layout

WRITER = """
import sys
from pathlib import Path
from ray_envcache.store import journal
from ray_envcache.store.layout import Layout

journal.FILE_BYTES = int(sys.argv[2])
for number in range(int(sys.argv[3])):
    journal.note(Layout(Path(sys.argv[1])), "test", result="ok", seconds=1, text="x" * (number % 50))
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return make_layout(tmp_path / "store")


def names(layout: Layout) -> list[str]:
    return sorted(name for name in files.names_in(layout.top) if name.startswith("journal"))


def count(layout: Layout) -> float:
    return journal.read(layout).totals.get("test ok count", 0)


def writer(layout: Layout, size: int, lines: int, **environ: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, os.fspath(layout.root), str(size), str(lines)]
    return subprocess.Popen(command, env={**os.environ, **environ}, text=True)


def write_raw(layout: Layout, data: bytes) -> None:
    with layout.journal.open("ab") as file:
        file.write(data)


def test_what_was_noted_is_read(layout: Layout) -> None:
    """An event comes back with its time and fields, and only its owner may read the file."""
    journal.note(layout, "setup", result="found", key="a", seconds=0.5, cluster=None)
    journal.note(layout, "setup", result="found", seconds=1)
    first, _ = journal.read(layout).events
    assert (first.name, first.text("key"), first.number("seconds"), first.text("cluster")) == ("setup", "a", 0.5, "")
    assert journal.read(layout).totals == {
        "setup count": 2, "setup seconds": 1.5, "setup found count": 2, "setup found seconds": 1.5,
    }  # fmt: skip
    assert stat.S_IMODE(layout.journal.stat().st_mode) == 0o600


def test_files_are_bounded_and_counters_go_on(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much is noted there are two files of bounded size, and each count is one more than the last."""
    monkeypatch.setattr(journal, "FILE_BYTES", 2000)
    for number in range(300):
        journal.note(layout, "test", result="ok", text="x" * 40)
        assert count(layout) == number + 1
    assert names(layout) == ["journal.1.jsonl", "journal.jsonl"]
    assert all((layout.top / name).stat().st_size < 2500 for name in names(layout))
    assert len(journal.read(layout).events) < 60
    assert journal.read(layout).passed_over == 0


def test_several_processes_rotate_at_once(layout: Layout, children: list[subprocess.Popen[str]]) -> None:
    """Lines of many processes are whole; no line counts twice, and the counter never goes back meanwhile."""
    children += [writer(layout, 40_000, 1000) for _ in range(6)]
    seen = [0.0]
    while any(child.poll() is None for child in children):
        seen.append(count(layout))
    assert [child.returncode for child in children] == [0] * 6
    assert seen == sorted(seen)
    found = journal.read(layout)
    assert found.passed_over == 0
    # A process that was stopped before a write for as long as others filled two files loses that line.
    assert 5990 <= count(layout) <= 6000
    assert names(layout) == ["journal.1.jsonl", "journal.jsonl"]


def test_killed_between_two_files(layout: Layout, tmp_path: Path, children: list[subprocess.Popen[str]]) -> None:
    """A process killed before it renames the full file takes no count with it, and others go on at once."""
    folder = tmp_path / "points"
    folder.mkdir()
    for killed in (1, 2, 3):
        (folder / "stop-journal-full").touch()
        (folder / "reached-journal-full").unlink(missing_ok=True)
        child = writer(layout, 2000, 10_000, **{testpoints.FOLDER: str(folder)})
        children.append(child)
        support.wait_until((folder / "reached-journal-full").exists, "the next file")
        before = count(layout)
        (other := writer(layout, 2000, 50)).wait()
        assert (other.returncode, count(layout)) == (0, before + 50)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert count(layout) == before + 50, killed
    before = count(layout)
    writer(layout, 2000, 100).wait()
    assert count(layout) == before + 100
    assert all((layout.top / name).stat().st_size < 2500 for name in names(layout))


def test_a_line_that_comes_late_counts(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that had the file open when it was renamed may write there: counters have its line too."""
    monkeypatch.setattr(journal, "FILE_BYTES", 2000)
    journal.note(layout, "test", result="ok")
    line = layout.journal.read_bytes()
    with layout.journal.open("ab") as late:
        while not layout.older_journal.exists():
            journal.note(layout, "test", result="ok")
        before = count(layout)
        late.write(line)
    for number in range(1, 100):
        journal.note(layout, "test", result="ok")
        assert count(layout) == before + 1 + number


def test_a_line_that_was_cut_off_takes_no_other_with_it(layout: Layout) -> None:
    """Where a full disk cut a line, the next one is whole; the torn one is passed over and counted."""
    write_raw(layout, b'{"v":1,"at":"2026-01-01T00:00:00Z","event":"test","resu')
    journal.note(layout, "test", result="ok")
    assert (count(layout), journal.read(layout).passed_over) == (1, 1)


def test_lines_that_cannot_be_understood_are_counted(layout: Layout) -> None:
    """Broken lines, and those of a newer version, are passed over; unknown fields and numbers that are none do no harm."""
    for line in (
        b"\xff\xfe", b"[]", b"17", b'{"v":1}', b'{"v":1,"at":1,"event":"test"}', b"[" * 100_000, b'{"v":"1","event":2}',
    ):  # fmt: skip
        write_raw(layout, line + b"\n")
    write_raw(layout, b'\n\n{"v":2,"at":"soon","event":"test"}\n')
    for seconds in (b"NaN", b"-1", b"1e999", b'"1"', b"true", b"1" + b"0" * 400):
        line = b'{"v":1,"at":"2026-01-01T00:00:00Z","event":"test","result":"ok","more":[],"seconds":%s}\n'
        write_raw(layout, line % seconds)
    found = journal.read(layout)
    assert found.passed_over == 8
    assert found.totals == {"test count": 6, "test ok count": 6}


@given(st.binary(max_size=300))
def test_any_bytes_can_be_read(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Whatever is in the files, reading it raises nothing."""
    layout = Layout(tmp_path_factory.mktemp("store"))
    layout.top.mkdir()
    layout.older_journal.write_bytes(data)
    layout.journal.write_bytes(b'{"v":1,"at":"","event":"totals","a count":' + data + b"}")
    assert journal.read(layout).passed_over >= 0


@pytest.mark.parametrize("text", ["x" * 100_000, "\N{PILE OF POO}" * 5000, "\udcff\0\n" * 3000])
def test_long_lines_are_shortened(layout: Layout, text: str) -> None:
    """A line is never longer than what one write appends whole, and keeps its numbers."""
    journal.note(layout, "test", result="ok", **dict.fromkeys("abcdefgh", text), seconds=3)
    (line,) = layout.journal.read_bytes().splitlines()
    assert len(line) < journal.LINE_BYTES
    assert json.loads(line)["seconds"] == 3
    assert (count(layout), journal.read(layout).totals["test ok seconds"]) == (1, 3)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_what_cannot_be_written_is_dropped(layout: Layout, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """On a disk that takes nothing a line is lost, and nothing fails; later ones are written again."""

    def fail(*_: object, **__: object) -> int:
        raise OSError(number, os.strerror(number))

    for function in ("open", "write"):
        with monkeypatch.context() as patch:
            patch.setattr(os, function, fail)
            journal.note(layout, "test", result="ok")
    assert count(layout) == 0
    journal.note(layout, "test", result="ok")
    assert count(layout) == 1


def test_no_room_for_the_totals(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full file whose totals the disk cuts off stays, does not grow by events, and no count is lost."""
    monkeypatch.setattr(journal, "FILE_BYTES", 500)
    write = os.write

    def cut_off(descriptor: int, data: bytes) -> int:
        return write(descriptor, data[:10] if b"totals" in data else data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", cut_off)
        for _ in range(20):
            journal.note(layout, "test", result="ok")
    assert names(layout) == ["journal.jsonl"]
    assert layout.journal.stat().st_size < 1000
    before = count(layout)
    journal.note(layout, "test", result="ok")
    assert names(layout) == ["journal.1.jsonl", "journal.jsonl"]
    assert count(layout) == before + 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a store of another user, and mount one")
def test_stores_that_are_not_ours(layout: Layout, tmp_path: Path) -> None:
    """Root leaves nothing in a user's store, and a disk that is full, or mounted read-only, drops lines."""
    os.chown(layout.top, 12345, 12345)
    journal.note(layout, "test", result="ok")
    assert not layout.journal.exists()
    with support.small_disk(tmp_path / "disk", "1m") as disk:
        full = make_layout(disk / "store")
        with pytest.raises(OSError, match="No space"):
            (disk / "fill").write_bytes(b"x" * 2_000_000)
        for _ in range(50):
            journal.note(full, "test", result="ok", text="x" * 3000)
        (disk / "fill").unlink()
        before = count(full)
        journal.note(full, "test", result="ok")
        assert count(full) == before + 1
        support.run("mount", "-o", "remount,ro", str(disk))
        journal.note(full, "test", result="ok")
        assert count(full) == before + 1


def test_a_readonly_store_gets_no_line(layout: Layout) -> None:
    """A store that is only read gets none, though we could write it."""
    journal.note(Layout(layout.root, readonly=True), "test", result="ok")
    assert not layout.journal.exists()


def test_removed(layout: Layout) -> None:
    """After `remove` nothing is left, and the next line begins anew."""
    journal.remove(layout)
    journal.note(layout, "test", result="ok")
    journal.remove(layout)
    assert names(layout) == []
    assert journal.read(layout) == journal.Journal([], {}, 0)
    journal.note(layout, "test", result="ok")
    assert count(layout) == 1
