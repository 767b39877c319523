"""The command line. Data on stdout, talk and progress on stderr; 0 done, 1 failed, 2 usage, 3 store unusable."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

import click

from ray_envcache.errors import EnvCacheError, StoreError
from ray_envcache.field import registration
from ray_envcache.store.layout import default_root
from ray_envcache.version import __version__

_COMMANDS = {
    "build": "build.build",
    "doctor": "doctor.doctor",
    "gc": "store.gc",
    "list": "store.list_",
    "pin": "store.pin",
    "purge": "store.purge",
    "rm": "store.rm",
    "run": "run.run",
    "unpin": "store.unpin",
    "why": "store.why",
}


class _Lazy(click.Group):
    """Imports what a command needs when that command, or its line of help, is wanted: half the time of most of them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, name = _COMMANDS[cmd_name].partition(".")
        command: click.Command = getattr(import_module(f"ray_envcache.cli.{module}"), name)
        return command


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ray-envcache")
def cli() -> None:
    """Python environments for Ray, built once per host and shared by all clusters.

    The store is $RAY_ENVCACHE_DIR, else the user's cache directory (see `ray-envcache dir`).
    """


@cli.command("dir")
def dir_() -> None:
    """Print where the store is."""
    click.echo(os.fsencode(default_root()))  # whatever the encoding of stdout has


@cli.command()
def env() -> None:
    r"""Print the exports for whoever starts a node.

    As in: eval "$(ray-envcache env)"; ray start --head
    """
    # Importing the package registered it in this process already: what the caller had is behind that.
    for name, value in sorted(registration.exports(registration.without_us(os.environ)).items()):
        click.echo(f"export {name}={shlex.quote(value)}")


def main() -> None:
    """Run the command line, and turn our errors into one sentence, a hint and an exit code."""
    color = False if os.environ.get("NO_COLOR") else None  # else as click finds it: https://no-color.org
    try:
        cli(standalone_mode=False, color=color)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except EnvCacheError as error:
        _fail(error)
    except OSError as error:
        _flush_or_forget()
        _fail(_explained(error))


def _fail(error: EnvCacheError) -> NoReturn:
    click.echo(f"error: {error}", err=True)
    sys.exit(error.exit_code)


def _flush_or_forget() -> None:
    """What stdout did not take would be tried again at our end, and change the exit code."""
    try:
        if sys.stdout is not None:  # closed by whoever started us
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explained(error: OSError) -> EnvCacheError:
    """What the system says, as an error of ours: of the store, where it is about a file in there."""
    place = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    message = f"{error.strerror or error}" + (f": `{place}`" if place else "")
    with suppress(EnvCacheError):  # no store at all
        if place.startswith(f"{default_root()}/"):
            return StoreError(message, "ray-envcache doctor looks whether the store can be used")
    return EnvCacheError(message)
