"""Credentials in texts and URLs: hidden in what is shown, removed from what is kept."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from types import MappingProxyType

# Up to the last `@` before the path: a password with an unquoted `@` in it goes too.
_LOGIN = re.compile(r"(?<=://)[^/\s]+@")
_WORDS = r"[\w.-]*(?:token|secret|passw(?:or)?d|signature|credential)|(?:[\w.-]*[_.-])?(?:key|sig|auth|pwd|jwt)"
_TOKEN = re.compile(rf"(?i)([?&;#](?:{_WORDS})=)[^&#\s\"`]+")
_SSH_USER = re.compile(r"(?:[a-z]+\+)?ssh://[^/\s:@]+@")
_SECRET_LENGTH = 4
_NONE: Mapping[str, str] = MappingProxyType({})


def without_credentials(text: str, given: Mapping[str, str] = _NONE) -> str:
    """Replace by `***` what is secret in every URL, and every password that uv takes from variables.

    The variables are those of this process, and `given`.
    """
    variables = (*os.environ.items(), *given.items())
    named = {value for name, value in variables if name.startswith("UV_") and name.endswith(("_PASSWORD", "_TOKEN"))}
    # The longest first: a shorter one may be its beginning.
    for value in sorted(named, key=len, reverse=True):
        # Shorter ones would be found in ordinary words.
        if len(value) >= _SECRET_LENGTH:
            text = text.replace(value, "***")
    return _TOKEN.sub(r"\1***", _LOGIN.sub("***@", text))


def strip_credentials(url: str) -> str:
    """Remove user and password from a URL: uv adds them again from where the user keeps them."""
    # Only for ssh the user is a part of the address.
    return url if _SSH_USER.match(url) else _LOGIN.sub("", url)
