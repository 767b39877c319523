"""SIGKILL at every step that changes the file system: what is left is complete, or rubbish that the next run sweeps.

A child process counts what it is about to do to the file system, by Python's own audit events (PEP 578), and kills
itself before the N-th: so it dies once between every two steps, and after each death the store is examined. Where
there is strace, it kills every process of an operation in turn, uv's too, by system calls.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import uv

from ray_envcache.acquire import Store
from ray_envcache.field.spec import EnvSpec
from ray_envcache.gc.collector import collect
from ray_envcache.gc.policy import Limits
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store import journal
from ray_envcache.store.layout import Layout
from ray_envcache.store.leases import Holder
from ray_envcache.store.record import ReadyRecord
from ray_envcache.survey.verification import verify
from ray_envcache.system import flock
from tests import support
from tests.attacks.test_full_disk import wait_for_background

pytestmark = [pytest.mark.host, pytest.mark.attack]

PRELUDE = """
import os, signal, sys
from pathlib import Path
# Imported before the counting begins: bytecode of the package itself is none of its business.
from ray_envcache import acquire
from ray_envcache.build import bytecode
from ray_envcache.build.progress import Observer
from ray_envcache.doctor import repair
from ray_envcache.inside import pyc
from ray_envcache.survey import verification
from ray_envcache.gc import collector, evict
from ray_envcache.store import pins
from ray_envcache.build.builder import Builder
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.layout import Layout
from ray_envcache.store.leases import Holder, claim
from ray_envcache.gc.policy import Limits
from ray_envcache.field.spec import EnvSpec
from ray_envcache.acquire import Store

CHANGES = {
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.utime", "os.link", "os.symlink", "os.truncate",
    "fcntl.flock", "subprocess.Popen", "os.fork",
}
remaining = int(sys.argv[1])

def count(event, arguments):
    global remaining
    if event in CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
        remaining -= 1
        if remaining == 0:
            os.kill(os.getpid(), signal.SIGKILL)

root, project = Path(sys.argv[2]), sys.argv[3]
layout = Layout(root)
if remaining:
    sys.addaudithook(count)
"""

# By the process that is killed, not by the environment's Python that it starts.
COMPILE_HERE = """
def compile_here(layout, entry, kept, *, background):
    places = pyc.Places.of_this_python(str(layout.bytecode), str(entry.staged_bytecode))
    pyc.compile_tree(str(entry.site_packages), places, 1)
    return pyc.tag()

bytecode.compile_all = compile_here
"""
OPERATIONS = {
    "build": "Store.open(root).acquire(EnvSpec.parse(project), installed_ray(), Holder('test')).release()",
    "acquire": "Store.open(root).acquire(EnvSpec.parse(project), installed_ray(), Holder('test'), finish=False).release()",
    "finish": COMPILE_HERE + "[bytecode.finish(layout, entry, background=True) for entry in layout.all_entries()]",
    "finish with links": COMPILE_HERE
    + "[bytecode.finish(layout, entry, background=True) for entry in layout.all_entries()]",
    "pin": "[(pins.pin(layout, entry), pins.unpin(layout, entry.key)) for entry in layout.all_entries()]",
    "gc": "collector.collect(layout, Limits(everything=True))",
    "repair": COMPILE_HERE
    + """
for entry in [one for one in layout.all_entries() if one.ready.exists()]:
    found = verification.verify(entry)
    if found.differences:
        repair.repair(Store(layout), found, installed_ray(), Observer())
