"""What requirements files say, line by line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packaging.requirements import InvalidRequirement, Requirement

from ray_envcache.checkout import requirement_files
from ray_envcache.errors import LockfileError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ONE, TWO = "1" * 64, "2" * 64


def read(tmp_path: Path, text: str) -> dict[str, set[str]]:
    (tmp_path / "requirements.txt").write_text(text)
    return requirement_files.listed_hashes(tmp_path / "requirements.txt")


@pytest.mark.parametrize(
    ("text", "name", "hashes"),
    [
        ("a==1.0", "a", set()),
        ("A.b_C [x,y] == 1.0 ; python_version > '3'", "a-b-c", set()),
        ("a===1.0", "a", set()),
        ("a==1.0,<2", "a", set()),
        ("a<2,==1.0;python_version=='3/1'", "a", set()),
        ("a (==1.0)", "a", set()),
        ("a==1.0 \\", "a", set()),
        (f"a==1.0 --hash=sha256:{ONE} --hash sha256:{TWO}", "a", {ONE, TWO}),
        (f"a==1.0 \\\n  --hash=sha256:{ONE} \\\n  # why\n", "a", {ONE}),
        (f"a==1.0  # --hash=sha256:{ONE}", "a", set()),
        (f"a @ https://example.org/a.zip#sha256={ONE}", "a", {ONE}),
        (f"a @ https://example.org/a.zip#subdirectory=x&sha256={ONE}", "a", {ONE}),
        (f"a @ git+https://example.org/a@{COMMIT}", "a", set()),
        (f"a @ git+ssh://git@example.org/a@{COMMIT}#subdirectory=b", "a", set()),
        (f"https://example.org/a_b-1.0-py3-none-any.whl --hash=sha256:{ONE}", "a-b", {ONE}),
        (f"https://example.org/a-1.0-py3-none-any.whl#sha256={ONE} ; python_version > '3'", "a", {ONE}),
        ("./files/a-1.0-py3-none-any.whl", "a", set()),
        ("./files/a-1.0-py3-none-any.whl[x] ; python_version > '3'", "a", set()),
        (f"./files/a-1.0-py3-none-any.whl \\\n --hash=sha256:{ONE}", "a", {ONE}),
        ("a-1.0-py3-none-any.whl", "a", set()),
    ],
)
def test_exact_lines(tmp_path: Path, text: str, name: str, hashes: set[str]) -> None:
    """One version, one file, or one commit, with the hashes that the line lists."""
    for folder in (tmp_path, tmp_path / "files"):
        folder.mkdir(exist_ok=True)
        (folder / "a-1.0-py3-none-any.whl").touch()
    assert read(tmp_path, text) == {name: hashes}


@pytest.mark.parametrize(
    "line",
    [
        "a", "a>=1", "a==1.*", "a!=1", "a~=1.0", "a[b]", "a>1 ; python_version=='3.12'", "a;python_version=='3'",
        "a @ https://example.org/a.zip", "a @ git+https://example.org/a@v1.0", "./a.whl", "./nowhere", "a-1.0.tar.gz",
        f"https://example.org/a.zip --hash=sha256:{ONE}", f"a>1 --hash=sha256:{ONE}", "folder",
    ],
)  # fmt: skip
def test_lines_that_leave_a_choice(tmp_path: Path, line: str) -> None:
    """Anything less than one version is refused with file, line and text."""
    (tmp_path / "folder").mkdir()  # which is no package's name
    with pytest.raises(LockfileError) as caught:
        read(tmp_path, f"# first\nb==1.0\n{line}\n")
    assert f"`{line}` in line 3 of `{tmp_path / 'requirements.txt'}`" in caught.value.message


@pytest.mark.parametrize(
    "line",
    [
        "a @ https://somebody:s3cret@example.org/a-1.0-py3-none-any.whl",
        "a @ git+https://somebody:s3cret@example.org/a",
        "https://somebody:s3cret@example.org/a.tar.gz",
        "https://somebody:s3cret@example.org/a-1.0-py3-none-any.whl ; not a marker",
        "https://somebody:s3cret@[example.org/a-1.0-py3-none-any.whl",
        "https://example.org/a.tar.gz?token=s3cret",
        f"https://{'x' * 100}:s3cret{'y' * 100}@example.org/a.tar.gz",
        "-r https://somebody:s3cret@example.org/all.txt",
        "-r ${SERVER}/all.txt",
    ],
)
def test_errors_show_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """What is refused is shown without the user and password in its URL, and without what variables hold."""
    monkeypatch.setenv("SERVER", "https://somebody:s3cret@example.org")
    with pytest.raises(LockfileError, match="line 1") as caught:
        read(tmp_path, line)
    assert "s3cret" not in str(caught.value)


def test_options_and_folders(tmp_path: Path) -> None:
    """Options are uv's business; folders are local packages, which have no version to fix."""
    (tmp_path / "local").mkdir()
    options = "\ufeff--index-url https://example.org/simple\n--pre\n-e ./local\n"
    assert read(tmp_path, f"{options}./local\nl @ file://{tmp_path}/local\n") == {"": set(), "l": set()}
    assert read(tmp_path, ".\n..\n.[extra] ; python_version > '3'\n") == {"": set()}


