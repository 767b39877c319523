"""What requirements files say, line by line."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ray_envcache.build.plan import require_buildable
from ray_envcache.checkout import requirement_files
from ray_envcache.errors import LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import requirements
from ray_envcache.resolve.interpreter import installed_ray
from tests import support

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ONE, TWO = "1" * 64, "2" * 64


def read(tmp_path: Path, text: str) -> list[requirements.RequirementLine]:
    (tmp_path / "requirements.txt").write_text(text)
    return requirements.read(tmp_path / "requirements.txt")


@pytest.mark.parametrize(
    ("line", "name", "hashes"),
    [
        ("a==1.0", "a", set()),
        ("A.b_C [x,y] == 1.0 ; python_version > '3'", "a-b-c", set()),
        ("a===1.0", "a", set()),
        ("a==1.0,<2", "a", set()),
        (f"a==1.0 --hash=sha256:{ONE} --hash sha256:{TWO}", "a", {f"sha256:{ONE}", f"sha256:{TWO}"}),
        (f"a==1.0 \\\n  --hash=sha256:{ONE} \\\n  # why\n", "a", {f"sha256:{ONE}"}),
        (f"a==1.0  # --hash=sha256:{ONE}", "a", set()),
        (f"a @ https://example.org/a.zip#sha256={ONE}", "a", {f"sha256:{ONE}"}),
        (f"a @ https://example.org/a.zip#subdirectory=x&sha256={ONE}", "a", {f"sha256:{ONE}"}),
        (f"a @ git+https://example.org/a@{COMMIT}", "a", set()),
        (f"a @ git+ssh://git@example.org/a@{COMMIT}#subdirectory=b", "a", set()),
        (f"https://example.org/a_b-1.0-py3-none-any.whl --hash=sha256:{ONE}", "a-b", {f"sha256:{ONE}"}),
        (f"https://example.org/a-1.0-py3-none-any.whl#sha256={ONE} ; python_version > '3'", "a", {f"sha256:{ONE}"}),
        ("./files/a-1.0-py3-none-any.whl", "a", set()),
        ("a-1.0-py3-none-any.whl", "a", set()),
    ],
)
def test_exact_lines(tmp_path: Path, line: str, name: str, hashes: set[str]) -> None:
    """One version, one file, or one commit, with the hashes that the line lists."""
    [one] = read(tmp_path, line)
    assert (one.name, set(one.hashes)) == (name, hashes)


@pytest.mark.parametrize("line", ["a", "a>=1", "a==1.*", "a!=1", "a~=1.0", "a @ https://example.org/a.zip", "a[b]"])
def test_lines_that_leave_a_choice(tmp_path: Path, line: str) -> None:
    """Anything less than one version is refused with file, line and text."""
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


# From `pip freeze` and conda: the line, what is said of it, and what to write instead.
OF_PIP_AND_CONDA = {
    "idna @ file:///home/conda/feedstock_root/build_artifacts/idna_1/work": (
        "another machine.*line 3",
        "name==version",
    ),
    "-e git+https://example.org/a@0123456789abcdef0123456789abcdef01234567#egg=a": ("Editable.*line 3", "name @ git+"),
    "--editable=git+ssh://git@example.org/a#egg=a": ("Editable.*line 3", "name @ git+"),
    "wanted==1.0 --use-pep517": ("--use-pep517.*requirements.txt:3", "leave out that option"),
    "wanted==1.0 --global-option=x": ("--global-option.*requirements.txt:3", "leave out that option"),
    'wanted==1.0 --config-settings="a=b"': ("--config-settings.*requirements.txt:3", "leave out that option"),
    "--use-pep517": ("Unexpected '-'.*requirements.txt:3", "leave out that option"),
    "wanted=1.0=py311_0": ("No package is named.*wanted=1.0=py311_0.*line 3", "name==version"),
    "@EXPLICIT": ("No package is named.*@EXPLICIT.*line 3", "name==version"),
    "https://conda.anaconda.org/conda-forge/noarch/idna-3.7-pyhd8ed1ab_0.conda": (
        "No package.*line 3",
        "name==version",
    ),
}


@pytest.mark.parametrize("line", OF_PIP_AND_CONDA)
def test_line_of_pip_or_conda(tmp_path: Path, line: str) -> None:
    """A line that pip or conda wrote and uv does not take is named, with what to write instead."""
    lock = tmp_path / "requirements.txt"
    lock.write_text(f"ray=={support.RAY_VERSION}\n\n{line}\n")
    says, hint = OF_PIP_AND_CONDA[line]
    with pytest.raises(LockfileError, match=says) as caught:
        require_buildable(EnvSpec.parse(lock), installed_ray())
    assert hint in caught.value.hint


def test_options_and_folders_are_no_read(tmp_path: Path) -> None:
    """Options are uv's business; folders are local packages, which have no version to fix."""
    (tmp_path / "local").mkdir()
    assert read(tmp_path, "\ufeff--index-url https://example.org/simple\n--pre\n-e ./local\n./local\n") == []
    [one] = read(tmp_path, f"local @ file://{tmp_path}/local\n")
    folder = {"name": "local", "directory": {"path": "local"}}
    assert requirements.restrict(folder, [one], {}) == folder


def test_variables_in_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`${NAME}` stands for what the environment says, and for itself where it says nothing."""
    monkeypatch.setenv("WHEELS", str(tmp_path))
    [one] = read(tmp_path, "${WHEELS}/a-1.0-py3-none-any.whl")
    assert one.requirement.url == f"file://{tmp_path}/a-1.0-py3-none-any.whl"


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
    """A constraint may leave a choice, and may make up for a line that does."""
    (tmp_path / "c.txt").write_text("a>1\nb==2.0\n")
    found = read(tmp_path, "-c c.txt\nb\n")
    assert sorted((one.name, one.line.is_constraint) for one in found) == [("a", True), ("b", False), ("b", True)]
    with pytest.raises(LockfileError, match="Not an exact version: `a`"):
        read(tmp_path, "-c c.txt\na\n")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text("ab=1.;# \\\n-rc[]@/:'\"\t", max_size=40))
def test_any_text(tmp_path: Path, text: str) -> None:
    """Whatever a file has in it is entries or a LockfileError."""
    with suppress(LockfileError):
        assert all(one.name for one in read(tmp_path, text))


def test_restrict(tmp_path: Path) -> None:
    """Artifacts that no line allows are left out; a package that no line asks for is refused."""
    found = read(tmp_path, f"a==1.0 --hash=sha256:{ONE}\nb==1.0\n")
    wheels = [{"url": digest, "hashes": {"sha256": digest}} for digest in (ONE, TWO)]
    package = {"name": "a", "version": "1.0", "wheels": wheels, "sdist": {"hashes": {"sha256": TWO}}}
    assert requirements.restrict(package, found, {}) == {"name": "a", "version": "1.0", "wheels": wheels[:1]}
    free = {**package, "name": "b"}
    assert requirements.restrict(free, found, {}) == free
    for strange in ({**package, "version": "2.0"}, {**package, "name": "c"}):
        with pytest.raises(LockfileError, match="which no line asks for"):
            requirements.restrict(strange, found, {})
