"""The plugin in an agent's event loop, without an agent: it never keeps the loop waiting, and loses no lease."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from ray._private.runtime_env.plugin import RuntimeEnvPluginManager
from ray.runtime_env import RuntimeEnv

from ray_envcache.acquire import Store
from ray_envcache.cluster import building
from ray_envcache.errors import BuildError, ChangedError, FieldValueError, InterpreterError, LockfileError
from ray_envcache.field import guard, registration
from ray_envcache.gc.companion import INTERVAL
from ray_envcache.plugin import PREFETCHES, THREADS, EnvCachePlugin, _finish
from ray_envcache.store import journal, leases
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Holder, claim
from ray_envcache.system import flock
from tests import support
from tests.gc.fabricated import change, make_entry, make_layout

pytestmark = pytest.mark.host

URI = "envcache://0"
LOGGER = logging.getLogger("test")


@pytest.fixture
def plugin(store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Iterator[EnvCachePlugin]:
    monkeypatch.setenv(INTERVAL, "off")
    # Set by the plugin for good: its process is the agent's, mostly.
    monkeypatch.setenv("RAY_RUNTIME_ENV_ENVCACHE_CACHE_SIZE_GB", "0")
    monkeypatch.delenv(registration.PLUGINS, raising=False)
    made = EnvCachePlugin()
    yield made
    made._threads.shutdown()
    gc.collect()
    assert "never retrieved" not in caplog.text, "what asyncio says of errors that nobody waited for"


@pytest.fixture
def project(tmp_path: Path, wheels: Path) -> Path:
    return support.make_project(tmp_path / "project", wheels, ["ray"])


@pytest.fixture
def entry(store: Store, project: Path) -> Entry:
    """The environment of the project: ready, finished, and used by nobody."""
    return support.build_finished(store, project)


def create(plugin: EnvCachePlugin, project: Path) -> asyncio.Task[float]:
    context = SimpleNamespace(command_prefix=[], env_vars={})
    return asyncio.create_task(plugin.create(URI, {"envcache": os.fspath(project)}, context, LOGGER))


def test_given_back_and_taken_again(plugin: EnvCachePlugin, store: Store, entry: Entry, project: Path) -> None:
    """A URI that Ray gives back is released by and by, though it is created again in the same moment."""

    async def run() -> None:
        await create(plugin, project)
        plugin.delete_uri(URI, LOGGER)
        await create(plugin, project)
        told = partial(leases.live_leases, store.layout, entry.key)
        await asyncio.to_thread(support.wait_until, lambda: len(told()) == 1, "one lease is left")

    asyncio.run(run())
    plugin.delete_uri(URI, LOGGER)
    support.wait_until(lambda: flock.is_free(entry.in_use), "none is left")
    support.wait_until(lambda: not list(store.layout.leases_of(entry.key).iterdir()), "nobody is told of one")


def prefetch(plugin: EnvCachePlugin, project: Path, *, kept: bool) -> dict[str, str]:
    """Prefetch as an agent does, until the lease is given back if it is not `kept`; returns the worker's variables."""
    env = RuntimeEnv(envcache=guard.prefetch({"path": os.fspath(project)}, "1"))
    plugin.validate(env)
    (uri,) = plugin.get_uris(env)
    variables: dict[str, str] = {}
    context = SimpleNamespace(command_prefix=[], env_vars=variables, py_executable="")

    async def run() -> None:
        try:
            await plugin.create(uri, env, context, LOGGER)
            plugin.modify_context([uri], env, context, LOGGER)
            assert "/v1/entries/" in context.py_executable
        finally:
            plugin.delete_uri(uri, LOGGER)
            if not kept:
                await asyncio.to_thread(support.wait_until, lambda: not plugin._leases, "it is given back")
        if kept:
            # Ray may give it back before its worker starts, and ask again.
            await plugin.create(uri, env, context, LOGGER)

    asyncio.run(run())
    return variables


