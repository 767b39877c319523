"""What a build of a local package sees: relevant changes change the digest, and nothing else does."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_envcache.acquire import Store
from ray_envcache.build import layers
from ray_envcache.checkout import content
from ray_envcache.checkout.content import scan
from ray_envcache.errors import LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.resolve.lockfile import LocalPackage
from ray_envcache.store import key
from ray_envcache.store.leases import Holder
from tests import support

NAMES = st.from_regex(r"[a-z]{1,6}(/[a-z]{1,6}){0,2}\.(py|txt|c)", fullmatch=True)
TREES = st.dictionaries(NAMES, st.binary(max_size=20), min_size=1, max_size=6).filter(
    # No name is both a file and a folder.
    lambda tree: not any(other.startswith(f"{name}/") for name in tree for other in tree)
)


def write(folder: Path, tree: dict[str, bytes]) -> Path:
    for name, data in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@settings(max_examples=40)
@given(tree=TREES, when=st.integers(0, 2_000_000_000), data=st.data())
def test_digest(tree: dict[str, bytes], when: int, data: st.DataObject) -> None:
    """Place, order and times of change do not matter; a name, a byte or the right to execute does."""
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        first, second = write(Path(one), tree), write(Path(other), dict(reversed(tree.items())))
        for name in tree:
            os.utime(second / name, (when, when))
        assert scan(first).digest == scan(second).digest
        name = data.draw(st.sampled_from(sorted(tree)))
        change = data.draw(st.sampled_from(["text", "mode", "name", "gone", "more"]))
        path = second / name
        if change == "text":
            path.write_bytes(tree[name] + b"x")
        elif change == "mode":
            path.chmod(0o755)
        elif change == "name":
            path.rename(path.with_name("Renamed"))
        elif change == "gone":
            path.unlink()
        else:
            path.with_name("More").touch()
        assert scan(first).digest != scan(second).digest


@given(st.lists(st.from_regex(r"[0-9a-f]{8}", fullmatch=True), min_size=1, max_size=4), st.randoms())
def test_layer_key(digests: list[str], dice: object) -> None:
    """The order of packages does not matter; their content and the environment below do."""
    folders = [Path(f"/{number}") for number in range(len(digests))]
    sources = [
        layers.Source(
            LocalPackage(one, folder, editable=True),
            content.Content(folder, (), one, {}),
            is_editable=False,
        )
        for one, folder in zip(digests, folders, strict=True)
    ]
    digest = layers.digest_of(sources)
    assert layers.digest_of(reversed(sources)) == digest
    assert layers.digest_of([*sources, sources[0]]) != digest
    assert layers.digest_of(sources, editable=True) != digest, "editable ones are good for one checkout only"
    assert key.layer_key("a" * 32, digest, "") != key.layer_key("b" * 32, digest, "")
    assert key.layer_key("a" * 32, digest, "") != key.layer_key("a" * 32, digest[:-1], "")
    assert key.layer_key("a" * 32, digest, "") != key.layer_key("a" * 32, digest, "{}")


@pytest.mark.parametrize("git", [True, False])
def test_caches_and_environments_are_no_content(tmp_path: Path, *, git: bool) -> None:
    """With git by what it ignores; without, by their names and by what an environment has."""
    write(tmp_path, {"pyproject.toml": b"", "src/a.py": b"", ".gitignore": b".venv\nenv\n__pycache__\n*.log\n"})
    if git:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    before = scan(tmp_path)
    write(tmp_path, {".venv/x.py": b"", "env/pyvenv.cfg": b"", "env/y.py": b"", "src/__pycache__/a.pyc": b""})
    assert scan(tmp_path) == before
    write(tmp_path, {"some.log": b""})
    assert (scan(tmp_path) == before) is git


def test_deleted_but_still_tracked(tmp_path: Path) -> None:
    """What git still lists, but is gone, is no content."""
    write(tmp_path, {"a.py": b"", "b.py": b""})
    for command in (["init", "-q"], ["add", "."]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    (tmp_path / "b.py").unlink()
    assert scan(tmp_path).files == ("a.py",)


def test_cache_keys_add_ignored_files_and_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`[tool.uv] cache-keys` names what else a build depends on."""
    write(tmp_path, {"made.c": b"1", ".gitignore": b"made.c\n"})
    (tmp_path / "pyproject.toml").write_text('[tool.uv]\ncache-keys = [{ file = "*.c" }, { env = "FLAVOUR" }]\n')
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    first = scan(tmp_path)
    assert "made.c" in first.files
    monkeypatch.setenv("FLAVOUR", "sweet")
    second = scan(tmp_path)
    (tmp_path / "made.c").write_bytes(b"2")
    assert len({first.digest, second.digest, scan(tmp_path).digest}) == 3


