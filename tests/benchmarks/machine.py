"""Where the figures come from: versions, processors, memory, disks, load. Printed first, kept in the JSON."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from ray_envcache.system import disk
from tests.benchmarks import processes

REPOSITORY = Path(__file__).parents[2]
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def describe(places: dict[str, Path]) -> dict[str, Any]:
    """What there is to know about this machine, and about the file systems of `places`."""
    memory = psutil.virtual_memory()
    return {
        "versions": {name: version(name) for name in ("ray", "uv", "ray-envcache", "filelock", "packaging")}
        | {"python": platform.python_version(), "kernel": platform.release(), "commit": _commit()},
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory.total,
        "memory_available_bytes": memory.available,
        "load": [round(one, 2) for one in os.getloadavg()],
        "disks": {name: _disk_of(path) for name, path in places.items()},
        "processor_seconds_by": "cgroup" if processes.cgroup_parent() else "polling",
        "page_cache_can_be_dropped": can_drop_pages(),
    }


def lines(machine: dict[str, Any]) -> list[str]:
    """The same for people."""
    versions = ", ".join(f"{name} {found}" for name, found in machine["versions"].items() if found)
    disks = [
        f"{name}: {about['kind']}, {about['free_bytes'] / 1e9:,.0f} GB free" for name, about in machine["disks"].items()
    ]
    gigabytes, available = machine["memory_bytes"] / 1e9, machine["memory_available_bytes"] / 1e9
    load = " ".join(map(str, machine["load"]))
    pages = (
        "dropped where a measure says so" if machine["page_cache_can_be_dropped"] else "always warm: not ours to drop"
    )
    return [
        versions,
        f"{machine['cores']} x {machine['processor']}, {gigabytes:,.0f} GB, {available:,.0f} GB available, load {load}",
        "; ".join(disks),
        f"processor seconds by {machine['processor_seconds_by']}; page cache {pages}",
    ]


def can_drop_pages() -> bool:
    """Whether we may empty the kernel's page cache."""
    return os.access(DROP_CACHES, os.W_OK)


def drop_pages() -> None:
    """Empty the kernel's page cache: what is read next comes from the disk."""
    os.sync()
    DROP_CACHES.write_text("3\n", encoding="ascii")


def _disk_of(path: Path) -> dict[str, Any]:
    found = disk.free_space(path)
    return {"kind": found.kind, "total_bytes": found.total, "free_bytes": found.free}


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or sys.platform


def _commit() -> str:
    with suppress(OSError):
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()
    return ""
