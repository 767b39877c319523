"""`ray-envcache run X` is to a person what `uv run X` is: Python, packages, and what calls of uv below it find."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import uv

from ray_envcache.acquire import Store
from ray_envcache.cli import build
from tests import support

pytestmark = pytest.mark.host

SHOW = "from importlib.metadata import distributions as d; print(*sorted(f'{x.name}=={x.version}' for x in d()))"


@pytest.fixture
def project(tmp_path: Path, wheels: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a project with extras and groups, where the test works; uv is on PATH."""
    support.make_wheel(wheels, "extra-one")
    folder = support.make_grouped_project(tmp_path / "project", wheels).parent
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/uv").symlink_to(uv.find_uv_bin())
    # By PATH, never by UV_PYTHON: with that a `uv pip install` would go into this machine's own Python.
    (tmp_path / "bin/python3").symlink_to(os.path.realpath(sys.executable))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("UV_PYTHON_DOWNLOADS", "never")
    monkeypatch.chdir(folder)
    assert store.layout.root.exists()
    return folder


def run(*arguments: str | Path, **environ: str) -> tuple[int, str, str]:
    """What `ray-envcache run` with these arguments ends with, and says."""
    command = [sys.executable, "-m", "ray_envcache", "run", *arguments]
    done = subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def script(text: str, *options: str, **environ: str) -> tuple[int, str, str]:
    """The same for a shell script. Whatever it does the environments of the store stay as they are, and no `.venv` appears."""
    code, _, err = run(*options, "--", "true", **environ)
    assert code == 0, err
    before = _state()
    found = run(*options, "--", "bash", "-c", text, **environ)
    assert _state() == before
    assert not os.path.exists(".venv")
    return found


def _state() -> dict[str, tuple[int, int]]:
    """All files of all environments but bytecode, which is compiled in the background."""
    tops = [entry.venv for entry in Store.open().layout.all_entries()]
    files = [path for top in tops for path in top.rglob("*") if "__pycache__" not in path.parts]
    states = {str(path): os.lstat(path) for path in files}
    return {
        path: (found.st_ino, found.st_mtime_ns) for path, found in states.items() if not stat.S_ISDIR(found.st_mode)
    }


def uv_run(*arguments: str, **environ: str) -> str:
    """What uv itself prints in a copy of this project."""
    copy = Path(shutil.copytree(".", f"../copy-{len(os.listdir('..'))}/{Path.cwd().name}"))
    command = [uv.find_uv_bin(), "run", "--frozen", *arguments]
    try:
        return support.run(*command, cwd=copy, env={**os.environ, **environ})
    finally:
        shutil.rmtree(copy / ".venv", ignore_errors=True)


@pytest.mark.parametrize(
    "options",
    [
        "", "--extra gpu", "--all-extras", "--all-extras --no-extra gpu", "--group test", "--no-group cu12",
        "--no-group cu12 --group cu13", "--no-default-groups --group cu13", "--all-groups --no-group cu13", "--only-group test",
        "--only-dev", "--no-dev", "--dev", "--all-packages", "--package project",
    ],
)  # fmt: skip
def test_options_that_select(project: Path, options: str) -> None:
    """Each gives the packages that it gives with `uv run`, the default group dev among them."""
    code, out, err = run(*options.split(), "python", "-c", SHOW)
    if "ray" in (expected := uv_run(*options.split(), "python", "-c", SHOW)):
        assert (code, out) == (0, expected), err
    else:
        assert code == 2
        assert "ray" in err


@pytest.mark.parametrize(
    ("name", "value"), [("UV_NO_DEV", "1"), ("UV_NO_DEFAULT_GROUPS", "1"), ("UV_NO_GROUP", "cu12")]
)
def test_variables_that_select(project: Path, name: str, value: str) -> None:
    """The variables of uv that stand for these options count."""
    code, out, err = run("python", "-c", SHOW, **{name: value})
    assert (code, out) == (0, uv_run("python", "-c", SHOW, **{name: value})), err