""",
    "evict": "[evict.evict(layout, entry) for entry in list(layout.all_entries())]",
}


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    support.make_wheel(wheels, "wanted", modules={"wanted/__init__.py": "", "wanted/deep/__init__.py": "X = 1\n"})
    return support.make_project(tmp_path / "project", wheels, ["ray", "wanted"])


def run_until_killed(operation: str, number: int, root: Path, project: Path) -> bool:
    """Run the operation, killed before its N-th change; True where it was, False where it came to its end."""
    program = PRELUDE + OPERATIONS[operation]
    command = [sys.executable, "-c", program, str(number), str(root), str(project)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode != 0


def prepare(operation: str, root: Path, project: Path, template: Path) -> None:
    """A store in which the operation has something to do."""
    if operation == "build":
        return
    if not template.exists():
        with Store.open(template).acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
            entry = lease.entry
        support.wait_until(entry.measured.exists, "finished")
        wait_for_background(template)
    # Links among the files stay such.
    subprocess.run(["cp", "-a", template, root], check=True)
    for entry in Layout(root).all_entries():
        # An entry is handed out where it was built only; nobody runs from this one.
        entry.ready.write_text(entry.ready.read_text().replace(str(template), str(root)))
    if operation.startswith("finish"):
        forget_bytecode(root)
    if operation == "finish":
        shutil.rmtree(Layout(root).bytecode)
    if operation == "repair":
        for entry in Layout(root).all_entries():
            (entry.site_packages / "wanted" / "deep" / "__init__.py").write_text("Y = 1\n")


def forget_bytecode(root: Path) -> None:
    for entry in Layout(root).all_entries():
        entry.compiled.unlink()
        entry.measured.unlink()
        for folder, _, _ in os.walk(entry.site_packages):
            os.chmod(folder, 0o755)
        for path in entry.site_packages.rglob("*.pyc"):
            path.unlink()


def examine(root: Path, project: Path, operation: str) -> None:
    """Nothing half is handed out, the next run succeeds, and the next collection leaves no byte of rubbish."""
    layout = Layout(root)
    quiet = lambda: all(flock.is_free(path) for path in layout.flocks.iterdir()) if layout.flocks.exists() else True  # noqa: E731
    support.wait_until(quiet, "orphans are done")
    compiled = lambda: not any(flock.is_held(entry.finishing_flock) for entry in layout.all_entries())  # noqa: E731
    support.wait_until(compiled, "what a killed compiler started is done")
    for entry in layout.all_entries():
        if ReadyRecord.read(entry) is not None and operation == "build":
            done = subprocess.run(
                [entry.python, "-c", "import ray, wanted.deep"], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
    with Store.open(root).acquire(EnvSpec.parse(project), installed_ray(), Holder("test")) as lease:
        assert lease.python.exists()
        entry = lease.entry
    if operation == "repair":
        # Once the damaged one is out of use there is a sound one, and that is handed out.
        ready = [one for one in layout.all_entries() if one.ready.exists()]
        sound = [one for one in ready if verify(one).state == "sound"]
        assert entry in sound or layout.first_entry(entry.key).ready.exists()
    # Not for its sizes: those of an entry whose compiler died between the two records are noted by `list`.
    support.wait_until(entry.compiled.exists, "compiled")
    wait_for_background(root)
    for path in layout.pins.iterdir():
        path.unlink()
    report = collect(layout, Limits(everything=True))
    assert report.failed == []
    assert journal.read(layout).passed_over == 0
    journal.remove(layout)
    left = sorted(str(path.relative_to(layout.top)) for path in layout.top.rglob("*") if not path.is_dir())
    assert [name for name in left if not name.startswith("flocks/") and name != "CACHEDIR.TAG"] == []
    assert list(layout.entries.iterdir()) == list(layout.trash.iterdir()) == list(layout.leases.iterdir()) == []


def attack(operation: str, project: Path, folder: Path, step: int) -> int:
    """Kill the operation at every `step`-th point; the number of points hit."""
    hits, number = 0, 1
    while True:
        root = folder / f"store-{number}"
        prepare(operation, root, project, folder / "template")
        killed = run_until_killed(operation, number, root, project)
        examine(root, project, operation)
        shutil.rmtree(root, ignore_errors=True)
        if not killed:
            return hits
        hits += 1
        number += step


@pytest.mark.parametrize(
    ("operation", "step"),
    [
        ("acquire", 1),
        ("pin", 1),
        ("finish", 5),
        ("finish with links", 7),
        ("build", 7),
        ("evict", 9),
        ("gc", 13),
        ("repair", 11),
    ],
)
def test_killed_at_many_steps(operation: str, step: int, project: Path, tmp_path: Path) -> None:
    """A SIGKILL between any two steps harms nobody; the slow test takes every single step of the long operations."""
    hits = attack(operation, project, tmp_path, step)
    print(f"{operation}: {hits} points")
    assert hits >= 3


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("operation", list(OPERATIONS))
def test_every_operation_killed_at_every_single_step(operation: str, project: Path, tmp_path: Path) -> None:
    """All operations, all points."""
    began = time.monotonic()
    hits = attack(operation, project, tmp_path, step=1)
    print(f"{operation}: {hits} points in {time.monotonic() - began:.0f} s")
    assert hits >= 3


# As the kernel sees changes. Each stands for its variants (rename, renameat, renameat2), which differ between machines.
SYSTEM_CALLS = (
    "mkdir", "rmdir", "rename", "unlink", "link", "symlink", "f?chmod", "utimensat", "ftruncate", "flock", "fsync",
    "write",
)  # fmt: skip

# A uv that is one only while it does this, so that it is killed and not the process that called it.
ATTACKED_UV = """\
#!/bin/sh
case "$1" in
{command}) exec {strace} {uv} "$@" ;;
*) exec {uv} "$@" ;;
esac
"""


def require_strace(folder: Path) -> None:
    """Skip where strace is not there, may not trace, or cannot inject."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    command: list[str | Path] = [
        "strace",
        "-f",
        "-o",
        folder / "trial",
        "-e",
        "inject=/^rename:signal=KILL:when=1",
        "true",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"strace does not work here: {done.stderr.strip()}")


