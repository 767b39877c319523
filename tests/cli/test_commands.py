"""The command line, as a process: what it prints where, and what it exits with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import ray_envcache
from ray_envcache.acquire import Store
from ray_envcache.field import registration
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder
from ray_envcache.survey import inventory
from tests import support
from tests.benchmarks import fabricate

pytestmark = pytest.mark.host


def run(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `ray-envcache` with these arguments."""
    command = [sys.executable, "-m", "ray_envcache", *map(str, arguments)]
    return subprocess.run(command, env={**os.environ, **environ}, capture_output=True, text=True, check=False)


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    support.make_wheel(wheels, "wanted")
    return support.make_project(tmp_path / "my-project", wheels, ["ray", "wanted"])


def listed() -> list[dict[str, Any]]:
    data = json.loads(run("list", "--json").stdout)
    assert data["schema_version"] == 1
    found: list[dict[str, Any]] = data["envs"]
    return found


def test_build_prints_the_interpreter_on_stdout_and_talks_on_stderr(store: Store, project: Path) -> None:
    """Scripts can use what `build` prints; the second time it says nothing else."""
    first, second = run("build", project), run("build", project.parent)
    assert first.returncode == second.returncode == 0
    assert Path(first.stdout.strip()).samefile(second.stdout.strip())
    assert "Building the environment of my-project: 2 packages" in first.stderr
    assert second.stderr == ""


def test_list_json_has_the_schema(store: Store, project: Path) -> None:
    """Exactly the documented fields, bytes as integers, UTC times."""
    run("build", project)
    (one,) = listed()
    assert set(one) == {
        "key", "state", "in_use", "holders", "pinned", "size_bytes", "reclaimable_bytes", "created_at", "last_used_at",
        "python", "ray", "project", "exact", "source", "path", "base", "readonly",
    }  # fmt: skip
    assert (one["state"], one["pinned"], one["ray"]) == ("ready", False, support.RAY_VERSION)
    assert one["size_bytes"] >= one["reclaimable_bytes"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", one["created_at"])
    assert Path(one["path"]).is_relative_to(store.layout.entries)


def test_list_imports_little(store: Store, project: Path) -> None:
    """`list` imports neither ray, rich nor uv, and nothing of ours that resolves, builds, collects or examines."""
    run("build", project)
    code = """
    import sys
    from ray_envcache.cli.main import main

    sys.argv = ["ray-envcache", "list"]
    main()
    print(*sys.modules)
    """
    *table, modules = support.run_python(code).splitlines()
    assert "my-project" in table[1]
    rooms = {name.split(".")[1] for name in modules.split() if name.startswith("ray_envcache.")}
    assert {"store", "cli"} <= rooms
    assert not rooms & {"acquire", "resolve", "build", "gc", "doctor", "cluster", "hook", "plugin"}
    assert not {"uv", "rich", "packaging", "ray"} & {*modules.split()}


def test_list_of_many(store: Store, project: Path) -> None:
    """JSON and table show each of 450 environments, as the inventory has them."""
    support.build_finished(store, project)
    fabricate.fill(store.layout.root, 450)
    found = listed()
    alone = inventory.survey(store.layout)
    assert [one["key"] for one in found] == [one.key for one in alone]
    told = [(one["size_bytes"], one["reclaimable_bytes"], one["project"], one["path"]) for one in found]
    assert told == [(one.size_bytes, one.reclaimable_bytes, one.project, one.path) for one in alone]
    assert len(run("list").stdout.splitlines()) == 450 + 2


def test_list_names_holders(store: Store, project: Path) -> None:
    """The holder of a lease appears with its pid, kind and cluster."""
    from ray_envcache.field.spec import EnvSpec
    from ray_envcache.resolve.interpreter import installed_ray
    from ray_envcache.store.leases import Holder

    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("agent", cluster="session_1")):
        (one,) = listed()
        assert one["in_use"]
        holder = next(holder for holder in one["holders"] if holder["kind"] == "agent")
        assert (holder["pid"], holder["cluster"]) == (os.getpid(), "session_1")


def test_list_of_an_empty_store(store: Store) -> None:
    """Nothing to show is no error."""
    done = run("list")
    assert done.returncode == 0
    assert done.stdout.startswith("0 environments")


