"""Ray's side: the plugin in the runtime env agent of every node. Thin, asynchronous, and unable to fail at import.

An exception while this module is imported, or in `__init__`, would take the whole node down. The agent's event loop
serves all runtime environments of the node, so this module never blocks it. Builds run in a child process
(`building`). File operations run in a thread, because each may wait for seconds on a disk that is busy writing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import shlex
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict
from functools import partial
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import ray
from ray._private.runtime_env.plugin import RuntimeEnvPlugin

from ray_envcache.acquire import Store
from ray_envcache.cluster import worker
from ray_envcache.cluster.building import AgentBuild, discard_result
from ray_envcache.errors import EnvCacheError, FieldValueError, StoreError
from ray_envcache.field import guard
from ray_envcache.field.spec import FIELD, EnvSpec, refuse_combinations, set_by_ray
from ray_envcache.resolve import uv
from ray_envcache.resolve.interpreter import ClusterRay
from ray_envcache.store.layout import Layout, default_root
from ray_envcache.store.leases import Holder, Lease

T = TypeVar("T")

THREADS = 4
"""How many of the plugin's operations may wait for the disk at the same time."""

PREFETCHES = 2
"""How many environments are prefetched at once, so that one downloads while one compiles. Both need memory and disk."""

KEPT_SECONDS = 3600.0
"""How long a prefetched environment is held for the jobs to come: others that need its room cannot push it out."""

_PREFETCHED = "prefetch-"

FAILURE_SECONDS = 10.0
"""How long the plugin repeats a failure instead of trying again: Ray asks three times, a second apart."""


