"""What a Python is, asked of real ones."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from pathlib import Path

import packaging.markers
import packaging.tags
import pytest

from ray_envcache.errors import InterpreterError
from ray_envcache.resolve import interpreter
from ray_envcache.resolve.interpreter import ClusterRay, Interpreter
from ray_envcache.system import children
from tests import support

RUNNING = ".".join(map(str, sys.version_info[:3]))
BASE = interpreter.base_executable(None)


def program(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o755)
    return os.fspath(path)


def test_base_of_the_running_one() -> None:
    """Without a wish it is the running one's base: a real file, in no virtual environment."""
    assert os.path.realpath(BASE) == BASE
    code = "import json, sys; print(json.dumps([sys.prefix == sys.base_prefix, sys.version]))"
    assert json.loads(support.run_python(code, python=BASE)) == [True, sys.version]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_version_that_fits(length: int) -> None:
    """A version, however short, that the running Python has is no other wish."""
    assert interpreter.base_executable(".".join(RUNNING.split(".")[:length])) == BASE


@pytest.mark.parametrize("version", ["3.1", "3.99", "3.1.1", RUNNING + "0", RUNNING.rpartition(".")[0] + ".99"])
def test_version_that_does_not_fit(version: str) -> None:
    """Another version is refused at once with both versions named; 3.1 is not the beginning of 3.11."""
    with pytest.raises(InterpreterError, match=rf"Python {version}, the cluster runs {RUNNING}"):
        interpreter.base_executable(version)


def test_path_that_is_no_executable(tmp_path: Path) -> None:
    """A path where there is no file, a folder, or a file nobody may run is refused."""
    (tmp_path / "text").write_text("x")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "text"):
        with pytest.raises(InterpreterError, match="No executable"):
            interpreter.base_executable(str(path))


def test_running_one_that_was_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent may outlive the Python that it runs from: that one is named, not the store."""
    monkeypatch.setattr(sys, "_base_executable", f"{tmp_path}/python")
    with pytest.raises(InterpreterError, match=f"No executable at `{tmp_path}/python`"):
        interpreter.base_executable(None)


def test_links_are_resolved(tmp_path: Path) -> None:
    """One interpreter reached by two paths is one interpreter."""
    (tmp_path / "python").symlink_to(BASE)
    assert interpreter.base_executable(str(tmp_path / "python")) == BASE


def test_probe() -> None:
    """It is what packaging says inside that Python."""
    found = interpreter.probe(BASE)
    assert (found.executable, found.implementation, found.version) == (
        BASE,
        sys.implementation.name,
        platform.python_version(),
    )
    assert found.build == sys.version
    assert found.tags == tuple(map(str, packaging.tags.sys_tags()))
    assert found.markers == packaging.markers.default_environment()


def test_probe_is_not_led_astray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PYTHONPATH and its kin, and a folder full of traps, change nothing."""
    for trap in ("json", "platform", "sysconfig", "packaging", "sitecustomize"):
        (tmp_path / f"{trap}.py").write_text("raise SystemExit('trapped')")
    before = interpreter.probe(BASE)
    monkeypatch.chdir(tmp_path)
    for name in ("PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"):
        monkeypatch.setenv(name, str(tmp_path))
    assert interpreter.probe.__wrapped__(BASE) == before


@pytest.mark.parametrize(
    "text",
    [
        "#!/bin/sh\nexit 3",
        "#!/bin/sh\necho broken library >&2; exit 127",
        "#!/bin/sh\necho Python",
        "#!/bin/sh\necho []",
        "#!/bin/sh\necho {}",
        "#!/bin/sh\n",
        "#!/no/such/interpreter\n",
        "\x7fELF of another machine",
        "#!/bin/sh\nkill -9 $$",
    ],
)
def test_probe_of_what_is_no_python(tmp_path: Path, text: str) -> None:
    """What does not start, dies or prints something else is an InterpreterError that names the path."""
    path = program(tmp_path / "python", text)
    with pytest.raises(InterpreterError, match="does not start") as caught:
        interpreter.probe(path)
    assert path in caught.value.message


@pytest.mark.parametrize("suffix", ["+", "rc1"])
def test_python_from_a_checkout_or_before_a_release(tmp_path: Path, suffix: str) -> None:
    """Its version is that of the release, as uv and pip compare it."""
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport platform, runpy, sys\nplatform.python_version = lambda: {RUNNING + suffix!r}\n"
        "sys.argv = sys.argv[3:]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    program.chmod(0o755)
    found = interpreter.probe(str(program))
    assert (found.version, found.markers["python_full_version"]) == (RUNNING, RUNNING)


def test_probe_quotes_the_reason(tmp_path: Path) -> None:
    """What a broken Python says for itself is in the message."""
    with pytest.raises(InterpreterError, match="libpython is missing"):
        interpreter.probe(program(tmp_path / "python", "#!/bin/sh\necho libpython is missing >&2; exit 127"))


def _claiming(path: Path, version: str) -> str:
    data = {**interpreter.probe(BASE)._asdict(), "executable": str(path), "version": version}
    return program(path, f"#!/bin/sh\necho {shlex.quote(json.dumps(data))}")


def test_another_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python of another patch version is refused, unless Ray is told to compare minor versions only."""
    path = _claiming(tmp_path / "python", RUNNING.rpartition(".")[0] + ".99")
    with pytest.raises(InterpreterError, match=f"cluster runs {RUNNING}"):
        ClusterRay("").require_fit(interpreter.probe(path))
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    ClusterRay("").require_fit(interpreter.probe(path))


def test_another_minor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python of another minor version is never taken."""
    monkeypatch.setenv("RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL", "minor")
    with pytest.raises(InterpreterError, match="same Python version"):
        ClusterRay("").require_fit(interpreter.probe(_claiming(tmp_path / "python", "3.2.1")))


def test_identity() -> None:
    """The identity is small, JSON, and leaves out what every update of the kernel changes."""
    one = Interpreter(
        BASE, "cpython", RUNNING, sys.version, "abi", ("a-b-c",) * 900, {"platform_release": "6", "os_name": "posix"}
    )
    assert one.identity()["markers"] == {"os_name": "posix"}
    assert len(json.dumps(one.identity())) < 1000
    assert one.identity() != one._replace(tags=("a-b-d",)).identity()


def test_fingerprint(tmp_path: Path) -> None:
    """The fingerprint of an executable changes when the file does, and is the same otherwise."""
    path = program(tmp_path / "python", "#!/bin/sh\n")
    before = interpreter.fingerprint(path)
    assert json.loads(json.dumps(interpreter.fingerprint(path))) == before
    os.utime(path, ns=(1, 1))
    assert interpreter.fingerprint(path) != before


def test_clean_environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would turn one Python into another is left out, everything else stays."""
    for name in ("PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV", "UNRELATED"):
        monkeypatch.setenv(name, "x")
    found = children.clean_environ()
    assert not {"PYTHONHOME", "PYTHONPATH", "VIRTUAL_ENV"} & found.keys()
    assert (found["UNRELATED"], os.environ["PYTHONPATH"]) == ("x", "x")
