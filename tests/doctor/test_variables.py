"""What `doctor` says of environment variables."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ray_envcache.doctor.host import SETTINGS, registered, settings
from ray_envcache.field import registration

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("variable", "value", "state", "text"),
    [
        ("RAY_ENVCACHE_DIRS", "/somewhere", "warn", "the settings are RAY_ENVCACHE_DIR, "),
        ("RAY_ENVCACHE_UNUSED_FOR", "soon", "error", "RAY_ENVCACHE_UNUSED_FOR: Not a duration: `soon`"),
        ("RAY_ENVCACHE_MIN_FREE_SPACE", "110%", "error", "RAY_ENVCACHE_MIN_FREE_SPACE: Not a share of the disk"),
        ("RAY_ENVCACHE_GC_INTERVAL", "often", "error", "RAY_ENVCACHE_GC_INTERVAL: Not a duration: `often`"),
        ("RAY_ENVCACHE_ALLOW_NETWORK_FS", "yes", "error", "RAY_ENVCACHE_ALLOW_NETWORK_FS: Neither 0 nor 1"),
    ],
)
def test_bad_setting(variable: str, value: str, state: str, text: str) -> None:
    """A setting that does not exist is a warning that names those there are; a value that does not parse is an error."""
    (found,) = settings({"RAY_ENVCACHE_MAX_USED_SPACE": "off", variable: value})
    assert found.state == state
    assert variable in found.text
    assert text in f"{found.text} {found.hint}"


def test_good_settings() -> None:
    """Those that are set are named; what we set ourselves is not one of them."""
    (found,) = settings({"RAY_ENVCACHE_UNUSED_FOR": "off", **registration.exports({})})
    assert (found.state, found.text) == ("ok", "RAY_ENVCACHE_UNUSED_FOR=off")
    (found,) = settings({"PATH": "/bin"})
    assert (found.state, found.text) == ("ok", "the defaults")


def test_settings_are_those_of_the_readme() -> None:
    """What the README documents, and nothing else, is a setting."""
    assert set(SETTINGS) == set(re.findall(r"^\| `(RAY_ENVCACHE_[A-Z_]+)` \|", README, re.MULTILINE))


def test_registration() -> None:
    """With the exports all is well, beside other plugins too; without them nodes of `ray start` are not."""
    mine = {registration.PLUGINS: '[{"class": "json.Plugin"}]'}
    assert registered(registration.exports({})).state == "ok"
    assert registered(registration.exports(mine)).state == "ok"
    for lacking in ({}, mine):
        found = registered(lacking)
        assert (found.state, found.hint) == ("warn", 'eval "$(ray-envcache env)" before ray start')
    assert registered({registration.PLUGINS: "x"}).state == "error"
