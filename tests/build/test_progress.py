"""What people see of a build, from lines as uv prints them."""

from __future__ import annotations

import io
import re
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ray_envcache.build import progress
from ray_envcache.build.builder import Observer
from ray_envcache.build.environment import EnvironmentPlan
from ray_envcache.build.progress import Steps, observer
from ray_envcache.resolve.interpreter import Interpreter
from ray_envcache.resolve.lockfile import ResolvedPackage, ResolvedSet
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Lease

BUILD = """\
Using Python 3.12.4 environment at: venv
Resolved 20 packages in 95ms
   Updating https://example.org/foo (HEAD)
    Updated https://example.org/foo (bba30017289a5d4cad8d7d1b89ed4d1e5c7047e8)
   Building foo==1.0
   Building bar @ git+https://example.org/foo@bba30017289a5d4cad8d7d1b89ed4d1e5c7047e8
Downloading numpy (16.1MiB)
Downloading torch (2.0GiB)
Downloading pillow (512.0KiB)
 Downloaded pillow
      Built foo==1.0
      Built bar @ git+https://example.org/foo@bba30017289a5d4cad8d7d1b89ed4d1e5c7047e8
 Downloaded numpy
 Downloaded torch
Prepared 2 packages in 259ms
Uninstalled 1 package in 0.48ms
Installed 20 packages in 30ms
 + foo==1.0 (from git+https://example.org/foo@bba30017289a5d4cad8d7d1b89ed4d1e5c7047e8)
warning: something
"""
LIVE_LINES = BUILD.splitlines()
TOTAL = pytest.approx(16.1 * 2**20 + 2 * 2**30 + 512 * 2**10, abs=2)


def after(*lines: str) -> Steps:
    steps = Steps()
    for line in lines:
        steps.feed(line)
    return steps


@pytest.mark.parametrize(
    ("lines", "text"),
    [
        ([], "preparing"),
        (["Downloading numpy (16.1MiB)"], "downloading numpy"),
        (["   Building foo==1.0"], "building foo==1.0"),
        (["   Updating https://example.org/foo (HEAD)"], "updating https://example.org/foo"),
        (["Downloading numpy (16.1MiB)", "   Building foo==1.0"], "downloading numpy and 1 more"),
        (["Downloading numpy (16.1MiB)", "   Building foo==1.0", " Downloaded numpy"], "building foo==1.0"),
        (["   Building foo==1.0", "      Built foo==1.0"], "preparing"),
        (["Downloading numpy (16.1MiB)", "Prepared 2 packages in 259ms"], "installing"),
        (["Prepared 1 package in 1m 02s", "Installed 1 package in 30ms"], "checking"),
        (["error: no such thing", "", "hint: Downloading"], "preparing"),
        ([" Downloaded never-announced"], "preparing"),
        (LIVE_LINES, "checking"),
    ],
)
def test_steps(lines: list[str], text: str) -> None:
    """uv's lines tell what is being done at the moment."""
    assert str(after(*lines)) == text


def test_bytes() -> None:
    """The sizes that uv announces add up, and those of finished downloads count as done."""
    steps = after(*LIVE_LINES[:9])
    assert steps.total_bytes == TOTAL
    assert steps.done_bytes == 0
    steps.feed(" Downloaded pillow")
    assert steps.done_bytes == 512 * 2**10
    assert after(*LIVE_LINES).done_bytes == TOTAL


def test_lines_worth_showing() -> None:
    """Worth a line of their own are large downloads and finished steps."""
    steps = Steps()
    assert [line.strip() for line in LIVE_LINES if steps.feed(line)] == [
        "Downloading numpy (16.1MiB)",
        "Downloading torch (2.0GiB)",
        "Downloading pillow (512.0KiB)",
        "Prepared 2 packages in 259ms",
        "Installed 20 packages in 30ms",
    ]


odd = st.sampled_from(["(", ")", "1.2.3MiB", "16.1MiB", "9XB", ".B", "..GiB", "", "\x1b[2m", "²MiB", "1" * 400 + "TiB"])
said = st.text(max_size=30) | st.builds(
    "{} {} ({})".format,
    st.sampled_from(["Downloading", " Downloaded", "Building", "Updating"]),
    odd,
    odd | st.text(max_size=9),
)