def test_list_table_has_key_project_and_totals(store: Store, project: Path) -> None:
    """The table names the project, and the footer counts."""
    run("build", project)
    lines = run("list").stdout.splitlines()
    assert lines[0].split() == [
        "KEY",
        "PROJECT",
        "PYTHON",
        "RAY",
        "STATE",
        "USERS",
        "SIZE",
        "RECLAIMABLE",
        "CREATED",
        "LAST",
        "USED",
    ]
    assert "my-project" in lines[1]
    assert lines[-1].startswith("1 environment, ")


def test_rm_refuses_what_is_in_use_and_says_by_whom(
    store: Store, project: Path, children: list[subprocess.Popen[str]]
) -> None:
    """A process that runs from the environment keeps it; afterwards `rm` removes it."""
    python = run("build", project).stdout.strip()
    key = listed()[0]["key"]
    user = subprocess.Popen(
        [python, "-c", "print('up', flush=True); input()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    children.append(user)
    assert user.stdout is not None
    assert user.stdout.readline() == "up\n"
    refused = run("rm", key[:8])
    assert refused.returncode == 1
    assert "cannot be removed" in refused.stderr
    assert "hint: " in refused.stderr
    user.communicate("\n")
    assert run("rm", key[:8]).returncode == 0
    assert listed() == []


@pytest.mark.parametrize("key", ["zzz", "../../etc", ""])
def test_rm_of_an_unknown_key(store: Store, key: str) -> None:
    """A key that is not there, or is no key, is an error with a hint."""
    done = run("rm", key)
    assert done.returncode == 1
    assert "ray-envcache list shows the keys" in done.stderr


def test_dir_prints_the_root(store: Store) -> None:
    """`dir` says where the store is, without making it."""
    assert run("dir").stdout.strip() == str(store.layout.root)
    assert not (store.layout.root / "elsewhere").exists()
    assert run("dir", RAY_ENVCACHE_DIR=str(store.layout.root / "elsewhere")).stdout.strip().endswith("elsewhere")


def test_paths_are_printed_in_any_encoding(tmp_path: Path) -> None:
    """A script gets the bytes of the path, also where letters of it are none of the stream's."""
    command = [sys.executable, "-m", "ray_envcache", "dir"]
    environ = {**os.environ, "RAY_ENVCACHE_DIR": f"{tmp_path}/Grüße", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environ, capture_output=True, check=True)
    assert done.stdout == os.fsencode(f"{tmp_path}/Grüße\n")


def test_env_prints_exports_that_a_shell_understands(store: Store) -> None:
    """eval "$(ray-envcache env)" registers plugin and hook, and keeps what others registered."""
    other = json.dumps([{"class": "it's.a.Plugin"}])
    script = f'eval "$({sys.executable} -m ray_envcache env)"; printf %s "$RAY_RUNTIME_ENV_PLUGINS"'
    done = subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, registration.PLUGINS: other},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [plugin["class"] for plugin in json.loads(done.stdout)] == ["it's.a.Plugin", registration.PLUGIN_CLASS]


def test_what_the_system_says(store: Store) -> None:
    """An error of the operating system is a sentence too; of the store's own files it is the store that is unusable."""
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "ray_envcache", "gc", "-n"]
        buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
        done = subprocess.run(command, env=buffered, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "error: No space left on device\n")
    store.layout.collector_flock.unlink()
    store.layout.collector_flock.mkdir()
    done = run("gc")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"error: Is a directory: `{store.layout.collector_flock}`\nhint: ")