@pytest.mark.parametrize("pattern", ["src/**.rs", "**.rs", "a**/b", ""])
def test_cache_keys_that_are_no_patterns(tmp_path: Path, pattern: str) -> None:
    """The error names the file and what is wrong in it, with every Python."""
    (tmp_path / "pyproject.toml").write_text(f'[tool.uv]\ncache-keys = [{{ file = "{pattern}" }}]\n')
    with pytest.raises(LockfileError, match=re.escape(f"no pattern for files: `{pattern}`")) as caught:
        scan(tmp_path)
    assert (str(tmp_path / "pyproject.toml") in caught.value.message, "**/*" in caught.value.hint) == (True, True)


_COMPILING_BACKEND = """\
import pathlib, zipfile

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    here, info = pathlib.Path.cwd(), "fast-1.0.dist-info"
    (here / "fast.so").write_text((here / "fast.c").read_text())
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / "fast-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("fast.pth", f"{here}\\n")
        wheel.writestr(info + "/METADATA", "Metadata-Version: 2.2\\nName: fast\\nVersion: 1.0\\n")
        wheel.writestr(info + "/WHEEL", "Wheel-Version: 1.0\\nGenerator: tests\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "/RECORD", "")
    return "fast-1.0-py3-none-any.whl"
"""


def test_editable_installation_of_compiled_code(tmp_path: Path, wheels: Path, store: Store) -> None:
    """It is made again when a file of `cache-keys` was edited or its compiled module is gone, and not otherwise."""
    folder = tmp_path / "fast"
    folder.mkdir()
    (folder / "backend.py").write_text(_COMPILING_BACKEND)
    (folder / "fast.c").write_text("1")
    (folder / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
        '[project]\nname = "fast"\nversion = "1.0"\nrequires-python = ">=3.10"\ndependencies = ["ray"]\n'
        f'[tool.uv]\nno-index = true\nfind-links = ["{wheels}"]\n'
        'cache-keys = [{ file = "pyproject.toml" }, { file = "*.c" }]\n'
    )
    support.run_uv("lock", cwd=folder)
    built = folder / "fast.so"

    def run() -> str:
        with store.acquire(
            EnvSpec.parse(folder), installed_ray(), Holder("test"), finish=False, editable=True
        ) as lease:
            return lease.entry.path.name

    first = run()
    assert (built.read_text(), run()) == ("1", first)
    (folder / "fast.c").write_text("2")
    second = run()
    assert (built.read_text(), second != first) == ("2", True)
    built.unlink()
    assert run() != second
    assert built.read_text() == "2"


def test_cache_keys_that_are_no_list(tmp_path: Path) -> None:
    """The letters of a word are no patterns."""
    (tmp_path / "pyproject.toml").write_text('[tool.uv]\ncache-keys = "src/*.rs"\n')
    with pytest.raises(LockfileError, match=r"`cache-keys` in .* is not a list"):
        scan(tmp_path)


def test_files_beside_the_package(tmp_path: Path) -> None:
    """What `cache-keys` names there is in the digest."""
    package = write(tmp_path / "repo" / "libs" / "package", {"a.py": b""})
    write(tmp_path / "repo", {"common/version.txt": b"1"})
    (package / "pyproject.toml").write_text('[tool.uv]\ncache-keys = [{ file = "../../common/*.txt" }]\n')
    seen = scan(package)
    assert seen.files == ("../../common/version.txt", "a.py", "pyproject.toml")
    (tmp_path / "repo" / "common" / "version.txt").write_bytes(b"2")
    assert scan(package).digest != seen.digest


def test_files_behind_links(tmp_path: Path) -> None:
    """What `cache-keys` names behind a link is hashed."""
    package = write(tmp_path / "package", {"inner/b.txt": b"b"})
    outside = write(tmp_path / "outside", {"c.txt": b"c"})
    (package / "out").symlink_to("../outside")
    (package / "absolute").symlink_to(package / "inner")
    (package / "pyproject.toml").write_text('[tool.uv]\ncache-keys = [{ file = "*/*.txt" }]\n')
    subprocess.run(["git", "init", "-q", package], check=True)
    seen = scan(package)
    assert {"out", "out/c.txt", "absolute/b.txt", "inner/b.txt"} <= set(seen.files)
    (outside / "c.txt").write_bytes(b"d")
    assert scan(package).digest != seen.digest


