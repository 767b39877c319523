"""Where Ray's temp directories are, and what the command line says of them."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from ray_envcache.errors import TempDirError
from ray_envcache.sessions import directories
from tests import support
from tests.sessions.made import BECOME_NOBODY, NOBODY, cli, give_to_nobody, make, needs_root


def test_temp_directories_are_rays(tmp_path: Path) -> None:
    """RAY_TMPDIR, TMPDIR or /tmp with `ray` below, as Ray has it; a chosen one may be either of the two."""
    ray_tmpdir, tmpdir = tmp_path / "a", tmp_path / "b"
    for folder in (ray_tmpdir, tmpdir):
        (folder / "ray").mkdir(parents=True)
    environ = {"RAY_TMPDIR": str(ray_tmpdir), "TMPDIR": str(tmpdir)}
    assert directories.temp_dirs(None, environ) == [ray_tmpdir / "ray"]
    if sys.platform.startswith("linux"):
        assert directories.temp_dirs(None, {"TMPDIR": str(tmpdir)}) == [tmpdir / "ray"]
    assert directories.temp_dirs(None, {"RAY_TMPDIR": str(tmp_path)}) == []
    assert directories.temp_dirs(tmpdir, environ) == [tmpdir, tmpdir / "ray"]
    assert directories.temp_dirs(tmpdir / "ray", environ) == [tmpdir / "ray"]
    (tmp_path / "link").symlink_to(tmpdir / "ray")
    assert directories.temp_dirs(tmp_path / "link", environ) == [tmpdir / "ray"]
    with pytest.raises(TempDirError, match="No directory"):
        directories.temp_dirs(tmp_path / "missing", environ)


def test_a_working_directory_that_is_gone(tmp_path: Path) -> None:
    """A relative temp directory for clusters is an error that names it; an absolute one will do."""
    code = """
    import os, sys, tempfile
    from ray_envcache import short_tmpdir
    from ray_envcache.errors import TempDirError
    from ray_envcache.sessions.run_directory import RunTmpdir
    gone = tempfile.mkdtemp()
    os.chdir(gone)
    os.rmdir(gone)
    for use in (short_tmpdir, lambda path: RunTmpdir.make(path, {})):
        use(sys.argv[1])
        try:
            use(".")
        except TempDirError as error:
            print(error.message)
    """
    with support.short_folder() as folder:
        said = support.run_python(code, str(folder))
    assert said == 2 * "Cannot use the temp directory `.`: No such file or directory\n"


CLI_AS_NOBODY = """
import _strptime, contextlib, io, os, sys
from ray_envcache.cli import main
from ray_envcache.sessions import run_directory, short_path
given = sys.argv[1:]
def call(*arguments):
    sys.argv = ["ray-envcache", *arguments]
    try:
        main.main()
        return 0
    except SystemExit as end:
        return end.code or 0
# Once as root, and unheard, for all that is imported late: the other user may not read where it lies.
with contextlib.redirect_stdout(io.StringIO()):
    call("gc", "--sessions", "--json", "--tmpdir", "/proc/self")
BECOME_NOBODY
sys.stderr = sys.stdout
print(call(*given))
""".replace("BECOME_NOBODY", BECOME_NOBODY)


def cli_as_nobody(*arguments: str | Path, **environ: str) -> list[str]:
    """What the command line says to another user; the last line is its status."""
    return support.run_python(CLI_AS_NOBODY, *map(str, arguments), environ=environ).splitlines()


@needs_root
@pytest.mark.parametrize(("outer", "inner"), [(0o700, None), (0o755, 0o700), (0o700, 0o700), (0o755, 0o755)])
def test_directories_of_other_users_runs(temp: Path, outer: int, inner: int | None) -> None:
    """What other users called like a run is skipped, whatever its modes; one's own are looked into."""
    foreign, own = (temp.parent / f"{directories.RUN_PREFIX}{name}" for name in ("aaaaaaaa", "bbbbbbbb"))
    for folder in (foreign, own):
        (folder / "ray").mkdir(parents=True)
    session = make(own / "ray")
    for path in (own, own / "ray"):
        os.chown(path, NOBODY, NOBODY)
    give_to_nobody(session)
    if inner is None:
        (foreign / "ray").rmdir()
    else:
        make(foreign / "ray", 2)
        (foreign / "ray").chmod(inner)
    foreign.chmod(outer)
    for arguments in (("--tmpdir", temp.parent), ()):
        said = cli_as_nobody("gc", "--sessions", "--json", *arguments, RAY_TMPDIR=str(temp.parent))
        assert said[-1] == "0", said
        report = json.loads("\n".join(said[:-1]))
        assert str(own / "ray") in report["temp_dirs"]
        assert str(foreign / "ray") not in report["temp_dirs"]
    assert not session.exists()