def test_conflict_with_a_default_group(project: Path) -> None:
    """uv's reason comes with the option that helps."""
    code, _, err = run("--group", "cu13", "python", "-V")
    assert code == 2
    assert "incompatible" in err
    assert "--no-group" in err


def test_with(project: Path) -> None:
    """`--with` is refused, with the reason and what to do."""
    code, _, err = run("--with", "cuda", "--", "python", "-V")
    assert code == 2
    assert "shared" in err
    assert "uv run --with" in err


def test_files_and_modules(project: Path) -> None:
    """A file with Python code is run by Python, and `-m` runs a module."""
    (project / "main.py").write_text("import sys; print(sys.argv[1:], sys.prefix)")
    assert run("main.py", "--x")[1].startswith("['--x'] /")
    assert run("-m", "main", "y")[1].startswith("['y'] /")


UV_RUN = "python -c 'import sys; print(sys.prefix)'"


def test_shell_script(project: Path, store: Store) -> None:
    """`uv run` in a script is in the same environment, from subfolders, by absolute path and with more packages too."""
    (project / "sub").mkdir()
    code, out, err = script(
        f"uv run {UV_RUN} && cd sub && uv run {UV_RUN} && {uv.find_uv_bin()} run {UV_RUN}\n"
        f"uv run --directory .. -- {UV_RUN}; uv --quiet run --project=.. {UV_RUN}; env UV_PROJECT=.. uv run {UV_RUN}\n"
        "cd ..; uv run --with extra-one python -c 'import extra_one, ray'; exec uv run bash -c 'exit 7'",
        UV_FIND_LINKS=str(project.parent / "wheels"),
    )
    assert code == 7, err
    assert len(out.splitlines()) == 6
    assert {line.partition("/v1/")[0] for line in out.splitlines()} == {str(store.layout.root)}, err
    assert len(set(out.splitlines())) == 1


def test_script_with_inline_metadata(project: Path) -> None:
    """It has the environment that uv makes for it, with a lockfile too."""
    (project / "job.py").write_text(
        "# /// script\n# dependencies = ['extra-one']\n# ///\nimport sys, extra_one; print(sys.prefix)\n"
    )
    command = "uv run job.py && uv lock --script job.py && uv run job.py"
    code, out, err = script(command, UV_FIND_LINKS=str(project.parent / "wheels"), UV_NO_INDEX="1")
    assert code == 0, err
    assert len(out.splitlines()) == 2
    assert "/store/" not in out


def test_what_the_environment_lacks(project: Path) -> None:
    """`uv run` and `uv sync` with what is not there fail, and name the option of `run` that brings it."""
    for command in ("uv run --extra gpu python -c 'import cuda'", "uv sync --extra=gpu", "uv sync -q --extra gpu"):
        code, _, err = script(command)
        assert code == 1, command
        assert "cuda==1.0" in err or "-q" in command
        assert "ray-envcache run --extra gpu -- ..." in err
        assert script(command, "--extra", "gpu")[0] == 0, command
    code, _, err = script("uv sync --extra nonsense")
    assert code == 2
    assert "error: Extra `nonsense` is not defined" in err


def test_what_is_there_already(project: Path) -> None:
    """`uv sync` and `uv pip install` of what the environment has pass, and change nothing."""
    code, _, err = script(
        "uv sync && uv sync --locked --inexact && uv pip install devtool && uv pip list && uv lock --check"
    )
    assert code == 0, err
    assert "Would make no changes" in err


def test_local_packages(project: Path, wheels: Path) -> None:
    """With the project itself in the environment `uv sync` passes too, after an edit as well."""
    (project / "src/project").mkdir(parents=True)
    (project / "src/project/__init__.py").write_text("WORD = 1\n")
    (project / "backend.py").write_text((support.SRC_BACKEND + support.EDITABLE_BACKEND).format(name="project"))
    text = (project / "pyproject.toml").read_text().replace("package = false\n", "")
    backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (project / "pyproject.toml").write_text(f"{text.replace('0.1', '1.0', 1)}\n{backend}")
    support.run_uv("lock", cwd=project)
    code, out, err = script(
        "echo WORD = 2 > src/project/__init__.py; uv sync && uv run --dev python -c 'import project; print(project.WORD)'"
    )
    assert (code, out) == (0, "2\n"), err
    code, _, err = script("uv sync --group test")
    assert code == 1
    assert "--group test -- ..." in err


