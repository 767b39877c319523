"""The projects whose environments are built: written and locked when the suite runs, so that they never grow old."""

from __future__ import annotations

import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path

from tests import support

SMALL = ("attrs", "click", "humanize", "jinja2", "requests")
MEDIUM = ("numpy", "pandas", "scipy", "pyarrow", "scikit-learn", "matplotlib")
LARGE = (*MEDIUM, "torch")
SIZES = {"small": SMALL, "medium": MEDIUM, "large": LARGE}
_ONE_MORE = "envcache-one-more"
"""The package by which a project differs from its variant."""


@dataclass(frozen=True)
class Project:
    """A locked project. `module` is the one whose first import is measured; `pins` are its packages without ray."""

    name: str
    folder: Path
    module: str
    pins: tuple[str, ...] = ()


def write(folder: Path, dependencies: tuple[str, ...], uv: str = "") -> None:
    """A project with these dependencies and this ray; nothing of its own is installed."""
    folder.mkdir(parents=True)
    # What tells Ray's packaging what not to copy into each cluster.
    (folder / ".gitignore").write_text(".venv\n")
    (folder / "pyproject.toml").write_text(
        textwrap.dedent(f"""\
        [project]
        name = "{folder.name}"
        version = "0.1"
        requires-python = ">=3.10"
        dependencies = {[f"ray=={support.RAY_VERSION}", *dependencies]!r}

        [tool.uv]
        package = false
        """)
        + uv
    )


def write_witnessed(folder: Path, wheels: Path, log: Path) -> None:
    """A project that notes each build of its environment, whoever builds it: see `support.make_witness`."""
    support.make_witness(wheels, log)
    write(folder, ("envcache-witness",), f'find-links = ["{wheels}"]\n')


def write_edited(folder: Path, dependencies: tuple[str, ...]) -> None:
    """A project that is a package itself, installed with what it depends on: `edit` changes a line of it."""
    write(folder, dependencies)
    text = (folder / "pyproject.toml").read_text().replace("package = false\n", "")
    (folder / "pyproject.toml").write_text(
        f'{text}\n[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
    )
    (folder / "src" / folder.name).mkdir(parents=True)
    edit(folder, -1)


def edit(folder: Path, number: int) -> None:
    """Change a line of the project's own package."""
    (folder / "src" / folder.name / "__init__.py").write_text(f"EDITED = {number}\n")


def write_variant(project: Path, folder: Path) -> Path:
    """The same project with one more package; what is locked stays as it is."""
    wheels = folder.parent / f"{folder.name}-wheels"
    support.make_wheel(wheels, _ONE_MORE)
    folder.mkdir()
    shutil.copy(project / "uv.lock", folder)
    text = (project / "pyproject.toml").read_text().replace("dependencies = [", f"dependencies = [{_ONE_MORE!r}, ")
    links = re.search(r"find-links = \[(.*)\]\n", text)
    text = text.replace(links[0], "") if links else text
    more = f'package = false\nfind-links = [{f"{links[1]}, " if links else ""}"{wheels}"]\n'
    (folder / "pyproject.toml").write_text(text.replace("package = false\n", more))
    return folder


def pins_of(export: str) -> tuple[str, ...]:
    """The requirements, one by one, that `uv export` printed; ray is left out: the cluster's own is in every clone."""
    lines = [line.strip() for line in export.splitlines()]
    return tuple(line for line in lines if "==" in line and not line.startswith(("#", "ray==")))
