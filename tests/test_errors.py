"""The errors: they travel between processes without losing anything."""

from __future__ import annotations

import json
import pickle

import pytest

from ray_envcache import errors
from ray_envcache.errors import EnvCacheError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EnvCacheError)]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)


@every_kind
def test_pickle(kind: type[EnvCacheError]) -> None:
    """Every error survives pickling with its type, message and hint."""
    back = pickle.loads(pickle.dumps(kind("what happened", "what to do")))
    assert (type(back), back.message, back.hint) == (kind, "what happened", "what to do")


@every_kind
def test_json(kind: type[EnvCacheError]) -> None:
    """Every error survives the way through JSON with its type, message and hint."""
    back = EnvCacheError.from_json(json.loads(json.dumps(kind("line one\nline two", "häng").to_json())))
    assert (type(back), back.message, back.hint) == (kind, "line one\nline two", "häng")


@every_kind
def test_passing(kind: type[EnvCacheError]) -> None:
    """Whether another try may succeed survives the way through JSON; it may after changes, races and full disks."""
    assert EnvCacheError.from_json(kind("what happened").to_json()).passing is kind.passing
    others = {errors.ChangedError, errors.DiskFullError, errors.BusyError}
    assert kind.passing is (kind in others or issubclass(kind, errors.PassingError))


@every_kind
def test_text(kind: type[EnvCacheError]) -> None:
    """The text of an error is its message, and its hint on a line of its own."""
    assert str(kind("what happened", "what to do")) == "what happened\nhint: what to do"
    assert str(kind("what happened")) == "what happened"


@every_kind
def test_exit_code(kind: type[EnvCacheError]) -> None:
    """An error exits with 1 (failed), 2 (usage), 3 (store unusable) or 127 (no command); each class says when it is raised."""
    assert kind.exit_code in {1, 2, 3, 127}
    assert kind.__doc__


@pytest.mark.parametrize("name", ["NoSuchError", "OSError", "", None])
def test_unknown_type(name: str | None) -> None:
    """An error of a type this version does not know becomes a plain EnvCacheError with its message."""
    back = EnvCacheError.from_json({"type": name, "message": "what happened"})
    assert (type(back), str(back)) == (EnvCacheError, "what happened")


def test_builtin_bases() -> None:
    """Callers may catch the built-in kin: ValueError for a bad field value, LookupError for an unknown key."""
    assert issubclass(errors.FieldValueError, ValueError)
    assert issubclass(errors.UnknownKeyError, LookupError)
