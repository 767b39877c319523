"""Ray's side: the plugin in the runtime env agent of every node. Thin, asynchronous, and unable to fail at import.

An exception while this module is imported, or in `__init__`, would take the whole node down. The agent's event loop
serves all runtime environments of the node, so nothing here keeps it waiting: what takes long happens in a child
process (`agent_build`), and what touches the disk in a thread, since any file operation may wait for seconds on a disk
that is busy writing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar

import ray
from ray._private.runtime_env.plugin import RuntimeEnvPlugin

from ray_envcache.acquire import Store
from ray_envcache.cluster.agent_build import Build, discard_result
from ray_envcache.errors import EnvCacheError, FieldValueError, StoreError
from ray_envcache.field import guard, probe, registration
from ray_envcache.field.spec import FIELD, EnvSpec, refuse_combinations
from ray_envcache.resolve.cluster_ray import ClusterRay
from ray_envcache.store.layout import Layout, default_root
from ray_envcache.store.leases import Holder, Lease

T = TypeVar("T")

THREADS = 4
"""How many of our operations may wait for the disk at the same time."""

FAILURE_SECONDS = 10.0
"""How long a failure is repeated without another try: Ray asks three times, a second apart."""


class EnvCachePlugin(RuntimeEnvPlugin):  # type: ignore[misc]  # Ray has no types there
    """Hands workers the interpreter of a shared environment, and holds a lease on it while this node refers to it."""

    name = FIELD
    # Before Ray's own plugins (10), so that what cannot work is refused before they install anything, and so that we
    # can take away what they must not see: the guard, and the interpreter that Ray's hook for `uv run` sets.
    priority = 5

    def __init__(self) -> None:
        # Ray reads it right after this constructor. A cap of zero makes `delete_uri` arrive exactly when the last
        # reference of this node goes.
        os.environ[f"RAY_RUNTIME_ENV_{FIELD.upper()}_CACHE_SIZE_GB"] = "0"
        self._leases: dict[str, Lease] = {}
        self._creating: dict[str, asyncio.Lock] = {}
        self._failures: dict[str, tuple[float, EnvCacheError]] = {}
        # Our own: the loop's default ones may be busy with what is Ray's.
        self._threads = ThreadPoolExecutor(THREADS, "envcache")
        self._companion: int | None = None
        with suppress(RuntimeError):  # no thread can be started: whoever comes later collects
            self._threads.submit(self._start_companion)
            for _ in range(THREADS):
                # All begin now: who starts a thread waits until it runs, which on a busy node is long for the loop.
                self._threads.submit(time.sleep, 0.005)

    @staticmethod
    def validate(runtime_env_dict: dict[str, Any]) -> None:
        """Raise FieldValueError for a field value, or a combination of fields, that can never work."""
        if probe.is_probe(runtime_env_dict[FIELD]):
            return
        refuse_combinations(runtime_env_dict)
        EnvSpec.parse(runtime_env_dict[FIELD])

    def get_uris(self, runtime_env: Any) -> list[str]:
        """One URI per field value (and working_dir, where the path is relative to it). Pure, and never raises.

        Called for every runtime_env of the node, ours or not, before the working_dir is unpacked.
        """
        value = runtime_env.get(FIELD)
        if value is None or probe.is_probe(value):
            return []
        text = json.dumps([value, runtime_env.get("working_dir")], sort_keys=True, default=str)
        return [f"{FIELD}://{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:32]}"]

    async def create(self, uri: str | None, runtime_env: Any, context: Any, logger: logging.Logger) -> float:
        """Find or build the environment and take a lease on it. Cancelled, it leaves no process and no flock."""
        if uri is None:
            context.env_vars[probe.VARIABLE] = await _answer()
            return 1.0
        # Per URI, not per serialized environment: Data, Train and Tune make many of one field value.
        async with self._creating.setdefault(uri, asyncio.Lock()):
            if uri not in self._leases:
                self._repeat_failure(uri)
                self._leases[uri] = await self._lease(uri, runtime_env, context, logger)
        return 1.0

    def modify_context(self, uris: list[str], runtime_env: Any, context: Any, logger: logging.Logger) -> None:  # noqa: ARG002
        """Start workers with the environment's interpreter, and put its `bin` first on their PATH."""
        guard.disarm(runtime_env)
        if not uris:
            return
        runtime_env.pop("py_executable", None)  # that of Ray's own hook for `uv run`; others were refused
        entry = self._leases[uris[0]].entry
        context.py_executable = shlex.quote(os.fspath(entry.python))
        context.env_vars["VIRTUAL_ENV"] = os.fspath(entry.venv)
        context.env_vars["PATH"] = f"{entry.bin}:{context.env_vars.get('PATH') or '${PATH}'}"
        context.command_prefix += registration.worker_prefix(os.environ)

    def delete_uri(self, uri: str, logger: logging.Logger) -> float:
        """Release the lease: this node's last reference went. Deletes nothing."""
        creating = self._creating.get(uri)
        if creating is not None and not creating.locked():
            del self._creating[uri]
        lease = self._leases.pop(uri, None)
        if lease is not None:
            self._threads.submit(_give_back, lease, logger)
            if not self._leases:
                self._threads.submit(self._collect_soon)
        return 1.0

    def _start_companion(self) -> None:
        from ray_envcache.gc import companion  # in a thread, not while the node waits for us

        # Open as long as the agent lives: the kernel closes it, whatever ends the agent.
        self._companion = companion.start(Layout(default_root()), os.environ)

    @staticmethod
    def _collect_soon() -> None:
        from ray_envcache.gc import companion  # in a thread, not while the node waits for us

        companion.collect_soon(Layout(default_root()), os.environ)

    async def _lease(self, uri: str, runtime_env: Any, context: Any, logger: logging.Logger) -> Lease:
        try:
            given = EnvSpec.parse(runtime_env[FIELD])
            spec, cluster_ray = _located(given, context), ClusterRay(ray.__version__)
            holder = _holder(logger)
            store, lease = await self._in_thread(partial(self._look_up, spec, cluster_ray, holder), _discard)
            if lease is None:
                # What travelled in a working_dir is what Ray pinned; it need not have all files of the driver's folder.
                wanted = spec if os.path.isabs(given.path) else spec.with_content(None)
                env_vars = runtime_env.get("env_vars") or {}
                lease = await self._build(partial(Build, store, wanted, cluster_ray, holder, logger, env_vars))
        except EnvCacheError as error:
            named = _on_this_node(error)
            self._failures[uri] = (time.monotonic(), named)
            # The driver gets this as text: what matters is not to be found below the tracebacks of our own insides.
            raise named from None
        except OSError as error:
            trouble = StoreError(f"Cannot use the store: {error}", "ray-envcache dir shows where it is")
            raise _on_this_node(trouble) from error
        logger.info("Using %s for %s", lease.entry.path.name, spec.path)
        return lease

    def _look_up(self, spec: EnvSpec, ray: ClusterRay, holder: Holder) -> tuple[Store, Lease | None]:
        store = Store.open()
        lease = store.lookup(spec, ray, holder)
        if lease is not None and any(map(store.wants_finishing, lease.entries)):
            # Nobody waits for it: what a killed compiler left undone is begun again.
            self._threads.submit(store.finish_all, lease)
        return store, lease

    async def _build(self, start: Callable[[], Build]) -> Lease:
        """Have it built, in another process. Who is cancelled meanwhile waits until nothing is left of that."""
        build = await self._in_thread(start, Build.abandon)
        over = asyncio.wrap_future(build.over)
        try:
            await asyncio.shield(over)
        except asyncio.CancelledError:
            build.abandon()
            await asyncio.shield(over)
            raise
        return build.lease.result()

    async def _in_thread(self, work: Callable[[], T], discard: Callable[[T], None]) -> T:
        """Do what touches the disk. Who is cancelled meanwhile has what comes of it discarded."""
        done = self._threads.submit(work)
        waited = asyncio.wrap_future(done)
        try:
            await asyncio.wait([waited])
        except asyncio.CancelledError:
            done.add_done_callback(partial(discard_result, discard))
            waited.add_done_callback(asyncio.Future.exception)  # else asyncio complains that nobody asked for it
            raise
        return waited.result()

    def _repeat_failure(self, uri: str) -> None:
        since, error = self._failures.pop(uri, (0.0, None))
        if error is not None and time.monotonic() - since < FAILURE_SECONDS:
            self._failures[uri] = (since, error)
            # Another object each time: one that is raised again grows a longer traceback.
            raise type(error)(error.message, error.hint)


