"""The doors of Ray Core: ray.init, tasks, actors, and how their runtime_envs merge."""

from __future__ import annotations

import pytest

from tests.cluster.doors.conftest import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.pypi]


def test_tasks(cluster: Cluster) -> None:
    """The field works in `ray.init`, in the decorator and in `.options`; nested tasks inherit it, or have their own."""
    found = cluster.run("""
    ray.init(runtime_env={"envcache": projects["one"]}, log_to_driver=False)
    task, own = ray.remote(where), ray_envcache.runtime_env(projects["two"])

    @ray.remote(runtime_env=own)
    def decorated():
        import sys
        again = task.options(runtime_env={"envcache": projects["one"]}).remote()
        return [sys.prefix, *ray.get([task.remote(), again])]

    tell([*ray.get([task.remote(), task.options(runtime_env=own).remote()]), *ray.get(decorated.remote())])
    """)
    one, two = cluster.prefix("one"), cluster.prefix("two")
    assert found == [one, two, two, two, one]


ACTOR = """
@ray.remote(max_restarts=-1, max_task_retries=-1)
class Actor:
    def where(self):
        return [where(), os.getpid()]

def killed(actor):
    before = ray.get(actor.where.remote())
    os.kill(before[1], 9)
    after = ray.get(actor.where.remote())
    return [before[0], after[0], before[1] != after[1]]
"""


def test_actors(cluster: Cluster) -> None:
    """Actors live in the environment, also restarted ones; a detached one outlives its job, by which another finds it."""
    first = (
        ACTOR
        + """
ray.init(namespace="doors", runtime_env={"envcache": projects["one"]}, log_to_driver=False)
own = ray_envcache.runtime_env(projects["two"])
named = Actor.options(name="named", runtime_env=own).remote()
detached = Actor.options(name="detached", lifetime="detached", runtime_env=own).remote()
tell([killed(Actor.remote()), killed(ray.get_actor("named")), ray.get(detached.where.remote())[0]])
"""
    )
    second = (
        ACTOR
        + """
ray.init(namespace="doors", log_to_driver=False)
detached = ray.get_actor("detached")
found = [killed(detached), error(lambda: ray.get_actor("named"))]
ray.kill(detached)
tell(found)
"""
    )
    one, two = cluster.prefix("one"), cluster.prefix("two")
    assert cluster.run(first) == [[one, one, True], [two, two, True], two]
    found, gone = cluster.run(second)
    assert found == [two, two, True]
    assert gone.startswith("ValueError")


def test_merging(cluster: Cluster) -> None:
    """A task's own field replaces the job's, env_vars add up, and what contradicts the inherited field is refused."""
    found = cluster.run("""
    field = {"envcache": projects["one"], "env_vars": {"ONLY_JOB": "job", "BOTH": "job"}}
    ray.init(runtime_env=field, log_to_driver=False)

    @ray.remote
    def task():
        return [where(), os.environ.get("ONLY_JOB"), os.environ.get("BOTH")]

    def run(**env):
        return ray.get(task.options(runtime_env=env).remote(), timeout=120)

    own = ray_envcache.runtime_env(projects["two"])
    tell([
        run(**own, env_vars={"BOTH": "task"}),
        run(env_vars={"BOTH": "task"}),
        error(lambda: run(pip=["no-such-package"])),
        error(lambda: run(envcache="pyproject.toml")),
    ])
    """)
    own, inherited, rival, relative = found
    assert own == [cluster.prefix("two"), "job", "task"]
    assert inherited == [cluster.prefix("one"), "job", "task"]
    assert "RuntimeEnvSetupError" in rival
    assert "`pip` beside `envcache` in one runtime_env" in rival
    assert "A relative path without a working_dir to start from: `pyproject.toml`" in relative
    assert "use ray_envcache.runtime_env(path)" in relative
