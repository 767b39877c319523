"""What the examples say about stores that travel: in an image, and between jobs of CI."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import support
from tests.examples.nodes import EXAMPLES, document

pytestmark = [pytest.mark.host, pytest.mark.pypi]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the example's project, locked. Of the packages only one that is small and has a library is left."""
    folder = shutil.copytree(EXAMPLES / "project", tmp_path / "app")
    pyproject = folder / "pyproject.toml"
    pyproject.write_text(
        re.sub(r"^dependencies = .*", 'dependencies = ["humanize>=4"]', pyproject.read_text(), flags=re.MULTILINE)
    )
    support.run_uv("lock", "--python", sys.executable, cwd=folder)
    return folder


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """A shell where `ray-envcache` is ours."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "ray-envcache").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ray_envcache "$@"\n')
    (programs / "ray-envcache").chmod(0o755)
    return {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}


def shell(command: str, environ: dict[str, str], cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["sh", "-ec", command], env=environ, cwd=cwd, capture_output=True, text=True, check=True)


def carry(archive: Path, *folders: Path) -> None:
    """Put folders into one archive, remove them, and unpack them: what a layer of an image and a cache of CI do."""
    subprocess.run(["tar", "--format=gnu", "-P", "-cf", archive, *folders], check=True)
    for folder in folders:
        subprocess.run(["rm", "-rf", folder], check=True)
        assert not folder.exists()
    subprocess.run(["tar", "-P", "-xf", archive], check=True)
    archive.unlink()


def instructions() -> list[list[str]]:
    """The Dockerfile's, each as its name and the rest; comments and continuations are no more."""
    text = (EXAMPLES / "docker" / "Dockerfile").read_text()
    lines = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [line.split(maxsplit=1) for line in lines if line]


def test_dockerfile(project: Path, environ: dict[str, str], tmp_path: Path) -> None:
    """The step that warms the store, run; a container with what the last stage has finds all of it, and builds nothing."""
    steps = instructions()
    assert [rest.split(" AS ")[-1] for name, rest in steps if name == "FROM"] == [
        "python",
        "warm",
        "store",
        "base",
        "base",
    ]
    (warm,) = [rest for name, rest in steps if name == "RUN" and "ray-envcache build" in rest]
    copies = [rest for name, rest in steps if name == "COPY"]
    copied = [
        "pyproject.toml uv.lock /app/",
        "--from=warm /opt/envcache /",
        ". /app",
        "--from=warm /opt/envcache /opt/envcache",
    ]
    assert copies == copied
    app = tmp_path / "warm" / "app"
    app.mkdir(parents=True)
    for name in copied[0].split()[:-1]:
        shutil.copy(project / name, app)
    root = tmp_path / "opt" / "envcache"
    done = shell(warm.replace("/opt/envcache", str(root)).replace("/app", str(app)), environ, tmp_path)
    assert "Compiling bytecode" in done.stderr
    carry(tmp_path / "layer.tar", root)
    variables = dict(word.split("=") for name, rest in steps if name == "ENV" for word in shlex.split(rest))
    inside = {**environ, **variables, "RAY_ENVCACHE_DIR": str(tmp_path / "own")}
    inside["RAY_ENVCACHE_READONLY_DIRS"] = variables["RAY_ENVCACHE_READONLY_DIRS"].replace("/opt/envcache", str(root))
    found = shell(f"ray-envcache build {project}", inside, tmp_path)
    assert found.stdout.startswith(str(root))
    assert found.stderr == ""
    assert ["CMD", json.dumps(["python", "dice.py"])] in steps
    assert (project / "dice.py").exists()


def test_store_between_jobs(project: Path, environ: dict[str, str], tmp_path: Path) -> None:
    """The workflow's steps in two jobs on two machines, with its cache in between: the second one builds nothing."""
    home = tmp_path / "home"
    home.mkdir()
    workflow = document("ci/github.yml")
    place = workflow["env"]["RAY_ENVCACHE_DIR"].replace("/home/runner", str(home))
    steps = workflow["jobs"]["experiments"]["steps"]
    (cache,) = [step["with"] for step in steps if "actions/cache" in step.get("uses", "")]
    cached = [Path(path.replace("~", str(home))) for path in cache["path"].split()]
    assert place in map(str, cached)
    runs = [step["run"] for step in steps if step.get("run", "").startswith("ray-envcache")]
    assert runs == ["ray-envcache build .", "ray-envcache gc --unused-for 3d"]
    environ = {**environ, "HOME": str(home), "RAY_ENVCACHE_DIR": place, "UV_CACHE_DIR": str(cached[1])}
    first = [shell(run, environ, project) for run in runs]
    assert "Built in" in first[0].stderr
    files = {path: path.stat().st_nlink for path in cached[0].rglob("*.so")}
    carry(tmp_path / "cache.tar", *cached)
    second = [shell(run, environ, project) for run in runs]
    assert second[0].stdout == first[0].stdout
    assert second[0].stderr == ""
    assert second[1].stdout.startswith("Removed 0 environments")
    assert files
    assert {path: path.stat().st_nlink for path in files} == files
    python = second[0].stdout.strip()
    assert support.run_python("import humanize, ray; print(ray.__version__)", python=python).strip()
