"""What people see of a build, from lines as uv prints them."""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Iterator

import pytest

from ray_envcache.build import progress
from ray_envcache.build.progress import Observer, observer
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


HEAD = "Building the environment of demo: 2 packages"


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


def build(shown: Observer, head: str) -> None:
    shown.say(head)
    for line in LINES:
        shown.line(line)
    shown.say("Built in 1.2 s")


def test_log() -> None:
    """In a log a build is what is said, and what uv says but for its list of packages."""
    stream = io.StringIO()
    with observer(stream) as shown:
        build(shown, HEAD)
    told = [f"  {line.strip()}" for line in LINES if "+ foo" not in line]
    assert stream.getvalue().splitlines() == [HEAD, *told, "Built in 1.2 s"]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_nothing_for_nothing(stream: io.StringIO) -> None:
    """Where nothing is built and nothing is waited for, nothing is printed."""
    with observer(stream):
        pass
    assert stream.getvalue() == ""


def test_the_same_again_is_no_news() -> None:
    """That another process builds is shown once, however long it takes, and again where yet another one does."""
    stream = io.StringIO()
    with observer(stream) as shown:
        for builder in ["driver 17"] * 5 + ["driver 18"]:
            shown.say(builder)
    assert stream.getvalue().splitlines() == ["driver 17", "driver 18"]


def test_sign_of_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """While uv says nothing a log is told now and then how long it takes, and what uv said last."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    stream = io.StringIO()
    with observer(stream) as shown:
        shown.say(HEAD)
        shown.line("   Building foo==1.0")
        support.wait_until(lambda: len(stream.getvalue().splitlines()) > 4, "some signs")
    assert re.fullmatch(r"  \d+ s  Building foo==1\.0", stream.getvalue().splitlines()[-1])


@pytest.mark.parametrize("project", ["demo", "[bold]demo", "demo[/red]", "ü" * 300, "\x1b[31mred"])
def test_terminal(project: str) -> None:
    """On a terminal what is said stays and what uv says is gone in the end; no name can move the cursor."""
    stream = Terminal()
    with observer(stream) as shown:
        shown.say("Waiting")
        build(shown, project)
    assert stream.shows() == ["Waiting", project.replace("\x1b", "?"), "Built in 1.2 s", ""]


def test_line_that_moves() -> None:
    """On a terminal one line shows the seconds and what uv said last, never longer than the terminal is wide."""
    stream = Terminal()
    with observer(stream) as shown:
        shown.say(HEAD)
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
        shown.say(HEAD)
    assert stream.getvalue() == f"{HEAD}\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_a_line_that_is_asked_for(stream: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    """What counts is asked now and then."""
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.01)
    numbers = iter(range(1_000_000))
    with observer(stream) as shown:
        shown.say("Compiling")
        shown.line(lambda: f"{next(numbers)} modules")
        support.wait_until(lambda: "s  2 modules" in stream.getvalue(), "it was asked again")


def test_programs_that_log(caplog: pytest.LogCaptureFixture) -> None:
    """Without an observer of its own a program's log gets what stays, and not each second that another one builds."""
    with caplog.at_level("INFO"):
        hears = Observer()
        for text in ("Waiting", "Waiting", HEAD, "Waiting"):
            hears.say(text)
    assert caplog.messages == ["Waiting", HEAD, "Waiting"]