class EnvCachePlugin(RuntimeEnvPlugin):  # type: ignore[misc]  # Ray has no types there
    """Hands workers the interpreter of a shared environment, and holds a lease on it while this node refers to it."""

    name = FIELD
    # Before Ray's own plugins (10): they would install `pip` before we refuse it, and fail at the guard.
    priority = 5

    def __init__(self) -> None:
        # Ray reads it right after this constructor. With a cap of zero Ray calls `delete_uri` at the moment when this
        # node's last reference goes.
        os.environ[f"RAY_RUNTIME_ENV_{FIELD.upper()}_CACHE_SIZE_GB"] = "0"
        # A copy: the loop sets and deletes a variable for each working_dir, and a thread that copies them meanwhile
        # gets a KeyError.
        self._environ = dict(os.environ)
        self._leases: dict[str, Lease] = {}
        # Each lock lives while a set-up uses it.
        self._creating: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._failures: dict[str, EnvCacheError] = {}
        self._prefetches = asyncio.Semaphore(PREFETCHES)
        # Not the loop's default threads: Ray unpacks working_dirs there, for minutes.
        self._threads = ThreadPoolExecutor(THREADS, "envcache")
        # Apart: a prefetch that Ray gives up, and begins again, goes on compiling.
        self._compilers = ThreadPoolExecutor(PREFETCHES, "envcache-compiler")
        self._companion: int | None = None
        with suppress(RuntimeError):  # the node has no thread left: the next cluster's companion collects
            self._threads.submit(self._start_companion)

    @staticmethod
    def validate(runtime_env_dict: dict[str, Any]) -> None:
        """Raise FieldValueError for a field value, or a combination of fields, that cannot work."""
        if guard.is_probe(runtime_env_dict[FIELD]):
            return
        others = dict(runtime_env_dict)
        if set_by_ray(others.get(guard.EXECUTABLE)):
            del others[guard.EXECUTABLE]
        refuse_combinations(others)
        EnvSpec.parse(guard.prefetched(runtime_env_dict[FIELD]) or runtime_env_dict[FIELD])

    def get_uris(self, runtime_env: Any) -> list[str]:
        """One URI per field value (and working_dir, where the path is relative to it). Reads no file, never raises.

        Ray calls it for every runtime_env of the node before any plugin acts on it. So it also takes the guard away:
        later Ray would not ask us about a task that left the environment of its job by `{"envcache": None}`.
        """
        guard.disarm(runtime_env)
        value = runtime_env.get(FIELD)
        if value is None or guard.is_probe(value):
            return []
        text = json.dumps([value, runtime_env.get("working_dir")], sort_keys=True, default=str)
        kind = _PREFETCHED if guard.prefetched(value) else ""
        return [f"{FIELD}://{kind}{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:32]}"]

    async def create(self, uri: str | None, runtime_env: Any, context: Any, logger: logging.Logger) -> float:
        """Find or build the environment and take a lease on it. Cancelled, it leaves no process and no flock."""
        if uri is None:
            context.env_vars[guard.PROBE_ANSWER] = await asyncio.to_thread(_answer_to_probe)
            return 1.0
        # Per URI, not per serialized environment: Data, Train and Tune make many of one field value.
        lock = self._creating.setdefault(uri, asyncio.Lock())
        async with lock, self._prefetches if _PREFETCHED in uri else nullcontext():
            if uri in self._failures:
                # Without the frames of the first time, which would be shown too.
                raise self._failures[uri].with_traceback(None)
            if uri not in self._leases:
                self._leases[uri] = await self._lease(uri, runtime_env, context, logger)
            if _PREFETCHED in uri:
                try:
                    answer = await self._in_thread(partial(_finish, self._leases[uri]), lambda _: None, self._compilers)
                finally:
                    asyncio.get_running_loop().call_later(KEPT_SECONDS, self._release, uri, logger)
                context.env_vars[guard.PROBE_ANSWER] = answer
        return 1.0

    def modify_context(self, uris: list[str], runtime_env: Any, context: Any, logger: logging.Logger) -> None:  # noqa: ARG002
        """Have workers run from the environment."""
        if uris:
            runtime_env.pop(guard.EXECUTABLE, None)  # the one that Ray sets under `uv run`: `validate` refused others
            worker.use(self._leases[uris[0]].entry, runtime_env, context, self._environ)

    def delete_uri(self, uri: str, logger: logging.Logger) -> float:
        """Release the lease, since this node's last reference to it is gone. Deletes nothing."""
        if _PREFETCHED not in uri:
            self._release(uri, logger)
        return 1.0

    def _release(self, uri: str, logger: logging.Logger) -> None:
        lease = self._leases.pop(uri, None)
        if lease is not None:
            self._threads.submit(_give_back, lease, logger)
            if not self._leases:
                self._threads.submit(self._collect_soon)

    def _start_companion(self) -> None:
        from ray_envcache.gc import companion

        # Open as long as the agent lives: the kernel closes it, whatever ends the agent.
        self._companion = companion.start(Layout(default_root()), self._environ)

    def _collect_soon(self) -> None:
        from ray_envcache.gc import companion

        companion.collect_soon(Layout(default_root()), self._environ, companion.SETTLING_SECONDS)

    async def _lease(self, uri: str, runtime_env: Any, context: Any, logger: logging.Logger) -> Lease:
        try:
            given = EnvSpec.parse(guard.prefetched(runtime_env[FIELD]) or runtime_env[FIELD]).expanded()
            spec, cluster_ray = _located(given, context), ClusterRay(ray.__version__)
            holder = _holder(logger)
            store, lease = await self._in_thread(partial(self._look_up, spec, cluster_ray, holder), _discard)
            if lease is None:
                # What travelled in a working_dir is what Ray pinned; it need not have all files of the driver's folder.
                wanted = spec if os.path.isabs(given.path) else spec._replace(content=None)
                # Variables that reach indexes: in the process's environment, so that no file and no log has them.
                environ = {**self._environ, **uv.relevant(runtime_env.get("env_vars") or {})}
                start = partial(AgentBuild, store, wanted, cluster_ray, holder, logger, environ)
                lease = await self._build(start)
        except EnvCacheError as error:
            named = _on_this_node(error)
            if not error.passing:
                self._remember_failure(uri, named)
            # Ray sends the whole traceback to the driver as text: without our own frames the message comes first.
            raise named from None
        except OSError as error:
            trouble = StoreError(f"Cannot use the store: {error}", "ray-envcache dir shows where it is")
            raise _on_this_node(trouble) from error
        logger.info("Using %s for %s", lease.entry.path.name, spec.path)
        return lease

    def _look_up(self, spec: EnvSpec, ray: ClusterRay, holder: Holder) -> tuple[Store, Lease | None]:
        store = Store.open()
        lease = store.lookup(spec, ray, holder)
        if lease is not None:
            # Nobody waits for it: what a killed compiler left undone is begun again.
            # Not os.environ: the loop removes Ray's variables from it while a thread copies it.
            with suppress(RuntimeError):  # the node has no thread left
                self._threads.submit(store.finish, lease, self._environ)
        return store, lease

    async def _build(self, start: Callable[[], AgentBuild]) -> Lease:
        """Wait for a build in another process. If cancelled, returns only after that process is gone."""
        build = await self._in_thread(start, AgentBuild.abandon)
        lease = asyncio.wrap_future(build.lease)
        try:
            await asyncio.wait([lease])
        except asyncio.CancelledError:
            build.abandon()
            lease.add_done_callback(asyncio.Future.exception)  # else asyncio logs "exception was never retrieved"
            await asyncio.wait([lease])
            raise
        return lease.result()

    async def _in_thread(
        self, work: Callable[[], T], discard: Callable[[T], None], threads: ThreadPoolExecutor | None = None
    ) -> T:
        """Do `work`, which touches the disk, in a thread. If cancelled, its result is discarded when it comes."""
        done = (threads or self._threads).submit(work)
        waited = asyncio.wrap_future(done)
        try:
            await asyncio.wait([waited])
        except asyncio.CancelledError:
            done.add_done_callback(partial(discard_result, discard))
            waited.add_done_callback(asyncio.Future.exception)  # else asyncio logs "exception was never retrieved"
            raise
        return waited.result()

    def _remember_failure(self, uri: str, error: EnvCacheError) -> None:
        self._failures[uri] = error
        asyncio.get_running_loop().call_later(FAILURE_SECONDS, self._failures.pop, uri, None)


