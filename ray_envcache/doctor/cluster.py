"""Asks every node of a cluster whether it is set up: a driver, in a process of its own.

`python -m ray_envcache.doctor.cluster REQUEST` prints one JSON object on stdout. On stderr the lines that start with
`SAYS` are for people, the others are Ray's. A process of its own, because Ray prints, and ends a driver whose cluster
stops answering.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import ray
from ray._common.usage import usage_lib
from ray._private import services, utils
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub lacks what it has
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_envcache.doctor.findings import SAYS, Answer, NodeReport, enter_environment, enter_facts, node_name
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


def examine(address: str, runtime_env: dict[str, Any] | None, timeout: float) -> dict[str, Any]:
    """Ask every node that is alive, and have each set up `runtime_env` if there is one. Raises ClusterError."""
    _connect(address)
    nodes = [
        NodeReport(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerHostname"])
        for node in ray.nodes()
        if node["Alive"]
    ]
    nodes.sort(key=lambda node: (node.ip, node.node_id))
    asked = {FIELD: guard.probe(secrets.token_hex(8)), "config": {"setup_timeout_seconds": max(int(timeout), 1)}}
    for node, answer in _ask(nodes, _task(), asked, timeout):
        enter_facts(node, answer, timeout)
    if runtime_env:
        able = [node for node in nodes if not node.failed]
        _say(f"Setting up the environment of {runtime_env[FIELD]['path']} on {len(able)} of {len(nodes)} nodes")
        for node, answer in _ask(able, _task(), runtime_env, None):
            came = "failed" if answer.error else "done"
            _say(f"{node_name(node.ip, node.node_id)} {came} after {answer.seconds:.1f} s")
            enter_environment(node, answer)
    return {"address": ray.get_runtime_context().gcs_address, "nodes": [asdict(node) for node in nodes]}


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
        place = os.environ.get("RAY_AUTH_TOKEN_PATH") or os.path.expanduser("~/.ray/auth_token")
        return (
            f"Ray looks for the token in `{place}`, with RAY_AUTH_MODE=token: copy the token of the user who started the "
            "cluster there, or name its file in RAY_AUTH_TOKEN_PATH"
        )
    return (
        "is its head running? Give the address of its GCS, as for `ray status` (10.0.0.7:6379); or run the doctor on one "
        "of its nodes, or as a job: ray job submit -- ray-envcache doctor --address auto"
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
    """A task that says how the workers of its node are started, and in which environment it runs."""
    variable = guard.PROBE_ANSWER

    # Nested, so that Ray ships its code: the node may lack this package.
    def facts() -> dict[str, Any]:
        import importlib.util
        import os
        import platform
        import sys

        import ray

        return {
            "answer": os.environ.get(variable),
            "installed": importlib.util.find_spec("ray_envcache") is not None,
            "python": platform.python_version(),
            "ray": ray.__version__,
            "prefix": sys.prefix,
        }

    return ray.remote(num_cpus=0, max_retries=0)(facts)


def _ask(
    nodes: Iterable[NodeReport], task: Any, runtime_env: dict[str, Any], timeout: float | None
) -> Iterable[tuple[NodeReport, Answer]]:
    """Run the task on all nodes at once; yield answers as they come, and at the end a TimeoutError for each lacking."""
    started = time.monotonic()
    pending = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        pending[task.options(scheduling_strategy=there, runtime_env=runtime_env).remote()] = node
    while pending and (timeout is None or time.monotonic() - started < timeout):
        for done in ray.wait([*pending], timeout=1)[0]:
            yield pending.pop(done), _answer(done, time.monotonic() - started)
    for reference, node in pending.items():
        ray.cancel(reference, force=True)
        yield node, Answer(None, TimeoutError(), time.monotonic() - started)


def _answer(reference: Any, seconds: float) -> Answer:
    try:
        return Answer(ray.get(reference), None, seconds)
    except ray.exceptions.RayError as error:
        return Answer(None, error, seconds)


def _say(text: str) -> None:
    sys.stderr.write(f"{SAYS}{text}\n")
    sys.stderr.flush()


def main(arguments: list[str]) -> int:
    """Answer one request."""
    answers = os.dup(1)
    os.dup2(2, 1)  # stdout is for the answer: what Ray prints goes to stderr
    try:
        answer = examine(**json.loads(arguments[0]))
    except EnvCacheError as error:
        answer = {"error": error.to_json()}
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        json.dump(answer, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