@given(st.lists(said, max_size=6))
def test_any_line(lines: list[str]) -> None:
    """No line of uv, of this version or another, can break a build by the way it is shown."""
    steps = after(*lines)
    assert str(steps)
    assert steps.done_bytes <= steps.total_bytes


def plan(project: str = "demo", size: int = 0) -> EnvironmentPlan:
    package = ResolvedPackage("numpy", "1.0", "wheel", "sha256:00", size, {})
    python = Interpreter("/usr/bin/python", "cpython", "3.12.4", "", "", (), {})
    return EnvironmentPlan(
        "0" * 32, python, Path("/project"), project, "2.60", ResolvedSet((package,)), {"ray": "2.60"}
    )


@pytest.fixture
def lease(tmp_path: Path) -> Lease:
    """A lease that only says where its environment lies."""
    lease = Lease(Entry("0" * 32, 1, tmp_path), -1)
    lease._in_use = None
    return lease


def build(shown: Observer, lease: Lease, of: EnvironmentPlan) -> None:
    shown.started(of)
    for line in LIVE_LINES:
        shown.line(line)
    shown.finished(lease, 1.25)


def test_plain(lease: Lease) -> None:
    """In a log a build is a headline, a line for each download and step, and where the result lies."""
    stream = io.StringIO()
    with observer(stream) as shown:
        build(shown, lease, plan())
    lines = stream.getvalue().splitlines()
    assert lines[0] == "Building the environment of demo: 1 packages"
    assert lines[1:-1] == [
        "  Downloading numpy (16.1MiB)",
        "  Downloading torch (2.0GiB)",
        "  Downloading pillow (512.0KiB)",
        "  Prepared 2 packages in 259ms",
        "  Installed 20 packages in 30ms",
    ]
    assert re.fullmatch(rf"Built in 1\.[23] s: {re.escape(str(lease.entry.venv))}", lines[-1])


def test_plain_with_size() -> None:
    """Where the lockfile knows sizes, the headline says how much is to be downloaded."""
    stream = io.StringIO()
    with observer(stream) as shown:
        shown.started(plan(size=16_900_000))
    assert re.fullmatch(r"Building the environment of demo: 1 packages, 1\d\.\d MB\n", stream.getvalue())


def test_plain_says_nothing_for_nothing() -> None:
    """Where nothing is built and nobody waits, nothing is printed."""
    stream = io.StringIO()
    with observer(stream):
        pass
    assert stream.getvalue() == ""


def test_plain_waits_once() -> None:
    """That somebody else builds is said once, however long it takes."""
    stream = io.StringIO()
    with observer(stream) as shown:
        for _ in range(5):
            shown.waiting("driver 17")
    assert stream.getvalue() == "Waiting for the environment: driver 17 builds it\n"


def test_plain_gives_a_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build that says nothing for long says what it is at, and stops saying so at its end."""
    monkeypatch.setattr(progress, "PLAIN_SECONDS", 0.01)
    before = threading.active_count()
    stream = io.StringIO()
    with observer(stream) as shown:
        shown.started(plan())
        shown.line("   Building foo==1.0")
        while not (said := stream.getvalue().splitlines()[1:]):
            pass
    assert re.fullmatch(r"  \d+ s: (preparing|building foo==1\.0)", said[0])
    assert threading.active_count() == before


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("project", ["demo", "[bold]demo", "demo[/red]", "[/]", "ü" * 300])
def test_live(lease: Lease, project: str) -> None:
    """On a terminal every project's name can be shown, and what remains in the end is where the result lies."""
    stream = Terminal()
    with observer(stream) as shown:
        shown.waiting("driver 17")
        build(shown, lease, plan(project))
    assert stream.getvalue().splitlines()[-1].endswith(f"s: {lease.entry.venv}")


def test_live_says_nothing_for_nothing() -> None:
    """On a terminal, too, nothing is printed where nothing is built."""
    stream = Terminal()
    with observer(stream):
        pass
    assert stream.getvalue() == ""
