"""Findings: what a check found on this host, and what the nodes of a cluster answered."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ray_envcache.errors import EnvCacheError
from ray_envcache.field import guard
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.version import __version__

OK, WARN, ERROR = "ok", "warn", "error"
SAYS = "ray-envcache: "
"""The start of a line for people, among the lines of Ray on stderr."""
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
    except (OSError, NotImplementedError) as error:
        hint = "the operating system refused; mend the permissions or the path"
        return Finding(name, ERROR, str(error) or type(error).__name__, hint)


def node_name(ip: str, node_id: str) -> str:
    """A node for people: its address, and the start of its id, because several nodes may share an address."""
    return f"{ip} ({node_id[:8]})"


@dataclass
class NodeReport:
    """One node, with the fields of the JSON. None: not known; `plugin` None: not loaded."""

    node_id: str
    ip: str
    host: str
    plugin: str | None = None
    store: str | None = None
    free_bytes: int | None = None
    ray: str | None = None
    python: str | None = None
    uv: str | None = None
    key: str | None = None
    seconds: float | None = None
    findings: list[Finding] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether the node cannot set up environments."""
        return any(found.state == ERROR for found in self.findings)

    def note(self, name: str, state: str, text: str, hint: str = "") -> None:
        """Add a finding."""
        self.findings.append(Finding(name, state, text, hint))


@dataclass(frozen=True)
class Answer:
    """What the task on a node returned, or the error it ended with, and after how many seconds."""

    value: Any
    error: Exception | None
    seconds: float


def enter_facts(node: NodeReport, answer: Answer, timeout: float) -> None:
    """Enter what the probe's task returned; or that it failed, or did not return within `timeout` seconds."""
    if isinstance(answer.error, TimeoutError):
        hint = "is the node overloaded or dying? See `ray list nodes` and its raylet's log; --timeout waits longer"
        node.note("answer", ERROR, f"No answer within {timeout:g} s", hint)
    elif answer.error:
        _enter_failure(node, "answer", answer.error)
    elif answer.value["answer"] is None:
        node.ray, node.python = answer.value["ray"], answer.value["python"]
        _enter_absence(node, installed=answer.value["installed"])
    else:
        _enter_answer(node, json.loads(answer.value["answer"]))
    if node.python:
        _compare(node)


def _enter_absence(node: NodeReport, *, installed: bool) -> None:
    first = "" if installed else "python -m pip install ray-envcache there; then "
    text = "The plugin is not loaded: Ray ignores the field there"
    node.note("plugin", ERROR, text, f"{first}start the node with the variables: {_START}")


def _enter_answer(node: NodeReport, facts: dict[str, Any]) -> None:
    # With `get`: the node may have another version of this package, with other fields.
    for name in ("plugin", "store", "free_bytes", "ray", "python", "uv"):
        setattr(node, name, facts.get(name))
    for found in facts.get("findings", []):
        node.note(*(str(found.get(name, "")) for name in ("name", "state", "text", "hint")))


def _compare(node: NodeReport) -> None:
    """Compare the node's versions with ours, which are those of the cluster's head: else Ray had not let us in."""
    if node.plugin and node.plugin != __version__:
        hint = "install one version everywhere"
        node.note("plugin", WARN, f"ray-envcache is {node.plugin} there, {__version__} here", hint)
    for name, there, here in (
        ("ray", node.ray, installed_ray().version),
        ("python", node.python, platform.python_version()),
    ):
        if there != here:
            node.note(name, ERROR, f"{name} is {there} there, {here} here", "all nodes of a cluster need the same")


def _enter_failure(node: NodeReport, name: str, error: Exception) -> None:
    if guard.ABSENT in str(error):
        # As a job with the guard in its runtime_env we inherit it, and a node without the plugin refuses our tasks.
        _enter_absence(node, installed=True)
        return
    message, hint = _reason(str(error))
    node.note(name, ERROR, message, hint or "see runtime_env_setup-*.log and raylet.err on the node")


def enter_environment(node: NodeReport, answer: Answer) -> None:
    """Enter the key of the environment that a task ran in, or why it did not run."""
    node.seconds = round(answer.seconds, 1)
    if answer.error:
        _enter_failure(node, "environment", answer.error)
    elif found := _ENTRY.search(answer.value["prefix"]):
        node.key = found["key"]
    else:
        text = f"The task ran outside of any environment, in `{answer.value['prefix']}`"
        node.note("environment", ERROR, text, "does another plugin set the interpreter?")


def _reason(text: str) -> tuple[str, str]:
    """Message and hint for a task that could not start: of our own error if Ray's text has one, else its last line."""
    if ours := _OURS.search(text):
        return ours[1].strip(), ours[2] or ""
    lines = text.strip().splitlines()
    return (lines[-1].strip() if lines else "no reason given"), ""
