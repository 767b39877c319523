"""Drivers under `uv run`, with and without the field; and tasks that have another py_executable, or leave the field."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.conftest import WITH_TOKEN, uv_binary
from tests.cluster.doors.conftest import DRIVER, Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.pypi]


def under_uv_run(cluster: Cluster, folder: Path, code: str) -> Any:
    """What a driver prints that runs under `uv run` in a folder, where Ray's own hook for that is on as ever."""
    folder.mkdir()
    projects = json.dumps({name: str(project.folder) for name, project in cluster.projects.items()})
    command = (uv_binary(), "run", "--no-project", f"--directory={folder}", f"--python={cluster.host.python}", "--")
    environ = {
        **WITH_TOKEN,
        "RAY_ADDRESS": cluster.address,
        "CLIENT": cluster.client,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1",
    }
    driver = cluster.host.start(DRIVER + code, before=command, PROJECTS=projects, **environ)
    out, err = driver.communicate()
    assert driver.returncode == 0, f"{out}\n{err}"
    return json.loads(out.splitlines()[-1])


TASKS = """
ray.init(**json.loads(INIT), log_to_driver=False)
job = ray.get_runtime_context().runtime_env
own = ray_envcache.runtime_env(projects["two"])
tell([job.get("py_executable"), "working_dir" in job, ray.get(ray.remote(where).options(runtime_env=own).remote())])
"""


def test_driver_under_uv_run(cluster: Cluster, tmp_path: Path) -> None:
    """With the field no `uv run` and no working_dir reach the workers; without it all is Ray's, but for tasks with the field."""
    two = cluster.prefix("two")
    init = json.dumps({"runtime_env": {"envcache": str(cluster.projects["one"].folder)}})
    assert under_uv_run(cluster, tmp_path / "with", TASKS.replace("INIT", repr(init))) == ["", False, two]
    executable, packaged, prefix = under_uv_run(cluster, tmp_path / "without", TASKS.replace("INIT", repr("{}")))
    assert executable.startswith(f"{uv_binary()} run --no-project")
    assert (packaged, prefix) == (True, two)


def test_client_under_uv_run(cluster: Cluster, tmp_path: Path) -> None:
    """The helper's runtime_env keeps the Ray Client from adding `uv run` and the current folder."""
    code = """
    ray.init(os.environ["CLIENT"], runtime_env=ray_envcache.runtime_env(projects["libraries"]), log_to_driver=False)
    tell([ray.get(ray.remote(where).remote()), "working_dir" in ray.get_runtime_context().runtime_env])
    """
    assert under_uv_run(cluster, tmp_path / "client", textwrap.dedent(code)) == [cluster.prefix("libraries"), False]


def test_tasks_with_another_interpreter(cluster: Cluster) -> None:
    """In a job with the field a task's own py_executable is an error that names both, and `None` leaves the environment."""
    found = cluster.run("""
    ray.init(runtime_env={"envcache": projects["one"]}, log_to_driver=False)
    prefix = ray.remote(lambda: __import__("sys").prefix)
    asks = prefix.options(runtime_env={"py_executable": "uv run --with sniffio"})
    leaves = prefix.options(runtime_env={"envcache": None, "env_vars": {"A": "1"}})
    tell([error(lambda: ray.get(asks.remote())), ray.get(leaves.remote()), ray.get(prefix.remote())])
    """)
    assert "`py_executable` beside `envcache`" in found[0]
    assert "`extras` and `groups`" in found[0]
    assert found[1:] == [str(cluster.host.python.parents[1]), cluster.prefix("one")]
