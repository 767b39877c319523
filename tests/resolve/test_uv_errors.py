"""What uv says when it fails, in the words of the real uv: each cause has its type of error and a hint that cures it."""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.build.plan import require_buildable
from ray_envcache.checkout.project import Project
from ray_envcache.errors import (
    BuildError,
    DiskFullError,
    EnvCacheError,
    InterpreterError,
    LockfileError,
    PassingError,
)
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import export, uv, uv_errors
from ray_envcache.resolve.interpreter import installed_ray
from tests import support

pytestmark = pytest.mark.host


@pytest.fixture(autouse=True)
def _own_uv_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another test fetched must not hide that this one cannot."""
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))


def failed(*arguments: str | Path, cwd: Path) -> EnvCacheError:
    """The error for this call of uv, which fails."""
    done = uv.run(arguments, cwd=cwd)
    assert done.returncode != 0
    return uv_errors.error_of(done, BuildError, "it failed", "no cause is known")


def sync(project: Path, *options: str) -> EnvCacheError:
    """The error for `uv sync` of this project."""
    return failed("sync", "--frozen", f"--python={sys.executable}", *options, cwd=project.parent)


def check(error: EnvCacheError, kind: type[EnvCacheError], says: str, hint: str) -> None:
    assert type(error) is kind
    assert says in error.message
    assert hint in error.hint
    assert ("uv lock" in error.hint) is ("uv lock" in hint), "only where that is the cure"


@pytest.mark.parametrize("place", ["/proc/nowhere", "/dev/null", "/dev/null/below"])
def test_cache_that_cannot_be_used(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """A cache that cannot be made, for this user or at all, is named with the variable that moves it."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    monkeypatch.setenv("UV_CACHE_DIR", place)
    check(
        sync(project),
        BuildError,
        f"uv cannot write where it has to: Failed to initialize cache at `{place}`",
        "UV_CACHE_DIR",
    )