@needs_root
def test_a_temp_directory_that_may_not_be_looked_into(temp: Path) -> None:
    """The one that was chosen, or Ray's in it, is an error that names it."""
    for forbidden, arguments in (
        (temp.parent, ("--tmpdir", temp.parent)),
        (temp, ("--tmpdir", temp.parent)),
        (temp, ()),
    ):
        mode = forbidden.stat().st_mode
        forbidden.chmod(0o700)
        said = cli_as_nobody("gc", "--sessions", "-n", *arguments, RAY_TMPDIR=str(temp.parent))
        assert said == [f"error: Permission denied: `{forbidden}`", "1"]
        forbidden.chmod(mode)


@needs_root
def test_links_that_may_not_be_looked_at_stay(temp: Path) -> None:
    """Where Ray's directory is closed to this user, nothing is removed, and that is no error."""
    temp.chmod(0o700)
    code = """
    import os, sys
    from pathlib import Path
    from ray_envcache.sessions import directories
    BECOME_NOBODY
    directories.remove_dangling_latest(Path(sys.argv[1]))
    """
    support.run_python(code.replace("BECOME_NOBODY", BECOME_NOBODY), str(temp))


def test_json_has_the_schema(temp: Path) -> None:
    """Exactly the documented fields, bytes as integers, UTC times; of a dead one, a kept one and one in doubt."""
    make(temp, 1, age=-500)
    make(temp, 2)
    make(temp, 3, age=10 * 86_400)
    command: list[str | Path] = ["gc", "--sessions", "--older-than", "1d", "--json", "--tmpdir", temp]
    for flags in (["-n"], []):
        report = json.loads(cli(*command, *flags).stdout)
        assert set(report) == {
            "schema_version", "dry_run", "temp_dirs", "removed", "kept", "alive", "in_doubt", "failed", "freed_bytes",
        }  # fmt: skip
        assert (report["schema_version"], report["temp_dirs"]) == (1, [str(temp)])
        assert [len(report[name]) for name in ("removed", "kept", "alive", "in_doubt")] == [1, 1, 0, 1]
        assert (report["dry_run"], report["failed"]) == (bool(flags), [])
        assert report["freed_bytes"] == report["removed"][0]["reclaimable_bytes"]
        for one in (*report["removed"], *report["kept"], *report["in_doubt"]):
            assert set(one) == {
                "name", "path", "state", "why", "size_bytes", "reclaimable_bytes", "exact", "started_at",
                "last_written_at", "user",
            }  # fmt: skip
            assert isinstance(one["size_bytes"], int)
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", one["last_written_at"])
    assert "Removed 0 sessions, freed 0 B; 0 alive, 1 in doubt, 1 dead but younger, 0 failed" in (
        cli(*[part for part in command if part != "--json"]).stdout
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["gc", "--older-than", "1d"],
        ["gc", "--tmpdir", "/tmp"],
        ["gc", "--sessions", "--all"],
        ["gc", "--sessions", "--unused-for", "1d"],
        ["gc", "--sessions", "--older-than", "soon"],
        ["gc", "--sessions", "--tmpdir", "/nowhere"],
        ["gc", "--sessions", "--tmpdir", "/etc/passwd"],
    ],
)
def test_usage_errors(arguments: list[str]) -> None:
    """Options that do not go together, and directories that are none, are errors of usage."""
    done = cli(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "rror: " in done.stderr


def test_no_temp_directory_is_no_error(tmp_path: Path) -> None:
    """Where no cluster has ever run there is nothing to do; the store is not asked for."""
    done = cli("gc", "--sessions", RAY_TMPDIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Removed 0 sessions, freed 0 B")