def test_without_stdout(store: Store) -> None:
    """With stdout closed, as in some crontabs, the work is done and nothing is said."""
    for command in ("gc", "list"):
        script = f"{sys.executable} -m ray_envcache {command} >&-"
        done = subprocess.run(["sh", "-c", script], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


def test_build_takes_the_options_of_the_field(store: Store, project: Path, wheels: Path, tmp_path: Path) -> None:
    """An environment that inherits can be built before any cluster starts."""
    assert run("build", project, "--inherit", "click").returncode == 1, "click is not in the lockfile"
    # The ray that is inherited is a fake one without requirements: those of the real one are in no base Python.
    with zipfile.ZipFile(next(wheels.glob("ray-*.whl"))) as wheel:
        wheel.extractall(tmp_path / "host")
    done = run("build", project, "--inherit=*", "--no-install-project", PYTHONPATH=os.fspath(tmp_path / "host"))
    assert done.returncode == 0, done.stderr
    (ray,) = Path(done.stdout.strip()).parents[1].glob("lib/python*/site-packages/ray")
    assert ray.readlink() == tmp_path / "host" / "ray"


def test_version(store: Store) -> None:
    """`--version` is the package's."""
    assert run("--version").stdout.split()[-1] == ray_envcache.__version__


def test_exit_codes(store: Store, tmp_path: Path) -> None:
    """1 something failed, 2 usage, 3 store unusable; one sentence and a hint on stderr, nothing on stdout."""
    broken = tmp_path / "file"
    broken.touch()
    cases = [
        (run("build", tmp_path / "nowhere"), 1),
        (run("build", tmp_path, "--extra", "--evil"), 2),
        (run("nonsense"), 2),
        (run("list", RAY_ENVCACHE_DIR=str(broken / "store")), 3),
    ]
    cases += [
        (run("list", RAY_ENVCACHE_DIR="relative"), 3),
        (run("run", "--project", tmp_path / "nowhere", "--", "true"), 2),
        (run("run", "--project", broken, "--", "true"), 2),
        (run("run", "--projct", tmp_path, "--", "true"), 2),
    ]
    assert [done.returncode for done, _ in cases] == [code for _, code in cases]
    assert all(done.stdout == "" and "rror: " in done.stderr and "Traceback" not in done.stderr for done, _ in cases)


def test_interrupted_build_exits_130(
    store: Store, tmp_path: Path, wheels: Path, children: list[subprocess.Popen[str]]
) -> None:
    """Ctrl-C ends `build` like any other command, without a traceback."""
    import signal

    started = tmp_path / "started"
    support.make_sdist(wheels, "slow", code=f"pathlib.Path({str(started)!r}).touch(); time.sleep(600)")
    slow = support.make_project(tmp_path / "slow-project", wheels, ["ray", "slow"])
    child = subprocess.Popen([sys.executable, "-m", "ray_envcache", "build", slow], stderr=subprocess.PIPE, text=True)
    children.append(child)
    support.wait_until(started.exists, "the build began")
    child.send_signal(signal.SIGINT)
    _, said = child.communicate()
    assert child.returncode == 130
    assert "Traceback" not in said
    assert list(store.layout.entries.iterdir()) == []


@pytest.mark.skipif((os.cpu_count() or 1) == 1, reason="needs helpers, one per processor")
def test_interrupted_compiling(
    store: Store, tmp_path: Path, wheels: Path, children: list[subprocess.Popen[str]]
) -> None:
    """After Ctrl-C while bytecode is made the helpers are gone, and what is missing is made in the next use."""
    import signal

    import psutil

    text = "x = [1]\n" * 3000
    # Two directories: enough for two helpers.
    modules = {f"many{number % 2}/m{number}.py": f"{text}{number}\n" for number in range(100)}
    support.make_wheel(wheels, "many", modules=modules)
    project = support.make_project(tmp_path / "project", wheels, ["ray", "many"])
    child = subprocess.Popen(
        [sys.executable, "-m", "ray_envcache", "build", project], stderr=subprocess.PIPE, text=True
    )
    children.append(child)
    process, helpers = psutil.Process(child.pid), list[psutil.Process]()

    def compiles() -> bool:
        helpers[:] = [one for one in process.children(recursive=True) if "pyc.py" in " ".join(support.command_of(one))]
        made = store.layout.entries.glob("*/venv/lib/*/site-packages/many?/__pycache__/*.pyc")
        return any(made) and len(helpers) >= 2

    support.wait_until(compiles, "helpers compile")
    child.send_signal(signal.SIGINT)
    _, said = child.communicate()
    assert child.returncode == 130
    assert "Traceback" not in said
    assert all(map(support.is_gone, helpers))
    (entry,) = store.layout.all_entries()
    assert not entry.compiled.exists()
    with store.acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
        assert lease.entry == entry
        support.wait_until(entry.compiled.exists, "the background finished it")
    assert len(list(entry.site_packages.glob("many?/__pycache__/*.pyc"))) == 100
