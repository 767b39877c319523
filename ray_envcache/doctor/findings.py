"""Findings: what a check found on this host, and what the nodes of a cluster answer when they are asked."""

from __future__ import annotations

import json
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray_envcache.errors import ClusterError, EnvCacheError
from ray_envcache.field import guard
from ray_envcache.field.registration import UV_RUN
from ray_envcache.store.layout import default_root
from ray_envcache.system import children
from ray_envcache.version import __version__

OK, WARN, ERROR = "ok", "warn", "error"
SAYS = "ray-envcache: "
"""The start of our own lines, which are JSON, among the lines of Ray on stderr."""
VERSION = f"ray-envcache {__version__}"
_ENTRY = re.compile(r"/entries/(?P<key>[0-9a-f]{32})-\d+/venv$")
_START = 'eval "$(ray-envcache env)"; ray start ...'
_OURS = re.compile(r"^ray_envcache\.errors\.\w+: (.*?)(?:\nhint: ([^\n]*))?\s*\Z", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Finding:
    """One result: the `name` of the check, OK, WARN or ERROR, the result in words, and what to do if it is not OK."""

    name: str
    state: str
    text: str
    hint: str = ""


def finding_of(name: str, check: Callable[..., Finding], *arguments: object) -> Finding:
    """Run a check and return its finding; an error that it raises becomes a finding too."""
    try:
        return check(*arguments)
    except EnvCacheError as error:
        return Finding(name, ERROR, error.message, error.hint)
    except OSError as error:
        hint = "the operating system refused; mend the permissions or the path"
        return Finding(name, ERROR, str(error), hint)


def node_name(ip: str, node_id: str) -> str:
    """A node for people: its address, and the start of its id, because several nodes may share an address."""
    return f"{ip} ({node_id[:8]})"


@dataclass
class Node:
    """A node of a cluster and what was found there, with the fields of the JSON."""

    node_id: str
    ip: str
    host: str
    findings: list[Finding] = field(default_factory=list, kw_only=True)


@dataclass
class Prefetched(Node):
    """One environment on one node; None: not yet. `ok` once a worker ran from it.

    `how` it came there is "found", "waited" for another builder, "fetched" or "built"; `bytecode`: all of it is there.
    """

    path: str
    ok: bool = False
    key: str | None = None
    how: str | None = None
    seconds: float | None = None
    bytecode: bool | None = None
    platform: str | None = None
    packages: list[str] = field(default_factory=list)


def enter_findings(node: Node, facts: dict[str, Any]) -> None:
    """Enter what the probe's task returned, and where the node differs from what a program here would use."""
    if facts["answer"] is None:
        node.findings.append(_absence(installed=facts["installed"]))
        return
    # With `get`: the node may have another version of this package, with other fields.
    names = ("name", "state", "text", "hint")
    node.findings += [Finding(*(str(found.get(name, "")) for name in names)) for found in json.loads(facts["answer"])]
    there = {one.name: one.text.partition(": ")[0] for one in node.findings if one.state != ERROR}
    if there.get("plugin", VERSION) != VERSION:
        text = f"{there['plugin']} is there, {VERSION} here"
        node.findings.append(Finding("plugin", WARN, text, "install one version everywhere"))
    here = os.fspath(default_root())
    if there.get("store", here) != here and node.host == os.uname().nodename:
        # Silent otherwise: the driver builds in the one, and the node once more in the other.
        text = f"the node uses the store at {there['store']}, a program started here the one at {here}"
        hint = "start the node, and programs, with the same RAY_ENVCACHE_DIR"
        node.findings.append(Finding("store", WARN, text, hint))


def _absence(*, installed: bool) -> Finding:
    first = "" if installed else "python -m pip install ray-envcache there; then "
    text = "The plugin is not loaded: Ray ignores the field there"
    return Finding("plugin", ERROR, text, f"{first}start the node with the variables: {_START}")


def failure_of(error: Exception, timeout: float) -> Finding:
    """Why a task on a node did not run; a TimeoutError: not within `timeout` seconds."""
    if isinstance(error, TimeoutError):
        hint = "is the node overloaded or dying? See `ray list nodes` and its raylet's log; --timeout waits longer"
        return Finding("answer", ERROR, f"No answer within {timeout:g} s", hint)
    if guard.ABSENT in str(error):
        # As a job with the guard in its runtime_env we inherit it, and a node without the plugin refuses our tasks.
        return _absence(installed=True)
    hint = "is the node alive (`ray list nodes`)? See runtime_env_setup-*.log and raylet.err there"
    if ours := _OURS.search(str(error)):
        return Finding("answer", ERROR, ours[1].strip(), ours[2] or hint)
    # The last line of what Ray says.
    return Finding("answer", ERROR, str(error).strip().rpartition("\n")[2].strip() or "no reason given", hint)


def enter_environment(row: Prefetched, facts: dict[str, Any]) -> None:
    """Enter what a task said of the environment that it ran in."""
    said = json.loads(facts["answer"] or "{}")
    row.how, row.bytecode = said.get("how"), said.get("bytecode")
    row.platform, row.packages = facts["platform"], facts["packages"]
    if found := _ENTRY.search(facts["prefix"]):
        row.ok, row.key = True, found["key"]
    else:
        text = f"The task ran outside of any environment, in `{facts['prefix']}`"
        row.findings.append(Finding("environment", ERROR, text, "does another plugin set the interpreter?"))


def latest(answers: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all that was said of prefetched environments the last of each one on each node."""
    return [*{(row["node_id"], row["path"]): row for row in answers}.values()]


def find_unequal(rows: Iterable[Prefetched]) -> Iterator[Prefetched]:
    """Yield, with a finding, each that has another key than most nodes of the same platform for the same path."""
    alike = defaultdict(list)
    for row in rows:
        alike[row.path, row.platform].append(row)
    for group in alike.values():
        usual = max(group, key=lambda row: sum(one.key == row.key for one in group))
        for row in (row for row in group if row.ok and row.key != usual.key):
            differ = ", ".join(sorted({*row.packages} ^ {*usual.packages})) or "files or settings of packages"
            there = f"{usual.key} on {node_name(usual.ip, usual.node_id)}"
            text = f"The key is {row.key}, but {there}, with the same Python and machine. They differ in {differ}"
            hint = "do both have the same packages beside ray? `ray-envcache explain` there says what it would build"
            row.ok = False
            row.findings.append(Finding("key", ERROR, text, hint))
            yield row


def ask(address: str, on_answer: Callable[[dict[str, Any]], object], **request: Any) -> None:
    """Ask in a process of its own, because Ray ends a driver whose cluster stops answering. Raises EnvCacheError."""

    def listen(line: str) -> None:
        if line.startswith(SAYS):
            answer = json.loads(line.removeprefix(SAYS))
            if "error" in answer:
                raise EnvCacheError.from_json(answer["error"])
            on_answer(answer)

    argv = [sys.executable, "-m", "ray_envcache.doctor.cluster", json.dumps({"address": address, **request})]
    # `-m` imports what lies in the working directory first: so not in a folder of the user.
    # Started below `uv run`, Ray would otherwise run the tasks by `uv run` too.
    done = children.run(argv, environ={**os.environ, UV_RUN: "0"}, cwd=Path("/"), on_line=listen)
    if done.returncode:
        end = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise ClusterError(
            f"Ray ended with status {done.returncode} while it talked to `{address}`:\n{end}",
            "is the cluster's head running? See Ray's logs there",
        )
