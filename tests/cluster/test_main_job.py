"""The main job: the field in runtime_env, real clusters, real uv."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests import support
from tests.cluster.conftest import NEWEST, Host, uv_binary, with_both_rays

pytestmark = pytest.mark.cluster

WHERE = """
import json, sys
import ray, ray_envcache
ray.init(runtime_env={"envcache": sys.argv[1]}, num_cpus=1, include_dashboard=False)

@ray.remote
def where():
    import envcache_witness, os, shutil, sys
    return {"python": sys.executable, "ray": ray.__version__, "pip": shutil.which("pip"), "which": shutil.which("python")}

@ray.remote
class Actor:
    def where(self):
        import envcache_witness, sys
        return sys.executable

found = ray.get(where.remote())
found["actor"] = ray.get(Actor.remote().where.remote())
ray.shutdown()
print(json.dumps(found))
"""


@pytest.fixture
def witness(host: Host) -> Path:
    """The log of a package that notes every start of an interpreter; projects depend on it."""
    log = host.folder / "witness.log"
    support.make_witness(host.wheels, log)
    return log


@with_both_rays
def test_first_cluster_builds_second_reuses(host: Host, witness: Path) -> None:
    """Two clusters one after the other: one build; tasks, actors, python and pip are the environment's, ray the cluster's."""
    project = host.project("project", ["envcache-witness"])
    first, second = host.run(WHERE, project), host.run(WHERE, project)
    (entry,) = host.layout.all_entries()
    assert first == second
    assert first["python"] == first["which"] == first["actor"] == str(entry.python)
    assert first["pip"] == str(entry.bin / "pip")
    assert support.count_builds(witness) == 1
    assert host.holders() == []


def test_four_clusters_at_once_on_an_empty_store_build_once(host: Host, witness: Path) -> None:
    """Whoever comes first builds, the others wait and reuse."""
    project = host.project("project", ["envcache-witness"])
    clusters = [host.start(WHERE, project) for _ in range(4)]
    outputs = [cluster.communicate() for cluster in clusters]
    assert [cluster.returncode for cluster in clusters] == [0] * 4, outputs
    assert len({json.loads(out.splitlines()[-1])["python"] for out, _ in outputs}) == 1
    assert support.count_builds(witness) == 1


def test_two_environments_in_one_job(host: Host) -> None:
    """A task's own field replaces the job's; the helper pins path and digest."""
    support.make_wheel(host.wheels, "envcache-wanted", "1.0")
    one = host.project("one", ["envcache-wanted==1.0"])
    support.make_wheel(host.wheels, "envcache-wanted", "2.0")
    two = host.project("two", ["envcache-wanted==2.0"])
    code = """
    import json, sys
    import ray, ray_envcache
    ray.init(runtime_env={"envcache": sys.argv[1]}, num_cpus=2, include_dashboard=False)

    @ray.remote
    def version():
        import envcache_wanted as wanted
        return wanted.VERSION

    other = version.options(runtime_env=ray_envcache.runtime_env(sys.argv[2]))
    print(json.dumps(ray.get([version.remote(), other.remote(), version.remote(), other.remote()])))
    """
    assert host.run(code, one, two) == ["1.0", "2.0", "1.0", "2.0"]


def test_lease_is_held_while_the_cluster_lives(host: Host) -> None:
    """The agent's lease names the cluster; it ends at once when everything is SIGKILLed."""
    project = host.project("project")
    code = """
    import sys
    import ray, ray_envcache
    context = ray.init(runtime_env={"envcache": sys.argv[1]}, num_cpus=1, include_dashboard=False)
    ray.get(ray.remote(lambda: 1).remote())
    print(context.address_info["session_dir"].rsplit("/", 1)[1], flush=True)
    sys.stdin.read()
    """
    driver = host.start(code, project)
    assert driver.stdout is not None
    session = driver.stdout.readline().strip()
    support.wait_until(lambda: [holder.kind for holder in host.holders()] == ["agent"], "the driver handed over")
    assert host.holders()[0].cluster == session
    support.kill_tree(driver.pid)
    support.wait_until(lambda: host.holders() == [], "nobody holds the environment")


