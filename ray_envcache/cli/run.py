"""`run`: run an unmodified Ray program from the environment of its project."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from ray_envcache.build.progress import observer
from ray_envcache.cli.arguments import absolute
from ray_envcache.cluster import program
from ray_envcache.errors import CommandError, EnvCacheError, StoreError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.sessions.run_directory import RunTmpdir

USAGE_ERROR = 2
"""The exit code of a run that fails before its command starts, unless the error has a more exact one."""


@click.command(
    context_settings={"allow_interspersed_args": False},
    epilog="Example: ray-envcache run --extra gpu -- python main.py",
)
@click.option(
    "--project", metavar="PATH", help="Folder or lockfile of the project; default: the nearest project upwards."
)
@click.option("--extra", "extras", multiple=True, metavar="NAME", help="Include this extra; may be repeated.")
@click.option("--group", "groups", multiple=True, metavar="NAME", help="Include this group; may be repeated.")
@click.option("--package", metavar="NAME", help="Use this member of the workspace.")
@click.option("--python", metavar="VERSION|PATH", help="Use this Python; default: the one that uv takes.")
@click.option("--tmpdir", metavar="DIR", help="Put Ray's session directories here; the path may be long.")
@click.option("--keep-session", is_flag=True, help="Keep the session directories.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    *, project: str | None, tmpdir: str | None, keep_session: bool, command: tuple[str, ...], **options: Any
) -> None:
    """Run a Ray program from the cached environment of its project.

    The program and every cluster it starts run from there; the program needs no changes. The project's own packages are
    imported from where they are developed. At the end the session directories of its clusters are removed; after a
    failed run the logs stay.
    """
    try:
        status = _run(project, tmpdir, list(command), options, keep=keep_session)
    except EnvCacheError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code if isinstance(error, StoreError | CommandError) else USAGE_ERROR)
    sys.exit(program.end_like(status))


def _run(project: str | None, tmpdir: str | None, command: list[str], options: dict[str, Any], *, keep: bool) -> int:
    folder = Path(absolute(project)) if project else program.find_project(Path(absolute(".")))
    spec = EnvSpec.parse(
        {"path": os.fspath(folder), **options, **{name: [*options[name]] for name in ("extras", "groups")}}
    )
    with observer(sys.stderr) as shown:
        lease = program.acquire(spec, shown)
    with lease:
        environ = program.environ_for(lease, os.environ)
        found = program.find_command(command[0], environ)
        place = RunTmpdir.make(tmpdir, os.environ)
        status = 1
        try:
            held = [*lease.descriptors, *place.descriptors]
            status = program.run(found, command, {**environ, "RAY_TMPDIR": place.short}, held)
        finally:
            place.close(_say, failed=status != 0, keep=keep, lent=True)
        return status


def _say(text: str) -> None:
    # Unbuffered: Python would try at exit to write what a full disk did not take, and change our exit code.
    with suppress(OSError):
        os.write(2, f"ray-envcache: {text}\n".encode(errors="replace"))
