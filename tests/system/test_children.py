"""The one door for child processes: what they say arrives, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from ray_envcache.system import children
from tests import support

ENVIRON = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}


def sh(script: str, **options: object) -> children.Completed:
    return children.run(["sh", "-c", script], environ=ENVIRON, **options)  # type: ignore[arg-type]


def lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def assert_all_gone(pids: list[int]) -> None:
    try:
        support.wait_until(lambda: not any(map(lives, pids)), "all processes are gone", seconds=10)
    finally:
        for pid in filter(lives, pids):
            os.kill(pid, signal.SIGKILL)


def test_completed() -> None:
    """Status and both streams come back, and bytes that are no text do no harm."""
    assert sh("echo out; echo err >&2; exit 3") == children.Completed(3, "out\n", "err")
    assert sh("printf 'a\\377'; printf 'b\\377\\n\\nc' >&2") == children.Completed(0, "a\ufffd", "b\ufffd\n\nc")
    assert sh("kill -9 $$").returncode == -9


def test_explicit_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child has the environment and folder it is given, nothing to read, and no descriptor beside its streams."""
    monkeypatch.setenv("UNWANTED", "1")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        done = sh("echo ${UNWANTED-none}; pwd; cat; ls /dev/fd | grep -c . ", cwd=tmp_path)
        assert done.stdout.splitlines()[:2] == ["none", str(tmp_path)]
        code = "import os; print([fd for fd in range(3, 100) if os.path.exists(f'/dev/fd/{fd}') and os.get_inheritable(fd)])"
        # Listing opens one of its own; those that may be inherited further are what was passed on.
        assert children.run([sys.executable, "-c", code], environ=ENVIRON).stdout.strip() == "[]"
        assert (
            children.run([sys.executable, "-c", code], environ=ENVIRON, pass_fds=[write]).stdout.strip() == f"[{write}]"
        )
    finally:
        os.close(read)
        os.close(write)


def test_missing_program() -> None:
    """A program that is not there is an OSError."""
    with pytest.raises(FileNotFoundError):
        children.run(["/no/such/program"], environ=ENVIRON)


def test_lines_arrive_as_they_come(tmp_path: Path) -> None:
    """Each line of stderr arrives while the child runs: this one goes on only when its line was heard."""
    heard = tmp_path / "heard"
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        heard.touch()

    script = f"echo one >&2; until [ -e '{heard}' ]; do sleep 0.01; done; printf 'two\\r\\nthree' >&2"
    assert sh(script, on_line=on_line).returncode == 0
    assert lines == ["one", "two", "three"]


def test_big_outputs() -> None:
    """Megabytes on both streams at once do not deadlock, and all arrive."""
    code = """
        import sys, threading
        def pour(stream, mark):
            for _ in range(2000):
                stream.write(mark * 1023 + "\\n")
        threads = [threading.Thread(target=pour, args=pair) for pair in ((sys.stdout, "o"), (sys.stderr, "e"))]
        [thread.start() for thread in threads], [thread.join() for thread in threads]
    """
    lines: list[str] = []
    done = children.run([sys.executable, "-c", textwrap.dedent(code)], environ=ENVIRON, on_line=lines.append)
    assert done.stdout == ("o" * 1023 + "\n") * 2000
    assert lines == ["e" * 1023] * 2000
    assert done.stderr == "\n".join(lines)


FAMILY = "sleep 600 & echo $! >&2; {trap} echo $$ >&2; while :; do sleep 600 & wait; done"


@pytest.mark.parametrize("trap", ["", "trap '' TERM;"], ids=["willing", "unwilling"])
def test_error_in_on_line(trap: str) -> None:
    """An error in `on_line` comes out as it was, after child and grandchild are gone, willing or not."""
    pids: list[int] = []

    def on_line(line: str) -> None:
        pids.append(int(line))
        if len(pids) == 2:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sh(FAMILY.format(trap=trap), on_line=on_line)
    assert_all_gone(pids)


def test_unwilling_grandchild() -> None:
    """A grandchild that ignores SIGTERM goes too, although its parent went at once."""
    pids: list[int] = []

    def on_line(line: str) -> None:
        pids.append(int(line))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        sh("sh -c \"trap '' TERM; echo \\$\\$ >&2; while :; do sleep 1; done\" & wait", on_line=on_line)
    assert_all_gone(pids)


