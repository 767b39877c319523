"""Real Ray clusters, of the oldest and the newest Ray that is supported."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
import pytest
import uv

from ray_envcache.acquire import Store
from ray_envcache.store import leases
from ray_envcache.store.layout import Layout
from tests import support

REPOSITORY = Path(__file__).parents[2]
OLDEST, NEWEST = "2.51.1", "newest"
WITH_TOKEN = {"RAY_AUTH_MODE": "token"}
"""What a cluster with a token needs besides it, where Ray is given an address or `ray.cluster_utils` starts the nodes."""
with_both_rays = pytest.mark.parametrize("python", [OLDEST, NEWEST], indirect=True)
"""For tests whose run with the oldest Ray is part of CI: of the others it is only with `-m slow`."""


@pytest.fixture(scope="session", params=[pytest.param(OLDEST, marks=pytest.mark.slow), NEWEST])
def python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a venv with that Ray and this package; it runs drivers, raylets and agents."""
    requirement = "ray" if request.param == NEWEST else f"ray=={request.param}"

    def make(folder: Path) -> None:
        support.run_uv("venv", f"--python={sys.executable}", folder / "venv", cwd=REPOSITORY)
        # Without bytecode: the first cluster writes what is needed of it, which is the lesser part.
        support.run_uv("pip", "install", f"--python={folder / 'venv'}", requirement, REPOSITORY, cwd=REPOSITORY)

    return support.made_once(tmp_path_factory, f"ray-{request.param}", make) / "venv/bin/python"


@pytest.fixture(scope="session")
def bytecode(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a store shares among its environments, once it has had one with ray: else each test compiles that anew."""

    def make(folder: Path) -> None:
        with run_host(python, folder) as host:
            support.run(python, "-m", "ray_envcache", "build", host.project("project"), env=host.environ())
            (entry,) = host.layout.all_entries()
            support.wait_until(entry.compiled.exists, "all bytecode is there")

    # A folder for each Ray: a Python's folder of bytecode is named by its version only.
    folder = support.made_once(tmp_path_factory, f"bytecode-of-{python.parents[2].name}", make)
    return Layout(folder / "store").bytecode


@dataclass
class Host:
    """One store, one temp directory for Ray, one home with Ray's token, and the drivers that tests run there.

    Its stores have the `bytecode` from the start, where that is given.
    """

    python: Path
    folder: Path
    temp: Path
    bytecode: Path | None = None
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def layout(self) -> Layout:
        return Layout(self.folder / "store")

    def store(self, name: str) -> Path:
        """The root of a store, empty but for bytecode."""
        layout = Store.open(self.folder / name).layout
        if self.bytecode:
            shutil.copytree(self.bytecode, layout.bytecode, copy_function=os.link)
        return layout.root

    @cached_property
    def home(self) -> Path:
        """The home of a user who has started a cluster before: Ray left its token there."""
        (self.folder / "home" / ".ray").mkdir(parents=True)
        (self.folder / "home" / ".ray" / "auth_token").write_text(secrets.token_hex(32))
        return self.folder / "home"

    def environ(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTEST_"))}
        # Ray phones home and colours its output otherwise; sessions of a test go with its temp directory.
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(self.temp), "HOME": str(self.home)}
        # These tests themselves may run under `uv run`: no driver but the one of that test is meant to notice.
        alone = {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "RAY_ENVCACHE_DIR": str(self.layout.root)}
        return {**kept, **quiet, **alone, "RAY_ENVCACHE_MIN_FREE_SPACE": "off", **more}

    def start(
        self, code: str, *arguments: str | Path, before: tuple[str | Path, ...] = (), **environ: str
    ) -> subprocess.Popen[str]:
        """Start a driver. It is gone at the end of the test, whatever happens."""
        script = self.folder / f"driver-{len(self.started)}.py"
        script.write_text(textwrap.dedent(code))
        child = subprocess.Popen(
            [*before, self.python, script, *map(str, arguments)],
            cwd=self.folder,
            env=self.environ(**environ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(child)
        return child

    def run(self, code: str, *arguments: str | Path, **options: Any) -> Any:
        """Run a driver to its end; the last line of its stdout is JSON."""
        child = self.start(code, *arguments, **options)
        out, err = child.communicate()
        assert child.returncode == 0, f"{out}\n{err}"
        return json.loads(out.splitlines()[-1])

    def project(self, name: str, dependencies: list[str] | None = None, extra: str = "") -> Path:
        """A project whose own packages come from the host's wheels, and ray from the cluster."""
        # Ray is added by us, from the index: only what the project names comes from the folder.
        folder = self.folder / name
        support.make_project(folder, self.wheels, dependencies or [], extra=extra)
        pyproject = folder / "pyproject.toml"
        pyproject.write_text(pyproject.read_text().replace("no-index = true\n", ""))
        support.run_uv("lock", cwd=folder)
        return pyproject

    @property
    def wheels(self) -> Path:
        (self.folder / "wheels").mkdir(exist_ok=True)
        return self.folder / "wheels"

    def holders(self) -> list[leases.Holder]:
        """Who holds a lease now, other than the compilers of bytecode."""
        keys = {entry.key for entry in self.layout.all_entries()}
        found = [holder for key in keys for _, holder in leases.live_leases(self.layout, key)]
        return [holder for holder in found if holder.kind != "bytecode"]


@pytest.fixture
def host(python: Path, bytecode: Path, tmp_path: Path) -> Iterator[Host]:
    with run_host(python, tmp_path, bytecode) as one:
        one.store("store")
        yield one


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


def start_node(command: str, environ: dict[str, str]) -> subprocess.Popen[str]:
    """The process of a shell command that ends in `ray start --block`, when its node is up."""
    child = subprocess.Popen(
        ["bash", "-c", command], env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert child.stdout is not None
    said: list[str] = []
    while not any("block forever" in line for line in said[-1:]):
        said.append(child.stdout.readline())
        if not said[-1]:
            end_nodes([child])
            pytest.fail("".join(said))
    return child


def end_nodes(started: list[subprocess.Popen[str]]) -> None:
    """End what is left of nodes, all their processes."""
    for child in started:
        if child.poll() is None:
            support.kill_tree(child.pid)
        child.wait()
        assert child.stdout is not None
        child.stdout.close()


@contextmanager
def run_host(python: Path, folder: Path, bytecode: Path | None = None) -> Iterator[Host]:
    """A host whose drivers are gone at the end."""
    # Sockets of Ray have at most 107 bytes: pytest's own folders are too deep.
    with support.short_folder() as temp:
        one = Host(python, folder, temp, bytecode)
        try:
            yield one
        finally:
            support.reap(one.started)
            _stop_compilers(one)


def _stop_compilers(host: Host) -> None:
    """Nobody will use these environments again; their bytecode would only take time from the tests to come."""
    for process in psutil.process_iter(["cmdline"]):
        command = process.info["cmdline"] or []
        words = " ".join(command)
        if str(host.folder) in words and ("ray_envcache.build.bytecode" in words or "inside/pyc.py" in words):
            with suppress(psutil.NoSuchProcess):
                process.kill()


def uv_binary() -> str:
    return os.fspath(uv.find_uv_bin())
