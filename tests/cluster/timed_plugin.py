"""Loaded by agents in the plugin's place: the same plugin, but it notes how long each step keeps the agent's event loop.

The longest ones go, as JSON, to the file that ENVCACHE_TEST_STEPS names: seconds on the wall, and how many of them are
ours, since on a loaded machine every step waits for a processor, which the kernel counts (proc(5), schedstat). Beside
them are the URIs that Ray refers to: those that it had created, and did not give back.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Coroutine, Generator
from functools import partial
from typing import Any

from ray_envcache.plugin import EnvCachePlugin

_longest: dict[str, dict[str, float]] = {}
_referenced: set[str] = set()


def timed(name: str, step: Callable[[], Any]) -> Any:
    """Do one step, and note how long it took."""
    queued, began = _queued(), time.perf_counter()
    try:
        return step()
    finally:
        wall = time.perf_counter() - began
        _note(name, wall, wall - (_queued() - queued))


def _queued() -> float:
    """For how many seconds this thread was ready to run, and others had the processors."""
    with open("/proc/thread-self/schedstat", encoding="ascii") as file:
        return int(file.read().split()[1]) / 1e9


def _note(name: str, wall: float, ours: float) -> None:
    known = _longest.setdefault(name, {"count": 0, "wall": 0.0, "ours": 0.0})
    known["count"] += 1
    if wall > known["wall"] or ours > known["ours"]:
        known |= {"wall": max(wall, known["wall"]), "ours": max(ours, known["ours"])}
        _write()


def _write() -> None:
    file = os.environ["ENVCACHE_TEST_STEPS"]
    with open(f"{file}.new", "w", encoding="ascii") as new:
        json.dump({"steps": _longest, "referenced": sorted(_referenced)}, new)
    os.replace(f"{file}.new", file)


class _Stepwise:
    """A coroutine that notes how long it runs each time before it waits for something."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, Any]:
        name, step = "create, first step", partial(self._coroutine.send, None)
        while True:
            try:
                awaited = timed(name, step)
            except StopIteration as stop:
                return stop.value
            try:
                value = yield awaited
            except BaseException as error:  # noqa: BLE001  # passed on, cancellation above all
                step = partial(self._coroutine.throw, error)
            else:
                step = partial(self._coroutine.send, value)
            name = "create, later steps"


class TimedPlugin(EnvCachePlugin):
    """The plugin, timed."""

    @staticmethod
    def validate(runtime_env_dict: dict[str, Any]) -> None:
        timed("validate", lambda: EnvCachePlugin.validate(runtime_env_dict))

    def get_uris(self, runtime_env: Any) -> list[str]:
        found: list[str] = timed("get_uris", lambda: EnvCachePlugin.get_uris(self, runtime_env))
        return found

    async def create(self, uri: str | None, runtime_env: Any, context: Any, logger: Any) -> float:
        size: float = await _Stepwise(super().create(uri, runtime_env, context, logger))
        if uri is not None:
            _referenced.add(uri)
        _write()
        return size

    def modify_context(self, uris: list[str], runtime_env: Any, context: Any, logger: Any) -> None:
        timed("modify_context", lambda: EnvCachePlugin.modify_context(self, uris, runtime_env, context, logger))

    def delete_uri(self, uri: str, logger: Any) -> float:
        size: float = timed("delete_uri", lambda: EnvCachePlugin.delete_uri(self, uri, logger))
        _referenced.discard(uri)
        _write()
        return size