@pytest.mark.parametrize("times", [1, 2])
def test_keyboard_interrupt(children: list[subprocess.Popen[str]], times: int) -> None:
    """Ctrl-C, also an impatient second one, ends the program with no process left behind."""
    program = f"""
        import os, sys
        from ray_envcache.system import children
        children.GRACE_SECONDS = {1 if times == 1 else 60}
        children.run(["sh", "-c", {FAMILY.format(trap="trap 'echo asked >&2' TERM;")!r}], environ=os.environ,
                     on_line=lambda line: print(line, flush=True))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    children.append(child)
    assert child.stdout is not None
    pids = [int(child.stdout.readline()) for _ in range(2)]
    assert all(map(lives, pids))
    # The first one reaches the program while it reads; a second one while it waits for the group to end.
    child.send_signal(signal.SIGINT)
    if times == 2:
        assert not child.poll()
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
    _, errors = child.communicate(timeout=30)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert_all_gone(pids)


def test_sigkill_leaves_the_child_alone(children: list[subprocess.Popen[str]]) -> None:
    """If we are killed the child goes on: it may hold a flock for a reason."""
    program = """
        import os
        from ray_envcache.system import children
        children.run(["sh", "-c", "echo $$ >&2; exec sleep 600"], environ=os.environ, on_line=lambda line: print(line, flush=True))
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True)
    children.append(child)
    assert child.stdout is not None
    pid = int(child.stdout.readline())
    child.kill()
    child.wait()
    try:
        assert lives(pid)
    finally:
        os.kill(pid, signal.SIGKILL)


DETACHED = """
import json, os, sys, time
report = {
    "pid": os.getpid(), "session": os.getsid(0), "group": os.getpgrp(), "parent": os.getppid(), "cwd": os.getcwd(),
    "descriptors": [fd for fd in range(256) if os.path.exists(f"/proc/self/fd/{fd}") or os.path.exists(f"/dev/fd/{fd}")],
    "streams": [os.path.samestat(os.fstat(fd), os.stat(os.devnull)) for fd in range(3)],
    "environ": os.environ.get("MARK"), "arguments": sys.argv[2:],
}
with open(sys.argv[1] + ".part", "w") as file:
    json.dump(report, file)
os.rename(sys.argv[1] + ".part", sys.argv[1])
time.sleep(600)
"""


def test_start_detached(tmp_path: Path) -> None:
    """A detached process leads a group in another session, is not our child, and inherits no descriptor and no stream."""
    import json

    report = tmp_path / "a report"
    read, write = os.pipe()
    os.set_inheritable(write, True)
    children.start_detached(
        [sys.executable, "-c", DETACHED, report, "an argument; with 'quotes'"], environ={**ENVIRON, "MARK": "here"}
    )
    support.wait_until(report.exists, "the detached process has started")
    found = json.loads(report.read_text())
    try:
        assert found["session"] != os.getsid(0)
        assert found["group"] == found["pid"]
        assert found["parent"] != os.getpid()
        assert psutil.Process(found["pid"]) not in psutil.Process().children(recursive=True)
        assert found["descriptors"] == [0, 1, 2]
        assert found["streams"] == [True] * 3
        assert (found["cwd"], found["environ"], found["arguments"]) == ("/", "here", ["an argument; with 'quotes'"])
        # The end of the pipe comes at once, although the process lives: what raylet waits for.
        os.close(write)
        os.set_blocking(read, False)
        assert os.read(read, 1) == b""
        assert lives(found["pid"])
    finally:
        os.kill(found["pid"], signal.SIGKILL)
        os.close(read)


