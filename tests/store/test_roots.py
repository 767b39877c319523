"""The roots of stores: what is ours in one, and where none can be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from ray_envcache.errors import StoreError
from ray_envcache.store import roots
from ray_envcache.store.layout import Layout
from ray_envcache.store.roots import prepare_root
from ray_envcache.system import disk
from ray_envcache.system.disk import FileSystem


def backed_up(folder: Path) -> set[str]:
    """The names of the files that a backup has which heeds CACHEDIR.TAG."""
    archive = folder.with_suffix(".tar")
    command: list[str | Path] = ["tar", "-c", "--exclude-caches", "-f", archive, "-C", folder.parent, folder.name]
    subprocess.run(command, check=True, capture_output=True)
    listed = subprocess.run(["tar", "-tf", archive], check=True, capture_output=True, text=True).stdout
    return {Path(name).name for name in listed.split() if not name.endswith("/")}


def test_backups_leave_out_what_is_ours_alone(tmp_path: Path) -> None:
    """In a folder with other data the environments are left out of backups, and the other data are not."""
    scratch = tmp_path / "scratch"
    (scratch / "thesis").mkdir(parents=True)
    (scratch / "thesis" / "results.csv").write_text("42")
    layout = Layout(scratch)
    prepare_root(layout)
    (layout.entries / "large").write_text("environment")
    assert backed_up(scratch) - {"CACHEDIR.TAG"} == {"results.csv"}


@pytest.mark.parametrize("kind", ["virtiofs", "fuse.mountpoint-s3"])
def test_file_system_of_a_virtual_machine_is_refused(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where other machines may use the same file system a store is refused, unless that is allowed."""
    monkeypatch.setattr(disk, "free_space", lambda _: FileSystem(10**12, 10**12, None, kind))
    roots._require_local.cache_clear()
    with pytest.raises(StoreError, match=re.escape(f"other machines may use too ({kind})")):
        prepare_root(Layout(tmp_path / "store"))
    monkeypatch.setenv("RAY_ENVCACHE_ALLOW_NETWORK_FS", "1")
    prepare_root(Layout(tmp_path / "store"))
    roots._require_local.cache_clear()
