"""Run a command so that its whole tree can be measured and ended: `python supervise.py PARENT CGROUP SETTLE COMMAND...`.

Orphans come to us (PR_SET_CHILD_SUBREAPER), also those of daemons that lead sessions of their own. When the command has
ended, or when whoever started us is gone, all of them end; what is still busy gets SETTLE seconds to end by itself.
CGROUP is a fresh cgroup directory to run in, "-" for none. Standard library only, and few of it: it starts quickly.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

MARK = "@bench "
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def say(event: str, **more: Any) -> None:
    print(f"{MARK}{json.dumps({'event': event, 'moment': time.monotonic(), **more})}", flush=True)


def adopt(parent: int, cgroup: str) -> None:
    """Get all orphans below us, end with our parent, and enter the cgroup."""
    system = ctypes.CDLL(None)
    system.prctl(_PR_SET_CHILD_SUBREAPER, 1)
    system.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
    if os.getppid() != parent:
        sys.exit(1)
    if cgroup != "-":
        with open(os.path.join(cgroup, "cgroup.procs"), "w", encoding="ascii") as file:
            file.write("0")


def descendants() -> list[int]:
    """All processes below us."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError), open(f"/proc/{name}/stat", encoding="utf-8", errors="replace") as file:
            # The name of the program may have blanks and parentheses in it.
            children.setdefault(int(file.read().rpartition(")")[2].split()[1]), []).append(int(name))
    found = list(children.get(os.getpid(), []))
    for pid in found:
        found += children.get(pid, [])
    return found


def reap() -> bool:
    """Take what has ended; whether a child is left."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return False
    return True


def end_all() -> None:
    while reap():
        for pid in descendants():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def settle(seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while reap() and time.monotonic() < deadline:
        time.sleep(0.02)


def main(arguments: list[str]) -> int:
    parent, cgroup, patience, *command = arguments
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    status = 1
    try:
        adopt(int(parent), cgroup)
        say("start")
        # No `with`: its end would wait for the command, also when we are to end it.
        status = subprocess.Popen(command, start_new_session=True).wait()
        say("exit", status=status)
        settle(float(patience))
    finally:
        # A second signal must not stop what ends the others.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        end_all()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        say("end", rusage=used.ru_utime + used.ru_stime)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
