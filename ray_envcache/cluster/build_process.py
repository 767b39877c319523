"""The agent's build process: one request on stdin, JSON lines on stdout, gone when stdin closes.

`{"log": ...}` while it works, then `{"ready": <entry>}` or `{"error": ...}`. It holds a lease on the entry until its
stdin closes, so that the agent can take its own. If the agent dies, stdin closes early, and if its set-up is cancelled
SIGTERM comes: then the build is abandoned, uv and what it started are killed, and the store is left as it was.
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
from ray_envcache.errors import EnvCacheError, InterpreterError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.cluster_ray import ClusterRay
from ray_envcache.store.leases import Holder, Lease


class _Reporter:
    """Tells the agent, for its log, how the build goes."""

    def waiting(self, builder: str) -> None:
        _say({"log": f"Waiting for the environment: {builder} builds it"})

    def started(self, plan: Any) -> None:
        _say({"log": plan.headline})

    def line(self, text: str) -> None:
        _say({"log": text})

    def finished(self, lease: Lease, seconds: float) -> None:
        _say({"log": f"Built {lease.entry.path.name} in {seconds:.1f} s"})


def main() -> int:
    """Serve one request."""
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
        _say({"ready": os.fspath(lease.entry.path)})
        abandoned.wait()
    return 0


def _acquire(request: dict[str, Any]) -> Lease:
    _require_same_python(request["python"])
    store = Store.open(Path(request["root"]))
    holder = Holder("build", cluster=request["cluster"])
    return store.acquire(EnvSpec.parse(request["field"]), ClusterRay(request["ray"]), holder, _Reporter())


def _require_same_python(version: str) -> None:
    """Raise InterpreterError where the links that led to the agent's Python lead to another one by now."""
    if version != sys.version:
        was, now = (" ".join(one.split()) for one in (version, sys.version))
        raise InterpreterError(
            f"`{sys.executable}` is not the Python that this node was started with: it is {now}, and was {was}",
            "restart the node",
        )


def _watch(abandoned: threading.Event) -> None:
    sys.stdin.read()
    abandoned.set()
    # The main thread may wait for uv: a signal gets it out of there, by way of its clean-up.
    os.kill(os.getpid(), signal.SIGTERM)


def _abandon(*_: object) -> NoReturn:
    # Once: a second signal would end the clean-up in its middle.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(1)


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(f"{json.dumps(message)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
