"""The README's ways to start clusters: real files of systemd, compose, KubeRay and Ray's cluster launcher."""

from __future__ import annotations

import configparser
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from ray_envcache.field import registration

README = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
SECTION = README.partition("### Clusters started by `ray start`\n")[2].partition("\n### ")[0]
VARIABLES = registration.exports({})
STORE = "RAY_ENVCACHE_DIR"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)


def document(key: str) -> Any:
    """The YAML block that has this key at its top."""
    (found,) = [loaded for block in blocks("yaml") if key in (loaded := yaml.safe_load(block))]
    return found


def check_node(environ: dict[str, Any]) -> str:
    """A node gets exactly the variables of `ray-envcache env`, as text, and a store; returns where that is."""
    assert all(isinstance(value, str) for value in environ.values())
    assert {name: value for name, value in environ.items() if name != STORE} == VARIABLES
    assert os.path.isabs(environ[STORE])
    return str(environ[STORE])


def test_systemd() -> None:
    """The unit's variables are quoted as systemd reads them: shell-like words with quotes, and `%` for specifiers."""
    (unit,) = blocks("ini")
    assert "%" not in unit
    words = [word for line in unit.splitlines() if line.startswith("Environment=") for word in shlex.split(line[12:])]
    store = check_node(dict(word.split("=", 1) for word in words))
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.read_string(unit)
    service = parsed["Service"]
    assert store == f"/var/cache/{service['CacheDirectory']}"
    assert shlex.split(service["ExecStart"])[-1] == "--block"
    assert service["KillMode"] == "mixed"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    """systemd itself has nothing to say about the unit; a variable without its quotes would be ignored with a warning."""
    (unit,) = blocks("ini")
    # The command must be there; this one is a path of the reader's.
    runnable = unit.replace("/opt/app/.venv/bin/ray", shutil.which("true") or "")

    def said(text: str) -> str:
        (tmp_path / "ray.service").write_text(text)
        command = ["systemd-analyze", "verify", os.fspath(tmp_path / "ray.service")]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    assert said(runnable) == ""
    assert "Invalid environment assignment" in said(runnable.replace("'", ""))


def test_compose() -> None:
    """Two containers with the same user, and one folder of the host at the same path in both."""
    services = document("services")["services"].values()
    assert len(services) == 2
    for service in services:
        store = check_node(service["environment"])
        # Compose would expand it.
        assert "$" not in json.dumps(service)
        (mount,) = service["volumes"]
        assert mount["source"] == mount["target"] == store
        assert mount["bind"] == {"create_host_path": False}
    assert len({service["user"] for service in services}) == 1
    assert [shlex.split(service["command"])[:2] for service in services] == [["ray", "start"]] * 2


def test_kuberay() -> None:
    """Every container of the head and of the workers has the variables, and the host's folder at the same path."""
    cluster = document("kind")
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    assert len(groups) == 2
    for group in groups:
        pod = group["template"]["spec"]
        volumes = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            store = check_node({one["name"]: one["value"] for one in container["env"]})
            mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
            assert mounts == volumes
            assert store in volumes.values()
        assert pod["securityContext"] == groups[0]["template"]["spec"]["securityContext"]
        assert pod["securityContext"]["runAsUser"] > 0
    # Those that the schema wants of a group of workers.
    assert groups[1].keys() >= {"groupName", "minReplicas", "maxReplicas", "template"}


def test_cluster_launcher_schema() -> None:
    """Ray's own schema accepts the launcher's file."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    schema = Path(spec.origin).parent / "autoscaler" / "ray-schema.json"
    jsonschema.validate(document("provider"), json.loads(schema.read_text()))


def commands() -> list[str]:
    """The shell commands of the section that start a node."""
    launcher = document("provider")
    lists = [launcher["head_start_ray_commands"], launcher["worker_start_ray_commands"]]
    return [*blocks("sh"), *(command for one in lists for command in one if command != "ray stop")]


def started(shell: str, command: str, programs: Path, **before: str) -> dict[str, str]:
    """The variables of `ray start`, as a real shell starts it by `command` where the caller had `before`."""
    texts = {
        "ray": "#!/bin/sh\necho $1 && exec env -0\n",
        "ray-envcache": f'#!/bin/sh\nexec "{sys.executable}" -m ray_envcache "$@"\n',
    }
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environ = {"PATH": f"{programs}:{os.environ['PATH']}", "RAY_HEAD_IP": "10.0.0.1", **before}
    done = subprocess.run([shell, "-c", command], env=environ, capture_output=True, text=True, check=True)
    verb, _, dump = done.stdout.partition("\n")
    assert verb == "start"
    found = dict(pair.split("=", 1) for pair in dump.split("\0") if pair)
    ours = {*VARIABLES, STORE}
    return {name: value for name, value in found.items() if name in ours}


@pytest.mark.parametrize("command", commands(), ids=["readme", "head", "worker"])
@pytest.mark.parametrize("shell", ["bash", "sh"])
def test_shell(shell: str, command: str, tmp_path: Path) -> None:
    """What a real shell makes of the command: `ray start` with the variables, quotes and all."""
    check_node(started(shell, command, tmp_path, **{STORE: "/of/the/shell"}))


def test_shell_keeps_what_was_there(tmp_path: Path) -> None:
    """A plugin of the caller's is not lost on the way through `ray-envcache env`; twice is once."""
    theirs = [{"class": "their.Plugin", "note": 'it\'s "quoted" $HOME'}]
    before = {registration.PLUGINS: json.dumps(theirs)}
    once = started("bash", blocks("sh")[0], tmp_path, **before)
    assert once == registration.exports(before)
    assert started("bash", blocks("sh")[0], tmp_path, **once) == once
