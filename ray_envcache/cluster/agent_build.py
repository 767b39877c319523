"""How the agent builds an environment: in a child process, watched by a thread.

A child process, because the kernel may kill a builder for its memory, and an agent that dies takes the node with it;
and because only a process can be stopped at any moment. A thread, because starting a process blocks for up to a second
on a host where many workers start at once.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import IO, Any, TypeVar

import psutil

from ray_envcache.acquire import Store
from ray_envcache.errors import BuildError, EnvCacheError, PassingError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import ClusterRay
from ray_envcache.store import journal
from ray_envcache.store.leases import Holder, Lease, claim

T = TypeVar("T")

GRACE_SECONDS = 10.0
"""How long a build process may clean up behind itself before it is killed."""


class AgentBuild:
    """A build process of the agent, which also waits where another process builds the same environment.

    `lease` becomes the agent's claim, or the error that `Store.acquire` raised. `over` is done when the process is
    gone. `environ` are the variables of the process.
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
        self.over: Future[None] = Future()
        self._store, self._path, self._holder, self._logger = store, spec.path, holder, logger
        self._request = {
            "root": os.fspath(store.layout.root),
            "field": spec.to_field(),
            "ray": ray.version,
            "python": sys.version,
            "cluster": holder.cluster,
        }
        self._environ = environ
        self._abandoned = False
        self._child: subprocess.Popen[bytes] | None = None
        # A daemon: an agent that ends does not wait for it. Then the child's stdin closes, and the child ends too.
        threading.Thread(target=self._work, name="envcache-build", daemon=True).start()

    def abandon(self) -> None:
        """Stop the process, and release a lease that still comes. Returns at once; `over` says when all is gone."""
        self._abandoned = True
        self._stop_if_abandoned()
        self.lease.add_done_callback(partial(discard_result, Lease.release))
        impatient = threading.Timer(GRACE_SECONDS, self._kill)
        impatient.daemon = True
        impatient.start()
        self.over.add_done_callback(lambda _: impatient.cancel())

    def _kill(self) -> None:
        if self._child is not None and self._child.returncode is None:
            _kill_tree(self._child.pid)

    def _stop_if_abandoned(self) -> None:
        # Called by the thread that starts the child and by `abandon`: the second of the two finds both set.
        if self._abandoned and self._child is not None:
            self._child.terminate()

    def _work(self) -> None:
        try:
            lease = self._run()
        except BaseException as error:  # noqa: BLE001  # the plugin awaits it
            self.lease.set_exception(error)
        else:
            self.lease.set_result(lease)
        self.over.set_result(None)

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
        tail: deque[bytes] = deque(maxlen=20)
        reader = threading.Thread(target=_drain, args=(child.stderr, tail), name="envcache-stderr", daemon=True)
        # The thread alone closes it: `close` beside a reader waits until all that inherited the pipe have ended.
        child.stderr = None
        reader.start()
        for raw in child.stdout:
            message = _message(raw)
            if "error" in message:
                raise EnvCacheError.from_json(message["error"])
            if "ready" in message:
                return message
            self._logger.info("%s", message.get("log", ""))
        reader.join(GRACE_SECONDS)
        _end(child)
        if child.returncode < 0 and not self._abandoned:
            # Killed: else it has noted itself how it ended.
            about = {"path": self._path, "kind": "build", "cluster": self._holder.cluster}
            journal.note(self._store.layout, "setup", result="failed", error=BuildError.__name__, **about)
        output = b"".join(tail).decode(errors="replace")
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
    command = [sys.executable, "-m", "ray_envcache.cluster.build_process"]
    try:
        # In `/`, because `-m` imports from the current folder first, and anybody may have written there.
        return subprocess.Popen(
            command, env=environ, cwd="/", stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
    except OSError as error:
        raise BuildError(
            f"Cannot start a process that builds: {error}", "has the node memory and processes left? (`ulimit -u`)"
        ) from error


def _drain(stream: IO[bytes], tail: deque[bytes]) -> None:
    """Read the child's stderr to its end: a child that writes into a full pipe would never go on."""
    with stream:
        tail.extend(stream)


def _message(raw: bytes) -> dict[str, Any]:
    """A line of the child's stdout as a message; any other line (a sitecustomize printed it) is for the log."""
    try:
        message = json.loads(raw)
    except ValueError:
        message = None
    return message if isinstance(message, dict) else {"log": raw.decode(errors="replace").rstrip()}


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
