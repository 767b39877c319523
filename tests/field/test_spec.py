"""The field value: whatever is written there, it is a spec or an error that says what to write."""

from __future__ import annotations

import json
import pathlib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import ray_envcache
from ray_envcache.cli.main import cli
from ray_envcache.errors import FieldValueError
from ray_envcache.field.spec import OPTIONS, EnvSpec, refuse_combinations, set_by_ray

NASTY = (
    "--help", "-r", "../..", "/", "~", "", " ", "\0", "a\nb", "\x1b[31m", "\x9b31m", "\udcff", "x" * 5000, "é" * 3000,
    "$(reboot)", "'\"", "file:///etc", "3.1٢", "3.12\n", "sha256:" + "g" * 64, "[dev]", "a;b", "dev\n", "dev-", "İ",
)  # fmt: skip

texts = st.text(st.characters(exclude_categories=()), max_size=20) | st.sampled_from(NASTY)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4))
fields = st.fixed_dictionaries({}, optional=dict.fromkeys(OPTIONS, values)) | st.fixed_dictionaries(
    {"path": texts}, optional={"extras": st.lists(texts), "groups": st.lists(texts), "python": texts, "digest": texts}
)

names = st.from_regex(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,8}[A-Za-z0-9])?", fullmatch=True)
specs = st.builds(
    EnvSpec.parse,
    st.fixed_dictionaries(
        {"path": st.sampled_from(["pyproject.toml", "/a folder/ü", "--help", "../x"])},
        optional={
            "extras": st.lists(names),
            "groups": st.lists(names).map(tuple),
            "package": st.none() | names,
            "no_groups": st.lists(names),
            "only_groups": st.lists(names),
            "all_extras": st.booleans(),
            "default_groups": st.booleans(),
            "dev": st.booleans(),
            "no_build": st.booleans(),
            "python": st.sampled_from([None, "3", "3.12", "3.12.4", "/usr/bin/python3"]),
            "digest": st.none() | st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True),
        },
    ),
)


def parsed(value: Any) -> EnvSpec | FieldValueError:
    try:
        return EnvSpec.parse(value)
    except FieldValueError as error:
        return error


@given(values | fields)
def test_hostile_values(value: Any) -> None:
    """Any JSON value is either a spec or a FieldValueError with a short text that a terminal can show."""
    found = parsed(value)
    if isinstance(found, FieldValueError):
        assert found.hint
        assert len(str(found)) < 1000
        assert str(found).replace("\n", "").isprintable()
    else:
        assert EnvSpec.parse(found.to_field()) == found
        assert not any(name.startswith("-") for name in found.extras + found.groups)
        assert len(found.path.encode()) <= 4096
        assert "\0" not in found.path


@pytest.mark.parametrize("value", [*NASTY, "x" * 10**6])
def test_hostile_names(value: str) -> None:
    """No name of an extra or group can be taken for an option, a path or shell text."""
    with pytest.raises(FieldValueError, match="extras"):
        EnvSpec.parse({"path": "pyproject.toml", "extras": [value]})


