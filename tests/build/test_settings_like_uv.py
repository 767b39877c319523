"""For each setting of uv's reference: what it makes of an environment is what `uv sync --frozen --no-editable` makes.

Or it is ignored or refused, and the list in which it stands says why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import uv as uv_package

from ray_envcache.acquire import Store
from ray_envcache.errors import BuildError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.leases import Holder
from tests import index, support
from tests.build.test_like_uv import contents, of_uv

pytestmark = pytest.mark.host

SYNC = ["sync", "-q", "--frozen", "--no-editable", "--no-dev", f"--python={sys.executable}"]

# Each changes what the project below has.
DECIDES: dict[str, Any] = {
    "no-binary-package": ["both"],
    "config-settings": {"a": "b"},
    "config-settings-package": {"source": {"c": "d"}},
    "extra-build-dependencies": {"source": ["one"]},
    "extra-build-variables": {"source": {"FLAVOUR": "sweet"}},
    "override-dependencies": ["one==1.0"],
    "constraint-dependencies": ["one<2"],
    "exclude-dependencies": ["three"],
    "dependency-metadata": [{"name": "source", "version": "1.0", "requires-dist": ["three==1.0"]}],
    "resolution": "lowest-direct",
    "prerelease": "allow",
    "prerelease-package": {"one": "allow"},
    "default-groups": ["more"],
    "sources": {"two": {"path": "../elsewhere/two-1.0-py3-none-any.whl"}},
}
# Each may change something, or may not, so it is shown by itself.
MAY_DECIDE: dict[str, Any] = {
    "no-build-package": ["both"],
    "no-build-isolation-package": ["source"],
    "build-constraint-dependencies": ["one<2"],
    "exclude-newer": "2030-01-01T00:00:00Z",
    "exclude-newer-package": {"one": "2030-01-01T00:00:00Z"},
    "environments": ["sys_platform == 'linux'"],
    "required-environments": ["sys_platform == 'linux'"],
    "dependency-groups": {"more": {"requires-python": ">=3.10"}},
    "conflicts": [[{"group": "more"}, {"extra": "x"}]],
    "no-sources": True,
    "no-sources-package": ["two"],
    "package": False,
    "preview": True,
    "fork-strategy": "fewest",
    "minimum-libc-version": {"glibc": "2.17"},
}
# uv refuses the project because of them, and so do we, with its words.
REFUSED: dict[str, tuple[Any, str]] = {
    "no-build": (True, "marked as `--no-build`"),
    "no-build-package": (["source"], "marked as `--no-build`"),
    "no-binary": (True, "marked as `--no-binary`"),
    "no-binary-package": (["two"], "marked as `--no-binary`"),
}
# They say how, from where or how fast, for other commands, or what uv itself has done when it locked: all at once.
SAME: dict[str, Any] = {
    "system-certs": True, "no-cache": False, "preview-features": ["pylock"],
    "python-preference": "system", "python-downloads": "never", "concurrent-downloads": 2, "concurrent-builds": 1,
    "concurrent-installs": 1, "index-strategy": "unsafe-best-match", "keyring-provider": "disabled",
    "http-proxy": "http://127.0.0.1:1", "https-proxy": "http://127.0.0.1:1", "no-proxy": ["127.0.0.1"],
    "allow-insecure-host": ["127.0.0.1"], "link-mode": "copy", "compile-bytecode": True,
    "upgrade": True, "upgrade-package": ["one"], "reinstall": True, "reinstall-package": ["one"], "no-build": False, "no-binary": False,
    "python-install-mirror": "https://x.invalid", "pypy-install-mirror": "https://x.invalid",
    "graalpy-install-mirror": "https://x.invalid", "pyodide-install-mirror": "https://x.invalid",
    "python-downloads-json-url": "https://x.invalid", "publish-url": "https://x.invalid", "check-url": "https://x.invalid",
    "trusted-publishing": "never", "add-bounds": "exact", "cache-keys": [{"file": "pyproject.toml"}], "managed": True,
    "offline": True, "require-build-hashes": False, "required-version": ">=0.9",
    "extra-index-url": ["https://x.invalid"],
}  # fmt: skip
ELSEWHERE = {
    # tests/resolve/test_settings.py: where indexes are; tests/build/test_like_uv.py: workspaces.
    "find-links", "index", "index-url", "no-index", "workspace",
    # uv builds all into an empty environment, where few builds succeed; here what needs no build is there by then.
    "no-build-isolation",
    # uv takes it for `native-tls` under another name; the cache is chosen by the place of the store.
    "native-tls", "cache-dir",
    # For `uv pip`, `uv audit` and `uv build` alone; `dev-dependencies` are the group `dev` under its old name.
    "audit", "build-backend", "dev-dependencies", "pip", "torch-backend",
}  # fmt: skip
PIP: dict[str, Any] = {
    "system": True, "break-system-packages": True, "target": "vendor", "prefix": "vendor",
    "index-url": "https://x.invalid", "extra-index-url": ["https://x.invalid"], "no-index": True,
    "find-links": ["nowhere"], "index-strategy": "unsafe-best-match", "keyring-provider": "disabled",
    "no-build": True, "no-binary": ["both"], "only-binary": ["source"], "no-build-isolation": True,
    "require-build-hashes": False, "no-build-isolation-package": ["source"],
    "extra-build-dependencies": {"source": ["nowhere"]}, "extra-build-variables": {"source": {"FLAVOUR": "sour"}},
    "strict": True, "extra": ["nowhere"], "no-extra": ["x"], "no-deps": True, "group": ["nowhere"],
    "allow-empty-requirements": True, "resolution": "lowest", "prerelease": "allow", "fork-strategy": "fewest",
    "dependency-metadata": [{"name": "one", "requires-dist": ["nowhere"]}], "output-file": "x.txt",
    "no-strip-extras": True, "no-strip-markers": True, "no-annotate": True, "no-header": True,
    "custom-compile-command": "x", "generate-hashes": True, "config-settings": {"a": "pip"},
    "config-settings-package": {"source": {"a": "pip"}}, "python-version": "3.10", "python-platform": "windows",
    "universal": True, "exclude-newer": "2020-01-01T00:00:00Z",
    "exclude-newer-package": {"one": "2020-01-01T00:00:00Z"}, "no-emit-package": ["one"], "emit-index-url": True,
    "emit-find-links": True, "emit-build-options": True, "emit-marker-expression": True,
    "emit-index-annotation": True, "annotation-style": "line", "link-mode": "copy", "compile-bytecode": True,
    "require-hashes": True, "verify-hashes": True, "no-sources": True, "no-sources-package": ["two"], "upgrade": True,
    "upgrade-package": ["one"], "reinstall": True, "reinstall-package": ["one"], "torch-backend": "cpu",
    "all-extras": True, "python": "3.2",
}  # fmt: skip


def known_to_uv(tmp_path: Path, text: str) -> set[str]:
    (tmp_path / "uv.toml").write_text(text)
    command: list[str | Path] = [uv_package.find_uv_bin(), "lock", "--directory", tmp_path]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    return set(re.findall(r"`([a-z-]+)`", said.partition("expected one of")[2]))


def test_tables_are_complete(tmp_path: Path) -> None:
    """Each setting of the installed uv is in one of the tables, and none that is gone."""
    assert known_to_uv(tmp_path, "nonsense = 1") == {*DECIDES, *MAY_DECIDE, *SAME, *ELSEWHERE}
    assert known_to_uv(tmp_path, "[pip]\nnonsense = 1") == {*PIP}


@pytest.fixture
def folder(tmp_path: Path, wheels: Path) -> Path:
    """The folder for a project; among the packages are one with a wheel and a source package, and one without a wheel."""
    for version in ("1.0", "2.0", "3.0rc1"):
        support.make_wheel(wheels, "one", version)
    for name in ("two", "three", "four", "both"):
        support.make_wheel(wheels, name)
    support.make_wheel(wheels, "needy", requires=["three"])
    support.make_wheel(wheels, "three", "2.0")
    support.make_sdist(wheels, "both")
    seen = "config_settings = (config_settings, __import__('os').environ.get('FLAVOUR'), __import__('importlib.util').util.find_spec('one') is None)"
    support.make_sdist(wheels, "source", code=seen)
    support.make_wheel(tmp_path / "elsewhere", "two", modules={"two.py": "FROM = 'elsewhere'\n"})
    (tmp_path / "app").mkdir()
    return tmp_path / "app"


def write(folder: Path, wheels: Path, settings: dict[str, Any], *, lock: bool = True) -> None:
    needs = ["ray", "one", "two", "both", "source", "needy"]
    sources = {"two": {"path": "../elsewhere/two-1.0-py3-none-any.whl"}} if "no-sources" in str([*settings]) else {}
    data = {
        "project": {
            "name": "app", "version": "1.0", "requires-python": ">=3.10", "dependencies": needs,
            "optional-dependencies": {"x": ["three"]},
        },
        "dependency-groups": {"more": ["four"]},
        "tool": {"uv": {"no-index": True, "find-links": [os.fspath(wheels)], "sources": sources, **settings}},
    }  # fmt: skip
    (folder / "pyproject.toml").write_text(tomli_w.dumps(data))
    if lock:
        (folder / "uv.lock").unlink(missing_ok=True)
        support.run_uv("lock", cwd=folder)


def same_as_uv(folder: Path, *, uv_is_told: bool = True) -> dict[str, str]:
    """Require that our environment of the project has what uv's has, and return that. Each builds with an own cache.

    What this process has of variables and of files of users is kept from uv unless `uv_is_told`.
    """
    with tempfile.TemporaryDirectory(dir=folder.parent) as place, pytest.MonkeyPatch.context() as patch:
        venv = Path(place, "venv")
        patch.setenv("UV_CACHE_DIR", f"{place}/cache-of-uv")
        with pytest.MonkeyPatch.context() as untold:
            for name in TOLD if not uv_is_told else ():
                untold.delenv(name, raising=False)
            of_uv(folder, venv, SYNC)
        wanted = contents(venv, [])
        patch.setenv("UV_CACHE_DIR", f"{place}/cache")
        with Store.open().acquire(EnvSpec.parse(folder), installed_ray(), Holder("test"), finish=False) as lease:
            assert contents(lease.entry.venv, []) == wanted
        return wanted


@pytest.fixture
def plain(folder: Path, wheels: Path, store: Store) -> dict[str, str]:
    """What an environment without any setting has."""
    write(folder, wheels, {})
    return same_as_uv(folder)


@pytest.mark.parametrize("name", DECIDES)
def test_setting_that_decides(name: str, folder: Path, wheels: Path, plain: dict[str, str]) -> None:
    """What it changes of an environment under uv it changes here."""
    write(folder, wheels, {name: DECIDES[name]})
    assert same_as_uv(folder) != plain


@pytest.mark.parametrize("name", MAY_DECIDE)
def test_setting_that_may_decide(name: str, folder: Path, wheels: Path, store: Store) -> None:
    """Whether it changes anything uv says."""
    write(folder, wheels, {name: MAY_DECIDE[name]})
    same_as_uv(folder)


@pytest.mark.parametrize("name", REFUSED)
def test_setting_that_refuses(name: str, folder: Path, wheels: Path, store: Store) -> None:
    """What uv does not install because of a setting, we do not install either."""
    value, says = REFUSED[name]
    write(folder, wheels, {})
    write(folder, wheels, {name: value}, lock=False)
    with pytest.raises(AssertionError, match=says):
        of_uv(folder, folder.parent / "venv", SYNC)
    with pytest.raises(BuildError, match=says):
        Store.open().acquire(EnvSpec.parse(folder), installed_ray(), Holder("test"))


@pytest.mark.parametrize("settings", [SAME, {"pip": PIP}], ids=["tool.uv", "tool.uv.pip"])
def test_settings_that_change_nothing(
    settings: dict[str, Any], folder: Path, wheels: Path, plain: dict[str, str]
) -> None:
    """How and from where uv gets things, and what is for other commands (as all of `uv pip`), is no part of it."""
    write(folder, wheels, settings, lock=False)
    assert same_as_uv(folder) == plain


# In a shell or in files of a user or a system: uv heeds them, we do not, so that all users have one environment.
IGNORED = [
    "UV_NO_BINARY=1", "UV_NO_BINARY_PACKAGE=both", "UV_NO_BUILD=1", "UV_NO_BUILD_PACKAGE=source", "UV_REQUIRE_HASHES=1",
    "UV_NO_DEFAULT_GROUPS=1", "UV_NO_SOURCES=1", "UV_PRERELEASE=allow", "UV_RESOLUTION=lowest",
    "UV_EXCLUDE_NEWER=2020-01-01", "UV_NO_BUILD_ISOLATION=1", "UV_TORCH_BACKEND=cpu", "UV_PYTHON=3.2",
    "UV_PROJECT_ENVIRONMENT=elsewhere", "UV_NO_INSTALL_PROJECT=1", "UV_COMPILE_BYTECODE=1", "UV_LINK_MODE=symlink",
    "UV_LOCKED=1", "UV_ISOLATED=1", "UV_CONSTRAINT=/nowhere", "UV_NO_EDITABLE=0", "UV_DEV=1", "UV_NO_SYNC=1",
    "user: no-binary-package = ['both']", "user: no-build = true", "user: config-settings = {a = 'of the user'}",
    "user: required-version = '==0.8.3'", "user: pip = {target = 'vendor'}", "user: exclude-newer = '2020-01-01T00:00:00Z'",
    "system: no-binary-package = ['both']", "system: extra-build-dependencies = {source = ['one']}",
]  # fmt: skip
TOLD = {"XDG_CONFIG_HOME", "XDG_CONFIG_DIRS", *(text.partition("=")[0] for text in IGNORED if text.startswith("UV_"))}


def tell(text: str, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Set this variable, or this setting in the uv.toml of the user or the system."""
    whose, _, setting = text.partition(": ")
    if not setting:
        patch.setenv(*text.split("=", 1))
        return
    file = folder / "uv" / "uv.toml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(setting)
    patch.setenv("XDG_CONFIG_HOME" if whose == "user" else "XDG_CONFIG_DIRS", os.fspath(folder))


