"""The policies of the example: who reads may not write, and no client may remove anything."""

from __future__ import annotations

import json
from typing import Any

from tests.examples.nodes import EXAMPLES


def _actions(name: str) -> set[str]:
    policy: dict[str, Any] = json.loads((EXAMPLES / "fleet" / name).read_text("utf-8"))
    found: set[str] = set()
    for statement in policy["Statement"]:
        actions = statement["Action"]
        found |= {actions} if isinstance(actions, str) else set(actions)
    return found


def test_rights() -> None:
    """Nodes read and list; publishers write too."""
    assert _actions("readers.json") == {"s3:GetObject", "s3:ListBucket"}
    assert _actions("publishers.json") == {"s3:GetObject", "s3:ListBucket", "s3:PutObject"}


def test_rules_reach_what_is_published() -> None:
    """The rule is about the folder of all objects."""
    rules = json.loads((EXAMPLES / "fleet" / "lifecycle.json").read_text("utf-8"))["Rules"]
    assert [(rule["Status"], rule["Filter"]["Prefix"]) for rule in rules] == [("Enabled", "v1/")]
