"""How the agent builds an environment: in a child process, watched by a thread.

A child process, because the kernel may kill a builder for its memory, and an agent that dies takes the node with it;
and because only a process can be stopped at any moment. A thread, because starting a process blocks for up to a second
on a host where many workers start at once.

The child, `python -m ray_envcache.cluster.building`, gets one request on stdin. On stdout, which is its stderr too,
come lines for the agent's log, and then `{"ready": <entry>, "how": <built, ...>}` or `{"error": ...}`. It holds a lease
on the entry until its stdin closes: by then the agent has its own. When the agent dies, stdin closes early; when Ray
cancels the set-up, the agent sends SIGTERM. In both cases the process kills uv with its children and leaves the store
as it was.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil

from ray_envcache.acquire import Store
from ray_envcache.errors import BuildError, EnvCacheError, InterpreterError, PassingError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import ClusterRay
from ray_envcache.store import journal
from ray_envcache.store.leases import Holder, Lease, claim

T = TypeVar("T")

GRACE_SECONDS = 10.0
"""How long a build process may clean up behind itself before it is killed."""


class AgentBuild:
    """A build process of the agent, which also waits where another process builds the same environment.

    `lease` becomes the agent's claim, or the error that `Store.acquire` raised, once the process is gone. `environ`
    are the variables of the process.
    """

    def __init__(
        self,
        store: Store,
        spec: EnvSpec,
        ray: ClusterRay,
        holder: Holder,
        logger: logging.Logger,
        environ: Mapping[str, str],
    ) -> None:
        self.lease: Future[Lease] = Future()
        self._store, self._path, self._holder, self._logger = store, spec.path, holder, logger
        self._request = {
            "root": os.fspath(store.layout.root),
            "field": spec.to_field(),
            "ray": ray.version,
            "python": platform.python_version(),
            "cluster": holder.cluster,
        }
        self._environ = environ
        self._abandoned = False
        self._child: subprocess.Popen[bytes] | None = None
        # A daemon: an agent that ends does not wait for it. Then the child's stdin closes, and the child ends too.
        threading.Thread(target=self._work, name="envcache-build", daemon=True).start()

    def abandon(self) -> None:
        """Stop the process, and release a lease that still comes. Returns at once; `lease` says when all is gone."""
        self._abandoned = True
        self._stop_if_abandoned()
        self.lease.add_done_callback(partial(discard_result, Lease.release))
        impatient = threading.Timer(GRACE_SECONDS, self._kill)
        impatient.daemon = True
        impatient.start()
        self.lease.add_done_callback(lambda _: impatient.cancel())

    def _kill(self) -> None:
        if self._child is not None and self._child.returncode is None:
            _kill_tree(self._child.pid)

    def _stop_if_abandoned(self) -> None:
        # Called by the thread that starts the child and by `abandon`: the second of the two finds both set.
        if self._abandoned and self._child is not None:
            self._child.terminate()

    def _work(self) -> None:
        try:
            self.lease.set_result(self._run())
        except BaseException as error:  # noqa: BLE001  # the plugin awaits it
            self.lease.set_exception(error)

    def _run(self) -> Lease:
        child = self._child = _start(self._environ)
        try:
            self._stop_if_abandoned()
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it ended already: `_listen` reads what it said
                child.stdin.write(json.dumps(self._request).encode() + b"\n")
                child.stdin.flush()
            # The child holds a lease until its stdin closes.
            return self._claim(self._listen(child))
        finally:
            _end(child)

    def _listen(self, child: subprocess.Popen[bytes]) -> dict[str, str]:
        """Log the child's lines until it names the entry: that message is returned. Raises the error it reports."""
        assert child.stdout is not None
        tail = deque[str](maxlen=20)
        for raw in child.stdout:
            line = raw.decode(errors="replace").rstrip()
            message = _message(line)
            if "error" in message:
                raise EnvCacheError.from_json(message["error"])
            if "ready" in message:
                return message
            if line:
                tail.append(line)
                self._logger.info("%s", line)
        _end(child)
        if child.returncode < 0 and not self._abandoned:
            # Killed: else it has noted itself how it ended.
            about = {"path": self._path, "kind": "build", "cluster": self._holder.cluster}
            journal.note(self._store.layout, "setup", result="failed", error=BuildError.__name__, **about)
        output = "\n".join(tail)
        raise BuildError(
            f"The build process ended without an answer:\n{output[-1500:]}", "was it killed for want of memory?"
        )

    def _claim(self, message: dict[str, str]) -> Lease:
        entry = self._store.layout.entry(message["ready"])
        lease = claim(entry, self._store.layout, self._holder) if entry else None
        if lease is None:
            raise PassingError(f"`{message['ready']}` was removed right after it was built", "try again")
        lease.how = message["how"]
        return lease


def discard_result(discard: Callable[[T], None], done: Future[T]) -> None:
    """Discard the result of work that was cancelled, if it has one."""
    if done.exception() is None:
        discard(done.result())


def _start(environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "ray_envcache.cluster.building"]
    try:
        # In `/`, because `-m` imports from the current folder first, and anybody may have written there.
        return subprocess.Popen(
            command, env=environ, cwd="/", stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True
        )
    except OSError as error:
        raise BuildError(
            f"Cannot start a process that builds: {error}", "has the node memory and processes left? (`ulimit -u`)"
        ) from error


def _message(line: str) -> dict[str, Any]:
    """What a line says to the agent; {} for one that is for the log. Those of uv are indented."""
    message: dict[str, Any] = {}
    with suppress(ValueError):
        message = json.loads(line) if line.startswith("{") else {}
    return message


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child by closing its stdin: then it kills what it started and cleans up. Else SIGKILL, after a while."""
    with child:
        try:
            with suppress(BrokenPipeError):
                assert child.stdin is not None
                child.stdin.close()
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            _kill_tree(child.pid)


def _kill_tree(pid: int) -> None:
    with suppress(psutil.NoSuchProcess):
        # Not by process group: uv leads another one. The process first: it would note uv's end as a failure.
        child = psutil.Process(pid)
        for process in [child, *child.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)


def main() -> int:
    """Serve one request of an agent."""
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
    from ray_envcache.build.progress import observer  # builds: not on the agent's warm path

    if request["python"] != (now := platform.python_version()):
        raise InterpreterError(
            f"`{sys.executable}` is Python {now}, and was {request['python']} when this node started",
            "restart the node: workers must have the Python of their cluster",
        )
    store = Store.open(Path(request["root"]))
    holder = Holder("build", cluster=request["cluster"])
    # Not sys.stdout: its encoding may lack letters of a path.
    with open(1, "w", encoding="utf-8", errors="replace", closefd=False) as stream, observer(stream) as shown:
        return store.acquire(EnvSpec.parse(request["field"]), ClusterRay(request["ray"]), holder, shown)


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
    # On a line of its own, whatever a package has printed.
    sys.stdout.write(f"\n{json.dumps(message)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
