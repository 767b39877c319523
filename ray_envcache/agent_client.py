"""How the agent has an environment built: in a child process, watched without blocking, gone when cancelled.

A child, because an agent that is killed for want of memory takes the node with it, and because only a process can be
stopped in the middle of anything.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import Any

from ray_envcache import _uv
from ray_envcache.cluster_ray import ClusterRay
from ray_envcache.errors import BuildError, EnvCacheError
from ray_envcache.leases import Holder, Lease, claim_ready
from ray_envcache.spec import EnvSpec
from ray_envcache.store import Store

_MAX_LINE = 1 << 20


@asynccontextmanager
async def built(
    store: Store,
    spec: EnvSpec,
    ray: ClusterRay,
    holder: Holder,
    logger: logging.Logger,
    env_vars: Mapping[str, str] = MappingProxyType({}),
) -> AsyncIterator[Callable[[], Lease]]:
    """Have the environment built, or wait for whoever builds it. Yields what claims it: that touches the disk.

    Nobody collects the environment while the context lasts. Raises what `Store.acquire` raises. Of `env_vars` uv gets
    what it needs to reach indexes, by way of the child's environment: in no file, and no log.
    """
    request = {
        "root": os.fspath(store.layout.root),
        "field": spec.to_field(),
        "ray": ray.version,
        "cluster": holder.cluster,
    }
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "ray_envcache.agent_build",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, **_uv.relevant(env_vars)},
        start_new_session=True,
        limit=_MAX_LINE,
    )
    assert child.stdin is not None
    try:
        child.stdin.write(json.dumps(request).encode() + b"\n")
        name = await _listen(child, logger)
        # The child holds a lease until its stdin closes.
        yield partial(_claim, store, name, holder)
    finally:
        child.stdin.close()
        await _end(child)


async def _listen(child: asyncio.subprocess.Process, logger: logging.Logger) -> str:
    """Log what the child says until it names the entry. Raises the error it reports."""
    assert child.stdout is not None
    async for raw in child.stdout:
        message: dict[str, Any] = json.loads(raw)
        if "error" in message:
            raise EnvCacheError.from_json(message["error"])
        if "ready" in message:
            return str(message["ready"])
        logger.info("%s", message.get("log", ""))
    assert child.stderr is not None
    output = (await child.stderr.read()).decode(errors="replace")
    raise BuildError(
        f"The build process ended without an answer:\n{output[-1500:]}", "was it killed for want of memory?"
    )


def _claim(store: Store, name: str, holder: Holder) -> Lease:
    entry = store.layout.entry(name)
    lease = claim_ready(entry, store.layout, holder) if entry else None
    if lease is None:
        raise BuildError(f"The environment `{name}` vanished right after it was built", "try again")
    return lease


async def _end(child: asyncio.subprocess.Process) -> None:
    """Wait for the child, which ends when its stdin closes: it kills what it started and cleans up behind itself."""
    # Shielded: a second cancellation must not leave it half done.
    await asyncio.shield(asyncio.ensure_future(_reap(child)))


async def _reap(child: asyncio.subprocess.Process) -> None:
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(child.wait(), timeout=10)
        return
    _kill_tree(child.pid)
    await child.wait()


def _kill_tree(pid: int) -> None:
    import psutil  # only where a child does not end by itself

    with suppress(psutil.NoSuchProcess):
        # uv leads a process group of its own.
        for process in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
