"""What `build` does."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from ray_envcache.acquire import Store
from ray_envcache.build import bytecode
from ray_envcache.build.progress import observer
from ray_envcache.errors import BuildError
from ray_envcache.field.spec import EnvSpec
from ray_envcache.resolve.cluster_ray import installed_ray
from ray_envcache.store.layout import Entry
from ray_envcache.store.leases import Holder


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--extra", "extras", multiple=True, metavar="NAME", help="Include this extra; may be repeated.")
@click.option(
    "--group", "groups", multiple=True, metavar="NAME", help="Include this dependency group; may be repeated."
)
@click.option("--package", metavar="NAME", help="The member of the workspace.")
@click.option("--no-build", is_flag=True, help="Refuse packages that are not wheels.")
@click.option("--python", metavar="VERSION|PATH", help="Insist on this Python.")
@click.option("--no-install-project", is_flag=True, help="Leave out the packages that are developed here.")
@click.option("--inherit", multiple=True, metavar="NAME", help="Use this one of the base Python; may be repeated.")
@click.option("--system-site-packages", is_flag=True, help="Use all that the base Python has.")
def build(*, path: Path, no_install_project: bool, **options: Any) -> None:
    """Build or find an environment, and print its interpreter.

    PATH is the project's pyproject.toml, its folder, uv.lock, pylock.toml, a requirements file or a script. Warms the
    store of an image or a CI machine, bytecode included: nothing is left to do when it returns. The options are those
    of the field.
    """
    chosen = {name: [*value] if isinstance(value, tuple) else value for name, value in options.items()}
    value = {"path": os.path.abspath(path), "install_project": not no_install_project, **chosen}
    store = Store.open()
    with observer(sys.stderr) as shown:
        lease = store.acquire(EnvSpec.parse(value), installed_ray(), Holder("cli"), shown, finish=False)
    with lease:
        try:
            _finish(store, [entry for entry in lease.entries if not (entry.readonly or entry.compiled.exists())])
        except KeyboardInterrupt:
            # The environment itself is ready.
            store.finish_all(lease)
            raise
        click.echo(os.fsencode(lease.python))  # whatever the encoding of stdout has


def _finish(store: Store, entries: list[Entry]) -> None:
    """Have the bytecode compiled now: where this is a step of making an image, nobody goes on after us.

    Raises BuildError: an entry without it is not handed out by another run of the kernel, and so by no container.
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
