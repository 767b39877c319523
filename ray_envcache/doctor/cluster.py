"""Asks every node of a cluster whether it is set up, or to set up environments: a driver, in a process of its own.

`python -m ray_envcache.doctor.cluster REQUEST` answers on stderr, in lines of JSON that start with `SAYS`; the others
are Ray's. A process of its own, because Ray prints, and ends a driver whose cluster stops answering.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import ray
from ray._common.usage import usage_lib
from ray._private import services, utils
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub lacks what it has
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_envcache.doctor import findings
from ray_envcache.doctor.findings import SAYS, Node, Prefetched
from ray_envcache.doctor.host import place_of_token
from ray_envcache.errors import ClusterError, EnvCacheError
from ray_envcache.field import guard
from ray_envcache.field.spec import FIELD

try:
    from ray._private.authentication.authentication_token_setup import (
        ensure_token_if_auth_enabled,
        maybe_enable_token_auth_if_token_available,
    )
except ImportError:  # Ray before 2.59: local clusters have no token
    ensure_token_if_auth_enabled = None

_CONNECT_SECONDS = 5


def examine(address: str, timeout: float) -> None:
    """Ask every node that is alive. Raises ClusterError."""
    _connect(address)
    nodes = _alive()
    probe = {FIELD: guard.probe(secrets.token_hex(8))}
    for node, facts, _ in _ask(iter([[(node, probe) for node in nodes]]), timeout):
        if facts:
            findings.enter_findings(node, facts)
    _say({"address": ray.get_runtime_context().gcs_address, "nodes": [asdict(node) for node in nodes]})


def prefetch(address: str, timeout: float, fields: dict[str, Any], *, follow: int) -> None:
    """Have every node set up all environments. Raises ClusterError.

    Also nodes that join as long as the process `follow`, which started us, is there; with 0 those that are there now.
    """
    _connect(address)
    rows: list[Prefetched] = []
    for row, facts, seconds in _ask(_wanted(rows, fields, follow=follow), timeout):
        row.seconds = round(seconds, 1)
        if facts:
            findings.enter_environment(row, facts)
        _say(asdict(row))
        if all(one.seconds is not None for one in rows):
            _say(*map(asdict, findings.find_unequal(rows)))


def _wanted(rows: list[Prefetched], fields: dict[str, Any], *, follow: int) -> Iterator[list[Any]]:
    """What to ask of new nodes, entered in `rows`; see `prefetch`."""
    while True:
        known = {row.node_id for row in rows}
        nodes = [node for node in _alive() if node.node_id not in known]
        new = [Prefetched(node.node_id, node.ip, node.host, path) for node in nodes for path in fields]
        rows += new
        _say(*map(asdict, new))
        yield [(row, guard.guarded({FIELD: guard.prefetch(fields[row.path], secrets.token_hex(8))})) for row in new]
        if os.getppid() != follow:
            return


def _alive() -> list[Node]:
    alive = [node for node in ray.nodes() if node["Alive"]]
    nodes = [Node(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerHostname"]) for node in alive]
    return sorted(nodes, key=lambda node: (node.ip, node.node_id))


def _connect(address: str) -> None:
    """Become a driver of the cluster; never start one. Raises ClusterError, with Ray's own words."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or address
    try:
        gcs = _gcs_of(address)
        # Ray itself tries for 200 seconds.
        host, _, port = gcs.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
        _use_token(address)
        # First, because `ray.init` says for 20 seconds that it cannot connect before it says why.
        utils.check_version_info(usage_lib.get_cluster_metadata(GcsClient(address=gcs)), "this host")
        # Without a hook, which would give this job an environment of its own.
        ray.init(
            gcs,
            namespace=f"ray-envcache-doctor-{os.getpid()}",
            log_to_driver=False,
            logging_level=logging.ERROR,
            _skip_env_hook=True,
        )
    except (
        AttributeError, RuntimeError, ValueError, OSError, OverflowError, ray.exceptions.RayError, SystemExit
    ) as error:  # fmt: skip
        reason = " ".join((str(error) or str(error.__context__)).split())
        raise ClusterError(f"Cannot ask the cluster at `{address}`: {reason}", _hint(reason)) from error


