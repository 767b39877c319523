"""The options of the field that select: each gives the packages that uv exports for the option of that name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ray_envcache.checkout.project import Project
from ray_envcache.errors import LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import interpreter, lockfile
from tests import support

pytestmark = pytest.mark.host


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    """A project with an extra, and groups of which one is a default that conflicts with another."""
    return support.make_grouped_project(tmp_path / "project", wheels)


def selected(path: Path, **options: Any) -> set[str]:
    """The packages that a field value selects."""
    spec = EnvSpec.parse({"path": path, **options})
    python = interpreter.probe(interpreter.base_executable(None))
    found = lockfile.resolve(spec, Project.locate(Path(spec.path), spec.package), python)
    return {f"{package.name}=={package.version}" for package in found.packages}


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ({}, "--no-dev"),
        ({"dev": True}, ""),
        ({"groups": ["dev"]}, ""),
        ({"all_extras": True}, "--all-extras --no-dev"),
        ({"all_extras": True, "no_extras": ["gpu"]}, "--all-extras --no-extra gpu --no-dev"),
        ({"groups": ["cu13"], "default_groups": False}, "--no-default-groups --group cu13"),
        ({"groups": ["cu13"], "no_groups": ["cu12"]}, "--group cu13 --no-group cu12 --no-dev"),
        ({"all_groups": True, "no_groups": ["cu12"]}, "--all-groups --no-group cu12"),
        ({"only_groups": ["test"]}, "--only-group test"),
        ({"all_packages": True}, "--all-packages --no-dev"),
    ],
)
def test_as_uv_selects(project: Path, options: dict[str, Any], flags: str) -> None:
    """uv is the judge."""
    arguments = ("export", "--frozen", "--no-hashes", "--no-header", "--no-annotate", *flags.split())
    exported = support.run_uv(*arguments, cwd=project.parent)
    assert selected(project, **options) == set(re.findall(r"(?m)^[\w-]+==[\w.]+", exported))


def test_default_group_in_conflict(project: Path) -> None:
    """The hint of that error can be followed."""
    with pytest.raises(LockfileError, match="`no_groups`"):
        selected(project, groups=["cu13"])


def test_what_goes_together_with_nothing(project: Path) -> None:
    """Options that exclude each other are an error with uv's reason."""
    with pytest.raises(LockfileError, match=r"cannot be used with(?s:.*)leave out one"):
        selected(project, only_groups=["test"], extras=["gpu"])


def test_other_lockfiles_have_no_groups(tmp_path: Path) -> None:
    """A pylock.toml has no default groups to leave out."""
    (tmp_path / "pylock.toml").write_text('lock-version = "1.0"\ncreated-by = "a test"\npackages = []\n')
    with pytest.raises(LockfileError, match="`default_groups`"):
        selected(tmp_path / "pylock.toml", default_groups=False)