@pytest.mark.parametrize(
    "command",
    [
        "uv pip install extra-one", "uv pip uninstall ray", "uv pip install --python $VIRTUAL_ENV extra-one", "uv venv",
        "echo extra-one > r.txt; uv pip sync r.txt", "uv pip install -p $(which python) extra-one", "uv venv --clear",
    ],
)  # fmt: skip
def test_what_would_change_it(project: Path, command: str) -> None:
    """It is refused with a sentence that says what this environment is, and what to do."""
    code, _, err = script(command, UV_FIND_LINKS=str(project.parent / "wheels"), UV_NO_INDEX="1")
    assert code == 2
    assert "error: this program runs from an environment that all Ray clusters of this host share" in err
    assert "hint: " in err


def test_other_environments_are_free(project: Path, tmp_path: Path) -> None:
    """What is aimed elsewhere is uv's own affair."""
    code, out, err = script(
        "set -e; uv venv ../mine; uv pip install --python ../mine extra-one; uv pip install --target ../target extra-one\n"
        "../mine/bin/python -c 'import extra_one'; . ../mine/bin/activate; uv pip install cuda; python -c 'import cuda'\n"
        "uv run --active python -c 'import sys; print(sys.prefix)'",
        UV_FIND_LINKS=str(project.parent / "wheels"),
        UV_NO_INDEX="1",
    )
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "mine")
    assert list((tmp_path / "target").glob("extra_one*"))


def test_added_packages(project: Path) -> None:
    """`uv add` and `uv remove` edit the project; the environment of the running program stays, which is said."""
    code, _, err = script("uv add extra-one && uv run python -c 'import extra_one'")
    assert code == 1
    assert "ModuleNotFoundError" in err
    assert "note: " in err
    assert "extra-one" in (project / "uv.lock").read_text()
    code, _, err = script("uv remove cuda --optional gpu; uv run python -c 'import extra_one'")
    assert code == 0, err


def test_another_project(project: Path, tmp_path: Path, wheels: Path) -> None:
    """In its folder uv does what it always does."""
    other = support.make_project(tmp_path / "other", wheels, ["cuda"]).parent
    for command in ("cd ../other; uv run {}", "uv run --project ../other {}", "uv run --directory ../other {}"):
        code, out, err = script(command.format(UV_RUN))
        assert (code, out.strip()) == (0, str(other / ".venv")), err
        shutil.rmtree(other / ".venv")
    assert script("cd ../other; uv sync; uv pip list -p .venv")[1].startswith("Package")


def test_no_uv_on_path(project: Path, tmp_path: Path) -> None:
    """Where PATH has none, `uv` is the one beside ray-envcache."""
    (tmp_path / "bin/uv").unlink()
    assert script(f"uv run {UV_RUN}")[0] == 0


def test_without_variables(project: Path) -> None:
    """A program that clears the environment has the next uv on PATH."""
    code, out, err = script('env -i "PATH=$PATH" uv --version')
    assert (code, out.split()[0]) == (0, "uv"), err


def test_command_of_a_group_that_is_not_there(project: Path, tmp_path: Path, store: Store) -> None:
    """A command from outside, or none, where a group of the project has a package of that name."""
    code, _, err = run("checker")
    assert code == 127
    assert "hint: `ray-envcache run --group test` brings it" in err
    (tmp_path / "bin/checker").write_text("#!/bin/sh\nexit 5\n")
    (tmp_path / "bin/checker").chmod(0o755)
    code, _, err = run("checker")
    assert code == 5
    assert f"`checker` is {tmp_path / 'bin/checker'}, outside of the environment; `--group test` brings" in err
    assert run("--group", "test", "checker") == (5, "", "") or "outside" not in run("--group", "test", "checker")[2]