def _give_back(lease: Lease, logger: logging.Logger) -> None:
    try:
        lease.release()
        logger.info("Released %s", lease.entry.path.name)
    except OSError as error:
        # The claim itself went first; what people are told of it is swept by whoever collects.
        logger.warning("The remains of the lease on %s stay: %s", lease.entry.path.name, error)


def _discard(found: tuple[Store, Lease | None]) -> None:
    if found[1] is not None:
        found[1].release()


async def _answer() -> str:
    """What a probe asks for. In a thread: a look at a store, and at uv, takes too long for the loop."""

    def look() -> str:
        from ray_envcache.doctor import host

        return probe.encode(asdict(host.examine()))

    return await asyncio.get_running_loop().run_in_executor(None, look)


def _located(spec: EnvSpec, context: Any) -> EnvSpec:
    """The spec with an absolute path: relative ones start in this setup's own unpacked working_dir.

    Taken from the `cd` that Ray's working_dir plugin put in front of the worker's command. The variable
    RAY_RUNTIME_ENV_CREATE_WORKING_DIR would be another setup's, where two go on at once.
    """
    if os.path.isabs(spec.path):
        return spec
    prefix = context.command_prefix
    if "cd" not in prefix:
        raise FieldValueError(
            f"A relative path without a working_dir to start from: `{spec.path}`",
            "for tasks, jobs, Serve and Ray Client use ray_envcache.runtime_env(path), whose path is absolute",
        )
    return spec.with_path(os.path.join(shlex.split(prefix[prefix.index("cd") + 1])[0], spec.path))


def _on_this_node(error: EnvCacheError) -> EnvCacheError:
    """The error with the node's address in front: a cluster has many, and the driver sees only the text."""
    address = _argument("node-ip-address")
    where = f"Node {address} ({os.uname().nodename})" if address else f"Host {os.uname().nodename}"
    return type(error)(f"{where}: {error.message}", error.hint)


def _argument(name: str) -> str:
    """An option of the command line by which the raylet started this agent; "" where it has none."""
    option = f"--{name}="
    return next((arg.removeprefix(option) for arg in sys.argv if arg.startswith(option)), "")


def _holder(logger: logging.Logger) -> Holder:
    session = os.path.basename(os.path.dirname(_argument("runtime-env-dir")))
    job = logger.name.removeprefix("runtime_env_") if logger.name else ""
    return Holder("agent", cluster=session, job=job, command="Ray's runtime env agent")