def test_deep_value() -> None:
    """A value nested deeper than Python's recursion goes is an error like any other."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(FieldValueError):
        EnvSpec.parse({"path": deep})


@pytest.mark.parametrize("option", OPTIONS)
def test_wide_value(option: str) -> None:
    """A value of many long parts is shown shortened, whichever option it is given for."""
    wide = [{"x" * 500: ["y" * 500] * 100}] * 100
    with pytest.raises(FieldValueError) as caught:
        EnvSpec.parse({"path": "x", option: wide})
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", ["--lock\x1b[31m", "\ud800", "p" * 10**6, ""])
def test_hostile_option(name: str) -> None:
    """The name of an unknown option is shown escaped and shortened."""
    with pytest.raises(FieldValueError, match="Unknown option") as caught:
        EnvSpec.parse({"path": "pyproject.toml", name: 1})
    assert len(str(caught.value)) < 1000
    assert str(caught.value).replace("\n", "").isprintable()


@given(st.lists(names, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_order_and_spelling(extras: list[str], random: Any) -> None:
    """Extras and groups are sets of PEP 503 names: order, repetition, case, `_`, `.` and `-` make no difference."""
    shuffled = [*extras, extras[0].upper()]
    random.shuffle(shuffled)
    respelled = [name.swapcase().replace("-", "_").replace(".", "--") for name in shuffled]
    for option in ("extras", "groups"):
        assert EnvSpec.parse({"path": "x", option: extras}) == EnvSpec.parse({"path": "x", option: respelled})


@given(specs)
def test_round_trip(spec: EnvSpec) -> None:
    """`to_field` is JSON that gives the same spec again, on any node."""
    assert EnvSpec.parse(json.loads(json.dumps(spec.to_field()))) == spec


@given(specs)
def test_selection(spec: EnvSpec) -> None:
    """The selection does not depend on where the project lies or what its files contain."""
    moved = spec._replace(path="elsewhere", digest="sha256:" + "0" * 64)
    assert moved.selection() == spec.selection()
    assert moved.path == "elsewhere"


def test_fields_have_what_was_chosen_only() -> None:
    """Options that are left out stand in no field value: new options change none that was written before."""
    old = {"path": "x", "extras": ["gpu"], "groups": ["train"], "package": "one", "no_build": True, "python": "3.12"}
    assert EnvSpec.parse(old).to_field() == old
    assert EnvSpec.parse({**old, "default_groups": True, "dev": False, "no_groups": []}).to_field() == old


def test_path_alone() -> None:
    """A path alone, as text or as a Path, is a field value."""
    assert EnvSpec.parse("a/pyproject.toml") == EnvSpec("a/pyproject.toml")
    assert EnvSpec.parse(pathlib.Path("a/b")) == EnvSpec.parse({"path": pathlib.Path("a/b")}) == EnvSpec("a/b")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("extra", "extras"),
        ("group", "groups"),
        ("Path", "path"),
        ("pyhton", "python"),
        ("digests", "digest"),
        ("no-build", "no_build"),
    ],
)
def test_did_you_mean(wrong: str, right: str) -> None:
    """A misspelt option is an error that names the right one."""
    with pytest.raises(FieldValueError) as caught:
        EnvSpec.parse({"path": "pyproject.toml", wrong: []})
    assert caught.value.hint == f"did you mean `{right}`?"


def test_unknown_option() -> None:
    """An option that resembles none is an error that lists all."""
    with pytest.raises(FieldValueError, match=", ".join(OPTIONS)):
        EnvSpec.parse({"path": "pyproject.toml", "qqqq": 1})


@pytest.mark.parametrize(
    "python", [3, 3.12, "2.7", "3.", "3.12.4.1", "python3", "bin/python", ">=3.11", True, "", "3.1٢"]
)
def test_bad_python(python: Any) -> None:
    """`python` is a version or an absolute path; a number is told to be text."""
    with pytest.raises(FieldValueError, match=r'"3.12"'):
        EnvSpec.parse({"path": "pyproject.toml", "python": python})


@pytest.mark.parametrize("rival", ["pip", "uv", "conda", "image_uri", "container"])
def test_rivals(rival: str) -> None:
    """Every other field that chooses an interpreter is refused beside ours, by name."""
    with pytest.raises(FieldValueError, match=f"`{rival}`"):
        refuse_combinations({"envcache": "pyproject.toml", rival: ["anything"]})


@pytest.mark.parametrize("rival", ["pip", "uv", "conda", "image_uri", "container", "py_executable"])
@pytest.mark.parametrize("nothing", [None, [], "", {}])
def test_empty_rivals(rival: str, nothing: Any) -> None:
    """A rival without a value is no rival."""
    refuse_combinations({"envcache": "pyproject.toml", rival: nothing})


@pytest.mark.parametrize("executable", ["uv run", "uv run python", "/opt/my.uv/bin/uv run --python 3.12.1 python"])
def test_py_executable_of_uv_run(executable: str) -> None:
    """What Ray itself sets for a driver under a `uv run` without options can be told from what chooses packages."""
    assert set_by_ray(executable)


@pytest.mark.parametrize(
    "executable",
    [
        "python3", "/usr/bin/python", "uvx run", "uv", "uv running", "ls; uv run", "uv run --with emoji", "uv run -p 3.12",
        "uv run --extra vllm --locked", "/usr/bin/uv run --isolated", "uv run --with x --python 3.12.1 python", "uv run x",
    ],
)  # fmt: skip
def test_other_py_executable(executable: str) -> None:
    """Any py_executable of the user's contradicts the field, and the error says how the field chooses packages."""
    assert not set_by_ray(executable)
    with pytest.raises(FieldValueError, match=r"`py_executable` beside `envcache`(?s:.*)`extras` and `groups`"):
        refuse_combinations({"envcache": "x", "py_executable": executable})


@pytest.mark.parametrize("path", ["", None])
def test_no_path_is_not_the_current_directory(path: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A path out of a variable that is not set is an error, and not the project in the current directory."""
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "here"\nversion = "1"\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FieldValueError, match="no usable path"):
        ray_envcache.runtime_env(path)
    with pytest.raises(FieldValueError, match="no usable path"):
        ray_envcache.Store.open(tmp_path / "store").acquire(path)
    for command in (["build", path or ""], ["run", "--project", path or "", "true"]):
        done = CliRunner().invoke(cli, command)
        assert "The path is empty" in f"{done.exception}{done.stderr}"