@pytest.mark.parametrize("git", [True, False])
def test_what_builds_leave_is_no_content(tmp_path: Path, *, git: bool) -> None:
    """Outputs of a build in the folder change no digest; what git tracks counts by whatever name."""
    write(tmp_path, {"pyproject.toml": b"", "src/a.py": b"", "build/own.py": b"", "dist/notes.txt": b""})
    if git:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    before = scan(tmp_path)
    assert {"build/own.py", "dist/notes.txt"} < {*before.files}
    left = ("build/lib/a.py", "build/bdist.linux-x86_64/x", "build/temp.linux/a.o", "dist/a-1.whl", "dist/a-1.tar.gz",
            "src/a.egg-info/SOURCES.txt", "a.egg-info/PKG-INFO")  # fmt: skip
    write(tmp_path, dict.fromkeys(left, b"x"))
    assert scan(tmp_path) == before
    if git:
        subprocess.run(["git", "-C", tmp_path, "add", "-f", "build/lib"], check=True)
        assert "build/lib/a.py" in scan(tmp_path).files


@pytest.mark.parametrize("git", [True, False])
def test_names_that_are_no_text(tmp_path: Path, *, git: bool) -> None:
    """A file is content by whatever bytes it is named, and two of them are two."""
    names = [os.fsdecode(b"caf\xe9.txt"), os.fsdecode(b"caf\xe8.txt")]
    try:
        write(tmp_path, {names[0]: b"1"})
    except OSError:
        pytest.skip("this file system takes no such names")
    (tmp_path / "link").symlink_to(names[0])
    if git:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
    first = scan(tmp_path)
    assert set(first.files) == {names[0], "link"}
    (tmp_path / names[0]).write_bytes(b"2")
    second = scan(tmp_path)
    (tmp_path / names[0]).rename(tmp_path / names[1])
    assert len({first.digest, second.digest, scan(tmp_path).digest}) == 3


def test_edits_and_logs(tmp_path: Path) -> None:
    """Beside a build a log may grow and files may come; any other change of a file that was there is an edit."""
    write(tmp_path, {"a.py": b"1", "log.txt": b"one\n", "table.csv": b"1", "gone.txt": b""})
    before = scan(tmp_path)
    write(tmp_path, {"log.txt": b"one\ntwo\n", "new.txt": b""})
    assert before.edited_until(scan(tmp_path)) == []
    write(tmp_path, {"a.py": b"12", "table.csv": b"2"})
    (tmp_path / "gone.txt").unlink()
    assert sorted(before.edited_until(scan(tmp_path))) == ["a.py", "gone.txt", "table.csv"]


def test_digest_is_the_same_in_every_locale(tmp_path: Path) -> None:
    """Nodes compare digests, and not all of them have the same encoding."""
    write(tmp_path, {"café.py": b"", "naïve.py": b""})
    program = "import sys; from pathlib import Path; from ray_envcache.checkout.content import scan; print(scan(Path(sys.argv[1])).digest)"
    plain = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "POSIX"}
    seen = {support.run_python(program, str(tmp_path), environ=environ).strip() for environ in ({}, plain)}
    assert seen == {scan(tmp_path).digest}


def test_links_sockets_and_pipes(tmp_path: Path) -> None:
    """Links count by where they point, and are never followed in circles; what cannot be read is no content."""
    folder = write(tmp_path / "package", {"a.py": b"", "sub/b.py": b""})
    (tmp_path / "outside").mkdir()
    (folder / "loop").symlink_to(".")
    (folder / "gone").symlink_to("nowhere")
    (folder / "out").symlink_to("../outside")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(folder / "socket"))
        seen = scan(folder)
    assert seen.files == ("a.py", "gone", "loop", "out", "sub/b.py")


def test_too_much_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a package that is too large the code is read; all else counts by size and time, and is edited unless larger."""
    monkeypatch.setattr(content, "MAX_READ", 10)
    folder = write(tmp_path / "package", {"a.py": b"12345", "data/big.bin": b"x" * 100})
    data, seen = folder / "data" / "big.bin", scan(folder)
    os.utime(folder / "a.py", (1, 1))
    assert scan(folder).digest == seen.digest
    for change, edited in ((b"y" * 100, ["data/big.bin"]), (b"y" * 99, ["data/big.bin"]), (b"x" * 101, [])):
        data.write_bytes(change)
        os.utime(data, (1, 1))
        assert scan(folder).digest != seen.digest
        assert seen.edited_until(scan(folder)) == edited
    write(folder, {"a.py": b"123456"})
    assert seen.edited_until(scan(folder)) == ["a.py"]


def test_too_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error within a moment, which names the folder."""
    monkeypatch.setattr(content, "MAX_FILES", 5)
    write(tmp_path, {f"data/{number}.py": b"" for number in range(9)})
    with pytest.raises(LockfileError, match=r"more than 5 files, the last one below `.*/data`"):
        scan(tmp_path)


def test_broken_project_file(tmp_path: Path) -> None:
    """A pyproject.toml that cannot be read is our own error."""
    write(tmp_path, {"pyproject.toml": b"[["})
    with pytest.raises(LockfileError, match="Cannot read"):
        scan(tmp_path)
