"""The object store of the remote tier, by the library obstore, which finds credentials by its own chain."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ray_envcache.errors import RemoteError
from ray_envcache.system.texts import needs_extra, without_credentials

VARIABLE = "RAY_ENVCACHE_REMOTE"
_CLIENT = {"allow_http": True, "connect_timeout": "3s", "timeout": "10m"}
# Without progress. Writers have none: an upload gets no answer before its end.
_READER = {**_CLIENT, "read_timeout": "10s"}
# A manifest is small: a server that sends it byte by byte must not keep a node from building.
_ASKING = {**_READER, "timeout": "30s"}
_RETRIES = {"retry_config": {"max_retries": 1}}


class Bucket:
    """What is below a URL: s3://, gs://, az://, file://, or http(s)://, which is read only. Nothing is ever removed.

    Methods raise RemoteError where the object store does not answer, or refuses.
    """

    def __init__(self, url: str, *, writes: bool = False) -> None:
        self.url, open_url = without_credentials(url), library("obstore.store").from_url
        if not re.match(r"file:///|(?!file:)[a-z0-9]+://[^/]", url):
            raise RemoteError(f"Not a bucket: `{self.url}`", "write s3://bucket/prefix, or file:///folder")
        self._errors = (library("obstore.exceptions").BaseError, OSError, ValueError)
        clients = [{"client_options": one, **_RETRIES} for one in (_ASKING, _CLIENT if writes else _READER)]
        with self._explained():
            ways = [{"mkdir": writes}] * 2 if url.startswith("file:") else clients
            self._asked, self._store = (open_url(url, **way) for way in ways)

    def read(self, name: str) -> bytes | None:
        """A small object, None where there is none."""
        with self._explained(), suppress(FileNotFoundError):
            return bytes(self._asked.get(name).bytes())
        return None

    def part(self, name: str, start: int, end: int) -> memoryview:
        """A part of an object, all of it."""
        with self._explained():
            found = memoryview(self._store.get_range(name, start=start, end=end))
            if len(found) != end - start:
                raise ValueError(f"{name} ends early")
            return found

    def has(self, name: str) -> bool:
        """Whether there is such an object."""
        with self._explained(), suppress(FileNotFoundError):
            return bool(self._store.head(name))
        return False

    def write(self, name: str, content: Any) -> None:
        """Make an object of bytes or of an open file. Others see it whole or not at all."""
        with self._explained():
            self._store.put(name, content)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            # The library shows all of an answer, which may name the access key, and then its own insides.
            text = re.sub(r"<\?xml.*<Code>(\w+)</Code>.*|Debug source:.*", r"\1", str(error), flags=re.DOTALL)
            reason = " ".join(without_credentials(text).split())[:400]
            hint = f"see whether this host reaches ${VARIABLE}, and has credentials and a region for it"
            raise RemoteError(f"`{self.url}`: {type(error).__name__}: {reason}", hint) from None


def library(name: str) -> Any:
    """A module of a library of the extra `remote`. Raises RemoteError where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RemoteError(f"Buckets need the library {name.partition('.')[0]}", needs_extra("remote")) from error
