"""Local packages in git repositories: the same content for all users, and nothing is written into a repository."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from ray_envcache.checkout.content import scan
from ray_envcache.errors import LockfileError


def git(folder: Path, *arguments: str) -> str:
    """Run git as a user would, and return what it says."""
    who = {f"GIT_{role}_{what}": "a@b" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    command: list[str | Path] = ["git", "-c", "protocol.file.allow=always", "-C", folder, *arguments]
    done = subprocess.run(command, env={**os.environ, **who}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package in a repository of its own, with a commit, a tag, and a file that git ignores."""
    return make_package(tmp_path / "package")


def make_package(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "pyproject.toml").write_text('[project]\nname = "package"\nversion = "1"\n')
    (folder / "a.py").write_text("")
    (folder / ".gitignore").write_text("data/\n")
    (folder / "data").mkdir()
    (folder / "data" / "big").write_text("x")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "first")
    git(folder, "tag", "v1.2.3")
    return folder


def belongs_to_another_user(_package: Path, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")


def is_older(package: Path, patch: pytest.MonkeyPatch) -> None:
    program = package.parent / "bin" / "git"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$*" in *--deduplicate*) exit 129;; esac\nexec {shutil.which("git")} "$@"\n')
    program.chmod(0o755)
    patch.setenv("PATH", str(program.parent), prepend=os.pathsep)


def runs_our_driver_in_a_hook(package: Path, patch: pytest.MonkeyPatch) -> None:
    git(package.parent, "init", "-q", "other")
    patch.setenv("GIT_DIR", str(package.parent / "other" / ".git"))
    patch.setenv("GIT_INDEX_FILE", str(package.parent / "other" / ".git" / "index"))
    patch.setenv("GIT_WORK_TREE", str(package.parent / "other"))


def ignores_more_for_this_user(package: Path, patch: pytest.MonkeyPatch) -> None:
    ignore = package.parent / "config" / "git" / "ignore"
    ignore.parent.mkdir(parents=True)
    ignore.write_text("*.py\n")
    git(package, "rm", "-q", "--cached", "a.py")
    patch.setenv("XDG_CONFIG_HOME", str(package.parent / "config"))


@pytest.mark.parametrize(
    "circumstance", [belongs_to_another_user, is_older, runs_our_driver_in_a_hook, ignores_more_for_this_user]
)
def test_content_is_the_same_for_every_git(
    package: Path, monkeypatch: pytest.MonkeyPatch, circumstance: Callable[[Path, pytest.MonkeyPatch], None]
) -> None:
    """Content depends neither on the version of git nor on the user who runs it, nor on a git hook around us."""
    before = scan(package)
    assert before.files == (".gitignore", "a.py", "pyproject.toml")
    circumstance(package, monkeypatch)
    assert scan(package) == before


def test_repository_without_git(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is a repository and no git, what is no part of the package is unknown: an error says so."""
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(LockfileError, match="there is no git on this node") as caught:
        scan(package)
    assert str(package) in caught.value.message


def test_package_without_repository_needs_no_git(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of repositories git is not asked."""
    shutil.rmtree(package / ".git")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert "data/big" in scan(package).files


def test_worktree_without_its_repository(package: Path) -> None:
    """A `.git` that names a place which is not here is an error that names it."""
    git(package, "worktree", "add", "-q", "../tree")
    package.rename(package.with_name("elsewhere"))
    with pytest.raises(LockfileError, match="not a git repository") as caught:
        scan(package.parent / "tree")
    assert str(package / ".git" / "worktrees" / "tree") in caught.value.message


def test_package_in_an_ignored_folder(tmp_path: Path) -> None:
    """A package below a folder that the repository around it ignores has all its files."""
    (tmp_path / ".gitignore").write_text("vendored/\n")
    git(tmp_path, "init", "-q")
    inner = tmp_path / "vendored" / "inner"
    inner.mkdir(parents=True)
    (inner / "pyproject.toml").write_text("")
    (inner / "a.py").write_text("1")
    before = scan(inner)
    assert before.files == ("a.py", "pyproject.toml")
    (inner / "a.py").write_text("2")
    assert scan(inner).digest != before.digest


def test_submodule_ignores_by_its_own_rules(package: Path, tmp_path: Path) -> None:
    """What a submodule ignores is no content of the package around it."""
    outer = make_package(tmp_path / "outer")
    git(outer, "submodule", "--quiet", "add", str(package), "deps/inner")
    (outer / "deps" / "inner" / "data").mkdir()
    (outer / "deps" / "inner" / "data" / "big").write_text("x")
    inner = {name for name in scan(outer).files if name.startswith("deps/inner/")}
    assert inner == {f"deps/inner/{name}" for name in (".gitignore", "a.py", "pyproject.toml")}
