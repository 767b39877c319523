"""How the agent has an environment built: in a child process, watched by a thread, gone when abandoned.

A child, because an agent that is killed for want of memory takes the node with it, and because only a process can be
stopped in the middle of anything. A thread, because on a host where many workers start at once the mere start of a
process takes longer than the agent's event loop may wait.
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
from types import MappingProxyType
from typing import IO, Any, TypeVar

import psutil

from ray_envcache.acquire import Store
from ray_envcache.errors import BuildError, EnvCacheError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.cluster_ray import ClusterRay
from ray_envcache.store.leases import Holder, Lease, claim

T = TypeVar("T")

GRACE_SECONDS = 10.0
"""How long a build process may clean up behind itself before it is killed."""


class Build:
    """Has an environment built, or waits for whoever builds it.

    `lease` becomes the claim on it, or the error that `Store.acquire` raised; `over` follows. By then nothing is left
    of the process. Of `env_vars` uv gets what it needs to reach indexes, by way of the child's environment: in no
    file, and no log.
    """

    def __init__(
        self,
        store: Store,
        spec: EnvSpec,
        ray: ClusterRay,
        holder: Holder,
        logger: logging.Logger,
        env_vars: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        from ray_envcache.resolve import uv  # not where everything is built already

        self.lease: Future[Lease] = Future()
        self.over: Future[None] = Future()
        self._store, self._holder, self._logger = store, holder, logger
        self._request = {
            "root": os.fspath(store.layout.root),
            "field": spec.to_field(),
            "ray": ray.version,
            "python": sys.version,
            "cluster": holder.cluster,
        }
        self._environ = {**os.environ, **uv.relevant(env_vars)}
        self._abandoned = False
        self._child: subprocess.Popen[bytes] | None = None
        # A daemon: an agent that ends does not wait for it, and by its end the child's stdin closes.
        threading.Thread(target=self._work, name="envcache-build", daemon=True).start()

    def abandon(self) -> None:
        """Stop: nobody wants it any more, and a lease that still comes is given back. Returns at once."""
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
        # Asked by both, the one who starts the child and the one who abandons it, whoever is second.
        if self._abandoned and self._child is not None:
            self._child.terminate()

    def _work(self) -> None:
        try:
            lease = self._run()
        except BaseException as error:  # noqa: BLE001  # passed on to whoever waits
            self.lease.set_exception(error)
        else:
            self.lease.set_result(lease)
        self.over.set_result(None)

    def _run(self) -> Lease:
        child = self._child = _start(self._environ)
        try:
            self._stop_if_abandoned()
            assert child.stdin is not None
            with suppress(BrokenPipeError):  # it ended already: what it left to say is read below
                child.stdin.write(json.dumps(self._request).encode() + b"\n")
                child.stdin.flush()
            # The child holds a lease until its stdin closes.
            return self._claim(_listen(child, self._logger))
        finally:
            _end(child)

    def _claim(self, name: str) -> Lease:
        entry = self._store.layout.entry(name)
        lease = claim(entry, self._store.layout, self._holder) if entry else None
        if lease is None:
            raise BuildError(f"The environment `{name}` vanished right after it was built", "try again")
        return lease


def discard_result(discard: Callable[[T], None], done: Future[T]) -> None:
    """Discard what came of work for which nobody waits any more, if anything did."""
    if done.exception() is None:
        discard(done.result())


def _start(environ: Mapping[str, str]) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    command = [sys.executable, "-m", "ray_envcache.cluster.build_process"]
    try:
        # Not in the driver's folder, or wherever the node was started: `-m` imports what lies there first.
        return subprocess.Popen(
            command, env=environ, cwd="/", stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True
        )
    except OSError as error:
        raise BuildError(
            f"Cannot start a process that builds: {error}", "has the node memory and processes left? (`ulimit -u`)"
        ) from error


def _listen(child: subprocess.Popen[bytes], logger: logging.Logger) -> str:
    """Log what the child says until it names the entry. Raises the error it reports."""
    assert child.stdout is not None
    tail: deque[bytes] = deque(maxlen=20)
    reader = threading.Thread(target=_drain, args=(child.stderr, tail), name="envcache-stderr", daemon=True)
    # The thread's from here on: who closed it beside a reader would wait for all who have inherited it.
    child.stderr = None
    reader.start()
    for raw in child.stdout:
        message = _message(raw)
        if "error" in message:
            raise EnvCacheError.from_json(message["error"])
        if "ready" in message:
            return str(message["ready"])
        logger.info("%s", message.get("log", ""))
    reader.join(GRACE_SECONDS)
    output = b"".join(tail).decode(errors="replace")
    raise BuildError(
        f"The build process ended without an answer:\n{output[-1500:]}", "was it killed for want of memory?"
    )


def _drain(stream: IO[bytes], tail: deque[bytes]) -> None:
    """Read to the end, all the time: a child whose pipe is full waits for ever."""
    with stream:
        tail.extend(stream)


def _message(raw: bytes) -> dict[str, Any]:
    """A line of the child's stdout. What something else than us wrote there is for the log."""
    try:
        message = json.loads(raw)
    except ValueError:
        message = None
    return message if isinstance(message, dict) else {"log": raw.decode(errors="replace").rstrip()}


def _end(child: subprocess.Popen[bytes]) -> None:
    """Have the child end by closing its stdin: it kills what it started and cleans up behind itself."""
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
        # uv leads a process group of its own.
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
