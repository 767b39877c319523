"""`verify`: whether environments are as they were built, and what to do where they are not."""

from __future__ import annotations

import sys
from io import StringIO
from typing import Any

import click

from ray_envcache.acquire import Store
from ray_envcache.build.progress import observer
from ray_envcache.cli import tables
from ray_envcache.doctor.repair import Repaired, chosen, repair
from ray_envcache.errors import EnvCacheError
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import journal
from ray_envcache.store.layout import Entry
from ray_envcache.survey.verification import Verified, verify
from ray_envcache.system.texts import format_size

SHOWN = 10
"""How many differences of an environment people see; `--json` has all."""


@click.command("verify", epilog="Example: ray-envcache verify 125a8")
@click.argument("keys", nargs=-1, metavar="[KEY...]")
@click.option("--quick", is_flag=True, help="Look at sizes and times only.")
@click.option("--repair", "repairs", is_flag=True, help="Build a sound environment in place of each damaged one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with all differences.")
def verify_(*, keys: tuple[str, ...], quick: bool, repairs: bool, as_json: bool) -> None:
    """Compare environments with what was installed.

    That is files, links, modes and bytecode. KEY is the start of a key, as `list` shows it; without one all are
    verified, those of read-only stores too. The hashes are those of the packages. The exit code is 1 where something
    differs and was not repaired.

    A repair builds the same environment beside the damaged one. New users get it at once; processes that run from the
    damaged one are shown, and keep it until they end. Then `gc` removes it.
    """
    store, answers, damaged = Store.open(), [], False
    for entry in chosen(store, keys):
        found = _verified(entry, quick=quick)
        count, seconds = len(found.differences), round(found.seconds, 3)
        about = {"key": entry.key, "project": found.project, "result": found.state}
        journal.note(store.layout, "verification", **about, differences=count, files=found.files, seconds=seconds)
        if not as_json:
            _print(found)
        done = _repaired(store, found) if repairs and found.differences else None
        if done and not as_json:
            _print_repaired(done)
        damaged |= bool(found.differences) and done is None
        answers.append(_as_json(found, done))
    if as_json:
        tables.print_json({"envs": answers})
    sys.exit(1 if damaged else 0)


def _verified(entry: Entry, *, quick: bool) -> Verified:
    """What a comparison of the entry finds; with a progress bar, where stderr is a terminal."""
    shown = sys.stderr if sys.stderr.isatty() else StringIO()
    with click.progressbar(length=1, label=f"Verifying {entry.short}", file=shown) as bar:

        def advance(done: int, total: int) -> None:
            bar.length = total
            bar.update(done)

        return verify(entry, advance, quick=quick)


def _repaired(store: Store, found: Verified) -> Repaired | None:
    """What the repair of an entry did; None where it failed, and stderr says why: others are still to be repaired."""
    try:
        with observer(sys.stderr) as shown:
            return repair(store, found, installed_ray(), shown)
    except EnvCacheError as error:
        click.echo(f"error: {error}", err=True)
        return None


def _print(found: Verified) -> None:
    what = f"{found.entry.short} of {found.project}" if found.project else found.entry.short
    if found.state == "skipped":
        tables.say(f"{what}: not verified, {found.reason}")
        return
    count = len(found.differences)
    result = f"damaged, {count:,} {'difference' if count == 1 else 'differences'}" if count else "sound"
    size = format_size(found.bytes)
    tables.say(f"{what}: {result}; {found.files:,} files and folders, {size} in {found.seconds:.1f} s")
    rows = [(one.kind, one.path, one.package or "-", one.detail or "-") for one in found.differences[:SHOWN]]
    tables.print_table(("KIND", "PATH", "PACKAGE", "WHAT"), rows, ())
    if count > SHOWN:
        tables.say(f"and {count - SHOWN:,} more: `ray-envcache verify --json {found.entry.short}` shows all")


def _print_repaired(done: Repaired) -> None:
    tables.say(f"{done.damaged.short}: repaired, new users get {done.sound.name}")
    if done.unpacked:
        tables.say(f"uv's cache had the damaged files too: unpacked anew {', '.join(done.unpacked)}")
    if done.bytecode:
        tables.say(f"the store's shared bytecode had {done.bytecode} of the damaged files: compiled anew")
    if done.users:
        tables.say("still run from the damaged one, and keep it until they end:")
        tables.print_users_of(done.users)


def _as_json(found: Verified, done: Repaired | None) -> dict[str, Any]:
    entry, data = found.entry, found._asdict()
    data |= {"entry": entry.name, "differences": [one._asdict() for one in found.differences]}
    users = [user._asdict() for user in done.users] if done else []
    repaired = done and {**done._asdict(), "damaged": entry.name, "sound": done.sound.name, "users": users}
    return {"key": entry.key, **data, "repaired": repaired}
