"""What nodes answered: from Ray's words to a reason, and whether equal platforms have equal keys."""

from __future__ import annotations

import json
import os

import pytest

from ray_envcache.doctor.findings import (
    VERSION,
    Node,
    Prefetched,
    enter_environment,
    enter_findings,
    failure_of,
    find_unequal,
)
from ray_envcache.field.guard import GUARD

FACTS = {"answer": '{"how": "built", "bytecode": true}', "platform": "3.11 x86_64", "packages": ["ray 2.60.0"]}


def row(number: int, key: str, *packages: str, platform: str = "3.11 x86_64", path: str = "/app") -> Prefetched:
    found = Prefetched(f"{number:056}", f"10.0.0.{number}", "host", path)
    facts = {**FACTS, "prefix": f"/store/v1/entries/{key * 32}-1/venv", "platform": platform, "packages": [*packages]}
    enter_environment(found, facts)
    assert (found.ok, found.key) == (True, key * 32)
    return found


def warned(host: str, *answer: tuple[str, str, str], installed: bool = True) -> dict[str, str]:
    """What is not in order on a node of this host name whose plugin answers with these findings."""
    node, names = Node("0" * 56, "10.0.0.1", host), ("name", "state", "text")
    found = [{**dict(zip(names, one, strict=True)), "more": 1} for one in answer]  # as a later version may
    enter_findings(node, {"answer": json.dumps(found) if found else None, "installed": installed})
    return {one.name: f"{one.state}: {one.text}; {one.hint}" for one in node.findings if one.state != "ok"}


@pytest.mark.parametrize(
    ("host", "state", "store", "is_said"),
    [
        (os.uname().nodename, "ok", "/other: ext4", True),
        (os.uname().nodename, "warn", "/other: nfs", True),
        (os.uname().nodename, "ok", "/mine: ext4", False),
        (os.uname().nodename, "error", "Others may write to the store at `/other`", False),
        ("far", "ok", "/x: ext4", False),
    ],
)
def test_another_store(monkeypatch: pytest.MonkeyPatch, host: str, state: str, store: str, *, is_said: bool) -> None:
    """A node of this host with another store than programs started here would use is a warning that names both."""
    monkeypatch.setenv("RAY_ENVCACHE_DIR", "/mine")
    said = warned(host, ("plugin", "ok", VERSION), ("store", state, store)).get("store", "")
    assert ("the node uses the store at /other, a program started here the one at /mine" in said) == is_said


def test_another_version() -> None:
    """A node with another version of ray-envcache is a warning; one without the plugin is an error, with what to do."""
    assert warned("far", ("plugin", "ok", "ray-envcache 0.0.1")) == {
        "plugin": f"warn: ray-envcache 0.0.1 is there, {VERSION} here; install one version everywhere"
    }
    assert "pip install" not in warned("far")["plugin"]
    assert warned("far", installed=False)["plugin"].startswith("error: The plugin is not loaded: ")
    assert "; python -m pip install ray-envcache there; then " in warned("far", installed=False)["plugin"]


def test_ready() -> None:
    """What a worker said of its environment is in the row; a worker outside of any is no proof."""
    found = row(1, "a", "numpy 2.0")
    assert (found.how, found.bytecode, found.packages, found.findings) == ("built", True, ["numpy 2.0"], [])
    outside = Prefetched("0", "10.0.0.1", "host", "/app")
    enter_environment(outside, {**FACTS, "prefix": "/usr"})
    assert (outside.ok, outside.key) == (False, None)
    assert outside.findings[0].text == "The task ran outside of any environment, in `/usr`"


def test_the_odd_one() -> None:
    """The node whose key is not that of most others is the one with a finding: what differs, and from which node."""
    odd, *others = [row(1, "b", "numpy 2.1", "ray 2.60.0"), *(row(n, "a", "numpy 2.0", "ray 2.60.0") for n in (2, 3))]
    assert [*find_unequal([odd, *others])] == [odd]
    (found,) = odd.findings
    assert (found.name, odd.ok) == ("key", False)
    assert f"The key is {'b' * 32}, but {'a' * 32} on 10.0.0.2 (" in found.text
    assert found.text.endswith(" They differ in numpy 2.0, numpy 2.1")
    assert [*find_unequal([odd, *others])] == [], "said once"
    assert all(one.ok for one in others)


def test_same_packages_but_another_key() -> None:
    """Where the packages are the same, what is left is said."""
    first, second = row(1, "a", "numpy 2.0"), row(2, "b", "numpy 2.0")
    assert [*find_unequal([first, second])] == [second]
    assert second.findings[0].text.endswith(" They differ in files or settings of packages")


def test_keys_that_may_differ() -> None:
    """Other platforms and other projects have other keys, and a node that failed has none."""
    failed = Prefetched("4", "10.0.0.4", "host", "/app")
    rows = [row(1, "a"), row(2, "b", platform="3.11 aarch64"), row(3, "c", path="/other"), failed]
    assert [*find_unequal(rows)] == []
    assert failed.findings == []


@pytest.mark.parametrize(
    ("text", "name", "message", "hint"),
    [
        ("", "answer", "no reason given", "is the node alive"),
        ("Traceback ...\n  File ...\nValueError: no\n", "answer", "ValueError: no", "is the node alive"),
        (
            "Failed\nray_envcache.errors.DigestError: Node 1: other\nfiles\nhint: update them",
            "answer",
            "Node 1: other\nfiles",
            "update them",
        ),
        (f"Invalid URI {GUARD}", "plugin", "The plugin is not loaded: Ray ignores the field there", "start the node"),
    ],
)
def test_reasons(text: str, name: str, message: str, hint: str) -> None:
    """Of what Ray says the reason is our own error, else the last line."""
    found = failure_of(RuntimeError(text), 30)
    assert (found.name, found.state, found.text) == (name, "error", message)
    assert found.hint.startswith(hint)


def test_too_late() -> None:
    """A node that does not answer is told apart from one that fails."""
    assert failure_of(TimeoutError(), 30).text == "No answer within 30 s"
