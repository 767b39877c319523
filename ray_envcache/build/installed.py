"""What uv has installed of a local package, and whether an earlier layer has the same build of it.

So an edit of one package never builds its neighbours again, which may take minutes to compile.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from packaging.utils import canonicalize_name

from ray_envcache.resolve.interpreter import Interpreter
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.record import ReadyRecord

# What uv adds to a wheel: notes on where it is from, and scripts, which name the place of their interpreter.
_ADDED = re.compile(
    rb"[^,]*\.dist-info/(INSTALLER|RECORD|REQUESTED|direct_url\.json|uv_build\.json|uv_cache\.json),|(\.\./)+bin/"
)


def earlier_builds(layout: Layout, interpreter: Interpreter) -> dict[tuple[str, str, str], str]:
    """The builds in the layers of a store that this interpreter has made: {name, folder, digest: digest of files}."""
    found: dict[tuple[str, str, str], str] = {}
    for entry in layout.all_entries():
        record = ReadyRecord.read(entry)  # none where the module that an editable one has compiled is gone
        if record and record.base and record.base_python == interpreter.executable:
            found |= {(package, folder, content): built for package, folder, content, built in record.local}
    return found


def record_of(entry: Entry, name: str) -> str:
    """The digest of the files of an installed package, as its wheel has them. "" where it is not installed."""
    for info in entry.site_packages.glob("*.dist-info"):
        if canonicalize_name(info.name.partition("-")[0]) == name:
            return _digest(info / "RECORD")
    return ""


def _digest(record: Path) -> str:
    lines = sorted(line for line in record.read_bytes().splitlines() if not _ADDED.match(line))
    return hashlib.sha256(b"\n".join(lines)).hexdigest()
