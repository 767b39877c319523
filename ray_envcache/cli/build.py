"""`build`: build or find an environment."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from ray_envcache.acquire import Store
from ray_envcache.build import bytecode
from ray_envcache.build.progress import observer
from ray_envcache.cli.arguments import absolute
from ray_envcache.errors import BuildError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.interpreter import installed_ray
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Holder


@click.command(epilog="Example: ray-envcache build .")
@click.argument("path", type=click.Path())
@click.option("--extra", "extras", multiple=True, metavar="NAME", help="Include this extra; may be repeated.")
@click.option("--group", "groups", multiple=True, metavar="NAME", help="Include this group; may be repeated.")
@click.option("--package", metavar="NAME", help="Use this member of the workspace.")
@click.option("--no-build", is_flag=True, help="Refuse packages without a wheel.")
@click.option("--python", metavar="VERSION|PATH", help="Use this Python.")
@click.option("--no-install-project", is_flag=True, help="Leave out the project's own packages.")
@click.option(
    "--inherit", multiple=True, metavar="NAME", help="Take this package from the base Python; may be repeated."
)
@click.option("--system-site-packages", is_flag=True, help="Show all packages of the base Python inside.")
def build(*, path: str, no_install_project: bool, **options: Any) -> None:
    """Build or find an environment, and print its interpreter.

    PATH is a project's folder, its pyproject.toml or uv.lock, a pylock.toml, a requirements file or a script. When the
    command returns the bytecode is compiled too: made for images and CI. The options are those of the field.
    """
    chosen = {name: [*value] if isinstance(value, tuple) else value for name, value in options.items()}
    value = {"path": absolute(path), "install_project": not no_install_project, **chosen}
    store = Store.open()
    with observer(sys.stderr) as shown:
        lease = store.acquire(EnvSpec.parse(value), installed_ray(), Holder("cli"), shown, finish=False)
    with lease:
        try:
            _finish(store, [entry for entry in lease.entries if not (entry.readonly or entry.compiled.exists())])
        except KeyboardInterrupt:
            # The environment is ready, and a background process compiles the rest.
            store.finish_all(lease)
            raise
        click.echo(os.fsencode(lease.python))  # as bytes: stdout may have an encoding without some of its letters


def _finish(store: Store, entries: list[Entry]) -> None:
    """Compile the bytecode now, because a step of an image's build leaves no background process.

    Raises BuildError where that fails: containers are not handed an entry without bytecode.
    """
    if entries:
        click.echo("Compiling bytecode", err=True)
    try:
        for entry in entries:
            bytecode.finish_now(store.layout, entry)
    except OSError as error:
        raise BuildError(
            f"The bytecode of {entry.path.name} could not be compiled: {error}",
            "run the same command again; what is compiled already is kept",
        ) from error