def _give_back(lease: Lease, logger: logging.Logger) -> None:
    try:
        lease.release()
        logger.info("Released %s", lease.entry.path.name)
    except OSError as error:
        # The claim itself was freed first; the next collection removes its file.
        logger.warning("The remains of the lease on %s stay: %s", lease.entry.path.name, error)


def _discard(found: tuple[Store, Lease | None]) -> None:
    if found[1] is not None:
        found[1].release()


def _finish(lease: Lease) -> str:
    """Complete the bytecode, and answer a prefetch. What lies in a read-only store may lack some for ever."""
    from ray_envcache.build import bytecode

    bytecode.finish_lease_now(Layout(default_root()), lease)
    is_complete = all(entry.compiled.exists() for entry in lease.entries)
    return guard.encode_answer({"how": lease.how, "bytecode": is_complete})


def _answer_to_probe() -> str:
    """The answer to a probe of `ray-envcache doctor`; finding it starts uv and writes to the store."""
    from ray_envcache.doctor import host

    return guard.encode_answer([asdict(found) for found in host.examine()])


def _located(spec: EnvSpec, context: Any) -> EnvSpec:
    """The spec with an absolute path: relative ones start in this setup's own unpacked working_dir.

    Read from the `cd` that Ray's working_dir plugin put in front of the worker's command. The variable
    RAY_RUNTIME_ENV_CREATE_WORKING_DIR may belong to another setup: the agent's loop runs several at once.
    """
    if os.path.isabs(spec.path):
        return spec
    prefix = context.command_prefix
    if "cd" not in prefix:
        raise FieldValueError(
            f"A relative path without a working_dir to start from: `{spec.path}`",
            "for tasks, jobs, Serve and Ray Client use ray_envcache.runtime_env(path), whose path is absolute",
        )
    return spec._replace(path=os.path.join(shlex.split(prefix[prefix.index("cd") + 1])[0], spec.path))


def _on_this_node(error: EnvCacheError) -> EnvCacheError:
    """The error with this node's address in front: the driver sees only the text, and a cluster has many nodes."""
    address = _argument("node-ip-address")
    where = f"Node {address} ({os.uname().nodename})" if address else f"Host {os.uname().nodename}"
    return type(error)(f"{where}: {error.message}", error.hint)


def _argument(name: str) -> str:
    """The value of an option with which the raylet started this agent, or ""."""
    option = f"--{name}="
    return next((arg.removeprefix(option) for arg in sys.argv if arg.startswith(option)), "")


def _holder(logger: logging.Logger) -> Holder:
    session = os.path.basename(os.path.dirname(_argument("runtime-env-dir")))
    job = logger.name.removeprefix("runtime_env_") if logger.name else ""
    return Holder("agent", cluster=session, job=job, command="Ray's runtime env agent")
