"""`examples/observability`: its rules and queries name metrics that there are, and Prometheus' own tool takes them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ray_envcache.acquire import Store
from ray_envcache.store import journal
from tests.cli.test_commands import run

EXAMPLES = Path(__file__).parents[2] / "examples" / "observability"
RULES = EXAMPLES / "alerts.yml"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool of Prometheus is not installed")


@pytest.fixture
def text(store: Store) -> str:
    journal.note(store.layout, "setup", result="found", seconds=0.1)
    return run("metrics").stdout


def queries() -> list[str]:
    dashboard = json.loads((EXAMPLES / "dashboard.json").read_text())
    rules = yaml.safe_load(RULES.read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return [*shown, *(rule["expr"] for group in rules["groups"] for rule in group["rules"])]


def test_queries_name_what_there_is(text: str) -> None:
    """Each metric of a query exists, with the labels and values that the query asks for."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    names = {sample.name for sample in samples}
    results = {sample.labels.get("result") for sample in samples}
    assert len(queries()) > 10
    for query in queries():
        named = set(re.findall(r"ray_envcache_\w+", query))
        assert named
        assert named <= names, query
        asked = [value for values in re.findall(r'result[!=]~?"([^"]+)"', query) for value in values.split("|")]
        assert set(asked) <= results, query


def test_crontab_and_readme(store: Store) -> None:
    """Cron's lines run as they are, and nothing in them ends a line early; the README names every file."""
    lines = [line for line in (EXAMPLES / "crontab").read_text().splitlines() if not line.startswith("#")]
    variables = dict(line.split("=", 1) for line in lines if "=" in line.split()[0])
    assert variables.keys() == {"PATH", "RAY_ENVCACHE_DIR"}
    jobs = [line.split(maxsplit=5) for line in lines[len(variables) :]]
    assert [" ".join(job[:5]) for job in jobs] == ["* * * * *", "17 * * * *"]
    for *_, command in jobs:
        assert "%" not in command
        words = command.replace("/var/lib/prometheus/node-exporter", str(store.layout.root.parent))
        environ = {**os.environ, "PATH": f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"}
        done = subprocess.run(["sh", "-c", words], env=environ, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    readme = (EXAMPLES / "README.md").read_text()
    assert all(f"`{path.name}`" in readme for path in EXAMPLES.iterdir() if path.name != "README.md")


@needs_promtool
def test_promtool_takes_the_metrics(text: str) -> None:
    """`promtool check metrics`, which also looks for names against the conventions, has nothing to say."""
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@needs_promtool
def test_promtool_takes_the_rules() -> None:
    """`promtool check rules` finds both."""
    done = subprocess.run(["promtool", "check", "rules", RULES], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "2 rules found" in done.stdout
