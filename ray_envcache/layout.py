"""Where everything lies below the store's root. The only file that spells path names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VERSION = "v1"
_ENTRY_NAME = re.compile(r"(?P<key>[0-9a-f]{32})-(?P<number>[1-9][0-9]*)")


@dataclass(frozen=True, order=True)
class Entry:
    """The paths of one environment. An entry is never rebuilt in place: the next build takes the next `number`.

    One of a lower store is `readonly`: nothing at all is ever written there.
    """

    key: str
    number: int
    path: Path
    readonly: bool = False

    @property
    def venv(self) -> Path:
        return self.path / "venv"

    @property
    def bin(self) -> Path:
        return self.venv / "bin"

    @property
    def python(self) -> Path:
        return self.bin / "python"

    @property
    def site_packages(self) -> Path:
        """Where the venv keeps its packages; a path that does not exist before the venv does."""
        return next((self.venv / "lib").glob("python3.*"), self.venv / "lib") / "site-packages"

    @property
    def ready(self) -> Path:
        return self.path / "ready.json"

    @property
    def building(self) -> Path:
        return self.path / "building.json"

    @property
    def compiled(self) -> Path:
        return self.path / "compiled.json"

    @property
    def measured(self) -> Path:
        return self.path / "measured.json"

    @property
    def staged_bytecode(self) -> Path:
        """Bytecode on its way to everybody; what a killed compiler left here the next one takes over."""
        return self.path / "bytecode"

    @property
    def in_use(self) -> Path:
        return self.path / "in-use"

    @property
    def build_log(self) -> Path:
        return self.path / "build.log"

    @property
    def sources(self) -> Path:
        """Copies of local packages while they are built."""
        return self.path / "src"

    @property
    def pylock(self) -> Path:
        return self.path / "pylock.toml"

    def base(self, name: str) -> Entry | None:
        """The entry below this one, by what its ready record says; None where that is no name of an entry."""
        return _entry_at(self.path.parent, name, readonly=self.readonly)


@dataclass(frozen=True)
class Layout:
    """The paths of one store."""

    root: Path
    readonly: bool = False

    @property
    def top(self) -> Path:
        return self.root / VERSION

    @property
    def entries(self) -> Path:
        return self.top / "entries"

    @property
    def leases(self) -> Path:
        return self.top / "leases"

    @property
    def pins(self) -> Path:
        return self.top / "pins"

    @property
    def memo(self) -> Path:
        return self.top / "memo"

    @property
    def trash(self) -> Path:
        return self.top / "trash"

    @property
    def bytecode(self) -> Path:
        """Bytecode that entries share, a folder for each Python; made when there is some."""
        return self.top / "bytecode"

    @property
    def flocks(self) -> Path:
        return self.top / "flocks"

    @property
    def collector_flock(self) -> Path:
        """The flock of the one collector at work."""
        return self.flocks / "collector"

    @property
    def doctor_flock(self) -> Path:
        """The file on which it is tried whether flocks work."""
        return self.flocks / "doctor"

    @property
    def clock(self) -> Path:
        """What the clocks said when the collector last looked."""
        return self.top / "clock.json"

    @property
    def last_collection(self) -> Path:
        """Its mtime is when the collector last ran by itself."""
        return self.top / "last-collection"

    @property
    def uv_cache(self) -> Path:
        """The cache of uv where the user's own is on another file system."""
        return self.root / "uv"

    @property
    def cachedir_tag(self) -> Path:
        return self.root / "CACHEDIR.TAG"

    def directories(self) -> tuple[Path, ...]:
        return (self.entries, self.leases, self.pins, self.memo, self.trash, self.flocks)

    def builder_flock(self, key: str) -> Path:
        """The flock of whoever builds `key`. Never unlinked: waiters would end up on different inodes."""
        return self.flocks / f"{key}.build"

    def finishing_flock(self, entry: Entry) -> Path:
        """The flock of whoever compiles the bytecode of `entry`; it lies in the entry and goes with it."""
        return entry.path / "finishing"

    def leases_of(self, key: str) -> Path:
        return self.leases / key

    def pin_of(self, key: str) -> Path:
        return self.pins / f"{key}.json"

    def memo_of(self, inputs: str) -> Path:
        return self.memo / f"{inputs}.json"

    def entry(self, name: str) -> Entry | None:
        """The entry with this directory name, whether it exists or not; None where it is no name of an entry.

        The absolute path of an entry of a lower store is its name.
        """
        return _entry_at(self.entries, name, readonly=self.readonly)

    def name_of(self, entry: Entry) -> str:
        """The name by which `entry` finds it, in files and messages of this store."""
        return entry.path.name if entry.path.parent == self.entries else os.fspath(entry.path)

    def first_entry(self, key: str) -> Entry:
        """The paths of the first build of `key`: nearly always the only one."""
        return Entry(key, 1, self.entries / f"{key}-1", self.readonly)

    def all_entries(self) -> Iterator[Entry]:
        """The entries on disk, in no order, finished or not. Foreign files are passed over."""
        for name in _names(self.entries):
            if entry := self.entry(name):
                yield entry

    def entries_of(self, key: str) -> list[Entry]:
        """The entries of `key` on disk, newest first."""
        return sorted((entry for entry in self.all_entries() if entry.key == key), reverse=True)

    def next_entry(self, key: str) -> Entry:
        """The paths for a new build of `key`; its caller holds the builder's flock."""
        taken = [entry.number for entry in self.entries_of(key)]
        number = max(taken, default=0) + 1
        return Entry(key, number, self.entries / f"{key}-{number}")


def layout_of(entry: Entry) -> Layout:
    """The store that an entry lies in."""
    return Layout(entry.path.parents[2], entry.readonly)


def default_root() -> Path:
    """$RAY_ENVCACHE_DIR, else the user's cache directory for ray-envcache."""
    if chosen := os.environ.get("RAY_ENVCACHE_DIR"):
        return Path(chosen).expanduser().absolute()
    import platformdirs  # not on the warm path of a store with a chosen root

    return platformdirs.user_cache_path("ray-envcache")


def _entry_at(folder: Path, name: str, *, readonly: bool) -> Entry | None:
    above, slash, last = name.rpartition("/")
    parts = _ENTRY_NAME.fullmatch(last)
    is_absolute = above.startswith("/") and above.endswith(f"/{VERSION}/entries")
    if parts is None or (slash and not is_absolute):
        return None
    is_elsewhere = bool(slash) and above != os.fspath(folder)
    return Entry(parts["key"], int(parts["number"]), folder / name, readonly or is_elsewhere)


def _names(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)  # names only: a store may have thousands
    except FileNotFoundError:
        return []
