"""Bytecode named after the text it was made of: linked where that text is, gone when nobody links to it."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_envcache.inside import pyc
from ray_envcache.inside.pyc import Places, compile_tree
from ray_envcache.store.layout import Layout
from ray_envcache.survey import shared_bytecode
from ray_envcache.system import disk
from tests import support


class Host:
    """A store in which trees of modules stand for entries."""

    def __init__(self, root: Path) -> None:
        self.layout = Layout(root)
        self.shared = self.layout.bytecode / pyc.tag()

    def tree(self, name: str, modules: dict[str, str]) -> Path:
        for path, text in modules.items():
            file = self.layout.entries / name / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return self.layout.entries / name

    def compile(self, tree: Path) -> Path:
        """Give the tree its bytecode, and the store what is new; where that was staged."""
        compile_tree(str(tree), self.places(tree), workers=1)
        shared_bytecode.publish(tree / "staged", self.layout.bytecode)
        for path in (tree / "staged").rglob("*.pyc*"):
            path.unlink()
        return tree / "staged"

    def places(self, tree: Path) -> Places:
        return Places.of_this_python(str(self.layout.bytecode), str(tree / "staged"))

    def offered(self) -> set[str]:
        return set(os.listdir(self.shared)) if self.shared.exists() else set()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path / "store")


def inodes(tree: Path) -> dict[str, int]:
    """The bytecode of a tree, by module."""
    return {path.name.split(".")[0]: path.stat().st_ino for path in tree.rglob("__pycache__/*.pyc")}


def occupied(path: Path) -> int:
    return path.stat().st_blocks * 512


def names(*texts: str) -> set[str]:
    return {pyc.name_of(text.encode()) for text in texts}


def test_each_text_is_compiled_once(host: Host) -> None:
    """Modules of one text have one file, within a tree and in another; only a new text adds one."""
    first = host.tree("a", {"one.py": "X = 1\n", "p/same.py": "X = 1\n", "two.py": "X = 2\n"})
    host.compile(first)
    assert host.offered() == names("X = 1\n", "X = 2\n")
    second = host.tree("b", {"q/other.py": "X = 1\n", "three.py": "X = 3\n"})
    host.compile(second)
    assert host.offered() == names("X = 1\n", "X = 2\n", "X = 3\n")
    assert inodes(first)["one"] == inodes(first)["same"] == inodes(second)["other"]


def test_what_is_wrong_stays_without(host: Host) -> None:
    """Text that does not compile, in whatever way, has no bytecode and keeps nobody from having some."""
    bad = {"syntax.py": "def (:\n", "null.py": "a\0b", "deep.py": "(" * 5000, "odd.py": "# coding: nonsense\n"}
    tree = host.tree("a", {**bad, "good.py": "x = '\\d'\n"})
    (tree / "folder.py").mkdir()
    (tree / "dangling.py").symlink_to("nowhere")
    os.mkfifo(tree / "pipe.py")
    with pytest.warns(match="invalid escape sequence"):
        host.compile(tree)
    assert inodes(tree).keys() == {"good"}


def test_nobody_is_trusted_but_the_text(host: Host) -> None:
    """Bytecode that came with a package, for a module of another one too, is replaced and never offered."""
    tree = host.tree("a", {"victim.py": "X = 'right'\n", "broken.py": "def (:\n"})
    for name in ("victim", "broken"):
        evil = tree / "__pycache__" / f"{name}.{sys.implementation.cache_tag}.pyc"
        evil.parent.mkdir(exist_ok=True)
        evil.write_bytes(b"evil")
    host.compile(tree)
    host.compile(tree)
    assert host.offered() == names("X = 'right'\n")
    other = host.tree("b", {"victim.py": "X = 'right'\n"})
    host.compile(other)
    assert inodes(tree)["victim"] == inodes(other)["victim"]
    assert (
        support.run_python(f"import sys; sys.path.insert(0, {str(other)!r}); import victim; print(victim.X)")
        == "right\n"
    )


def test_what_a_killed_compiler_staged_is_taken_over(host: Host) -> None:
    """The next compiler of the tree goes on where the last one was."""
    tree = host.tree("a", {"one.py": "X = 1\n", "two.py": "X = 2\n"})
    compile_tree(str(tree), host.places(tree), workers=1)
    before = inodes(tree)
    (Path(host.places(tree).staged) / f"{'0' * 64}.pyc.4711").write_bytes(b"cut o")
    for path in tree.rglob("__pycache__/one.*"):
        path.unlink()
    host.compile(tree)
    assert inodes(tree) == before
    assert host.offered() == names("X = 1\n", "X = 2\n")


@pytest.mark.parametrize("number", [errno.EMLINK, errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP])
def test_where_there_can_be_no_link(host: Host, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Everybody has a copy then: without more links to a file, or without any."""
    host.compile(host.tree("a", {"one.py": "X = 1\n"}))

    def no_link(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", no_link)
    tree = host.tree("b", {"one.py": "X = 1\n", "two.py": "X = 2\n"})
    host.compile(tree)
    host.compile(tree)
    monkeypatch.undo()
    assert inodes(tree).keys() == {"one", "two"}
    assert not list(tree.rglob("*.unproven"))
    assert host.offered() == names("X = 1\n")
    (kept,) = host.shared.iterdir()
    assert [path.read_bytes() == kept.read_bytes() for path in sorted(tree.rglob("__pycache__/*"))] == [True, False]


def test_no_room_to_share(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store without room for another name has its bytecode all the same, in each entry."""
    link = os.link

    def full(source: str, target: str | Path) -> None:
        if Path(target).parent == host.shared:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        link(source, target)

    monkeypatch.setattr(os, "link", full)
    tree = host.tree("a", {"one.py": "X = 1\n"})
    host.compile(tree)
    assert [*inodes(tree)] == ["one"]
    assert not host.offered()


def test_no_room_to_compile(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler without room fails, and leaves what is whole; with room it comes to its end."""
    replace, left = os.replace, [2]

    def full(source: str, target: str) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    tree = host.tree("a", {f"m{number}.py": f"X = {number}\n" for number in range(4)})
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            host.compile(tree)
    assert len(inodes(tree)) == len(list((tree / "staged").rglob("*.pyc"))) == 2
    host.compile(tree)
    assert len(inodes(tree)) == len(host.offered()) == 4


def test_kept_as_long_as_anybody_links_to_it(host: Host) -> None:
    """What a tree alone has goes with it, what others have too stays; and what nobody has is swept."""
    first = host.tree("a", {"one.py": "X = 1\n", "again.py": "X = 1\n", "both.py": "X = 0\n"})
    second = host.tree("b", {"both.py": "X = 0\n"})
    for tree in (first, second):
        host.compile(tree)
    (host.shared / "foreign").touch()
    shared_bytecode.let_go(host.layout, first)
    assert host.offered() == {*names("X = 0\n"), "foreign"}
    for path in [*first.rglob("*.pyc"), *second.rglob("*.pyc")]:
        path.unlink()
    freed = occupied(host.shared / names("X = 0\n").pop())
    assert shared_bytecode.sweep(host.layout) == freed
    assert host.offered() == {"foreign"}
    (host.shared / "foreign").unlink()
    assert shared_bytecode.sweep(host.layout) == 0
    assert list(host.layout.bytecode.iterdir()) == []


def test_bytes_are_those_that_become_free(host: Host) -> None:
    """A tree frees the bytecode that only it has; trees that go together, what only they have, with the last of them."""
    trees = [
        host.tree(name, {"one.py": f"X = '{name}'\n", "same.py": "X = 1\n", "all.py": "X = 0\n"}) for name in "abc"
    ]
    for tree in trees:
        host.compile(tree)
    for path in trees[2].rglob("__pycache__/same.*"):
        path.unlink()
    known = shared_bytecode.inodes(host.layout)
    own = [disk.measure(tree, known).reclaimable - disk.measure(tree).reclaimable for tree in trees]
    one = occupied(next(trees[0].rglob("__pycache__/one.*")))
    assert own == [one] * 3
    together = disk.freed_in_turn(trees, known)
    alone = [disk.measure(tree, known).reclaimable for tree in trees]
    assert [freed - own for (freed, _), own in zip(together, alone, strict=True)] == [0, one, one]
    assert [freed for freed, _ in disk.freed_in_turn(trees[1:], known)] == alone[1:]


@pytest.mark.parametrize("options", [["-O"], ["-OO"], ["-X", "no_debug_ranges"]])
def test_each_python_has_its_own(host: Host, options: list[str]) -> None:
    """An interpreter that compiles differently, be it by an option, has a folder of its own."""
    if options[0] == "-X" and sys.version_info < (3, 11):
        options = ["-O"]
    program = "from ray_envcache.inside import pyc; print(pyc.tag())"
    said = [
        subprocess.check_output([sys.executable, *chosen, "-c", program], text=True).strip() for chosen in ([], options)
    ]
    assert said[0] == host.shared.name
    assert said[1] != said[0]
