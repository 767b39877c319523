"""Atomic writes, and removal that touches nothing but the tree it is told to remove."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import stat
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from ray_envcache.system import files
from tests import support


def test_write_then_read(tmp_path: Path) -> None:
    """What was written is read back, and nothing else lies beside it."""
    for durable in (True, False):
        files.write_json(tmp_path / "a.json", {"b": [1, "é\ud800"], "durable": durable}, durable=durable)
        assert files.read_json(tmp_path / "a.json") == {"b": [1, "é\ud800"], "durable": durable}
    assert os.listdir(tmp_path) == ["a.json"]


def test_write_survives_sigkill(tmp_path: Path) -> None:
    """Readers see a whole old or a whole new file, whenever the writer is killed; generations never go back."""
    seen = support.run_python(
        """
        import os, random, signal, sys, time
        from pathlib import Path
        from ray_envcache.system import files

        path, seen, last = Path(sys.argv[1]), set(), -1
        files.write_json(path, {"generation": 0, "text": ""})

        def write_for_ever(start):
            for generation in range(start, start + 10**6):
                files.write_json(path, {"generation": generation, "text": "x" * (generation % 50 * 2000)}, durable=generation % 2)

        for _ in range(150):
            data = files.read_json(path)
            assert len(data["text"]) == data["generation"] % 50 * 2000 and data["generation"] >= last, data["generation"]
            last = data["generation"]
            seen.add(last)
            writer = os.fork()
            if not writer:
                write_for_ever(last + 1)
            until = time.monotonic() + random.uniform(0.001, 0.015)
            try:
                while time.monotonic() < until:
                    # A reader beside the writer.
                    assert files.read_json(path)["generation"] >= last
            finally:
                os.kill(writer, signal.SIGKILL)
                os.waitpid(writer, 0)
        print(len(seen))
        """,
        str(tmp_path / "a.json"),
    )
    # The killing was not idle: most writers got somewhere before they died.
    assert int(seen) > 30


def _fail(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace", "os.fchmod"])
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """On a full disk the old file stays, and no temporary one does."""
    path = tmp_path / "a.json"
    files.write_json(path, {"old": True})
    with monkeypatch.context() as patch:
        patch.setattr(where, _fail)
        with pytest.raises(OSError, match="No space"):
            files.write_json(path, {"new": True})
    assert files.read_json(path) == {"old": True}
    assert list(tmp_path.iterdir()) == [path]


def test_write_error_of_the_system(tmp_path: Path) -> None:
    """Where the system takes only a part of the data, the old file stays and no temporary one does."""
    support.run_python(
        """
        import os, resource, signal, sys
        from pathlib import Path
        from ray_envcache.system import files

        path = Path(sys.argv[1])
        files.write_json(path, {"old": True})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            files.write_json(path, {"new": "x" * 5000})
        except OSError:
            assert files.read_json(path) == {"old": True} and os.listdir(path.parent) == [path.name]
        else:
            raise AssertionError("written beyond the limit")
        """,
        str(tmp_path / "a.json"),
    )


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Calls of sync(2)."""
    calls: list[str] = []
    monkeypatch.setattr(os, "sync", lambda: calls.append("sync"))
    return calls


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="macOS has no syncfs")
def test_only_our_file_system_is_synced(tmp_path: Path, synced: list[str]) -> None:
    """Other disks may be slow, or gone: nobody waits for them."""
    (tmp_path / "file").write_text("x")
    files.sync_file_system(tmp_path)
    assert synced == []
    with pytest.raises(NotADirectoryError):
        files.sync_file_system(tmp_path / "file")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.ENOSYS])
