"""The facts of a plan: what its key is made of, in words, and nothing that is not for other eyes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ray_envcache.build.plan import EnvironmentPlan
from ray_envcache.resolve.lockfile import ResolvedPackage, ResolvedSet
from tests.store.test_key import BASE, PYTHON, package


def plan(*packages: ResolvedPackage, settings: str = "{}") -> EnvironmentPlan:
    resolved = ResolvedSet(packages, build_settings=settings)
    return EnvironmentPlan("k" * 32, PYTHON, Path("/p"), "p", "2.60", resolved, added={}, selection=None)


def test_headline() -> None:
    """It says how much is installed and, where the lockfile knows sizes, how much is to be downloaded."""
    unknown, known = replace(package("a"), size=0), replace(package("b"), size=16_900_000)
    assert plan(unknown).headline == "Building the environment of p: 1 packages"
    assert plan(unknown, known).headline == "Building the environment of p: 2 packages, 16.9 MB"


def test_facts() -> None:
    """Packages with their files, and the interpreter."""
    found = plan(*BASE.packages).facts()
    assert found["package ray"] == "2.60"
    assert found["artifact a"] == "00"
    assert found["python version"] == "3.12.4"


def test_settings_matter_where_something_is_built() -> None:
    """As in the key, and as digests: a value may hold a secret."""
    settings = '{"config-settings": {"token": "secret"}}'
    assert "setting config-settings" not in plan(package("a"), settings=settings).facts()
    built = plan(package("a", kind="sdist"), settings=settings).facts()
    assert "setting config-settings" in built
    assert "secret" not in str(built)


def test_packages_are_told_apart_as_keys_are() -> None:
    """By hash, commit and subdirectory; without any of them by all that is known, of which nothing is shown."""

    def artifact(kind: str, digest: str, url: str, **table: str) -> str:
        return plan(package("a", "", kind, digest, url=url, **table)).facts()["artifact a"]

    commit = artifact("vcs", "c1", "https://host/a", subdirectory="x")
    assert commit == artifact("vcs", "c1", "https://mirror/a", subdirectory="x")
    assert commit != artifact("vcs", "c1", "https://host/a", subdirectory="y")
    loose = artifact("archive", "", "https://host/a.tgz?token=secret")
    assert "secret" not in loose
    assert loose != artifact("archive", "", "https://host/b.tgz")
    assert plan(package("a", "")).facts()["package a"] == "(no version)"
