"""`stats`, `metrics` and `log`, as processes: what they print, and what they say of bad input."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ray_envcache.acquire import Store
from ray_envcache.store import journal
from ray_envcache.store.layout import Layout
from ray_envcache.system import files
from tests.cli.test_commands import run
from tests.gc.fabricated import make_entry

A, B = "a1" * 16, "a2" * 16


@pytest.fixture
def layout(store: Store) -> Layout:
    """A store with a history: one environment that is there, one that was removed."""
    layout = store.layout
    make_entry(layout, 0)
    for result in ("built", "found", "found", "refused"):
        key = A if result != "refused" else ""
        journal.note(layout, "setup", result=result, key=key, project="p", kind="run", seconds=0.5, bytes=10)
    journal.note(layout, "build", key=A, project="p", seconds=61.5)
    journal.note(layout, "build", key=B, project="q\x1b[31m", seconds=2)
    journal.note(layout, "removal", key=A, reason="unused for 15 days", freed_bytes=5_000_000, bytes=7_000_000)
    return layout


def answer(*arguments: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(run(*arguments, "--json").stdout)
    return data


def test_stats(layout: Layout) -> None:
    """Counts, rate, savings and removals, for people without control characters."""
    done = run("stats", "--since", "7d")
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("1 built", "2 found", "1 refused", "hit rate 67%", "Builds:  2, 1 minute; ", "at most 14.0 MB and 2 min",
                 "Removed: 1, freed 5.0 MB", "a1a1a1a1a1a1", "q?[31m"):  # fmt: skip
        assert text in done.stdout, text
    data = answer("stats", "--since", "1d12h")
    assert (data["schema_version"], data["counts"]["builds"], data["saved_bytes"]) == (1, 2, 14_000_000)
    assert [one["key"] for one in data["slowest"]] == [A, B]
    assert answer("stats", "--project", "p")["counts"]["builds"] == 1
    assert answer("stats", "--project", "unknown")["counts"]["builds"] == 0


def test_an_empty_journal(store: Store) -> None:
    """A store without a history is no error."""
    done = run("stats")
    assert (done.returncode, done.stdout.strip()) == (0, "The journal is empty")
    assert run("metrics").returncode == 0


@pytest.mark.parametrize("since", ["7y", "soon", "-1d", ""])
def test_unknown_units(layout: Layout, since: str) -> None:
    """What is no duration is an error of usage with the units that there are."""
    done = run("stats", "--since", since)
    assert done.returncode == 2
    assert f"Not a duration: `{since}`" in done.stderr
    assert 'hint: write "14d", "36h"' in done.stderr


@pytest.mark.parametrize("since", ["0", "999999999999999999w"])
def test_any_span(layout: Layout, since: str) -> None:
    """Nothing, and more than there ever was."""
    assert run("stats", "--since", since).returncode == 0


@pytest.mark.parametrize("command", [["stats"], ["metrics"], ["log", A[:6]]])
def test_lines_that_are_passed_over(layout: Layout, command: list[str]) -> None:
    """Torn lines and those of a newer version are told on stderr, and nothing fails."""
    with layout.journal.open("a") as file:
        file.write('{"v":1,"at"\nnot JSON\n{"v":7,"at":"","event":"x"}\n{"v":1,"at":"","event":""}\n')
    done = run(*command)
    assert done.returncode == 0
    assert done.stderr == "note: passed over 3 lines of the journal, torn or of a newer ray-envcache\n"


def test_a_journal_that_cannot_be_read(layout: Layout) -> None:
    """A file in which there is something else than a file: the store is unusable in this, and the path is named."""
    layout.journal.unlink()
    layout.journal.mkdir()
    done = run("stats")
    assert done.returncode == 3
    assert f"`{layout.journal}`" in done.stderr


def test_metrics(layout: Layout) -> None:
    """Standard text, with HELP, TYPE and UNIT; no key and no project is in it."""
    text = run("metrics").stdout
    families = {family.name: family for family in text_string_to_metric_families(text)}
    setups = families["ray_envcache_setups"]
    values = {sample.labels["result"]: sample.value for sample in setups.samples}
    assert (setups.type, values["found"], values["built"], values["waited"]) == ("counter", 2, 1, 0)
    (freed,) = families["ray_envcache_freed_bytes"].samples
    assert (freed.name, freed.value) == ("ray_envcache_freed_bytes_total", 5_000_000)
    (ready, *_) = families["ray_envcache_environments"].samples
    assert (ready.labels, ready.value) == ({"state": "ready"}, 1)
    assert all(family.documentation for family in families.values())
    for name in families:
        if name.endswith(("_bytes", "_seconds")):
            unit = name.rpartition("_")[2]
            assert f"# UNIT {name} {unit}\n" in text or f"# UNIT {name}_total {unit}\n" in text
    assert {label for family in families.values() for one in family.samples for label in one.labels} == {
        "result", "state",
    }  # fmt: skip
    assert A[:6] not in text


def test_metrics_to_a_file(layout: Layout, tmp_path: Path) -> None:
    """The file is replaced whole, everybody may read it, and nothing else is left beside it."""
    folder = tmp_path / "textfile"
    folder.mkdir()
    output = folder / "envcache.prom"
    output.write_text("old")
    output.chmod(0o600)
    with output.open() as before:
        done = run("metrics", "--output", output)
        assert before.read() == "old"
    assert (done.returncode, done.stdout) == (0, "")
    assert stat.S_IMODE(output.stat().st_mode) == 0o644
    assert output.read_text() == run("metrics").stdout or "ray_envcache_disk_free_bytes" in output.read_text()
    assert files.names_in(folder) == ["envcache.prom"]
    nowhere = tmp_path / "nowhere" / "x.prom"
    done = run("metrics", "--output", nowhere)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: Cannot write `{nowhere}`: No such file or directory\nhint: ")
    assert run("metrics", "--output", folder).returncode == 2


def test_metrics_without_their_package(layout: Layout) -> None:
    """Without prometheus_client there is an error that says how to get it; nothing else needs it."""
    code = "import sys; sys.modules['prometheus_client'] = None; from ray_envcache.cli.main import main; main()"
    for command, status in (("stats", 0), ("metrics", 1)):
        done = subprocess.run(
            [sys.executable, "-c", code, command], capture_output=True, text=True, check=False, env={**os.environ}
        )
        assert done.returncode == status
    assert "`metrics` needs the package prometheus-client" in done.stderr
    assert f'hint: uv pip install --python "{sys.executable}" "ray-envcache[metrics]"' in done.stderr


def test_log_of_a_removed_environment(layout: Layout) -> None:
    """What happened to a key, though nothing of it is left."""
    done = run("log", "a1")
    assert done.returncode == 0
    for text in ("built", "found", "61.5", "7.0 MB", "unused for 15 days", "5 events of a1a1a1a1a1a1"):
        assert text in done.stdout, text
    data = answer("log", "a1")
    assert [event["event"] for event in data["events"]] == ["setup"] * 3 + ["build", "removal"]
    assert (data["key"], data["build_logs"]) == (A, [])


def test_log_tells_where_the_build_log_is(layout: Layout) -> None:
    """The path of what uv said, where it said something."""
    entry = next(layout.all_entries())
    assert "What uv said" not in run("log", entry.key).stdout
    entry.build_log.write_text("Installed 3 packages\n")
    assert run("log", entry.key).stdout.splitlines()[-1] == f"What uv said: {entry.build_log}"
    assert answer("log", entry.key)["build_logs"] == [str(entry.build_log)]


@pytest.mark.parametrize(("key", "says"), [("a", "2 environments have a key"), ("f", "No environment"), ("", "3 env")])
def test_log_of_an_ambiguous_or_unknown_key(layout: Layout, key: str, says: str) -> None:
    """A key must mean one environment."""
    done = run("log", key)
    assert done.returncode == 1
    assert says in done.stderr
    assert "hint: " in done.stderr


def test_purge_removes_the_journal(layout: Layout) -> None:
    """`gc --all` keeps the history, `purge` does not."""
    assert run("gc", "--all").returncode == 0
    assert answer("stats")["counts"]["removals"] == 2
    assert run("purge", "--yes").returncode == 0
    assert not layout.journal.exists()


def test_stores_without_a_journal_of_their_own(layout: Layout) -> None:
    """A store of which the journal was removed has an empty one."""
    layout.journal.unlink()
    assert answer("stats")["counts"]["builds"] == 0
