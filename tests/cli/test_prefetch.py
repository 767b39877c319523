"""`prefetch` as people and supervisors see it, without a cluster."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from rich.console import Console

from ray_envcache.cli.doctor import _table
from ray_envcache.cli.main import cli
from tests import support

ROW: dict[str, Any] = {
    "node_id": "b4b77d05" * 7, "ip": "10.0.0.7", "host": "worker", "path": "/app", "ok": False, "key": None, "how": None,
    "seconds": None, "bytecode": None, "platform": None, "packages": [], "findings": [],
}  # fmt: skip
DONE = {"ok": True, "key": "a" * 32, "how": "built", "seconds": 1.25, "bytecode": True}
FAILED = {"seconds": 3.0, "findings": [{"name": "answer", "state": "error", "text": "no", "hint": ""}]}


def test_live_table() -> None:
    """What is not ready comes first, each as it is by now, and text of other machines reaches no terminal as it is."""
    rows = [
        {**ROW, "node_id": "1", "how": "built"},
        {**ROW, **FAILED, "path": "/bad[red]\x1b[31m"},
        ROW,
        {**ROW, **DONE, "node_id": "1"},
        {**ROW, **DONE, "node_id": "4", "bytecode": False},
    ]
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(_table(rows))
    head, *lines = [line.split() for line in console.export_text().splitlines()]
    assert head == ["NODE", "HOST", "ENVIRONMENT", "STATE", "KEY", "SECONDS", "BYTECODE"]
    shown = [line[3:] for line in lines]
    assert shown[0][0].startswith("/bad[red]")
    assert "\x1b" not in console.export_text(clear=False)
    assert shown[0][1:] == ["failed", "-", "3.0", "-"]
    assert shown[1:] == [
        ["/app", "running", "-", "-", "-"],
        ["/app", "built", "a" * 12, "1.2", "complete"],
        ["/app", "built", "a" * 12, "1.2", "missing"],
    ]


@pytest.mark.parametrize(
    "arguments", [["prefetch"], ["doctor", "--address", "auto", "."], ["prefetch", "--timeout=0", "."]]
)
def test_usage(arguments: list[str]) -> None:
    """What makes no sense is refused before any cluster is asked."""
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 2


@pytest.mark.host
@pytest.mark.parametrize("project", [True, False])
def test_nothing_to_ask(tmp_path: Path, wheels: Path, *, project: bool) -> None:
    """A bad project is an error before the cluster is asked, and a cluster that is not there is one at once."""
    folder = tmp_path / "project"
    if project:
        support.make_project(folder, wheels, ["ray"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "ray_envcache", "prefetch", "--address", address, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    expected = f"error: Cannot ask the cluster at `{address}`: " if project else f"error: Cannot look at `{folder}`: "
    assert done.stderr.startswith(expected)
    assert "\nhint: " in done.stderr
