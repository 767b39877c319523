"""How many processors and how much memory we may use, by files as kernels and container runtimes show them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ray_envcache.system import capacity

MANY = [*range(16)]


@pytest.fixture(autouse=True)
def big_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen processors, whatever this machine has."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*MANY}, raising=False)


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "found"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "300000 100000\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/not/mounted/here\n", {"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
        ("", {}, 16),
    ],
)
def test_processors(tmp_path: Path, cgroup: str, files: dict[str, str], found: int) -> None:
    """The smallest quota of our cgroup and those above it counts; at least one processor is ours."""
    assert capacity.processors(machine(tmp_path, cgroup, files)) == found


@pytest.mark.parametrize(
    ("cgroup", "files", "found"),
    [
        (
            "0::/pod\n",
            {
                "sys/fs/cgroup/pod/memory.max": "2000\n",
                "sys/fs/cgroup/pod/memory.current": "1500\n",
                "sys/fs/cgroup/pod/memory.stat": "anon 400\ninactive_file 700\n",
            },
            1200,
        ),
    ],
)
def test_memory(tmp_path: Path, cgroup: str, files: dict[str, str], found: int) -> None:
    """What a container's limit leaves, cached files that can go not counted as used."""
    assert capacity.memory(machine(tmp_path, cgroup, files)) == found


def test_memory_of_the_machine(tmp_path: Path) -> None:
    """Without a limit it is what the machine has."""
    files = {"sys/fs/cgroup/memory.max": "max\n", "sys/fs/cgroup/memory.current": "1\n"}
    assert capacity.memory(machine(tmp_path, "0::/\n", files)) > 10**6


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no affinity")
def test_affinity() -> None:
    """A process that is bound to one processor has one."""
    program = (
        "import os; from ray_envcache.system import capacity; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "print(capacity.processors())"
    )
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "1\n"


def test_idle_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting ends when a processor idled for half a second, or when the patience is over."""
    now, idle = [0.0], [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        idle[0] += seconds if now[0] > 2 else seconds / 2

    monkeypatch.setattr(capacity, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    monkeypatch.setattr(capacity, "psutil", SimpleNamespace(cpu_times=lambda: SimpleNamespace(idle=idle[0])))
    capacity.wait_for_idle(60)
    assert now[0] == 2.5
    now[0] = 0
    capacity.wait_for_idle(1)
    assert now[0] == 1
