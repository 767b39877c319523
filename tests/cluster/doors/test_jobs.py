"""The doors of `ray job submit`: command line and SDK, what the entrypoint is, and what drivers in the job may say."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from tests.cluster.doors.conftest import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.pypi]

# The entrypoint of all jobs: a driver that knows nothing of ray-envcache, but for what it is given.
MAIN = """
import json, shutil, sys
import ray

if sys.argv[2:]:
    import ray_envcache
ray.init(**json.loads(sys.argv[1]), log_to_driver=False)

@ray.remote
def task():
    import envcache_dep, os, sys
    return [sys.prefix, os.environ.get("VARIABLE")]

prefix, variable = ray.get(task.remote())
guarded = "java_jars" in ray.get_runtime_context().runtime_env
found = {"entrypoint": sys.prefix, "python": shutil.which("python"), "task": prefix, "variable": variable, "guarded": guarded}
ray.shutdown()
print("FOUND" + json.dumps(found))
"""

# All jobs at once. Of each: what became of it, what Ray says of it, and what it wrote.
SUBMIT = """
import shlex, subprocess, time
from ray.job_submission import JobSubmissionClient

client, folder = JobSubmissionClient(os.environ["DASHBOARD"]), sys.argv[1]
shipped = {"working_dir": folder, "envcache": "pyproject.toml"}

def main(*more, python="python", **init):
    return f"{python} {folder}/main.py '{json.dumps(init)}' {' '.join(more)}"

sdk = {
    "relative": (main(), shipped),
    "pinned": (main(), ray_envcache.runtime_env(projects["one"])),
    "driver adds": (main(runtime_env={"env_vars": {"VARIABLE": "driver"}}), shipped),
    "driver repeats": (main(runtime_env={"envcache": "pyproject.toml"}), shipped),
    "driver alone": (main(python=sys.executable, runtime_env={"envcache": "pyproject.toml"}), {"working_dir": folder}),
    "driver imports us": (main("import"), {"envcache": projects["two"]}),
    "missing": (main(), {**shipped, "envcache": "nowhere.toml"}),
    "no start": (main(), {"envcache": "pyproject.toml"}),
}
command = [os.path.join(os.path.dirname(sys.executable), "ray"), "job", "submit", "--address", os.environ["DASHBOARD"]]
cli = {
    "cli, JSON": ["--working-dir", folder, "--runtime-env-json", json.dumps({"envcache": "pyproject.toml"})],
    "cli, YAML": ["--runtime-env", f"{folder}/env.yaml"],
    "cli, missing": ["--runtime-env-json", json.dumps({"envcache": "/nowhere/pyproject.toml"})],
}
pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
running = {name: subprocess.Popen([*command, *options, "--", *shlex.split(main())], **pipes) for name, options in cli.items()}
for name, (entrypoint, env) in sdk.items():
    client.submit_job(submission_id=name, entrypoint=entrypoint, runtime_env=env)

found = {}
for name, process in running.items():
    out, _ = process.communicate()
    found[name] = [process.returncode, "", out]
for name in sdk:
    while not client.get_job_status(name).is_terminal():
        time.sleep(0.1)
    found[name] = [client.get_job_status(name).value, client.get_job_info(name).message, client.get_job_logs(name)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def jobs(cluster: Cluster) -> dict[str, list[Any]]:
    """{name: [status or exit code, Ray's message, the job's log]}"""
    folder = cluster.host.folder / "job"
    folder.mkdir()
    (folder / "main.py").write_text(MAIN)
    for name in ("pyproject.toml", "uv.lock"):
        shutil.copy(cluster.projects["one"].folder / name, folder / name)
    path = cluster.projects["two"].folder / "pyproject.toml"
    (folder / "env.yaml").write_text(f"envcache:\n  path: {path}\nenv_vars:\n  VARIABLE: yaml\n")
    found: dict[str, list[Any]] = cluster.run(SUBMIT, folder)
    return found


def found(job: list[Any]) -> dict[str, Any]:
    """What the job's driver found, where it came to that."""
    (line,) = [line for line in job[2].splitlines() if line.startswith("FOUND")] or [str(job)]
    assert line.startswith("FOUND"), line
    result: dict[str, Any] = json.loads(line.removeprefix("FOUND"))
    return result


@pytest.mark.parametrize(
    ("job", "project"),
    [("relative", "one"), ("pinned", "one"), ("cli, JSON", "one"), ("cli, YAML", "two"), ("driver imports us", "two")],
)
def test_submitted(cluster: Cluster, jobs: dict[str, list[Any]], job: str, project: str) -> None:
    """The entrypoint itself runs in the environment, `python` is its own, and its tasks inherit it.

    The path is relative to the shipped working_dir, or an absolute one, with and without what the helper adds.
    """
    prefix, answers = cluster.prefix(project), found(jobs[job])
    assert jobs[job][0] in {"SUCCEEDED", 0}
    assert answers["entrypoint"] == answers["task"] == prefix
    assert answers["python"] == f"{prefix}/bin/python"
    assert answers["variable"] == ("yaml" if job == "cli, YAML" else None)
    # In a driver that has and imports this package, the hook guards what came unguarded.
    assert answers["guarded"] is (job in {"pinned", "driver imports us"})


def test_driver_in_a_job(cluster: Cluster, jobs: dict[str, list[Any]]) -> None:
    """A driver may add to the job's runtime_env or be the first to name the field; Ray refuses one that repeats it."""
    one = cluster.prefix("one")
    adds, alone = found(jobs["driver adds"]), found(jobs["driver alone"])
    assert (adds["entrypoint"], adds["task"], adds["variable"]) == (one, one, "driver")
    assert (alone["entrypoint"], alone["task"]) == (str(cluster.host.python.parents[1]), one)
    # The guard comes with `import ray_envcache`, which this driver does without.
    assert not alone["guarded"]
    status, message, _ = jobs["driver repeats"]
    assert status == "FAILED"
    assert "Specifying the same runtime_env fields" in message


def test_refused(jobs: dict[str, list[Any]]) -> None:
    """A job with a field that cannot work fails with our words, and so does its command."""
    for name, says in {
        "missing": "/nowhere.toml`: No such file or directory\nhint: name what can be read here; a relative path",
        "no start": "relative path without a working_dir to start from: `pyproject.toml`\nhint: ",
    }.items():
        status, message, _ = jobs[name]
        assert status == "FAILED"
        assert message.startswith("runtime_env setup failed")
        assert says in message
    code, _, out = jobs["cli, missing"]
    assert code == 1
    assert "Cannot look at `/nowhere/pyproject.toml`: No such file or directory" in out