def test_detached_outlives(tmp_path: Path) -> None:
    """A detached process outlives whoever started it, whose whole process group is killed."""
    report = tmp_path / "report"
    program = """
        import os, signal, sys
        from ray_envcache.system import children
        children.start_detached([sys.executable, "-c", sys.argv[1], sys.argv[2]], environ=os.environ)
        os.killpg(0, signal.SIGKILL)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), DETACHED, str(report)]
    assert subprocess.run(command, start_new_session=True, check=False).returncode == -signal.SIGKILL
    support.wait_until(report.exists, "the detached process has started")
    pid = psutil.Process(int(report.read_text().split('"pid": ')[1].split(",")[0])).pid
    assert lives(pid)
    os.kill(pid, signal.SIGKILL)


def test_detached_failure() -> None:
    """A program that cannot be started is an error here, not silence."""
    with pytest.raises(subprocess.CalledProcessError):
        children.start_detached(["/no/such/program"], environ=ENVIRON)


def in_a_program(text: str, *, threaded: bool = False) -> str:
    """What a program says that has SIGCHLD ignored from its start, as some supervisors leave it."""
    program = f"""if True:
        import os, signal, sys, threading
        from pathlib import Path
        from ray_envcache.errors import EnvCacheError
        from ray_envcache.system import children
        def work():
            {text}
        if {threaded}:
            thread = threading.Thread(target=work); thread.start(); thread.join()
        else:
            work()
    """
    ignoring = "import os, signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    return subprocess.check_output([sys.executable, "-c", ignoring, "-c", program], text=True)


def test_ignored_sigchld() -> None:
    """A failure is one also where our parent had us ignore SIGCHLD, and children can wait for theirs."""
    inner = "import subprocess; print(subprocess.run(['false']).returncode)"
    text = (
        f"print(children.run(['false'], environ=os.environ).returncode,"
        f" children.run([sys.executable, '-c', {inner!r}], environ=os.environ).stdout.strip(),"
        " signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN)"
    )
    assert in_a_program(text) == "1 1 True\n"


def test_ignored_sigchld_of_a_launcher(tmp_path: Path) -> None:
    """That a detached process could not be started is an error there too."""
    text = """
            try: children.start_detached(["/no/such/program"], environ=os.environ)
            except Exception as error: print(type(error).__name__)
    """
    assert in_a_program(text.strip()) == "CalledProcessError\n"


def test_ignored_sigchld_in_a_thread() -> None:
    """Where only the main thread could mend it, it is an error with the way out, and no success."""
    text = """
            try: children.run(["false"], environ=os.environ)
            except EnvCacheError as error: print(error.hint)
    """
    assert "signal.signal(signal.SIGCHLD, signal.SIG_DFL)" in in_a_program(text.strip(), threaded=True)


def test_status_that_a_handler_took() -> None:
    """A program's own handler that reaps every child makes an error of a status that nobody can know."""
    program = """if True:
        import os, signal
        from ray_envcache.errors import EnvCacheError
        from ray_envcache.system import children
        signal.signal(signal.SIGCHLD, lambda *_: os.waitpid(-1, 0))
        try: print(children.run(["false"], environ=os.environ))
        except EnvCacheError as error: print(error.message)
    """
    said = subprocess.check_output([sys.executable, "-c", program], text=True)
    assert said.startswith("Another part of this program took the exit status of a child: ['false']")


def test_flock_of_a_process_without_streams(tmp_path: Path) -> None:
    """A descriptor with the number of a stream reaches the child under another one, which keeps its flock."""
    program = """if True:
        import os, sys
        from ray_envcache.system import children, flock
        for stream in range(3):
            os.close(stream)
        held = flock.try_flock(sys.argv[1], exclusive=True, flags=os.O_RDWR | os.O_CREAT)
        assert held == 0
        taken = []
        def on_line(line):
            os.close(held)
            taken.append(flock.is_held(sys.argv[1]))
        command = ["sh", "-c", "echo begun >&2; sleep 0.2; exit 3"]
        done = children.run(command, environ=os.environ, pass_fds=[held], on_line=on_line)
        sys.exit(done.returncode + 10 * sum(taken))
    """
    assert subprocess.run([sys.executable, "-c", program, tmp_path / "flock"], check=False).returncode == 13


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks /proc")
def test_detached_has_the_usual_signals(tmp_path: Path) -> None:
    """Nothing that Python, or our parent, ignores or blocks is ignored or blocked in a detached process."""
    report, program = tmp_path / "report", "grep Sig /proc/self/status > $0.part; mv $0.part $0"
    text = """
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            children.start_detached(["/bin/sh", "-c", PROGRAM, REPORT], environ=os.environ)
    """
    in_a_program(text.strip().replace("PROGRAM", repr(program)).replace("REPORT", repr(str(report))))
    support.wait_until(report.exists, "it has told")
    found = dict(line.split() for line in report.read_text().splitlines() if line.startswith(("SigBlk", "SigIgn")))
    # Above 31 are those of the C library.
    assert {name: int(mask, 16) & 0x7FFF_FFFF for name, mask in found.items()} == {"SigBlk:": 0, "SigIgn:": 0}


def test_time_out() -> None:
    """A child that is not done in time is killed with what it started, and the error says how long that was."""
    pids: list[int] = []
    with pytest.raises(TimeoutError, match=r"not done after 0\.5 seconds: \['sh'"):
        sh("sleep 600 & echo $! >&2; wait", on_line=lambda line: pids.append(int(line)), seconds=0.5)
    assert_all_gone(pids)
    assert sh("exit 3", seconds=60).returncode == 3
