"""The doors of Ray Data, Train and Tune: in the whole job, or in what the library starts."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster.doors.conftest import Cluster, answer

pytestmark = [pytest.mark.cluster, pytest.mark.pypi]

# `job` and `own` are runtime_envs: of the driver, and of what Data, Train or Tune start.
DRIVER = """
import ray.data, ray.train, ray.tune
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

folder, given = sys.argv[1], json.loads(sys.argv[2])
os.makedirs(folder)
pinned = ray_envcache.runtime_env(projects["libraries"])
job, own = (pinned, {}) if given == "job" else ({}, pinned)
ray.init(runtime_env=job, log_to_driver=False)
ray.data.DataContext.get_current().enable_progress_bars = False

class Pool:
    def __call__(self, batch):
        return {**batch, "actor": [where()] * len(batch["id"])}

def data():
    rows = ray.data.range(4, override_num_blocks=2).map_batches(
        lambda batch: {"id": batch["id"], "task": [where()] * len(batch["id"])}, **options
    ).map_batches(Pool, compute=ray.data.ActorPoolStrategy(size=1), **options).take_all()
    return sorted({row[kind] for row in rows for kind in ("task", "actor")})

def train():
    def loop(config):
        rank = ray.train.get_context().get_world_rank()
        with open(f"{folder}/{rank}", "w") as file:
            file.write(where())

    config = ray.train.RunConfig(storage_path=f"{folder}/train", **({"worker_runtime_env": own} if own else {}))
    DataParallelTrainer(loop, train_loop_config={}, scaling_config=ray.train.ScalingConfig(num_workers=2), run_config=config).fit()
    return [open(f"{folder}/{rank}").read() for rank in range(2)]

def tune():
    def trial(config):
        # Ray takes no runtime_env for a trial. What it starts has one of its own like everywhere.
        inside = ray.remote(where).options(num_cpus=0, **options).remote()
        ray.tune.report({"trial": sys.prefix, "inside": ray.get(inside)})

    space = {"x": ray.tune.grid_search([1, 2])}
    config = ray.tune.RunConfig(storage_path=f"{folder}/tune", verbose=0)
    found = ray.tune.Tuner(trial, param_space=space, run_config=config).fit()
    return [[one.metrics["trial"], one.metrics["inside"]] for one in found]

options = {"runtime_env": own} if own else {}
tell({function.__name__: function() for function in (data, train, tune)})
"""


@pytest.fixture(scope="module")
def found(cluster: Cluster) -> dict[str, Any]:
    """{"job" or "own": {library: where its parts ran}}"""
    given = ("job", "own")
    drivers = [cluster.start(DRIVER, cluster.host.folder / f"libraries-{one}", json.dumps(one)) for one in given]
    return {one: answer(driver) for one, driver in zip(given, drivers, strict=True)}


@pytest.mark.parametrize("given", ["job", "own"])
def test_data(cluster: Cluster, found: dict[str, Any], given: str) -> None:
    """`map_batches` runs its tasks and its actors in the job's environment, or in that of its runtime_env."""
    assert found[given]["data"] == [cluster.prefix("libraries")]


@pytest.mark.parametrize("given", ["job", "own"])
def test_train(cluster: Cluster, found: dict[str, Any], given: str) -> None:
    """All workers of a trainer run in the job's environment, or in that of `worker_runtime_env`."""
    assert found[given]["train"] == [cluster.prefix("libraries")] * 2


def test_tune(cluster: Cluster, found: dict[str, Any]) -> None:
    """Trials run in the job's environment; a task that they start may have its own."""
    inside, outside = cluster.prefix("libraries"), str(cluster.host.python.parents[1])
    assert found["job"]["tune"] == [[inside, inside]] * 2
    assert found["own"]["tune"] == [[outside, inside]] * 2
