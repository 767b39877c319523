"""Where everything lies below the store's root. The only file that spells path names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from ray_envcache.errors import StoreError, UnknownKeyError
from ray_envcache.system.files import names_in

VERSION = "v1"
SHOWN_DIGITS = 12
"""Digits of a key that people see; commands take any unambiguous start."""

_ENTRY_NAME = re.compile(r"(?P<key>[0-9a-f]{32})-(?P<number>[1-9][0-9]*)")


class _Below:
    """A path below that of an entry, or below the top of a store."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: Entry | Layout, _: object) -> Path:
        return (owner.path if isinstance(owner, Entry) else owner.top) / self.name


@dataclass(frozen=True)
class Entry:
    """The paths of one environment. An entry is never rebuilt in place: the next build takes the next `number`.

    Nothing at all is ever written to an entry that is `readonly`: it lies in a read-only store.
    """

    key: str
    number: int
    path: Path
    readonly: bool = False

    venv = _Below("venv")
    bin = _Below("venv/bin")
    python = _Below("venv/bin/python")
    pylock = _Below("pylock.toml")
    build_log = _Below("build.log")
    building = _Below("building.json")
    ready = _Below("ready.json")
    measured = _Below("measured.json")
    facts = _Below("facts.json")
    """What its key is made of, in words."""
    sealed = _Below("seal.csv")
    """The list of all that should be in the venv, bytecode apart."""
    in_use = _Below("in-use")
    """The file on which leases and interpreters hold shared flocks; its mtime is the entry's last use."""
    compiled = _Below("compiled.json")
    finishing_flock = _Below("finishing")
    """The flock of the process that compiles the bytecode."""
    staged_bytecode = _Below("bytecode")
    """Bytecode on its way to all entries; what a killed compiler left here the next compiler takes over."""

    @property
    def name(self) -> str:
        """The name of its directory."""
        return self.path.name

    @property
    def short(self) -> str:
        """The beginning of the key, for people."""
        return self.key[:SHOWN_DIGITS]

    @property
    def site_packages(self) -> Path:
        """Where the venv keeps its packages; a path that does not exist before the venv does."""
        return next((self.venv / "lib").glob("python3.*"), self.venv / "lib") / "site-packages"

    def base(self, name: str) -> Entry | None:
        """The entry below this one, by the name that its ready record has; None where that is no name of an entry."""
        return _entry_at(self.path.parent, name, readonly=self.readonly)


@dataclass(frozen=True)
class Layout:
    """The paths of one store."""

    root: Path
    readonly: bool = False

    entries = _Below("entries")
    leases = _Below("leases")
    pins = _Below("pins")
    memo = _Below("memo")
    trash = _Below("trash")
    flocks = _Below("flocks")
    collector_flock = _Below("flocks/collector")
    """The flock of the one collector at work."""
    last_collection = _Below("last-collection")
    """Its mtime is when the collector last ran by itself."""
    bytecode = _Below("bytecode")
    """Bytecode that entries share, a folder for each Python; made when there is some."""
    journal = _Below("journal.jsonl")
    """What happened here; made with the first line."""
    older_journal = _Below("journal.1.jsonl")
    """What happened before."""
    cachedir_tag = _Below("CACHEDIR.TAG")
    """Tells backups to leave out what is ours: the root may be a folder that holds other data too."""

    @property
    def top(self) -> Path:
        return self.root / VERSION

    @property
    def uv_cache(self) -> Path:
        """The cache of uv where uv cannot link from the user's own into the store."""
        return self.root / "uv"

    def directories(self) -> tuple[Path, ...]:
        """The directories that every store has."""
        return (self.entries, self.leases, self.pins, self.memo, self.trash, self.flocks)

    def builder_flock(self, key: str) -> Path:
        """The flock of the one builder of `key`. Only a collector unlinks it, while it holds the flock itself.

        A process whose flock comes right after has to see that its file has no name any more, and to begin again.
        """
        return self.flocks / f"{key}.build"

    def leases_of(self, key: str) -> Path:
        return self.leases / key

    def leased_keys(self) -> set[str]:
        """The keys on which there are, or were, leases."""
        return set(names_in(self.leases))

    def pin_of(self, key: str) -> Path:
        return self.pins / f"{key}.json"

    def memo_of(self, inputs: str) -> Path:
        return self.memo / f"{inputs}.json"

    def entry(self, name: str) -> Entry | None:
        """The entry with this directory name, whether it exists or not; None where it is no name of an entry.

        The absolute path of an entry in a read-only store is its name here.
        """
        return _entry_at(self.entries, name, readonly=self.readonly)

    def name_of(self, entry: Entry) -> str:
        """The name by which `entry` finds it, in files and messages of this store."""
        return entry.name if entry.path.parent == self.entries else os.fspath(entry.path)

    def first_entry(self, key: str) -> Entry:
        """The paths of the first build of `key`: nearly always the only one."""
        return Entry(key, 1, self.entries / f"{key}-1", self.readonly)

    def all_entries(self) -> Iterator[Entry]:
        """The entries on disk, in no order, finished or not. Foreign files are passed over."""
        for name in names_in(self.entries):
            if entry := self.entry(name):
                yield entry

    def entries_of(self, key: str) -> list[Entry]:
        """The entries of `key` on disk, newest first."""
        return newest_first(entry for entry in self.all_entries() if entry.key == key)

    def next_entry(self, key: str) -> Entry:
        """The paths for a new build of `key`; its caller holds the builder's flock."""
        number = max((entry.number for entry in self.entries_of(key)), default=0) + 1
        return Entry(key, number, self.entries / f"{key}-{number}")


def newest_first(entries: Iterable[Entry]) -> list[Entry]:
    """The entries by key, of each key the newest build first."""
    return sorted(entries, key=lambda entry: (entry.key, -entry.number))


def only_key(prefix: str, keys: Iterable[str]) -> str:
    """The one of these keys that starts with `prefix`. Raises UnknownKeyError: none does, or several do."""
    found = {key for key in keys if key and key.startswith(prefix)}
    if len(found) != 1 or not prefix:
        trouble = f"{len(found)} environments have" if found else "No environment has"
        raise UnknownKeyError(f"{trouble} a key that starts with `{prefix}`", "ray-envcache list shows the keys")
    return found.pop()


def layout_of(entry: Entry) -> Layout:
    """The store that an entry lies in."""
    return Layout(entry.path.parents[2], entry.readonly)


def default_root() -> Path:
    """$RAY_ENVCACHE_DIR, else the user's cache directory for ray-envcache.

    Raises StoreError where that is no absolute path: from another working directory it would be another store.
    """
    chosen = os.environ.get("RAY_ENVCACHE_DIR")
    try:
        root = Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("ray-envcache")
    except RuntimeError as error:  # of pathlib and platformdirs, where a user has no home
        raise StoreError(
            f"Cannot tell where the store is: {error}", "set RAY_ENVCACHE_DIR to an absolute path, or HOME"
        ) from error
    if not root.is_absolute():
        raise StoreError(f"The path of the store is relative: `{root}`", "set RAY_ENVCACHE_DIR to an absolute path")
    return root


def _entry_at(folder: Path, name: str, *, readonly: bool) -> Entry | None:
    above, slash, last = name.rpartition("/")
    parts = _ENTRY_NAME.fullmatch(last)
    is_absolute = above.startswith("/") and above.endswith(f"/{VERSION}/entries")
    if parts is None or (slash and not is_absolute):
        return None
    is_elsewhere = bool(slash) and above != os.fspath(folder)
    return Entry(parts["key"], int(parts["number"]), folder / name, readonly or is_elsewhere)
