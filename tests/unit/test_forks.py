"""Work shared among forks: all of it is done, whatever becomes of them."""

from __future__ import annotations

import textwrap

import pytest

from tests import support

# In a process of one thread, as it is made for.
PROGRAM = """
import errno, os, signal, sys
import psutil
from ray_envcache._forks import shared

parent = os.getpid()

def children():
    return psutil.Process().children()

def twice(part):
    if os.getpid() != parent:
        in_a_fork()
    return [(number * 2, os.getpid()) for number in part]

def in_a_fork():
    pass

def check(count, most, processes):
    found = shared(twice, range(count), most)
    assert [number for number, _ in found] == [number * 2 for number in range(count)]
    assert len({pid for _, pid in found}) == processes, found
    assert children() == []
"""


def run(body: str) -> None:
    support.run_python(PROGRAM + textwrap.dedent(body))


def test_parts() -> None:
    """In order, by no more processes than are wanted, nor than it is worth."""
    run("""
    for count, most, processes in [(0, 4, 0), (1, 4, 1), (399, 4, 1), (400, 4, 2), (1001, 4, 4), (1001, 64, 5), (999, 1, 1)]:
        check(count, most, processes)
    """)


@pytest.mark.parametrize(
    "end", ["os.kill(os.getpid(), signal.SIGKILL)", "raise ValueError", "raise KeyboardInterrupt", "sys.exit(0)"]
)
def test_fork_that_fails(end: str) -> None:
    """Its part is done by the one who waits for it."""
    run(f"""
    def in_a_fork():
        {end}

    check(1000, 3, 1)
    """)


def test_no_processes_left() -> None:
    """Where none can be started, nobody is waited for."""
    run("""
    def fork():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    os.fork = fork
    check(1000, 3, 1)
    """)


def test_more_than_a_pipe_holds() -> None:
    """Forks may find more than a pipe takes at once, and are not waited for in vain."""
    run("""
    def long(part):
        return [str(number) * 1000 for number in part]

    assert shared(long, range(1000), 4) == long(range(1000))
    """)


@pytest.mark.parametrize("where", ["parent", "everywhere"])
def test_error(where: str) -> None:
    """An error is that of the work, and leaves no process behind."""
    run(f"""
    def fails(part):
        if os.getpid() == parent or "{where}" == "everywhere":
            raise LookupError("as without forks")
        signal.pause()

    try:
        shared(fails, range(1000), 3)
    except LookupError as error:
        assert str(error) == "as without forks"
    else:
        raise AssertionError
    assert children() == []
    """)
