"""What the tests of sessions share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import support


@pytest.fixture
def temp() -> Iterator[Path]:
    """A temp directory of Ray that all users may write to; short, since sockets are bound in it."""
    with support.short_folder() as folder:
        folder.chmod(0o755)
        (folder / "ray").mkdir(mode=0o777)
        (folder / "ray").chmod(0o777)
        yield folder / "ray"