def test_failed_sync(tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """What did not get to the disk is told; where the kernel has no syncfs, everything is synced."""

    def syncfs(_descriptor: int) -> int:
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(syncfs=syncfs))
    if number == errno.ENOSYS:
        files.sync_file_system(tmp_path)
        assert synced == ["sync"]
    else:
        with pytest.raises(OSError, match=re.escape(os.strerror(number))) as caught:
            files.sync_file_system(tmp_path)
        assert (caught.value.errno, caught.value.filename, synced) == (number, str(tmp_path), [])


def test_sync_without_syncfs(tmp_path: Path, synced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A system, or a Python, without it syncs everything."""
    for broken in (lambda *_, **__: SimpleNamespace(), _fail):
        monkeypatch.setattr(ctypes, "CDLL", broken)
        files.sync_file_system(tmp_path)
    assert synced == ["sync"] * 2


@pytest.mark.parametrize("replace", [True, False])
def test_sweep_in_between(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, replace: bool) -> None:
    """A sweep that removes the temporary file before its writer has the flock costs one more try."""
    swept: list[str] = []

    def sweep(*_: object) -> None:
        if not swept:
            swept.extend(os.listdir(tmp_path))
            (tmp_path / swept[0]).unlink()

    monkeypatch.setattr(fcntl, "flock", sweep)
    files.write_whole(tmp_path / "a", b"text", mode=0o600, replace=replace)
    assert (tmp_path / "a").read_bytes() == b"text"
    assert os.listdir(tmp_path) == ["a"]
    assert len(swept) == 1


def test_unserializable(tmp_path: Path) -> None:
    """Data that is no JSON leaves nothing behind."""
    with pytest.raises(TypeError):
        files.write_json(tmp_path / "a.json", {"a": object()})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"[1]", b"null", b"1", b'"x"', b"\xff\xfe", b"\0" * 4096])
def test_read_what_is_no_object(tmp_path: Path, content: bytes) -> None:
    """A truncated or foreign file reads as none."""
    path = tmp_path / "a.json"
    path.write_bytes(content)
    assert files.read_json(path) is None


def test_read_what_is_not_there(tmp_path: Path) -> None:
    """No file, no folder, or a file in place of the folder reads as none."""
    (tmp_path / "file").touch()
    for path in ("a.json", "no/a.json", "file/a.json"):
        assert files.read_json(tmp_path / path) is None


def test_read_passes_on_other_trouble(tmp_path: Path) -> None:
    """Other trouble is not taken for an absent file, and says which file."""
    with pytest.raises(IsADirectoryError) as caught:
        files.read_json(tmp_path)
    assert caught.value.filename == str(tmp_path)


@pytest.fixture
def trash(tmp_path: Path) -> Path:
    path = tmp_path / "trash"
    path.mkdir()
    return path


def _tree(top: Path) -> Path:
    (top / "a" / "b").mkdir(parents=True)
    for file in ("x", "a/y", "a/b/z"):
        (top / file).write_text(file)
    return top


def test_discard(tmp_path: Path, trash: Path) -> None:
    """A discarded tree is gone, and the trash is empty again."""
    files.discard(_tree(tmp_path / "top"), trash)
    assert list(tmp_path.rglob("*")) == [trash]


def test_discard_frozen(tmp_path: Path, trash: Path) -> None:
    """A tree with frozen directories is discarded by an ordinary user too."""
    frozen = _tree(tmp_path / "top") / "a"
    trash.chmod(0o700)
    files.freeze(frozen)
    program = """
        import os, sys
        from pathlib import Path
        from ray_envcache.system import files
        # Root may do everything: as nobody. Relative paths, since nobody may not look into our temporary directory.
        if os.getuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            os.unlink("top/a/y")
        except PermissionError:
            files.discard(Path("top"), Path("trash"))
        else:
            raise AssertionError("not frozen")
    """
    if os.getuid() == 0:
        for path in [tmp_path, *tmp_path.rglob("*")]:
            os.chown(path, 65534, 65534)
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, check=True)
    assert list(tmp_path.rglob("*")) == [trash]


def test_discard_never_follows_links(tmp_path: Path, trash: Path) -> None:
    """Links in a discarded tree go; what they lead to stays, with its mode."""
    outside = _tree(tmp_path / "outside")
    (outside / "a").chmod(0o555)
    top = _tree(tmp_path / "top")
    (top / "directory").symlink_to(outside)
    (top / "a" / "deeper").symlink_to(outside / "a")
    (top / "file").symlink_to(outside / "x")
    (top / "dangling").symlink_to("nowhere")
    (top / "circle").symlink_to(top)
    files.discard(top, trash)
    assert not top.exists()
    assert not list(trash.iterdir())
    assert (outside / "a" / "b" / "z").read_text() == "a/b/z"
    assert (outside / "x").read_text() == "x"
    assert stat.S_IMODE((outside / "a").stat().st_mode) == 0o555


def test_discard_a_link(tmp_path: Path, trash: Path) -> None:
    """A link in place of the tree goes; the tree it leads to stays."""
    outside = _tree(tmp_path / "outside")
    (tmp_path / "link").symlink_to(outside)
    files.discard(tmp_path / "link", trash)
    assert not (tmp_path / "link").is_symlink()
    assert (outside / "a" / "b" / "z").exists()


def test_discard_a_file(tmp_path: Path, trash: Path) -> None:
    """A file is discarded like a tree."""
    (tmp_path / "file").touch()
    files.discard(tmp_path / "file", trash)
    assert list(tmp_path.rglob("*")) == [trash]


def test_discard_nothing(tmp_path: Path, trash: Path) -> None:
    """Nothing to discard is no error."""
    files.discard(tmp_path / "missing", trash)
    files.discard(tmp_path / "missing" / "deeper", trash)


def test_discard_without_trash(tmp_path: Path) -> None:
    """A missing trash is an error, not a tree that silently stays."""
    top = _tree(tmp_path / "top")
    with pytest.raises(FileNotFoundError):
        files.discard(top, tmp_path / "no-trash")
    assert (top / "a" / "b" / "z").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_discard_on_a_full_disk(tmp_path: Path, trash: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Without room even for a name in the trash, the tree is deleted where it is."""

    def rename(*_: Any) -> NoReturn:
        raise OSError(number, os.strerror(number))

    top = _tree(tmp_path / "top")
    monkeypatch.setattr(Path, "rename", rename)
    files.discard(top, trash)
    assert list(tmp_path.rglob("*")) == [trash]


def test_trash_names_are_unique(tmp_path: Path, trash: Path) -> None:
    """Two trees of one name lie in the trash side by side."""
    for _ in range(2):
        files.to_trash(_tree(tmp_path / "top"), trash)
    assert len(list(trash.iterdir())) == 2


def test_freeze_leaves_files_alone(tmp_path: Path) -> None:
    """Freezing changes no file's mode, which belongs to all its hard links."""
    top, cached = _tree(tmp_path / "top"), tmp_path / "cached"
    cached.write_text("shared")
    cached.chmod(0o464)
    (top / "a" / "linked").hardlink_to(cached)
    directories = [top, top / "a", top / "a" / "b"]
    plain = [path for path in top.rglob("*") if path.is_file()]
    before = [path.stat().st_mode for path in [*plain, cached]]
    files.freeze(top)
    assert [path.stat().st_mode for path in [*plain, cached]] == before
    assert not [path for path in directories if path.stat().st_mode & 0o222]


def test_freeze_leaves_links_alone(tmp_path: Path) -> None:
    """Freezing stops at links to directories."""
    outside, top = _tree(tmp_path / "outside"), _tree(tmp_path / "top")
    (top / "link").symlink_to(outside)
    (outside / "a" / "b").chmod(0o555)
    before = [path.stat().st_mode for path in (outside, outside / "a", outside / "a" / "b")]
    files.freeze(top)
    assert [path.stat().st_mode for path in (outside, outside / "a", outside / "a" / "b")] == before
