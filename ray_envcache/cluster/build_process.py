"""The agent's build process: one request on stdin, JSON lines on stdout, and its end when stdin closes.

It says `{"log": ...}` while it works, then `{"ready": <entry>, "how": <built, ...>}` or `{"error": ...}`. It holds a
lease on the entry until its stdin closes: by then the agent has its own. When the agent dies, stdin closes early; when
Ray cancels the set-up, the agent sends SIGTERM. In both cases the process kills uv with its children and leaves the
store as it was.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any, NoReturn

from ray_envcache.acquire import Store
from ray_envcache.build.observer import Observer
from ray_envcache.errors import EnvCacheError, InterpreterError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import ClusterRay
from ray_envcache.store.leases import Holder, Lease


class _Reporter(Observer):
    """Sends the progress of the build to the agent's log."""

    def waiting(self, builder: str) -> None:
        _say({"log": f"Waiting for the environment: {builder} builds it"})

    def started(self, plan: Any) -> None:
        _say({"log": f"{plan.headline}{plan.reason and f' ({plan.reason})'}"})

    def line(self, text: str) -> None:
        _say({"log": text})

    note = line

    def finished(self, lease: Lease, seconds: float) -> None:
        _say({"log": f"{lease.how.capitalize()} {lease.entry.path.name} in {seconds:.1f} s"})


def main() -> int:
    """Serve one request."""
    # Where the parent ignores it, the kernel throws away how uv ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    request = json.loads(sys.stdin.readline())
    abandoned = threading.Event()
    watcher = threading.Thread(target=_watch, args=(abandoned,), daemon=True)
    signal.signal(signal.SIGTERM, _abandon)
    watcher.start()
    try:
        lease = _acquire(request)
    except EnvCacheError as error:
        _say({"error": error.to_json()})
        return 1
    with lease:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _say({"ready": os.fspath(lease.entry.path), "how": lease.how})
        abandoned.wait()
    return 0


def _acquire(request: dict[str, Any]) -> Lease:
    _require_same_python(request["python"])
    store = Store.open(Path(request["root"]))
    holder = Holder("build", cluster=request["cluster"])
    return store.acquire(EnvSpec.parse(request["field"]), ClusterRay(request["ray"]), holder, _Reporter())


def _require_same_python(version: str) -> None:
    """Raise InterpreterError if the node's Python was replaced since the agent started."""
    if version != sys.version:
        was, now = (" ".join(one.split()) for one in (version, sys.version))
        raise InterpreterError(
            f"`{sys.executable}` is not the Python that this node was started with: it is {now}, and was {was}",
            "restart the node",
        )


def _watch(abandoned: threading.Event) -> None:
    sys.stdin.read()
    abandoned.set()
    # The main thread may be waiting for uv: the signal interrupts it there, and it cleans up.
    os.kill(os.getpid(), signal.SIGTERM)


def _abandon(*_: object) -> NoReturn:
    # Ignored from now on: a second signal would interrupt the clean-up.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(message)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
