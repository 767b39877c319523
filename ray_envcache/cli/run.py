"""What `run` does."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from ray_envcache.build.progress import observer
from ray_envcache.cluster import program
from ray_envcache.errors import CommandError, EnvCacheError, StoreError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.sessions.run_directory import RunTmpdir

USAGE_ERROR = 2
"""What ends a run before the command starts, where nothing more exact is known."""


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("--project", metavar="PATH", help="The project's folder or lockfile; else the nearest folder upwards.")
@click.option("--extra", "extras", multiple=True, metavar="NAME", help="Include this extra; may be repeated.")
@click.option("--group", "groups", multiple=True, metavar="NAME", help="Include this group; may be repeated.")
@click.option("--package", metavar="NAME", help="The member of the workspace.")
@click.option("--python", metavar="VERSION|PATH", help="Use this Python instead of the one that uv takes.")
@click.option("--tmpdir", metavar="DIR", help="Where Ray's sessions go; however long the path is.")
@click.option("--keep-session", is_flag=True, help="Leave the session directories.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def run(
    *, project: str | None, tmpdir: str | None, keep_session: bool, command: tuple[str, ...], **options: Any
) -> None:
    """Run an unmodified Ray program: ray-envcache run -- python main.py.

    The program, and every cluster it starts, run from the cached environment of the project. Its own packages are
    imported from where they are developed. After its end the session directories of its clusters are removed; of a
    failed run the logs stay.
    """
    try:
        status = _run(project, tmpdir, list(command), options, keep=keep_session)
    except EnvCacheError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code if isinstance(error, StoreError | CommandError) else USAGE_ERROR)
    sys.exit(program.end_like(status))


def _run(project: str | None, tmpdir: str | None, command: list[str], options: dict[str, Any], *, keep: bool) -> int:
    folder = Path(os.path.abspath(project)) if project else program.find_project(Path.cwd())
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
    # Not through a buffer: what a full disk does not take would be tried again at our end, and change our status.
    with suppress(OSError):
        os.write(2, f"ray-envcache: {text}\n".encode(errors="replace"))