def test_variables_in_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`${NAME}` stands for what the environment says."""
    (tmp_path / "a-1.0-py3-none-any.whl").touch()
    monkeypatch.setenv("WHEELS", str(tmp_path))
    assert read(tmp_path, "${WHEELS}/a-1.0-py3-none-any.whl") == {"a": set()}


def test_files(tmp_path: Path) -> None:
    """Includes and constraints, also of includes, each once, in circles too, relative to the file that names them."""
    (tmp_path / "inner").mkdir()
    (tmp_path / "top.txt").write_text("-r inner/a.txt\n--requirement=inner/b.txt\n-cinner/c.txt\n")
    (tmp_path / "inner" / "a.txt").write_text("-r b.txt\n-r ../top.txt\n")
    (tmp_path / "inner" / "b.txt").write_text("")
    (tmp_path / "inner" / "c.txt").write_text("--constraint d.txt")
    (tmp_path / "inner" / "d.txt").write_text("a==1.0")
    found = requirement_files.files(tmp_path / "top.txt")
    assert [str(path.relative_to(tmp_path)) for path in found] == ["top.txt", *(f"inner/{name}.txt" for name in "abcd")]


def test_constraints_are_not_entries_of_their_own(tmp_path: Path) -> None:
    """A constraint may leave a choice, and may make up for a line that does, unless a marker limits it."""
    (tmp_path / "c.txt").write_text("a>1\nb==2.0\nd==1.0 ; sys_platform == 'win32'\n")
    assert read(tmp_path, "-c c.txt\nb\n").keys() == {"a", "b", "d"}
    for text in ("-c c.txt\na\n", "-c c.txt\nd\n", "-c c.txt\nb @ https://example.org/b.zip", "-c c.txt\n-r c.txt"):
        with pytest.raises(LockfileError, match=r"Not an exact version: `[ad]|A URL without a hash"):
            read(tmp_path, text)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("ab=1.;# \\\n-rc[]@/:'\"\t", max_size=40))
def test_any_text(tmp_path: Path, text: str) -> None:
    """Whatever a file has in it, it is read or a LockfileError."""
    with suppress(LockfileError):
        read(tmp_path, text)


PARTS = [
    "a", "b.c", "==", "===", ">=", "<", "~=", "!=", "1.0", "1.*", ",", " ", " ; ", ";", "python_version", "'3'", "(", ")",
    "[x]", "@ ", "git+https://h/a", f"@{COMMIT}", "@main", "https://h/a.zip", f"#sha256={ONE}", "a-1.0-py3-none-any.whl",
]  # fmt: skip


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(PARTS), max_size=9).map("".join))
def test_nothing_that_leaves_a_choice_passes(tmp_path: Path, text: str) -> None:
    """What packaging understands, and we accept, is one version, one commit, a file with its hash, or of this host."""
    try:
        asked = Requirement(text)
        read(tmp_path, text)
    except (InvalidRequirement, LockfileError):
        return
    exact = [one for one in asked.specifier if one.operator in {"==", "==="} and "*" not in one.version]
    url = asked.url or "://"
    assert exact or "://" not in url or COMMIT in url or ONE in url
