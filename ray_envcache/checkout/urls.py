"""URLs in lockfiles."""

from __future__ import annotations

from urllib.parse import unquote, urlsplit


def path_of(url: str) -> str:
    """The path in a URL: of a file URL that of the file."""
    return unquote(urlsplit(url).path)
