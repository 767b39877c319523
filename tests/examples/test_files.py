"""The examples' files against the schemas and programs of the tools that read them."""

from __future__ import annotations

import functools
import json
import operator
import os
import re
import shlex
import shutil
import subprocess
from importlib import resources, util
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest

from ray_envcache.cli.main import cli
from ray_envcache.field import registration
from tests import support
from tests.examples.nodes import EXAMPLES, RECIPES, ROLES, document, node, unit_environ, unit_of

VARIABLES = registration.exports({})
STORE = "RAY_ENVCACHE_DIR"
FOLDERS = sorted(path for path in EXAMPLES.iterdir() if path.is_dir() and path.name != "fleet")
UNITS = sorted(EXAMPLES.rglob("*.service"))
FILES = sorted(path for path in EXAMPLES.rglob("*") if path.is_file() and path.suffix not in {".json", ".py", ".pyc"})


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("role", ROLES)
def test_node_has_its_variables(recipe: str, role: str, tmp_path: Path) -> None:
    """`ray start`, as a real shell starts it there, has the plugin, a store and a token, quotes and all."""
    environ, command = node(recipe, role)
    assert not any("$" in value for value in environ.values())
    before = {"RAY_HEAD_IP": "10.0.0.1", **environ}
    found = support.variables_of_ray_start("sh", command.replace("/opt/app/.venv/bin/", ""), tmp_path, before)
    assert found.items() >= VARIABLES.items()
    assert os.path.isabs(found[STORE])
    assert found["RAY_AUTH_MODE"] == "token"


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_units(unit: Path) -> None:
    """A service has the store of its user's cache directory, and a node is ended as a whole."""
    service = unit_of(unit)
    assert unit_environ(unit)[STORE] == "/var/cache/ray-envcache"
    if "CacheDirectory" in service:
        assert f"/var/cache/{service['CacheDirectory']}" == unit_environ(unit)[STORE]
        assert (service["KillMode"], shlex.split(service["ExecStart"])[-1]) == ("mixed", "--block")


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.name)
def test_systemd_accepts_the_units(unit: Path, tmp_path: Path) -> None:
    """systemd itself has nothing to say about a unit and its timer; without quotes a variable would be ignored."""

    def said(text: str) -> str:
        (tmp_path / unit.name).write_text(text)
        names = [unit.name]
        if (timer := unit.with_suffix(".timer")).exists():
            names.append(os.fspath(shutil.copy(timer, tmp_path)))
        command = ["systemd-analyze", "verify", *[os.fspath(tmp_path / name) for name in names]]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    # The command must be there; these are paths of the reader's.
    text = re.sub(r"/opt/app/.venv/bin/\S+", shutil.which("true") or "", unit.read_text())
    assert said(text) == ""
    if "PLUGINS" in text:
        assert "Invalid environment assignment" in said(text.replace("'", ""))
    else:
        assert "Unknown" in said(text.replace("Nice=", "Nicer="))


def builtin_schema(name: str) -> Any:
    found = resources.files("check_jsonschema") / "builtin_schemas" / "vendor" / f"{name}.json"
    return json.loads(found.read_text())


@pytest.mark.parametrize(
    ("path", "schema", "place"),
    [
        ("compose/compose.yaml", "compose-spec", ["services", "head"]),
        ("ci/github.yml", "github-workflows", ["jobs", "experiments"]),
        ("ci/gitlab.yml", "gitlab-ci", ["experiments"]),
    ],
)
def test_schema(path: str, schema: str, place: list[str]) -> None:
    """The tool's own schema accepts the file, and would not accept one with a misspelled key."""
    # YAML 1.1 takes the key `on` for true.
    text = json.loads(json.dumps(document(path)).replace('"true":', '"on":'))
    rules = builtin_schema(schema)
    jsonschema.validate(text, rules)
    functools.reduce(operator.getitem, place, text)["volumez"] = 1
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(text, rules)


def test_compose() -> None:
    """Two containers of one image with the same user, one folder of the host at the same path, and the token."""
    compose = document("compose/compose.yaml")
    head, worker = compose["services"].values()
    for service in (head, worker):
        (mount,) = service["volumes"]
        assert mount["source"] == mount["target"] == service["environment"][STORE]
        assert mount["bind"] == {"create_host_path": False}
        assert [service["environment"]["RAY_AUTH_TOKEN_PATH"]] == [f"/run/secrets/{one}" for one in compose["secrets"]]
        assert service["build"] == {"context": "../project", "dockerfile": "../docker/Dockerfile", "target": "base"}
    assert [head["user"], head["image"], head["secrets"]] == [worker["user"], worker["image"], worker["secrets"]]


