"""The examples that start clusters, run: nodes as each tool starts them, a notebook, a program that is not changed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import support
from tests.cluster.conftest import NEWEST, Host, end_nodes, free_port, start_node
from tests.examples.nodes import EXAMPLES, RECIPES, ROLES, Node, node

pytestmark = [pytest.mark.cluster, pytest.mark.pypi, pytest.mark.parametrize("python", [NEWEST], indirect=True)]

# In the foreground, small, and beside other clusters of this host.
RAY = """#!/bin/sh
case "$*" in *--head*) set -- "$@" --include-dashboard=false;; esac
exec {bin}/ray "$@" --block --node-ip-address=127.0.0.1 --num-cpus=1 \
  --min-worker-port=0 --max-worker-port=0 --object-store-memory=100000000
"""


@pytest.fixture
def examples(host: Host) -> Path:
    """A copy of the examples, whose projects are locked."""
    folder = shutil.copytree(EXAMPLES, host.folder / "examples")
    for pyproject in folder.rglob("pyproject.toml"):
        support.run_uv("lock", "--python", sys.executable, cwd=pyproject.parent)
    return folder


def here(host: Host, recipe: str, role: str, port: int) -> Node:
    """A recipe's node for this host: other places, another port, and no part of the launcher that makes hosts."""
    places = {
        "/opt/app/.venv/bin/ray": "ray",
        "/var/cache/ray-envcache": str(host.layout.root),
        "/scratch/envcache": str(host.layout.root),
        "/etc/ray/auth_token": str(host.home / ".ray" / "auth_token"),
        "/run/secrets/auth_token": str(host.home / ".ray" / "auth_token"),
        " --autoscaling-config=~/ray_bootstrap_config.yaml": "",
        "=HEAD:": "=127.0.0.1:",
        "=head:": "=127.0.0.1:",
        "=$RAY_HEAD_IP:": "=127.0.0.1:",
        "6379": str(port),
    }

    def replaced(text: str) -> str:
        for old, new in places.items():
            text = text.replace(old, new)
        return text

    environ, command = node(recipe, role)
    return Node({name: replaced(value) for name, value in environ.items()}, replaced(command))


def run(host: Host, *command: str | Path, cwd: Path, **environ: str) -> tuple[str, str]:
    """What a command says on stdout and stderr; its programs are first those of the host."""
    path = f"{host.folder / 'bin'}:{host.python.parent}:/usr/local/bin:/usr/bin:/bin"
    variables = host.environ(PATH=path, **environ)
    child = subprocess.Popen(
        list(command), cwd=cwd, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    host.started.append(child)
    out, err = child.communicate()
    assert child.returncode == 0, out + err
    return out, err


@pytest.mark.parametrize("recipe", RECIPES)
def test_nodes(host: Host, examples: Path, recipe: str) -> None:
    """Head and worker start with the recipe's variables and command; `dice.py` finds them, and runs from the store."""
    programs = host.folder / "bin"
    programs.mkdir()
    (programs / "ray").write_text(RAY.format(bin=host.python.parent))
    (programs / "ray").chmod(0o755)
    port = free_port()
    started: list[subprocess.Popen[str]] = []
    try:
        for role in ROLES:
            environ, command = here(host, recipe, role, port)
            path = f"{programs}:{host.python.parent}:/usr/bin:/bin"
            started.append(start_node(command, {**host.environ(), **environ, "PATH": path}))
        token = {name: value for name, value in environ.items() if name.startswith("RAY_AUTH_")}
        out, err = run(
            host, host.python, examples / "project" / "dice.py", cwd=host.folder, **{"RAY_AUTH_MODE": "token", **token}
        )
    finally:
        end_nodes(started)
    assert re.search(rf"Connecting to existing Ray cluster at address: \S+:{port}\.\.\.", err)
    total, *interpreters = out.splitlines()
    assert 3_400_000 < int(total.removeprefix("a million dice: ").replace(",", "")) < 3_600_000
    (entry,) = host.layout.all_entries()
    assert [line.split(": ")[1] for line in interpreters] == [str(entry.python)]


def test_notebook(host: Host, examples: Path) -> None:
    """All cells run in turn, in the notebook's folder; the helper's environment is the one that is there."""
    out, _ = run(host, host.python, "notebook.py", cwd=examples / "notebook")
    total, again, listed = out.splitlines()
    assert 13_000 < int(total) < 15_000
    assert 3_000 < int(again) < 4_000
    (entry,) = host.layout.all_entries()
    assert re.fullmatch(rf"{entry.key[:12]} dice \d+ MB in use", listed)


def test_unmodified(host: Host, examples: Path) -> None:
    """The program and its script run from one environment, and leave neither a .venv nor a session directory."""
    project = examples / "unmodified"
    found = []
    for command in (["python", "main.py"], ["./train.sh"]):
        out, _ = run(host, host.python, "-m", "ray_envcache", "run", "--", *command, cwd=project)
        found += re.findall(r"the sum is 7,998,000, found by (\S+)", out)
    assert len(found) == 2
    assert len(set(found)) == 1
    assert Path(found[0]).is_relative_to(host.layout.entries)
    assert not (project / ".venv").exists()
    assert list(host.temp.rglob("session_2*")) == []