def test_cache_that_another_uv_keeps(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is being cleaned is waited for; after that time the error is passing."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    monkeypatch.setenv("UV_LOCK_TIMEOUT", "1")
    with (tmp_path / "uv-cache" / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        check(sync(project), PassingError, "Timeout (1s) when waiting for lock", "UV_LOCK_TIMEOUT")


@pytest.mark.parametrize(("name", "value"), [("UV_HTTP_TIMEOUT", "soon"), ("UV_LINK_MODE", "chain")])
def test_variable_that_uv_cannot_read(
    tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    """A variable of this node with a wrong value is quoted."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    monkeypatch.setenv(name, value)
    error = sync(project)
    check(error, BuildError, "uv cannot read a variable: ", "mend the variable UV_")
    assert value in error.message


def test_setting_that_uv_cannot_read(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong value in a file is quoted, with the files in which it can be: also that of the user."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    user = tmp_path / "config" / "uv" / "uv.toml"
    user.parent.mkdir(parents=True)
    user.write_text('index-strategy = "foo"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    error = sync(project)
    check(error, LockfileError, 'index-strategy = "foo"', f"mend that setting in {project} or {user}")
    assert "/dev/fd" not in error.message


def test_no_python(tmp_path: Path) -> None:
    """A Python that is not here is named with the command that installs it, one that does not fit with that which lists."""
    done = failed("python", "find", "--managed-python", "3.13.99", cwd=tmp_path)
    check(done, InterpreterError, "No interpreter found for Python 3.13.99", "`uv python install 3.13.99`")
    (tmp_path / "python").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    error = failed("python", "find", tmp_path / "python", cwd=tmp_path)
    check(error, InterpreterError, "failed with exit status", "`uv python list`")


def test_python_that_does_not_fit(tmp_path: Path, wheels: Path) -> None:
    """A Python that requires-python excludes is no fault of the lockfile."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    for file in (project, project.with_name("uv.lock")):
        file.write_text(file.read_text().replace(">=3.10", ">=3.99"))
    check(sync(project), InterpreterError, "incompatible with the project's Python requirement", "`uv python list`")


def test_repository_that_is_gone(tmp_path: Path) -> None:
    """What git says is in the message."""
    (tmp_path / "requirements.txt").write_text(f"wanted @ git+file://{tmp_path}/gone@{'0' * 40}\n")
    error = failed("pip", "compile", "requirements.txt", cwd=tmp_path)
    check(error, BuildError, "does not appear to be a git repository", "that this node has git")


def test_refused_by_a_setting(tmp_path: Path, wheels: Path) -> None:
    """What a setting of the project forbids is said as that."""
    support.make_sdist(wheels, "source")
    project = support.make_project(tmp_path / "project", wheels, ["source"])
    project.write_text(project.read_text().replace("[tool.uv]\n", "[tool.uv]\nno-build = true\n"))
    check(sync(project), BuildError, "marked as `--no-build`", "leave out `no_build`")


def test_package_for_another_platform(tmp_path: Path, wheels: Path) -> None:
    """What uv itself advises is the hint: a package without a wheel for this platform is to be locked for it."""
    support.make_wheel(wheels, "elsewhere", tag="cp311-cp311-win_amd64")
    project = support.make_project(tmp_path / "project", wheels, ["elsewhere"])
    check(
        sync(project),
        BuildError,
        "for the current platform",
        "to `tool.uv.required-environments`",
    )


@pytest.mark.parametrize(
    ("make", "says"),
    [
        ({"code": "raise SystemExit('no compiler')"}, "no compiler"),
        ({"requires": ["nowhere"]}, "nowhere was not found"),
    ],
)
def test_build_that_fails(tmp_path: Path, wheels: Path, make: dict[str, Any], says: str) -> None:
    """What a build backend says, or lacks, is quoted."""
    support.make_sdist(wheels, "source", **make)
    project = support.make_project(tmp_path / "project", wheels, ["source"])
    check(sync(project), BuildError, says, "(a compiler, headers)")


def test_build_that_talks(tmp_path: Path, wheels: Path) -> None:
    """Of what a build says at length the first line, which names the package, and the end are in the message."""
    support.make_sdist(
        wheels, "source", code="print('noise\\n' * 10**4, 'the end', file=sys.stderr); raise SystemExit(1)"
    )
    project = support.make_project(tmp_path / "project", wheels, ["source"])
    message = sync(project).message
    assert message.startswith("it failed: Failed to build `source==1.0`\n")
    assert message.endswith("the end")
    assert len(message) < 1000


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\n", "", "version = 99\n"], ids=["conflict", "empty", "later"])
def test_lockfile_that_cannot_be_read(tmp_path: Path, wheels: Path, text: str) -> None:
    """`uv lock` itself does not mend a lockfile that cannot be read: the hint is what does."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    project.with_name("uv.lock").write_text(text)
    for command in ("export", "lock"):
        error = failed(command, *(["--frozen"] if command == "export" else []), cwd=project.parent)
        assert ("upgrade uv on this node" if "99" in text else "restore uv.lock from version control") in error.hint


def test_stale_lockfile(tmp_path: Path, wheels: Path) -> None:
    """A lockfile that lacks the project itself is cured by `uv lock`, as is one that no longer matches it."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    text = project.read_text()
    for edited in (text.replace('name = "project"', 'name = "renamed"'), text.replace("'ray'", "'ray<99'")):
        project.write_text(edited)
        with pytest.raises(LockfileError, match=r"needs to be updated|no longer matches") as caught:
            require_buildable(EnvSpec.parse(project), installed_ray())
        assert "run `uv lock`" in caught.value.hint
        support.run_uv("lock", cwd=project.parent)
        require_buildable(EnvSpec.parse(project), installed_ray())


def test_lockfile_that_is_not_at_fault(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this node lacks is not said of the lockfile, also where only its check meets it."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    monkeypatch.setenv("UV_CACHE_DIR", "/proc/nowhere")
    with pytest.raises(BuildError, match=r"Cannot check uv.lock .* uv cannot write where it has to") as caught:
        export.require_current(Project.locate(project), sys.executable)
    assert "uv lock" not in caught.value.hint


@pytest.mark.parametrize("place", ["variable", "file"])
def test_user_who_is_not_at_fault(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    """What a user's setting of versions says, even nonsense, makes no lockfile stale, and is not blamed where it is."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    if place == "variable":
        monkeypatch.setenv("UV_RESOLUTION", "foo")
    else:
        (tmp_path / "config" / "uv").mkdir(parents=True)
        (tmp_path / "config" / "uv" / "uv.toml").write_text('resolution = "foo"\n')
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    export.require_current(Project.locate(project), sys.executable)
    project.write_text(project.read_text().replace("'ray'", "'ray<99'"))
    with pytest.raises(LockfileError, match=r"no longer matches pyproject.toml"):
        export.require_current(Project.locate(project), sys.executable)


def test_unknown_cause(tmp_path: Path) -> None:
    """What is not in the table is quoted, with the hint of the call."""
    check(
        failed("cache", "nonsense", cwd=tmp_path), BuildError, "it failed: unrecognized subcommand", "no cause is known"
    )


def test_full_disk(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk is named by the path at which there was no room, with figures."""
    project = support.make_project(tmp_path / "project", wheels, ["ray"])
    with support.small_disk(tmp_path / "disk", "64k") as disk:
        (disk / "ballast").write_bytes(os.urandom(48_000))
        monkeypatch.setenv("UV_CACHE_DIR", str(disk / "cache"))
        check(sync(project), DiskFullError, f"{disk}/cache/", "UV_CACHE_DIR, TMPDIR")


def test_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a uv has said before it was killed is not the reason."""
    (tmp_path / "uv").write_text("#!/bin/sh\necho 'error: needs to be updated' >&2\nkill -KILL $$\n")
    (tmp_path / "uv").chmod(0o755)
    monkeypatch.setattr("ray_envcache.resolve.uv.find", lambda: str(tmp_path / "uv"))
    check(failed("lock", cwd=tmp_path), PassingError, "uv was killed by signal 9", "too little memory")
