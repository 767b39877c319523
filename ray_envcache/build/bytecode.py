"""Finishing an entry in the background: bytecode, true sizes, and everything on the disk for good.

An environment is handed out as soon as it is linked and checked, because compiling takes thirty times longer than
linking. This process, the compiler, follows: `python -m ray_envcache.build.bytecode ROOT ENTRY`. It holds the entry
with a lease like every other user, runs at the lowest priority, and may be killed at any moment: the next user of the
entry starts it again, and it goes on where it was. Bytecode of earlier environments is linked, see `shared_bytecode`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path

from ray_envcache.build.progress import Observer
from ray_envcache.errors import BuildError
from ray_envcache.inside import pyc
from ray_envcache.remote.push import push_built
from ray_envcache.store.layout import Entry, Layout
from ray_envcache.store.leases import Holder, Lease, claim
from ray_envcache.survey import shared_bytecode, verification
from ray_envcache.survey.inventory import record_sizes
from ray_envcache.system import children, files, flock, testpoints
from ray_envcache.system.texts import utc_now

MOST_PROCESSES = 4
"""How many compile where somebody waits: each takes 50 MB for ray, and 180 MB for a single module of 1 MB."""


def finish(layout: Layout, entry: Entry, *, background: bool) -> bool:
    """Compile, sync and measure `entry`; False where it is gone or done. Raises OSError.

    In the background at the lowest priority, and not where another compiler is at it; for a user who waits after that.
    """
    lease = claim(entry, layout, Holder("bytecode", command="compiles bytecode"))
    if lease is None:
        return False
    with lease:
        testpoints.reach("finishing-leased")
        if background and flock.is_held(entry.finishing_flock):
            return False
        with flock.exclusive_flock(entry.finishing_flock, lambda: None) as descriptor:
            if entry.compiled.exists():
                return False
            _finish(layout, entry, [descriptor, *lease.descriptors], background=background)
            return True


def finish_lease_now(layout: Layout, lease: Lease, observer: Observer | None = None) -> None:
    """Finish what a lease holds of writable stores for a user who waits, and hears of it. Raises BuildError."""
    told = observer or Observer()
    try:
        for entry in lease.entries:
            if not (entry.readonly or entry.compiled.exists()):
                told.say("Compiling bytecode")
                told.line(partial(_compiled, entry))
                finish(layout, entry, background=False)
                push_built(layout, entry)
    except OSError as error:
        raise BuildError(
            f"The bytecode of {entry.path.name} could not be compiled: {error}",
            "try again; what is compiled already is kept",
        ) from error


def _compiled(entry: Entry) -> str:
    """How much is compiled so far, for people."""
    done = sum(len(files.names_in(folder)) for folder in entry.staged_bytecode.glob("*"))
    return f"{done:,} modules compiled" if done else ""


def _finish(layout: Layout, entry: Entry, kept: list[int], *, background: bool) -> None:
    began = time.monotonic()
    # As soon as may be: later changes are to be noticed.
    verification.seal(entry)
    tag = compile_all(layout, entry, kept, background=background)
    # From here on the entry survives a crash of the machine, not only of processes; and what it shares.
    files.sync_file_system(entry.path)
    shared_bytecode.publish(entry.staged_bytecode, layout.bytecode)
    files.remove_tree(entry.staged_bytecode)
    done = {"compiled_at": utc_now(), "seconds": round(time.monotonic() - began, 3), "python": tag}
    files.write_json(entry.compiled, done)
    record_sizes(layout, entry)


def compile_all(layout: Layout, entry: Entry, kept: list[int], *, background: bool) -> str:
    """Have the entry's own Python compile, ours may be another one; its tag. Raises OSError where it could not do all.

    If we are killed, it goes on: so it inherits the descriptors `kept`, which keep others away from the entry.
    """
    request = {
        "top": os.fspath(entry.site_packages),
        "shared": os.fspath(layout.bytecode),
        "staged": os.fspath(entry.staged_bytecode),
        "workers": _workers(background=background),
        "background": background,
    }
    optimized = ["-O"] * sys.flags.optimize
    command: list[str | Path] = [entry.python, "-I", "-S", *optimized, pyc.__file__, json.dumps(request)]
    done = children.run(command, environ=children.clean_environ(), cwd=Path("/"), pass_fds=kept)
    if done.returncode != 0:
        reason = done.killed or done.stderr.strip()[-1500:]
        number = int(done.stdout) if done.stdout.isdigit() else None
        raise OSError(number, reason) if number else ChildProcessError(f"`{entry.python}` cannot compile: {reason}")
    return done.stdout


def _workers(*, background: bool) -> int:
    """How many processes compile at once: in the background one, which takes no container's quota or memory."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 1 if background else min(MOST_PROCESSES, usable)


def main(arguments: list[str]) -> int:
    """Finish the entry of a store in the background."""
    root, name = arguments
    layout = Layout(Path(root))
    entry = layout.entry(name)
    if entry is None:
        return 2
    # The cluster that waited for this environment starts now.
    pyc.lower_priority()
    if finish(layout, entry, background=True):
        push_built(layout, entry)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
