"""The doors of Ray Client, where no hook of the driver runs."""

from __future__ import annotations

import pytest

from tests.cluster.doors.conftest import Cluster, answer

pytestmark = [pytest.mark.cluster, pytest.mark.pypi]


def test_client(cluster: Cluster) -> None:
    """The helper's runtime_env works for the connection and for tasks and actors; a bare relative path says what to write."""
    refused = cluster.start("""
    bare = {"envcache": "pyproject.toml"}
    print(json.dumps(error(lambda: ray.init(os.environ["CLIENT"], runtime_env=bare))))
    """)
    found = cluster.run("""
    pinned = ray_envcache.runtime_env(projects["libraries"])
    ray.init(os.environ["CLIENT"], runtime_env=pinned, log_to_driver=False)
    task, own = ray.remote(where), {"runtime_env": ray_envcache.runtime_env(projects["two"])}

    @ray.remote
    class Actor:
        def where(self):
            return where()

    asked = [task, task.options(**own)]
    found = [ray.get(one.remote()) for one in asked]
    found += [ray.get(one.remote().where.remote()) for one in (Actor, Actor.options(**own))]
    tell([found, error(lambda: ray.get(task.options(runtime_env={"envcache": "pyproject.toml"}).remote()))])
    """)
    libraries, two = cluster.prefix("libraries"), cluster.prefix("two")
    assert found[0] == [libraries, two] * 2
    for said in (found[1], answer(refused)):
        assert "A relative path without a working_dir to start from: `pyproject.toml`" in said
        assert "Ray Client use ray_envcache.runtime_env(path)" in said


def test_client_with_working_dir(cluster: Cluster) -> None:
    """A working_dir with the lockfile is uploaded, and a relative path starts there."""
    found = cluster.run("""
    env = {"working_dir": projects["libraries"], "envcache": "pyproject.toml"}
    ray.init(os.environ["CLIENT"], runtime_env=env, log_to_driver=False)
    tell(ray.get(ray.remote(where).remote()))
    """)
    assert found == cluster.prefix("libraries")