def test_cluster_launcher() -> None:
    """Ray's own schema accepts the launcher's file; the token and the project reach every host."""
    spec = util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = json.loads((Path(spec.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    launcher = document("cluster-launcher/cluster.yaml")
    jsonschema.validate(launcher, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**launcher, "file_mount": {}}, schema)
    assert set(launcher["file_mounts"].values()) == {"~/.ray/auth_token", "../project"}


POD_KEYS = {"securityContext", "initContainers", "containers", "volumes"}
CONTAINER_KEYS = {"name", "image", "command", "env", "volumeMounts", "securityContext"}


def pods(path: str) -> list[dict[str, Any]]:
    """The pods of a manifest, by the names that Kubernetes and KubeRay have for where they stand."""
    spec = document(path)["spec"]
    if "template" in spec:
        return [spec["template"]["spec"]]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    assert groups[1].keys() >= {"groupName", "minReplicas", "maxReplicas", "replicas", "rayStartParams", "template"}
    return [group["template"]["spec"] for group in groups]


@pytest.mark.parametrize("path", ["kuberay/raycluster.yaml", "kuberay/image-volume.yaml", "kuberay/warm.yaml"])
def test_pods(path: str) -> None:
    """Every container has only keys that there are, its volumes mounted, and its store on one of them."""
    for pod in pods(path):
        assert pod.keys() <= POD_KEYS
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container.keys() <= CONTAINER_KEYS
            mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
            assert mounts.keys() <= volumes
            environ = {one["name"]: one["value"] for one in container.get("env", [])}
            stores = [environ[name] for name in (STORE, "RAY_ENVCACHE_READONLY_DIRS") if name in environ]
            assert all(any(Path(store).is_relative_to(mount) for mount in mounts.values()) for store in stores)
            assert bool(stores) == bool(environ)


def test_kuberay_clusters() -> None:
    """Both clusters have a token, and in every container the plugin and a user who is not root."""
    for path in ("kuberay/raycluster.yaml", "kuberay/image-volume.yaml"):
        cluster = document(path)
        assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
        assert cluster["spec"]["authOptions"] == {"mode": "token"}
        for pod in pods(path):
            assert pod["securityContext"]["runAsUser"] == 1000
            (container,) = pod["containers"]
            environ = {one["name"]: one["value"] for one in container["env"]}
            assert environ.items() >= VARIABLES.items()
    (volume,) = pods("kuberay/image-volume.yaml")[0]["volumes"]
    assert volume["image"].keys() == {"reference", "pullPolicy"}
    (volume,) = pods("kuberay/raycluster.yaml")[0]["volumes"]
    assert volume["hostPath"] == {"path": "/scratch/envcache", "type": "Directory"}


def test_kuberay_jobs() -> None:
    """The DaemonSet finds its own pods, and makes the store that the cluster's pods mount; the job names the cluster."""
    warm = document("kuberay/warm.yaml")
    assert (warm["apiVersion"], warm["kind"]) == ("apps/v1", "DaemonSet")
    labels = warm["spec"]["template"]["metadata"]["labels"]
    assert warm["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (volume,) = pods("kuberay/raycluster.yaml")[0]["volumes"]
    folder, build = pods("kuberay/warm.yaml")[0]["initContainers"]
    assert folder["command"][-1] == volume["hostPath"]["path"] == build["env"][0]["value"]
    assert int(folder["command"][3]) == build["securityContext"]["runAsUser"]
    job = document("kuberay/prefetch.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": document("kuberay/raycluster.yaml")["metadata"]["name"]}


def commands() -> list[str]:
    """What the examples run of the command line, in their files and in the shell blocks of their texts."""
    found = set()
    for path in FILES:
        text = path.read_text()
        if path.suffix == ".md":
            text = "\n".join(re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
        text = re.sub(r"^\s*#.*|uv tool install.*|.*pip install.*", "", text, flags=re.MULTILINE)
        text = text.replace("[ray-envcache, build, /app]", "ray-envcache build /app")
        found |= set(re.findall(r"(?<![/\w.-])(?:/opt/app/.venv/bin/)?ray-envcache ([a-z][^&>|;)`\n]*)", text))
    return sorted(command.strip().strip("\"'") for command in found)


def test_commands_are_found() -> None:
    """The next test sees them."""
    assert {"gc", "env", "build /app", "run -- ./train.sh"} <= set(commands())


@pytest.mark.parametrize("command", commands())
def test_commands_exist(command: str) -> None:
    """Every command of the examples is one, with these options."""
    name, *arguments = shlex.split(command)
    context = click.Context(cli)
    found = cli.get_command(context, name)
    assert found, name
    found.make_context(name, arguments)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_text(folder: Path) -> None:
    """Each example has a short text, which says how to run it, and leads to no file that is not there."""
    text = (folder / "README.md").read_text()
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 30
    for name in re.findall(r"`(\.\./[\w./-]+)`", text):
        assert (folder / name).exists(), name
