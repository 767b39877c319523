"""Is every node of a cluster set up? A driver of its own that asks each, as a process of its own.

`python -m ray_envcache.doctor.cluster REQUEST` answers with one JSON object on stdout; lines of its stderr that start
with `SAYS` are for people, the others are Ray's. A process, because Ray may talk, wait for minutes or end whoever asks
when a cluster does not answer: an alarm, which no blocked thread can hold up, ends this one instead.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import ray
from ray._common.usage import usage_lib
from ray._private import services, utils
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # its stub lacks what it has
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

import ray_envcache
from ray_envcache.doctor.nodes import SAYS, Answer, NodeReport, enter_environment, enter_facts, node_name
from ray_envcache.errors import ClusterError, EnvCacheError
from ray_envcache.field import probe

_SILENCE_SECONDS = 45
"""How long Ray may block us before the cluster counts as dead; or as long as a node may take to answer."""
_REFUSED_SECONDS = 5
_AS_A_JOB = "on a node of the cluster, or as a job: ray job submit -- ray-envcache doctor --address auto"


def examine(address: str, path: str | None, timeout: float) -> dict[str, Any]:
    """Ask every node that is alive, and with `path` have each set up its environment. Raises EnvCacheError."""
    signal.alarm(max(_SILENCE_SECONDS, int(timeout)))
    runtime_env = _runtime_env(path)
    _connect(address)
    nodes = [
        NodeReport(node["NodeID"], node["NodeManagerAddress"], node["NodeManagerHostname"])
        for node in ray.nodes()
        if node["Alive"]
    ]
    nodes.sort(key=lambda node: (node.ip, node.node_id))
    asked = {"envcache": probe.field(secrets.token_hex(8)), "config": {"setup_timeout_seconds": max(int(timeout), 1)}}
    for node, answer in _ask(nodes, _look(), asked, timeout):
        enter_facts(node, answer, timeout)
    if runtime_env:
        able = [node for node in nodes if not node.failed]
        _say(f"Setting up the environment of {path} on {len(able)} of {len(nodes)} nodes")
        for node, answer in _ask(able, _where(), runtime_env, None):
            came = "failed" if answer.error else "done"
            _say(f"{node_name(node.ip, node.node_id)} {came} after {answer.seconds:.1f} s")
            enter_environment(node, answer)
    return {"address": ray.get_runtime_context().gcs_address, "nodes": [asdict(node) for node in nodes]}


def _runtime_env(path: str | None) -> dict[str, Any] | None:
    if path is None:
        return None
    return ray_envcache.runtime_env(path)


def _connect(address: str) -> None:
    """Become a driver of the cluster, and never start one. Raises ClusterError."""
    host, port = _located(address)
    _require_listener(host, port)
    namespace = f"ray-envcache-doctor-{os.getpid()}"
    trouble = ""
    try:
        if address == "auto":
            _take_token()
        trouble = _require_same_versions(f"{host}:{port}")
        # Our own hook, and Ray's for `uv run`, would give the job an environment of its own.
        ray.init(address, namespace=namespace, log_to_driver=False, logging_level=logging.ERROR, _skip_env_hook=True)
    except (ConnectionError, RuntimeError, ValueError, OSError, ray.exceptions.RayError, SystemExit) as error:
        raise _unreachable(address, trouble or str(error) or str(error.__context__)) from error


def _take_token() -> None:
    """Use the user's token if there is one, as `ray.init("auto")` does later than we need it."""
    with suppress(ImportError):  # of a Ray without that
        from ray._private.authentication.authentication_token_setup import (
            maybe_enable_token_auth_if_token_available,
        )

        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def _require_same_versions(address: str) -> str:
    """Raise what Ray raises when it compares versions: it tries for long to talk to a distant one before it does.

    Whatever else is wrong is returned: Ray need not fail of it, but says less where it does.
    """
    try:
        utils.check_version_info(usage_lib.get_cluster_metadata(GcsClient(address=address)), "this host")
    except (AttributeError, ConnectionError, OSError, ValueError, ray.exceptions.RayError) as error:
        return str(error)  # AttributeError: a cluster that does not say
    return ""


def _located(address: str) -> tuple[str, int]:
    """Host and port of the cluster's GCS."""
    named = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
    if "://" in named:
        raise ClusterError(
            f"`{named}` is for clients, through which nodes cannot be told apart",
            f"give the address of the GCS, as `ray status` takes it (10.0.0.7:6379), {_AS_A_JOB}",
        )
    try:
        found = services.canonicalize_bootstrap_address(named)
    except (ConnectionError, ValueError, OSError) as error:
        raise _unreachable(named, str(error)) from error
    if found is None:
        raise _unreachable(named, "that is how one starts a cluster, not how one finds it")
    host, _, port = found.rpartition(":")
    return host.strip("[]"), int(port)


def _require_listener(host: str, port: int) -> None:
    # Ray itself tries for two minutes.
    try:
        socket.create_connection((host, port), timeout=_REFUSED_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"Nobody listens at {host}:{port}: {error}", "is the cluster's head running?") from error


def _unreachable(address: str, reason: str) -> ClusterError:
    versions = re.findall(r"Ray: (\S+)\s+Python: (\S+)", reason)
    if "Version mismatch" in reason and len(versions) == 2:
        (theirs, their_python), (ours, our_python) = versions
        return ClusterError(
            f"The cluster runs ray {theirs} and Python {their_python}, this is ray {ours} and Python {our_python}",
            "run the doctor with the cluster's own Python",
        )
    if "RAY_AUTH_MODE" in reason:
        hint = "set RAY_AUTH_MODE=token, and have the cluster's token in ~/.ray/auth_token or RAY_AUTH_TOKEN"
        return ClusterError(f"The cluster at `{address}` wants a token", hint)
    told = reason.strip().splitlines() or ["Ray does not say why"]
    return ClusterError(f"No cluster at `{address}`: {told[0]}", f"run it {_AS_A_JOB}")


def _look() -> Any:
    """The task that finds out how a node's workers are started."""
    variable = probe.VARIABLE

    # Nested, so that it travels whole: the node need not have this package.
    def look() -> dict[str, Any]:
        import importlib.util
        import os
        import platform

        import ray

        return {
            "answer": os.environ.get(variable),
            "installed": importlib.util.find_spec("ray_envcache") is not None,
            "python": platform.python_version(),
            "ray": ray.__version__,
        }

    return ray.remote(num_cpus=0, max_retries=0)(look)


def _where() -> Any:
    """The task that says where it runs."""

    def where() -> str:
        import sys

        return sys.prefix

    return ray.remote(num_cpus=0, max_retries=0)(where)


def _ask(
    nodes: Iterable[NodeReport], task: Any, runtime_env: dict[str, Any], timeout: float | None
) -> Iterable[tuple[NodeReport, Answer]]:
    """Run the task on each node at once, and yield the answers as they come; of who has none when time is up, too."""
    started = time.monotonic()
    pending = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        pending[task.options(scheduling_strategy=there, runtime_env=runtime_env).remote()] = node
    while pending and (timeout is None or time.monotonic() - started < timeout):
        signal.alarm(max(_SILENCE_SECONDS, int(timeout or 0)))
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
    """Serve one request."""
    answers = os.dup(1)
    os.dup2(2, 1)  # what Ray prints is not the answer
    try:
        answer = examine(**json.loads(arguments[0]))
    except EnvCacheError as error:
        answer = {"error": error.to_json()}
    with os.fdopen(answers, "w", encoding="utf-8") as out:
        json.dump(answer, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
