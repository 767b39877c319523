"""Tables that any terminal and any file can have."""

from __future__ import annotations

import io
import sys

import pytest

from ray_envcache.cli.tables import shown


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("utf-8", "└ naïve ☃?"),
        ("utf-16", "└ naïve ☃?"),
        ("latin-1", "+ naïve \\u2603?"),
        ("ascii", "+ na\\xefve \\u2603?"),
    ],
)
def test_what_a_stream_cannot_have(monkeypatch: pytest.MonkeyPatch, encoding: str, text: str) -> None:
    """Letters that it has no code for stay recognizable; control characters never come through."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    assert shown("└ naïve ☃\x1b") == text
    stream.write(text)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert shown("└ naïve ☃\x1b") == "└ naïve ☃?"
