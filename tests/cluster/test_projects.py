"""Projects with packages of their own, and with private indexes, in real clusters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import index, support
from tests.cluster.conftest import NEWEST, Host
from tests.index import PASSWORD, USER

pytestmark = pytest.mark.cluster


def make_package(folder: Path, text: str = "X = 1\n") -> Path:
    """A packaged project; ray is added from the cluster."""
    (folder / "src" / "app").mkdir(parents=True)
    (folder / "src" / "app" / "__init__.py").write_text(text)
    (folder / "backend.py").write_text(support.SRC_BACKEND.format(name="app"))
    (folder / "pyproject.toml").write_text(
        '[project]\nname = "app"\nversion = "1.0"\nrequires-python = ">=3.10"\ndependencies = []\n'
        '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    support.run_uv("lock", cwd=folder)
    return folder


def test_edits_of_the_project_reach_new_tasks_of_a_living_cluster(host: Host) -> None:
    """Each field value pins the code it was made from: the job's, and, after an edit, that of a task's own."""
    project = make_package(host.folder / "app")
    code = """
    import json, pathlib, sys
    import ray, ray_envcache
    project = pathlib.Path(sys.argv[1])
    ray.init(runtime_env={"envcache": str(project)}, num_cpus=1, include_dashboard=False)

    @ray.remote
    def see():
        import app, importlib.metadata, sys
        return app.X, importlib.metadata.version("app"), sys.prefix

    first = ray.get(see.remote())
    (project / "src" / "app" / "__init__.py").write_text("X = 2\\n")
    second = ray.get(see.options(runtime_env=ray_envcache.runtime_env(project)).remote())
    raw = ray.get(see.options(runtime_env={"envcache": {"path": str(project), "extras": []}}).remote())
    again = ray.get(see.remote())
    print(json.dumps([first, second, raw, again]))
    """
    first, second, raw, again = host.run(code, project)
    assert [found[0] for found in (first, second, raw, again)] == [1, 2, 2, 1]
    assert first[1] == second[1] == "1.0"
    assert first == again
    assert raw == second
    # One environment, two layers.
    assert len(list(host.layout.all_entries())) == 3
    assert host.holders() == []


def test_project_that_travels_in_a_working_dir(host: Host) -> None:
    """It is installed from there too; what the driver built is found on its own host."""
    project = make_package(host.folder / "app")
    code = """
    import json, sys
    import ray, ray_envcache
    env = {"envcache": "pyproject.toml", "working_dir": sys.argv[1]}
    ray.init(runtime_env=env, num_cpus=1, include_dashboard=False)

    @ray.remote
    def see():
        import app, importlib.metadata
        return app.X, app.__file__, importlib.metadata.version("app")

    print(json.dumps(ray.get(see.remote())))
    """
    x, place, version = host.run(code, project)
    assert (x, version) == (1, "1.0")
    assert place.startswith(str(host.layout.entries))
    assert len(list(host.layout.all_entries())) == 2


@pytest.mark.parametrize("python", [NEWEST], indirect=True)
@pytest.mark.parametrize("place", ["environ", "env_vars"])
def test_password_of_a_private_index(host: Host, place: str) -> None:
    """From the node's environment or the runtime_env's env_vars it reaches uv in the agent, and stays nowhere.

    Ray itself logs the env_vars of a runtime_env: so there only the store is searched.
    """
    support.make_wheel(host.wheels, "envcache-private")
    folder = host.folder / "private"
    folder.mkdir()
    secrets = {"UV_INDEX_HERE_USERNAME": USER, "UV_INDEX_HERE_PASSWORD": PASSWORD}
    with index.serve(host.wheels) as served:
        (folder / "pyproject.toml").write_text(
            '[project]\nname = "private"\nversion = "1"\nrequires-python = ">=3.10"\ndependencies = ["envcache-private"]\n'
            '[tool.uv.sources]\nenvcache-private = { index = "here" }\n'
            f'[tool.uv]\npackage = false\n[[tool.uv.index]]\nname = "here"\nurl = "{served.url}"\nexplicit = true\n'
        )
        support.run_uv("lock", cwd=folder)
        served.locked = True
        code = """
        import json, sys
        import ray, ray_envcache
        ray.init(num_cpus=1, include_dashboard=False)
        env = {"envcache": {"path": sys.argv[1]}, "env_vars": json.loads(sys.argv[2])}

        @ray.remote
        def see():
            import envcache_private
            return envcache_private.VERSION

        print(json.dumps(ray.get(see.options(runtime_env=env).remote())))
        """
        variables, environ = (json.dumps(secrets), {}) if place == "env_vars" else ("{}", secrets)
        assert host.run(code, folder, variables, **environ) == "1.0"
    searched = [host.layout.root] if place == "env_vars" else [host.layout.root, host.temp]
    assert support.files_with([PASSWORD.encode()], *searched) == []