def strace(call: str, number: int, log: Path) -> list[str]:
    """The beginning of a command whose processes all die at the N-th such call, each counting its own."""
    calls = f"/^{call}"
    inject = f"inject={calls}:signal=KILL:when={number}"
    return ["strace", "-f", "-q", "-A", "-o", str(log), "-e", f"trace=execve,{calls}", "-e", inject]


def run_under_strace(operation: str, words: list[str], root: Path, project: Path, log: Path) -> list[str]:
    """Run an operation, or "build" with a command of uv, and return the names of the programs that were killed."""
    name, _, command = operation.partition(", uv ")
    prelude = PRELUDE
    if command:
        attacked = log.with_name("uv")
        quoted = " ".join(f"'{word}'" for word in words)
        attacked.write_text(ATTACKED_UV.format(command=command, strace=quoted, uv=uv.find_uv_bin()))
        attacked.chmod(0o755)
        prelude, words = f"{PRELUDE}\nfrom ray_envcache.resolve import uv\nuv.find = lambda: {str(attacked)!r}\n", []
    log.write_text("")
    program = [sys.executable, "-c", prelude + OPERATIONS[name], "0", str(root), str(project)]
    done = subprocess.run([*words, *program], capture_output=True, text=True, check=False)
    # Killed; or alive, and telling in one of our errors that a child was.
    told = re.search(r"\nray_envcache\.errors\.(Build|Passing)Error: ", done.stderr)
    assert done.returncode in {0, -signal.SIGKILL} or told, done.stderr
    text = log.read_text()
    names = dict(re.findall(r'^(\d+) +execve\("(?:[^"]*/)?([^"/]+)"', text, re.MULTILINE))
    return [names.get(pid, "thread") for pid in re.findall(r"^(\d+) +\+\+\+ killed by SIGKILL", text, re.MULTILINE)]


def attack_with_strace(operation: str, project: Path, folder: Path, step: int) -> Counter[str]:
    """Kill the operation at every `step`-th call of each kind; whom it hit, and at how many points."""
    hits: Counter[str] = Counter()
    name, log = operation.split(", uv ", maxsplit=1)[0], folder / "strace.log"
    for call in SYSTEM_CALLS:
        number, killed = 1, ["somebody"]
        while killed:
            root = folder / f"store-{call.strip('f?')}-{number}"
            prepare(name, root, project, folder / "template")
            killed = run_under_strace(operation, strace(call, number, log), root, project, log)
            examine(root, project, name)
            shutil.rmtree(root, ignore_errors=True)
            hits.update({*killed, *(["points"] if killed else [])})
            number += step
    return hits


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("operation", "step"), [("build", 1), ("build, uv venv", 1), ("build, uv sync", 1), ("gc", 1), ("pin", 1)]
)
def test_every_process_killed_at_its_system_calls(operation: str, step: int, project: Path, tmp_path: Path) -> None:
    """Whichever process of an operation dies, and wherever: the builder, uv in all its threads, the check, the compiler."""
    require_strace(tmp_path)
    began = time.monotonic()
    hits = attack_with_strace(operation, project, tmp_path, step)
    print(f"{operation}: {dict(hits)} in {time.monotonic() - began:.0f} s")
    assert hits["points"] >= 3
