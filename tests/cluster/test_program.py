"""The program under `ray-envcache run`: it starts with the state of a process in our place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import support

RUN = """
import os, sys
from ray_envcache.cluster import program
held = [int(one) for one in sys.argv[2:]]
sys.exit(program.run("/bin/sh", ["sh", "-c", sys.argv[1]], {"PATH": os.environ["PATH"]}, held))
"""


def run(command: str, before: str = ":", *, held: str = "") -> str:
    """What a shell command writes below `run`, where the shell in front has done what `before` says."""
    script = f'{before}; exec "$0" -c "$1" "$2" {held}'
    done = subprocess.run(
        ["bash", "-c", script, sys.executable, RUN, command], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
@pytest.mark.parametrize("before", [":", "trap '' INT"])
def test_signals(before: str) -> None:
    """It ignores the signals that a process in our place would, not those that Python ignores, and blocks none."""
    show = "grep -E 'Sig(Ign|Blk)' /proc/self/status"
    plain = subprocess.run(["bash", "-c", f'{before}; exec sh -c "{show}"'], capture_output=True, text=True, check=True)
    assert standard_signals(run(show, before)) == standard_signals(plain.stdout)


def standard_signals(status: str) -> list[int]:
    """The masks without what is above: glibc ignores two signals of its own in all that it spawns."""
    return [int(mask, 16) & 0x7FFFFFFF for mask in status.split()[1::2]]


def test_pipes() -> None:
    """A writer whose reader has gone ends without a word."""
    assert run("yes | head -n 1") == "y\n"


def test_supervisor_that_ignores_the_end_of_children() -> None:
    """How it ended is known where our parent ignores SIGCHLD, and the kernel keeps no status."""
    ignoring = (
        "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.executable, sys.argv[1:])"
    )
    code = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {ignoring!r}, sys.executable, '-c', {RUN!r}, 'exit 7']))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 7


def test_closed_stdin(tmp_path: Path) -> None:
    """Where we start without a stdin, what keeps the environment is not what the program reads from; it still holds it."""
    file = tmp_path / "in-use"
    file.write_text("held")
    code = RUN.replace("held = ", f"os.open({str(file)!r}, os.O_RDONLY); held = ")
    command = "cat 2>/dev/null; ls -l /proc/self/fd" if Path("/proc").exists() else "cat 2>/dev/null"
    done = subprocess.run(
        ["bash", "-c", 'exec <&-; exec "$0" -c "$1" "$2" 0', sys.executable, code, command],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "held" not in done.stdout
    assert not Path("/proc").exists() or done.stdout.count(os.fspath(file)) == 1


def test_nothing_is_left_in_our_process(tmp_path: Path) -> None:
    """Afterwards our own process has the descriptors and the signal handlers that it had."""
    said = support.run_python(
        "import fcntl, os, signal, sys\n"
        "from ray_envcache.cluster import program\n"
        f"held = os.open({str(tmp_path)!r}, os.O_RDONLY)\n"
        "before = [signal.getsignal(signal.SIGCHLD), os.listdir('/dev/fd')]\n"
        "program.run('/bin/sh', ['sh', '-c', ':'], {}, [held])\n"
        "print(before == [signal.getsignal(signal.SIGCHLD), os.listdir('/dev/fd')], os.get_inheritable(held))"
    )
    assert said == "True False\n"