def test_other_fields_work_beside_it(host: Host) -> None:
    """A relative path means inside the working_dir; env_vars, py_modules and a setup hook work in the environment."""
    support.make_wheel(host.wheels, "envcache-wanted", "3.0")
    project = host.project("project", ["envcache-wanted"])
    (project.parent / "mycode.py").write_text(
        "import envcache_wanted as wanted\ndef version(): return wanted.VERSION\n"
    )
    module = host.folder / "modules" / "mymodule"
    module.mkdir(parents=True)
    (module / "__init__.py").write_text("COLOUR = 'green'\n")
    code = """
    import json, os, sys
    import ray, ray_envcache

    def at_start():
        import envcache_wanted, os
        os.environ["HOOKED"] = envcache_wanted.VERSION

    env = {
        "envcache": "pyproject.toml", "working_dir": sys.argv[1], "env_vars": {"COLOUR": "blue"},
        "py_modules": [sys.argv[2]], "worker_process_setup_hook": at_start,
    }
    ray.init(runtime_env=env, num_cpus=1, include_dashboard=False)

    @ray.remote
    def work():
        import mycode, mymodule, os
        elsewhere = os.path.basename(os.getcwd()) != "project"
        return mycode.version(), os.environ["COLOUR"], mymodule.COLOUR, os.environ["HOOKED"], elsewhere

    print(json.dumps(ray.get(work.remote())))
    """
    assert host.run(code, project.parent, module) == ["3.0", "blue", "green", "3.0", True]


def test_driver_under_uv_run(host: Host, witness: Path) -> None:
    """Ray's own hook for `uv run` neither wraps workers in uv nor packages the working directory."""
    project = host.project("project", ["envcache-witness"])
    command = (uv_binary(), "run", "--no-project", f"--python={host.python}", "--")
    found = host.run(WHERE, project, before=command, RAY_ENABLE_UV_RUN_RUNTIME_ENV="1")
    (entry,) = host.layout.all_entries()
    assert found["python"] == str(entry.python)
    assert list(host.temp.rglob("_ray_pkg_*")) == []


def test_worker_may_start_a_cluster_of_its_own(host: Host) -> None:
    """The environment lacks ray_envcache; a `ray.init()` of a worker's child must not die of what we registered."""
    project = host.project("project")
    code = """
    import json, sys
    import ray, ray_envcache
    ray.init(runtime_env={"envcache": sys.argv[1]}, num_cpus=1, include_dashboard=False)

    @ray.remote
    def nested():
        import importlib.util, subprocess, sys
        program = "import ray; ray.init(address='local', num_cpus=1, include_dashboard=False); print(ray.get(ray.remote(lambda: 42).remote()))"
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        return importlib.util.find_spec("ray_envcache") is None, done.stdout.strip(), done.stderr[-2000:] if done.returncode else ""

    print(json.dumps(ray.get(nested.remote())))
    """
    assert host.run(code, project) == [True, "42", ""]


def test_clusters_without_the_field_are_as_before(host: Host) -> None:
    """Importing ray_envcache changes nothing for whoever does not use it, and makes no store."""
    code = """
    import json, sys
    import ray, ray_envcache
    ray.init(num_cpus=1, include_dashboard=False)
    print(json.dumps(ray.get(ray.remote(lambda: __import__("sys").executable).remote()) == sys.executable))
    """
    elsewhere = host.folder / "elsewhere"
    assert host.run(code, RAY_ENVCACHE_DIR=str(elsewhere)) is True
    assert not elsewhere.exists()


def test_driver_that_is_killed_while_it_builds(host: Host) -> None:
    """SIGKILL of a builder in the middle; the next cluster succeeds, and the half environment is gone."""
    started, blocked = host.folder / "started", host.folder / "blocked"
    blocked.touch()
    code = f"p = pathlib.Path; p({str(started)!r}).touch(); [time.sleep(0.02) for _ in iter(p({str(blocked)!r}).exists, False)]"
    support.make_sdist(host.wheels, "envcache-slow", code=code)
    support.make_witness(host.wheels, host.folder / "witness.log")
    project = host.project("project", ["envcache-slow", "envcache-witness"])
    first = host.start(WHERE, project)
    support.wait_until(started.exists, "the build began")
    first.send_signal(signal.SIGKILL)
    first.wait()
    blocked.unlink()
    found = host.run(WHERE, project)
    (entry,) = host.layout.all_entries()
    assert found["python"] == str(entry.python)
    assert list(host.layout.trash.iterdir()) == []


@pytest.mark.pypi
@pytest.mark.parametrize("python", [NEWEST], indirect=True)
def test_real_compiled_packages(host: Host) -> None:
    """A project with numpy and pyarrow from the index: their compiled modules work in tasks, and in Ray's object store."""
    folder = host.folder / "real"
    folder.mkdir()
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "real"\nversion = "0"\nrequires-python = ">=3.10"\ndependencies = ["numpy", "pyarrow"]\n'
    )
    support.run_uv("lock", cwd=folder)
    code = """
    import json, sys
    import ray, ray_envcache
    ray.init(runtime_env={"envcache": sys.argv[1]}, num_cpus=1, include_dashboard=False)

    @ray.remote
    def table():
        import numpy, pyarrow
        return pyarrow.table({"x": numpy.arange(1000)})

    @ray.remote
    def total(table):
        return int(table["x"].to_numpy().sum()), sys.executable

    print(json.dumps(ray.get(total.remote(table.remote()))))
    """
    number, executable = host.run(code, folder)
    (entry,) = host.layout.all_entries()
    assert number == 499500
    assert executable == str(entry.python)
