"""Life and death of an environment under real clusters."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_envcache.survey.inventory import survey
from tests import support
from tests.cluster.conftest import NEWEST, Host, with_both_rays

pytestmark = pytest.mark.cluster

# Runs tasks for ever. Each imports, late, modules that its worker has not imported yet, and notes what it finds itself:
# the driver may be dead by then.
WORK = """
import json, sys
import ray, ray_envcache
ray.init(runtime_env={"envcache": sys.argv[1]}, num_cpus=2, include_dashboard=False, log_to_driver=False)

@ray.remote(max_retries=0)
def work(notes):
    import importlib, os, sys, time
    with open(notes, "a", buffering=1) as file:
        for number in range(100):
            if f"envcache_many.m{number}" not in sys.modules:
                time.sleep(0.05)
                try:
                    importlib.import_module(f"envcache_many.m{number}")
                    file.write("found\\n")
                except BaseException as error:
                    file.write(f"LOST {error!r}\\n")
        for name in list(sys.modules):
            if name.startswith("envcache_many.m"):
                del sys.modules[name]

while True:
    pending = [work.remote(sys.argv[2]) for _ in range(4)]
    print(json.dumps(len(pending)), flush=True)
    ray.wait(pending, num_returns=4)
"""


@pytest.fixture
def project(host: Host) -> Path:
    modules = {f"envcache_many/m{number}.py": f"N = {number}\n" for number in range(100)}
    support.make_wheel(host.wheels, "envcache-many", modules={"envcache_many/__init__.py": "", **modules})
    return host.project("project", ["envcache-many"])


def cli(host: Host, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [host.python, "-m", "ray_envcache", *arguments]
    return subprocess.run(command, env=host.environ(**environ), capture_output=True, text=True, check=False)


def listed(host: Host) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(cli(host, "list", "--json").stdout)["envs"]
    return found


@with_both_rays
def test_environment_goes_by_itself_after_shutdown(host: Host, project: Path) -> None:
    """With RAY_ENVCACHE_UNUSED_FOR=0 it is gone a few seconds after `ray.shutdown()`, and nobody called anything."""
    code = """
    import json, sys
    import ray, ray_envcache
    ray.init(runtime_env={"envcache": sys.argv[1]}, num_cpus=1, include_dashboard=False)
    print(json.dumps(ray.get(ray.remote(lambda: sys.executable).remote())))
    ray.shutdown()
    sys.stdin.close()
    """
    limits = {"RAY_ENVCACHE_UNUSED_FOR": "0", "RAY_ENVCACHE_GC_INTERVAL": "0"}
    assert str(host.layout.entries) in host.run(code, project, **limits)
    support.wait_until(lambda: list(host.layout.entries.iterdir()) == [], "the environment is gone")


def test_who_uses_it(host: Host, project: Path) -> None:
    """`list` and `why` name the agent, the workers and their cluster; gc and rm refuse; after the end nobody is left."""
    driver = host.start(WORK, project, host.folder / "notes")
    support.wait_until(lambda: "found" in read(host.folder / "notes"), "a task runs")
    (one,) = listed(host)
    kinds = sorted({holder["kind"] for holder in one["holders"]} - {"bytecode", "driver"})
    assert kinds == ["agent", "process"]
    clusters = {holder["cluster"] for holder in one["holders"] if holder["kind"] != "driver"} - {""}
    assert len(clusters) == 1
    assert next(iter(clusters)).startswith("session_")
    said = cli(host, "why", one["key"][:8]).stdout
    assert "ray::" in said
    assert "agent" in said
    assert "Removed 0" in cli(host, "gc", "--all").stdout
    assert cli(host, "rm", one["key"]).returncode == 1
    support.kill_tree(driver.pid)
    support.wait_until(lambda: not any(status.in_use for status in survey(host.layout)), "nobody uses it")
    assert "Removed 1" in cli(host, "gc", "--all").stdout


def processes_of(driver: subprocess.Popen[str]) -> dict[str, list[psutil.Process]]:
    """The driver's cluster, by what its processes are."""
    found: dict[str, list[psutil.Process]] = {
        "driver": [psutil.Process(driver.pid)],
        "agent": [],
        "raylet": [],
        "worker": [],
    }
    for process in psutil.Process(driver.pid).children(recursive=True):
        try:
            name, line = process.name(), " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        if name == "raylet":
            found["raylet"].append(process)
        elif "RuntimeEnvAgent" in line or "runtime_env" in line:
            found["agent"].append(process)
        elif "ray::" in line:
            found["worker"].append(process)
    return found


def chaos(host: Host, project: Path, order: tuple[str, ...]) -> None:
    """SIGKILL the parts of a working cluster in this order, and in the end the rest, while a collector runs all the time."""
    notes = host.folder / "notes"
    driver = host.start(WORK, project, notes)
    support.wait_until(lambda: "found" in read(notes), "a task runs")
    with collecting(host) as collector:
        family = psutil.Process(driver.pid).children(recursive=True)
        parts = processes_of(driver)
        for kind in order:
            before = notes.stat().st_size
            for process in parts[kind]:
                kill(process)
            # Long enough for a collector that would take it wrongly, and for workers that live on to notice.
            time.sleep(1.5 + random.Random(kind).random())
            print(f"{kind} killed: {notes.stat().st_size - before} bytes of notes after it")
        for process in [psutil.Process(driver.pid), *family]:
            kill(process)
        driver.wait()
        support.wait_until(lambda: host.holders() == [], "all leases are gone")
        support.wait_until(lambda: "Removed 1 environment" in read(collector), "the collector took it")
    assert list(host.layout.all_entries()) == []
    assert "LOST" not in notes.read_text()
    assert "Traceback" not in collector.read_text()


@contextmanager
def collecting(host: Host) -> Iterator[Path]:
    """A collector that runs all the time; what it says goes to the file that is yielded."""
    said = host.folder / "collector.log"
    loop = f'while :; do "{host.python}" -m ray_envcache gc --all; done'
    with said.open("w") as file, subprocess.Popen(
        ["bash", "-c", loop], env=host.environ(), stdout=file, stderr=file, start_new_session=True
    ) as child:  # fmt: skip
        try:
            yield said
        finally:
            os.killpg(child.pid, signal.SIGKILL)


def read(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


def test_chaos(host: Host, project: Path) -> None:
    """SIGKILL of all parts while a collector runs all the time: no task loses a module, no lease outlives its holder."""
    chaos(host, project, ("worker", "raylet", "driver", "agent"))


@pytest.mark.parametrize("python", [NEWEST], indirect=True)
@pytest.mark.parametrize("part", ["driver", "agent", "raylet"])
def test_chaos_of_one_part(host: Host, project: Path, part: str) -> None:
    """The same, with one part killed and the others left to themselves for a while."""
    chaos(host, project, (part,))


@pytest.mark.slow
@pytest.mark.parametrize("order", list(itertools.permutations(("driver", "agent", "raylet", "worker"))))
def test_chaos_in_every_order(host: Host, project: Path, order: tuple[str, ...]) -> None:
    """The same in all orders."""
    chaos(host, project, order)
