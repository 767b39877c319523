"""What people see of a build, from lines as uv prints them."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_envcache.build import progress
from ray_envcache.build.plan import EnvironmentPlan
from ray_envcache.build.progress import Observer, observer
from ray_envcache.resolve.interpreter import Interpreter
from ray_envcache.resolve.lockfile import ResolvedPackage, ResolvedSet
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Lease
from tests import support

LINES = """\
Resolved 20 packages in 95ms
   Building foo==1.0
Downloading torch (2.0GiB)
      Built foo==1.0
 Downloaded torch
Prepared 2 packages in 259ms
Installed 20 packages in 30ms
 + foo==1.0 (from git+https://example.org/foo@bba30017289a5d4cad8d7d1b89ed4d1e5c7047e8)
warning: something
""".splitlines()


def plan(project: str = "demo", size: int = 0) -> EnvironmentPlan:
    package = ResolvedPackage("numpy", "1.0", "wheel", "sha256:00", size, {})
    python = Interpreter("/usr/bin/python", "cpython", "3.12.4", "", "", (), {})
    return EnvironmentPlan(
        "0" * 32, python, Path("/project"), project, "2.60", ResolvedSet((package,)), {"ray": "2.60"}, None
    )


@pytest.fixture
def lease(tmp_path: Path) -> Lease:
    """A lease that only says where its environment lies."""
    lease = Lease(Entry("0" * 32, 1, tmp_path), -1)
    lease._in_use = None
    return lease


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def shows(self) -> list[str]:
        """The lines that a person sees in the end."""
        return [line.rpartition("\x1b[2K")[2] for line in self.getvalue().split("\n")]


@pytest.fixture(autouse=True)
def terminal_like_any(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A terminal of a usual size, and no thread left behind."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def build(shown: Observer, lease: Lease, of: EnvironmentPlan) -> None:
    shown.started(of)
    for line in LINES:
        shown.line(line)
    shown.finished(lease, 1.25)


def test_log(lease: Lease) -> None:
    """In a log a build is a headline, what uv says but for its list of packages, and where the result lies."""
    stream = io.StringIO()
    with observer(stream) as shown:
        build(shown, lease, plan())
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Building the environment of demo: 1 packages"
    assert lines[1:-1] == [f"  {line.strip()}" for line in LINES if "+ foo" not in line]
    assert re.fullmatch(rf"Built in 1\.[23] s: {re.escape(str(lease.entry.venv))}", lines[-1])


def test_size_in_the_headline() -> None:
    """Where the lockfile knows sizes, the headline says how much is to be downloaded."""
    stream = io.StringIO()
    with observer(stream) as shown:
        shown.started(plan(size=16_900_000))
    assert re.fullmatch(r"Building the environment of demo: 1 packages, 1\d\.\d MB\n", stream.getvalue())


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_nothing_for_nothing(stream: io.StringIO) -> None:
    """Where nothing is built and nothing is waited for, nothing is printed."""
    with observer(stream):
        pass
    assert stream.getvalue() == ""


def test_waiting_is_said_once() -> None:
    """That another process builds is said once, however long it takes, and again where yet another one does."""
    stream = io.StringIO()
    with observer(stream) as shown:
        for builder in ["driver 17"] * 5 + ["driver 18"]:
            shown.waiting(builder)
    assert stream.getvalue().splitlines() == [
        "Waiting for the environment: driver 17 builds it",
        "Waiting for the environment: driver 18 builds it",
    ]


def test_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """While uv says nothing a log is told now and then how long it takes, and what uv said last."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    stream = io.StringIO()
    with observer(stream) as shown:
        shown.started(plan())
        shown.line("   Building foo==1.0")
        support.wait_until(lambda: len(stream.getvalue().splitlines()) > 4, "some signs")
    assert re.fullmatch(r"  \d+ s  Building foo==1\.0", stream.getvalue().splitlines()[-1])


@pytest.mark.parametrize("project", ["demo", "[bold]demo", "demo[/red]", "ü" * 300, "\x1b[31mred"])
def test_terminal(lease: Lease, project: str) -> None:
    """On a terminal headlines stay and what uv says is gone in the end; no name can move the cursor."""
    stream = Terminal()
    with observer(stream) as shown:
        shown.waiting("driver 17")
        build(shown, lease, plan(project))
    head, waited, built, rest = stream.shows()
    assert head == "Waiting for the environment: driver 17 builds it"
    assert waited == f"Building the environment of {project}: 1 packages".replace("\x1b", "?")
    assert built.endswith(f"s: {lease.entry.venv}")
    assert rest == ""


def test_line_that_moves() -> None:
    """On a terminal one line shows the seconds and what uv said last, never longer than the terminal is wide."""
    stream = Terminal()
    with observer(stream) as shown:
        shown.started(plan())
        shown.line(f"Downloading {'long' * 50}\x1b[31m (2.0GiB)")
        support.wait_until(lambda: "Downloading" in stream.getvalue(), "the line")
    moving = [text for text in re.split(r"[\r\n]+", stream.getvalue()) if "Downloading" in text]
    assert all(re.fullmatch(r"\x1b\[2K[|/\\-] \d+ s  Downloading [long]+", text) for text in moving)
    assert {len(text) for text in moving} == {79 + len("\x1b[2K")}


def test_dumb_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that cannot clear a line gets plain lines."""
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with observer(stream) as shown:
        shown.started(plan())
    assert stream.getvalue() == "Building the environment of demo: 1 packages\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_compiling(stream: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that are compiled so far are counted while one waits; two entries are one headline."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    folder = tmp_path / "cpython-312-0"
    folder.mkdir()
    for number in range(1234):
        (folder / f"{number}.pyc").touch()
    with observer(stream) as shown:
        for _ in range(2):
            shown.compiling(tmp_path)
        support.wait_until(lambda: "s  1,234 modules compiled" in stream.getvalue(), "it was said")
    assert stream.getvalue().count("Compiling bytecode") == 1