def versions() -> dict[str, str]:
    """Other Pythons of this machine, by version."""
    homes = [Path(os.path.realpath(sys.executable)).parents[2], Path("/usr/bin")]
    found = [path for home in homes for path in (*home.glob("*/bin/python3.1?"), *home.glob("python3.1?"))]
    told = {support.run(path, "-V").split()[1]: str(path) for path in found}
    return {version: path for version, path in told.items() if "a" not in version and "b" not in version}


def test_python(project: Path) -> None:
    """It is the one that `uv run` takes: of `.venv`, of UV_PYTHON, of UV_PROJECT_ENVIRONMENT, and by the project's wishes."""
    others = {
        version: path for version, path in versions().items() if version.split(".")[1] != str(sys.version_info[1])
    }
    if not others:
        pytest.skip("needs two Pythons")
    other, path = max(others.items())
    assert run("python", "-V", UV_PYTHON=path)[1] == f"Python {other}\n"
    support.run(uv.find_uv_bin(), "venv", "--python", path)
    assert support.run(uv.find_uv_bin(), "run", "--frozen", "python", "-V") == f"Python {other}\n"
    assert run("python", "-V")[1] == f"Python {other}\n"
    assert run("python", "-V", VIRTUAL_ENV=os.path.dirname(os.path.dirname(sys.executable)))[1] == f"Python {other}\n"
    (project / ".venv").rename(project / "mine")
    assert run("python", "-V", UV_PROJECT_ENVIRONMENT="mine")[1] == f"Python {other}\n"


def test_python_that_is_not_here(project: Path) -> None:
    """A patch in `.python-version` that is not installed: the hint is the command that installs it."""
    (project / ".python-version").write_text("3.13.99\n")
    code, _, err = run("python", "-V")
    assert code == 2
    assert "`uv python install 3.13.99`" in err
    assert "--python" in err


WRITE = """
import os, sys
if os.geteuid() == 0:
    os.setuid(65534)
open(os.path.join(sys.argv[1] or sys.prefix, "cache"), "w")
"""


@pytest.mark.parametrize(("folder", "hints"), [("", 1), ("/", 0)])
def test_write_into_the_environment(project: Path, folder: str, hints: int) -> None:
    """A write below `sys.prefix` that is refused ends in its traceback and a hint; one elsewhere in its traceback only."""
    code, _, err = run("python", "-c", WRITE, folder)
    assert code == 1
    assert "PermissionError" in err
    assert err.count("hint: this environment is shared") == hints
    assert err.count("Traceback") == 1


OURS = """all-extras all-groups all-packages extra group no-default-groups no-dev no-extra no-group only-dev only-group package
python module"""
WITHOUT = {
    "with with-editable with-requirements": "the environment is shared, and has what is locked; `uv run --with` below it works",
    "no-project script gui-script": "a script's own packages: name the script, or `--project`",
    "isolated active exact inexact no-sync dry-run check": "there is one environment, exactly what was chosen, never changed",
    "locked frozen": "the lockfile is never changed, and one that is not current is refused",
    "no-editable no-editable-package": "what is developed here shows at once; the field installs its content",
    "no-install-project no-install-workspace no-install-local no-install-package": "`build --no-install-project`",
    "python-platform": "the environment is for this host",
    "env-file no-env-file output-format": "no packages are chosen by it",
}


@pytest.mark.parametrize("command", ["run", "sync"])
def test_flags_of_uv(command: str) -> None:
    """Each flag of uv's commands that is not about indexes, builds and so on is an option of ours, or has a reason."""
    text = support.run(uv.find_uv_bin(), command, "--help").partition("\nIndex options")[0]
    found = set(re.findall(r"(?m)^ +(?:-\w, )?--([\w-]+)", text))
    decided = {*OURS.split(), *(name for names in WITHOUT for name in names.split())}
    assert found <= decided
    ours = {name.removeprefix("--") for option in build.run.params for name in option.opts}
    assert ours >= set(OURS.split())
