"""Tables that any terminal and any file can have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ray_envcache.acquire import Store
from tests.gc.fabricated import change, make_entry

pytestmark = pytest.mark.host


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("utf-8", "  naïve ☃?  "), ("latin-1", "  naïve \\u2603?  "), ("ascii", "  na\\xefve \\u2603?  ")],
)
def test_what_a_stream_cannot_have(store: Store, encoding: str, text: str) -> None:
    """Letters that it has no code for stay recognizable; control characters never come through."""
    entry = make_entry(store.layout, 1)
    change(entry, project="naïve ☃\x1b")
    change(make_entry(store.layout, 2), base=entry.name)
    environ = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-m", "ray_envcache", "list"], env=environ, capture_output=True, check=True)
    assert text in done.stdout.decode(encoding)
    assert done.stderr == b""
