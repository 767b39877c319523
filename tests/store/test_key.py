"""The key: everything that changes what is installed changes it, and nothing else does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envcache.resolve.interpreter import Interpreter
from ray_envcache.resolve.lockfile import LocalPackage, ResolvedPackage, ResolvedSet
from ray_envcache.store.key import compute_key, digest_of

PYTHON = Interpreter(
    executable="/usr/bin/python3.12",
    implementation="cpython",
    version="3.12.4",
    build="3.12.4 (main, Jun 1 2024) [GCC 13]",
    soabi="cpython-312-x86_64-linux-gnu",
    tags=("cp312-cp312-manylinux_2_39_x86_64", "py3-none-any"),
    markers={
        "sys_platform": "linux",
        "platform_release": "6.1",
        "platform_version": "#1 SMP",
        "python_version": "3.12",
    },
)


def package(
    name: str = "demo", version: str = "1.0", kind: str = "wheel", digest: str = "sha256:00", **table: Any
) -> ResolvedPackage:
    table = {"url": f"file:///{name}-{version}", **table}
    artifact = {"name": name, "version": version, **({"wheels": [table]} if kind == "wheel" else {kind: table})}
    return ResolvedPackage(name, version, kind, digest, size=10, artifact=artifact)


BASE = ResolvedSet(
    (package("a"), package("b"), package("ray", "2.60")),
    local=(LocalPackage("mine", Path("/somewhere"), editable=False),),
    build_settings="{}",
)
KEY = compute_key(BASE, PYTHON)

short = st.text("abc.-1", min_size=1, max_size=3)
packages = st.lists(st.builds(package, short, short, st.sampled_from(["wheel", "sdist", "vcs"]), short), max_size=4)


@given(packages)
def test_format(found: list[ResolvedPackage]) -> None:
    """A key is 32 lower case hex digits, whatever it is the key of."""
    assert re.fullmatch("[0-9a-f]{32}", compute_key(ResolvedSet(tuple(found)), PYTHON))


@given(packages, packages, st.randoms(use_true_random=False))
def test_same_set_same_key(one: list[ResolvedPackage], other: list[ResolvedPackage], random: Any) -> None:
    """Two sets have the same key exactly if they hold the same packages, in whatever order."""
    shuffled = [*one]
    random.shuffle(shuffled)
    key = compute_key(ResolvedSet(tuple(one)), PYTHON)
    assert key == compute_key(ResolvedSet(tuple(shuffled)), PYTHON)
    same = sorted(map(repr, one)) == sorted(map(repr, other))
    assert same == (key == compute_key(ResolvedSet(tuple(other)), PYTHON))


@pytest.mark.parametrize(
    "changed",
    [
        package("c"),
        package("a", "1.1"),
        package("a", digest="sha256:01"),
        package("a", kind="sdist"),
        package("a", kind="vcs", subdirectory="part"),
    ],
    ids=["name", "version", "digest", "kind", "subdirectory"],
)
def test_relevant_of_a_package(changed: ResolvedPackage) -> None:
    """Another name, version, digest, kind or subdirectory of one package is another environment."""
    plain = package("a", kind="vcs") if changed.kind == "vcs" else package("a")
    keys = {compute_key(ResolvedSet((one, package("b"))), PYTHON) for one in (plain, changed)}
    assert len(keys) == 2


def test_one_package_more() -> None:
    """One package more is another environment."""
    more = replace(BASE, packages=(*BASE.packages, package("c")))
    assert compute_key(more, PYTHON) != KEY


@pytest.mark.parametrize(
    "changed",
    [
        {"executable": "/opt/python"},
        {"implementation": "pypy"},
        {"version": "3.12.5"},
        {"build": "3.12.4 (main, Jul 2 2024) [Clang 17]"},
        {"soabi": "cpython-312d-x86_64-linux-gnu"},
        {"tags": ("cp312-cp312-musllinux_1_2_x86_64", "py3-none-any")},
        {"tags": tuple(reversed(PYTHON.tags))},
        {"markers": {**PYTHON.markers, "sys_platform": "darwin"}},
    ],
    ids=str,
)
def test_relevant_of_the_interpreter(changed: dict[str, Any]) -> None:
    """Whatever differs in an interpreter that decides about packages makes another environment."""
    assert compute_key(BASE, PYTHON._replace(**changed)) != KEY


@pytest.mark.parametrize("name", ["platform_release", "platform_version"])
def test_update_of_the_kernel(name: str) -> None:
    """An update of the kernel leaves all keys as they are."""
    assert compute_key(BASE, PYTHON._replace(markers={**PYTHON.markers, name: "6.9"})) == KEY


def test_irrelevant() -> None:
    """Sizes, mirrors and which packages are developed here leave the key as it is."""
    moved = tuple(replace(one, size=99, artifact={**one.artifact, "index": "mirror"}) for one in BASE.packages)
    assert (
        compute_key(
            ResolvedSet(
                moved,
                local=(
                    LocalPackage("yours", Path("/somewhere"), editable=False),
                    LocalPackage("theirs", Path("/somewhere"), editable=False),
                ),
                build_settings="{}",
            ),
            PYTHON,
        )
        == KEY
    )


@pytest.mark.parametrize(("kind", "matters"), [("wheel", False), ("sdist", True), ("vcs", True), ("archive", True)])
def test_build_settings(kind: str, matters: bool) -> None:  # noqa: FBT001
    """Build settings matter exactly where something is built from source."""
    some = ResolvedSet((package("a"), package("b", kind=kind)), build_settings="{}")
    keys = {compute_key(replace(some, build_settings=settings), PYTHON) for settings in ("{}", '{"no-binary": true}')}
    assert (len(keys) == 2) == matters


@pytest.mark.parametrize("kind", ["wheel", "archive", "vcs"])
def test_artifact_without_digest(kind: str) -> None:
    """An artifact without any hash is told from another by where it comes from."""
    keys = {
        compute_key(ResolvedSet((package("a", kind=kind, digest="", url=f"file:///{place}"),)), PYTHON)
        for place in "xy"
    }
    assert len(keys) == 2


def test_no_ambiguity_by_concatenation() -> None:
    """Names and versions cannot flow into each other, unlike in a hash over joined strings."""
    assert digest_of(["ab", "c"]) != digest_of(["a", "bc"])
    sets = [
        ResolvedSet((package("a", "b1"),)),
        ResolvedSet((package("ab", "1"),)),
        ResolvedSet((package("a", "1"), package("b", "1"))),
        ResolvedSet((package("a", "1", digest="sha256:00b"),)),
        ResolvedSet((package("a,b", "1"),)),
    ]
    assert len({compute_key(one, PYTHON) for one in sets}) == len(sets)


def test_digest_is_canonical() -> None:
    """The order of a mapping makes no difference to its digest, and any text can be digested."""
    assert digest_of({"a": 1, "b": "\ud800"}) == digest_of({"b": "\ud800", "a": 1})
