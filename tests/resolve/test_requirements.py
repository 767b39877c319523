"""Requirements files that uv refuses, and the hashes that they list."""

from __future__ import annotations

from pathlib import Path

import pytest

from ray_envcache.build.plan import require_buildable
from ray_envcache.errors import LockfileError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve import export
from ray_envcache.resolve.interpreter import installed_ray
from tests import support

ONE, TWO = "1" * 64, "2" * 64

# From `pip freeze` and conda: the line, what is said of it, and what to write instead.
OF_PIP_AND_CONDA = {
    "idna @ file:///home/conda/feedstock_root/build_artifacts/idna_1/work": (
        "another machine.*line 3",
        "name==version",
    ),
    "-e git+https://example.org/a@0123456789abcdef0123456789abcdef01234567#egg=a": (
        "cannot be editable",
        "name @ git+",
    ),
    "--editable=git+ssh://git@example.org/a#egg=a": ("cannot be editable", "name @ git+"),
    "wanted==1.0 --use-pep517": ("--use-pep517.*requirements.txt:3", "leave out that option"),
    "wanted==1.0 --global-option=x": ("--global-option.*requirements.txt:3", "leave out that option"),
    'wanted==1.0 --config-settings="a=b"': ("--config-settings.*requirements.txt:3", "leave out that option"),
    "--use-pep517": ("Unexpected '-'.*requirements.txt:3", "leave out that option"),
    "wanted=1.0=py311_0": ("Not an exact version.*wanted=1.0=py311_0.*line 3", "name==version"),
    "@EXPLICIT": ("No package is named.*@EXPLICIT.*line 3", "name==version"),
    "https://conda.anaconda.org/conda-forge/noarch/idna-3.7-pyhd8ed1ab_0.conda": (
        "No package is named.*line 3",
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


def test_keep_listed() -> None:
    """Artifacts whose hashes are not listed are left out, unless there is nothing else; local folders have none."""
    wheels = [{"url": digest, "hashes": {"sha256": digest}} for digest in (ONE, TWO)]
    package = {"name": "a", "version": "1.0", "wheels": wheels, "sdist": {"hashes": {"sha256": TWO}}}
    export._keep_listed(package, {ONE}, Path("a.txt"))
    assert package == {"name": "a", "version": "1.0", "wheels": wheels[:1]}
    export._keep_listed(folder := {"name": "a", "directory": {"path": "a"}}, {ONE}, Path("a.txt"))
    assert folder["directory"] == {"path": "a"}
    other = {"name": "a", "version": "1.0", "archive": {"url": "a", "hashes": {"sha256": TWO}}}
    with pytest.raises(LockfileError, match=r"None of the files of a 1\.0 has a hash that `a\.txt` lists"):
        export._keep_listed(other, {ONE}, Path("a.txt"))