@pytest.mark.parametrize("text", IGNORED)
def test_what_users_say_is_ignored(
    text: str, folder: Path, wheels: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment has what uv gives a user who says nothing."""
    write(folder, wheels, {})
    tell(text, tmp_path / "config", monkeypatch)
    same_as_uv(folder, uv_is_told=False)


@pytest.mark.parametrize("whose", ["user", "system"])
def test_index_of_users_is_heeded(
    whose: str, folder: Path, wheels: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where things come from may stand in files of the user and the system, and they come from there."""
    tell(f'{whose}: find-links = ["{wheels}"]\nno-index = true', tmp_path / "config", monkeypatch)
    write(folder, wheels, {"no-index": False, "find-links": []})
    same_as_uv(folder)


@pytest.mark.parametrize(("strategy", "version"), [("first-index", "1.0"), ("unsafe-best-match", "2.0")])
def test_index_strategy(strategy: str, version: str, folder: Path, wheels: Path, store: Store) -> None:
    """Of two indexes the lockfile has the one that the strategy chose, and so has the environment."""
    other = folder.parent / "other"
    other.mkdir()
    for name in ("one-2.0", "one-3.0rc1"):
        shutil.move(next(wheels.glob(f"{name}-*")), other)
    with index.serve(wheels) as first, index.serve(other) as second:
        indexes = [{"url": first.url}, {"url": second.url, "default": True}]
        write(folder, wheels, {"index-strategy": strategy, "index": indexes, "no-index": False, "find-links": []})
        assert any(f"/one-{version}.dist-info/" in name for name in same_as_uv(folder))