def _hint(reason: str) -> str:
    if "uthentication" in reason:
        return (
            f"Ray looks for the token in `{place_of_token(os.environ)}`, with RAY_AUTH_MODE=token: copy the token of "
            "the user who started the cluster there, or name its file in RAY_AUTH_TOKEN_PATH"
        )
    return (
        "is its head running? Give the address of its GCS, as for `ray status` (10.0.0.7:6379); or run the doctor on "
        "one of its nodes, or as a job: ray job submit -- ray-envcache doctor --address auto"
    )


def _gcs_of(address: str) -> str:
    """The address of the cluster's GCS, as host:port. Raises ValueError and OSError."""
    if "://" in address:
        raise ValueError("it is an address for Ray Client, which cannot ask a single node")
    found: str | None = services.canonicalize_bootstrap_address(address)
    if found is None:
        raise ValueError("this word starts a cluster, and finds none")
    return found


def _use_token(address: str) -> None:
    """Do what `ray.init` does about a token, but before our first question. Raises Ray's AuthenticationError.

    Without RAY_AUTH_MODE Ray sends the user's token only to a cluster that it found itself, never to a named address.
    """
    if ensure_token_if_auth_enabled is not None:
        if address == "auto":
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        ensure_token_if_auth_enabled(create_token_if_missing=False)


def _task() -> Any:
    """A task that says what the plugin of its node answered, in which environment it runs, and what that has."""
    variable = guard.PROBE_ANSWER

    # Nested, so that Ray ships its code: the node may lack this package.
    def facts() -> dict[str, Any]:
        import importlib.metadata
        import importlib.util
        import os
        import platform
        import sys

        return {
            "answer": os.environ.get(variable),
            "installed": importlib.util.find_spec("ray_envcache") is not None,
            "prefix": sys.prefix,
            "platform": " ".join([*sys.version.split(), platform.machine(), *platform.libc_ver()]),
            "packages": sorted(f"{one.name} {one.version}" for one in importlib.metadata.distributions()),
        }

    return ray.remote(num_cpus=0, max_retries=0)(facts)


def _ask(arriving: Iterator[list[Any]], timeout: float) -> Iterator[tuple[Any, dict[str, Any], float]]:
    """Run the task for all that arrives, pairs of what is about a node and a runtime_env; yield answers and seconds."""
    task, pending = _task(), dict[Any, tuple[Any, float]]()
    while (batch := next(arriving, None)) is not None or pending:
        for about, runtime_env in batch or ():
            there = NodeAffinitySchedulingStrategy(about.node_id, soft=False)
            env = {**runtime_env, "config": {"setup_timeout_seconds": max(int(timeout), 1)}}
            pending[task.options(scheduling_strategy=there, runtime_env=env).remote()] = about, time.monotonic()
        if not pending:
            time.sleep(1)
        ready = {*ray.wait([*pending], num_returns=len(pending), timeout=1)[0]}
        for reference, (about, started) in [*pending.items()]:
            seconds = time.monotonic() - started
            if reference in ready or seconds > timeout:
                del pending[reference]
                yield about, _answer(about, reference, timeout), seconds


def _answer(about: Node | Prefetched, reference: Any, timeout: float) -> dict[str, Any]:
    """What the task returned, {} where it failed, or is not over now: that becomes a finding."""
    try:
        return dict(ray.get(reference, timeout=0))
    except ray.exceptions.RayError as error:
        ray.cancel(reference, force=True)
        about.findings.append(findings.failure_of(error, timeout))
        return {}


def _say(*answers: dict[str, Any]) -> None:
    sys.stderr.write("".join(f"{SAYS}{json.dumps(answer)}\n" for answer in answers))
    sys.stderr.flush()


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    try:
        prefetch(**request) if "fields" in request else examine(**request)
    except EnvCacheError as error:
        _say({"error": error.to_json()})