def test_prefetch(plugin: EnvCachePlugin, store: Store, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is prefetched has all bytecode before a worker starts, and is kept for a while after Ray gave it back."""
    assert prefetch(plugin, project, kept=True)[guard.PROBE_ANSWER] == '{"how": "built", "bytecode": true}'
    (entry,) = store.layout.all_entries()
    assert entry.compiled.exists()
    assert not flock.is_free(entry.in_use)
    for lease in plugin._leases.values():
        lease.release()
    plugin._leases.clear()
    monkeypatch.setattr("ray_envcache.plugin.KEPT_SECONDS", 0.1)
    assert prefetch(plugin, project, kept=False)[guard.PROBE_ANSWER] == '{"how": "found", "bytecode": true}'
    support.wait_until(lambda: flock.is_free(entry.in_use), "it is released")


def test_bytecode_of_layers(store: Store, tmp_path: Path) -> None:
    """A layer has all of its bytecode where the environment below has it too, which may lie in a read-only store."""
    far = make_entry(make_layout(tmp_path / "far"), 1)
    layer = make_entry(store.layout, 2)
    change(layer, base=os.fspath(far.path))
    layer.compiled.touch()
    for is_complete in (False, True):
        lease = claim(layer, store.layout, Holder("test"))
        assert lease is not None
        with lease:
            assert [one.path for one in lease.entries] == [layer.path, far.path]
            assert json.loads(_finish(lease)) == {"how": "found", "bytecode": is_complete}
        far.compiled.touch()


def test_prefetch_whose_bytecode_fails(
    plugin: EnvCachePlugin, entry: Entry, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an error with its cause; the environment is there, and kept no longer than others."""
    monkeypatch.setattr("ray_envcache.plugin.KEPT_SECONDS", 0.1)
    monkeypatch.setattr(Store, "finish", lambda *_: None)
    entry.compiled.unlink()
    entry.finishing_flock.unlink()
    entry.finishing_flock.mkdir()
    with pytest.raises(BuildError, match=r"The bytecode of .* could not be compiled"):
        prefetch(plugin, project, kept=False)
    support.wait_until(lambda: flock.is_free(entry.in_use), "it is released")


def test_prefetch_that_ray_gives_up(
    plugin: EnvCachePlugin, entry: Entry, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on compiling, and tasks of the node are set up meanwhile, however often Ray asks again."""
    monkeypatch.setattr(Store, "finish", lambda *_: None)
    entry.compiled.unlink()
    held = flock.try_flock(entry.finishing_flock, exclusive=True, flags=os.O_RDWR | os.O_CREAT)
    assert held is not None

    async def run() -> None:
        for nonce in range(THREADS + PREFETCHES):
            env = {"envcache": guard.prefetch({"path": os.fspath(project)}, str(nonce))}
            context = SimpleNamespace(command_prefix=[], env_vars={})
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(plugin.create(f"envcache://prefetch-{nonce}", env, context, LOGGER), 0.3)
        await asyncio.wait_for(create(plugin, project), 10)

    try:
        asyncio.run(run())
    finally:
        os.close(held)
    support.wait_until(entry.compiled.exists, "it is compiled")
    plugin.delete_uri(URI, LOGGER)
    for lease in plugin._leases.values():
        lease.release()


def test_lease_that_cannot_be_listed(
    plugin: EnvCachePlugin,
    entry: Entry,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It holds all the same, the set-up goes on, and the log says why `list` does not show it."""

    def fail(_path: Path) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(leases, "_own_file", fail)

    async def run() -> None:
        await create(plugin, project)
        said = "`list` cannot show it: [Errno 5]"
        await asyncio.to_thread(support.wait_until, lambda: said in caplog.text, "the log says so")

    asyncio.run(run())
    assert not flock.is_free(entry.in_use)
    plugin.delete_uri(URI, LOGGER)
    support.wait_until(lambda: flock.is_free(entry.in_use), "none is left")


def test_node_without_a_thread_left(
    plugin: EnvCachePlugin, entry: Entry, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there is handed out all the same."""
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(plugin, "_threads", ThreadPoolExecutor(2))
    monkeypatch.setattr(threading.Thread, "start", start)

    async def run() -> None:
        await create(plugin, project)

    asyncio.run(run())
    assert not flock.is_free(entry.in_use)
    plugin.delete_uri(URI, LOGGER)
    support.wait_until(lambda: flock.is_free(entry.in_use), "it is given back")


def test_slow_disk(plugin: EnvCachePlugin, store: Store, entry: Entry, project: Path) -> None:
    """A disk that does not answer keeps the set-up waiting, not the loop; cancelled, it gives back what it gets later."""
    (memo,) = store.layout.memo.iterdir()
    text = memo.read_bytes()
    memo.unlink()
    # Whoever opens it to read waits for somebody who writes.
    os.mkfifo(memo)
    os.utime(entry.in_use, (0, 0))

    async def run() -> None:
        creating = create(plugin, project)
        await asyncio.sleep(0.1)
        assert not creating.done()
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating

    asyncio.run(run())
    assert entry.in_use.stat().st_mtime == 0
    memo.write_bytes(text)
    support.wait_until(lambda: entry.in_use.stat().st_mtime > 0, "the lease was taken")
    support.wait_until(lambda: flock.is_free(entry.in_use), "it was given back")
    assert plugin._leases == {}


@pytest.mark.parametrize("deaf", [False, True])
def test_cancelled_build(
    plugin: EnvCachePlugin, store: Store, tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch, *, deaf: bool
) -> None:
    """Who cancels a build waits until nothing is left of it, and the loop goes on meanwhile; who is deaf is killed."""
    note = tmp_path / "note"
    code = f"pathlib.Path({str(note)!r}).write_text(str(__import__('os').getppid())); time.sleep(600)"
    support.make_sdist(wheels, "stuck", code=code)
    project = support.make_project(tmp_path / "project", wheels, ["ray", "stuck"])
    if deaf:
        monkeypatch.setattr(building, "GRACE_SECONDS", 0.1)
        monkeypatch.setattr(subprocess.Popen, "terminate", lambda _child: None)

    async def run() -> None:
        creating = create(plugin, project)
        await asyncio.to_thread(support.wait_until, lambda: note.exists() and note.read_text() != "", "it is building")
        creating.cancel()
        with pytest.raises(asyncio.CancelledError):
            await creating

    asyncio.run(run())
    assert psutil.Process().children(recursive=True) == []
    support.wait_until(lambda: support.is_gone(int(note.read_text())), "uv is gone")
    assert journal.read(store.layout).events == []
    if not deaf:
        assert list(store.layout.entries.iterdir()) == list(store.layout.trash.iterdir()) == []
        assert not any(map(flock.is_held, store.layout.flocks.iterdir()))
    # What uv had started holds the flock too, until the kernel has ended it: a moment after the SIGKILL of all.
    support.wait_until(lambda: not any(map(flock.is_held, store.layout.flocks.iterdir())), "no flock is held", 60)


def test_build_process_that_dies(plugin: EnvCachePlugin, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an answer there is an error with what it said last, and one where it cannot be started at all."""

    async def run() -> None:
        await create(plugin, project)

    monkeypatch.setitem(plugin._environ, "PYTHONHOME", "/nowhere")
    with pytest.raises(BuildError, match=r"(?s)ended without an answer.*encodings"):
        asyncio.run(run())
    plugin._failures.clear()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(BuildError, match=r"Cannot start a process that builds: .*/nowhere/python"):
        asyncio.run(run())


def test_build_process_that_is_killed(plugin: EnvCachePlugin, store: Store, tmp_path: Path, wheels: Path) -> None:
    """The kernel may kill it for its memory: it cannot note any more that the set-up failed, so the agent does."""
    note = tmp_path / "note"
    support.make_sdist(wheels, "stuck", code=f"pathlib.Path({str(note)!r}).touch(); time.sleep(600)")
    project = support.make_project(tmp_path / "project", wheels, ["ray", "stuck"])

    async def run() -> None:
        creating = create(plugin, project)
        await asyncio.to_thread(support.wait_until, note.exists, "it is building")
        for process in psutil.Process().children(recursive=True):
            process.kill()
        with pytest.raises(BuildError, match="ended without an answer"):
            await creating

    asyncio.run(run())
    (setup,) = journal.read(store.layout).events
    assert setup.name == "setup"
    told = {name: setup.fields.get(name) for name in ("result", "error", "path", "kind")}
    assert told == {"result": "failed", "error": "BuildError", "path": os.fspath(project), "kind": "build"}


def test_another_python_by_now(
    plugin: EnvCachePlugin, store: Store, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the node's Python was replaced since it was started, nothing is built: workers would have the wrong one."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.version = '3.99.0 (new)\\n[GCC]'\nprint('no end', end='')\n"
    )
    monkeypatch.setitem(plugin._environ, "PYTHONPATH", str(tmp_path))
    with pytest.raises(InterpreterError, match=r"is Python 3\.99\.0, and was 3\.") as caught:
        build(plugin, project)
    assert caught.value.hint.startswith("restart the node")
    assert list(store.layout.all_entries()) == []


def build(plugin: EnvCachePlugin, project: Path) -> None:
    """Set up what is not built yet, and give it back."""

    async def run() -> None:
        await create(plugin, project)

    asyncio.run(run())
    plugin.delete_uri(URI, LOGGER)


def test_build_imports_nothing_from_where_the_agent_was_started(
    plugin: EnvCachePlugin, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node is started anywhere, also where others may write: what lies there is no code of ours."""
    folder = tmp_path / "anywhere"
    (folder / "ray_envcache").mkdir(parents=True)
    for name in ("signal.py", "ray_envcache/__init__.py"):
        (folder / name).write_text("raise SystemExit('imported from where we were started')\n")
    monkeypatch.chdir(folder)
    build(plugin, project)


def test_talkative_build(
    plugin: EnvCachePlugin,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """More on stderr than a pipe holds, and lines of others that end nowhere, hold up no build; all are logged."""
    code = """\
        import sys
        print('hello\\n[1]\\n  {"error": "of uv"}\\n{', flush=True)
        sys.stderr.write('x' * 1_000_000 + '\\nno end')
        """
    (tmp_path / "sitecustomize.py").write_text(textwrap.dedent(code))
    monkeypatch.setitem(plugin._environ, "PYTHONPATH", str(tmp_path))
    with caplog.at_level("INFO"):
        build(plugin, project)
    assert {"hello", "[1]", '  {"error": "of uv"}', "{", "x" * 1_000_000} <= {*caplog.messages}
    assert [text[:8] for text in caplog.messages if text.startswith(("no end", "Built"))] == ["no endBu", "Built in"]


def test_build_with_letters_that_the_locale_lacks(
    plugin: EnvCachePlugin,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They are no reason for a build to fail, and the log has them."""
    monkeypatch.setenv("RAY_ENVCACHE_DIR", str(tmp_path / "störe"))
    monkeypatch.setitem(plugin._environ, "PYTHONIOENCODING", "ascii")
    with caplog.at_level("INFO"):
        build(plugin, project)
    assert any(text.startswith("Built") and "/störe/" in text for text in caplog.messages)


def test_build_gets_the_variables_of_the_node(
    plugin: EnvCachePlugin,
    project: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What Ray sets in the agent for a moment, for the set-up of another working_dir, reaches no build."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nprint('found:', os.environ.get('NODE'), os.environ.get('DIR'))\n"
    )
    monkeypatch.setitem(plugin._environ, "PYTHONPATH", str(tmp_path))
    monkeypatch.setitem(plugin._environ, "NODE", "here")
    monkeypatch.setenv("DIR", "/another")
    with caplog.at_level("INFO"):
        build(plugin, project)
    assert "found: here None" in caplog.messages


def test_passing_error(plugin: EnvCachePlugin, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that says "try again" is tried again when Ray asks the next time."""
    said = tmp_path / "said"
    python = tmp_path / "python"
    answer = json.dumps({"error": ChangedError("The files changed", "try again").to_json()})
    python.write_text(f"#!/bin/sh\n[ -e {said} ] && exec {sys.executable} \"$@\"\ntouch {said}\necho '{answer}'\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(ChangedError, match="The files changed"):
        build(plugin, project)
    build(plugin, project)


def test_permanent_error(plugin: EnvCachePlugin, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that Ray's next attempts would meet again is repeated at once, and forgotten a while later."""
    monkeypatch.setattr("ray_envcache.plugin.FAILURE_SECONDS", 0.5)
    lockfile, away = project.with_name("uv.lock"), project.with_name("away")
    lockfile.rename(away)

    async def run() -> None:
        with pytest.raises(LockfileError) as first:
            await create(plugin, project)
        away.rename(lockfile)
        with pytest.raises(LockfileError) as second:
            await create(plugin, project)
        assert str(first.value) == str(second.value)
        await asyncio.sleep(0.6)
        await create(plugin, project)

    asyncio.run(run())
    plugin.delete_uri(URI, LOGGER)


def test_nothing_grows(plugin: EnvCachePlugin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a URI that fails, of which Ray never says that it is gone, nothing stays with the plugin."""
    monkeypatch.setattr("ray_envcache.plugin.FAILURE_SECONDS", 0.1)

    async def run() -> None:
        context = SimpleNamespace(command_prefix=[], env_vars={})
        for number in range(20):
            with pytest.raises(LockfileError):
                await plugin.create(f"envcache://{number}", {"envcache": f"/nowhere/{number}"}, context, LOGGER)
        await asyncio.sleep(0.2)

    asyncio.run(run())
    gc.collect()  # the tracebacks of the errors
    assert not plugin._failures
    assert not plugin._creating
    assert not plugin._leases


def test_task_that_leaves_the_environment_of_its_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """`{"envcache": None}` with anything beside it: the guard that it inherits from its job fails nothing here."""
    monkeypatch.setenv(registration.PLUGINS, registration.exports({})[registration.PLUGINS])
    monkeypatch.setenv(INTERVAL, "off")
    monkeypatch.setenv("RAY_RUNTIME_ENV_ENVCACHE_CACHE_SIZE_GB", "0")
    inherited = guard.guarded({"envcache": {"path": "/p"}})
    env = RuntimeEnv(**{**inherited, "envcache": None, "env_vars": {"A": "1"}})
    # As the agent does before it asks any plugin to create something: ours is the first of its plugins.
    (first,) = RuntimeEnvPluginManager().plugins.values()
    assert first.class_instance.get_uris(env) == []
    assert dict(env) == {"envcache": None, "env_vars": {"A": "1"}}
    first.class_instance._threads.shutdown()


def test_py_executable(plugin: EnvCachePlugin) -> None:
    """A node accepts what Ray sets for a driver under a plain `uv run`, and refuses what a task asks for itself."""
    env = {"envcache": "/p/pyproject.toml"}
    plugin.validate({**env, "py_executable": "uv run --python 3.12.1 python"})
    with pytest.raises(FieldValueError, match="`py_executable` beside `envcache`"):
        plugin.validate({**env, "py_executable": "uv run --with emoji"})


def test_home_directory(plugin: EnvCachePlugin, entry: Entry, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path below `~` is one of the node's own, no path in the working_dir."""
    monkeypatch.setenv("HOME", os.fspath(project.parent))
    asyncio.run(plugin.create(URI, {"envcache": f"~/{project.name}"}, SimpleNamespace(command_prefix=[]), LOGGER))
    assert plugin._leases[URI].entry == entry
    plugin.delete_uri(URI, LOGGER)
