"""Processes that use an environment are seen by `why`, whether or not they hold a flock on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ray_envcache.acquire import Store
from ray_envcache.store.layout import Entry
from tests import support
from tests.cli.test_commands import run

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what a process runs from"),
]

Children = list[subprocess.Popen[str]]
WAIT = "print('up', flush=True); input()"


@pytest.fixture
def entry(store: Store, tmp_path: Path, wheels: Path) -> Entry:
    """An environment of pure Python."""
    return support.build_finished(store, support.make_project(tmp_path / "project", wheels, ["ray"]))


def started(children: Children, argv: Sequence[str | Path], **options: object) -> int:
    """Start a process that says it is up; return its pid."""
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    children.append(child)
    assert child.stdout.readline() == "up\n"
    return int(child.pid)


def users(entry: Entry) -> list[tuple[int, str]]:
    """Pids and kinds, as `why` shows them."""
    (one,) = json.loads(run("why", entry.key, "--json").stdout)["envs"]
    assert one["in_use"] == bool(one["holders"])
    return [(user["pid"], user["kind"]) for user in one["holders"]]


@pytest.mark.parametrize("command", ["path", "name", "renamed"])
def test_interpreter_without_hold(entry: Entry, children: Children, command: str) -> None:
    """An interpreter that took no hold is a user like any other.

    It has the base Python as executable and maps no file of the entry; Ray's workers also change their argv[0].
    """
    name = {"path": str(entry.python), "name": "python", "renamed": "ray::IDLE"}[command]
    environ = {**os.environ, "PATH": f"{entry.bin}:{os.environ['PATH']}", "VIRTUAL_ENV": str(entry.venv)}
    # -S: without `site` no .pth file is read, and so no hold taken.
    pid = started(children, [name, "-S", "-c", WAIT], executable=entry.python, env=environ)
    assert users(entry) == [(pid, "process")]
    children[0].communicate("\n")
    assert users(entry) == []


def test_interpreter_with_hold(entry: Entry, children: Children) -> None:
    """An interpreter with a hold is a user once."""
    pid = started(children, [entry.python, "-c", WAIT])
    assert users(entry) == [(pid, "process")]


def test_program_in_an_entry(entry: Entry, children: Children) -> None:
    """Another program that runs from an entry, as raylet does, is a user too, though it never has a hold."""
    shutil.copy2("/bin/sh", entry.bin / "program")
    pid = started(children, [entry.bin / "program", "-c", "echo up; read line"])
    assert users(entry) == [(pid, "process")]


def test_other_interpreters_do_not_count(entry: Entry, children: Children) -> None:
    """Another Python in a shell with the environment activated does not use it."""
    environ = {**os.environ, "VIRTUAL_ENV": str(entry.venv)}
    started(children, [sys.executable, "-S", "-c", WAIT], env=environ)
    assert users(entry) == []
