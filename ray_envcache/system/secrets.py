"""Credentials in what others wrote: left out of what is kept, blotted out in what is shown."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import MappingProxyType

# Up to the last `@` before the path: a password that is not quoted as it should be may have one of its own.
_LOGIN = re.compile(r"(?<=://)[^/\s]+@")
_WORDS = r"[\w.-]*(?:token|secret|passw(?:or)?d|signature|credential)|(?:[\w.-]*[_.-])?(?:key|sig|auth|pwd|jwt)"
_TOKEN = re.compile(rf"(?i)([?&;#](?:{_WORDS})=)[^&#\s\"`]+")
_SSH_USER = re.compile(r"(?:[a-z]+\+)?ssh://[^/\s:@]+@")
_SECRET_LENGTH = 4
_NONE: Mapping[str, str] = MappingProxyType({})


def without_credentials(text: str, given: Mapping[str, str] = _NONE) -> str:
    """The text with what is secret in every URL, and every password that uv has from variables, blotted out.

    `given` are variables beside those of this process.
    """
    variables = (*os.environ.items(), *given.items())
    named = {value for name, value in variables if name.startswith("UV_") and name.endswith(("_PASSWORD", "_TOKEN"))}
    # The longest first, since another may be its beginning.
    for value in sorted(named, key=len, reverse=True):
        # A short one would be found in ordinary words.
        if len(value) >= _SECRET_LENGTH:
            text = text.replace(value, "***")
    return _TOKEN.sub(r"\1***", _LOGIN.sub("***@", text))


def strip_credentials(url: str) -> str:
    """The URL without user and password: uv adds them again from where the user keeps them."""
    # To ssh the user is a part of the address, and nowhere else.
    return url if _SSH_USER.match(url) else _LOGIN.sub("", url)
